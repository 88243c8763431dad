"""Freeze stores of this version for tests/data, so that tests can make later versions read and continue them.

    python scripts/freeze_store.py 0.1.0 tests/data

Writes `store-VERSION.tar.gz` (two finished runs of two rounds), `interrupted-VERSION.tar.gz` (the same configuration,
killed in the middle of `generate` and of `train`) and `ids-VERSION.json` (object ids and manifest sums, by stage).
The pages of reports are left out, because they are views and most of their bytes are plotly's.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "deployments/configs/smoke.yaml"
OTHER = ["--run", "smoke-spin", "-p", "objective.alpha=1"]  # shares round 1 with the first run


def start(store: Path, cache: Path, *arguments: str) -> subprocess.Popen[bytes]:
    env = os.environ | {"SPINREG_CACHE": str(cache), "PREFECT_HOME": str(cache / "prefect"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "flows.spin", "--config", CONFIG, "--store", str(store), *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, start_new_session=True)


def finish(store: Path, cache: Path, *arguments: str) -> None:
    if status := start(store, cache, *arguments).wait():
        raise SystemExit(f"the run failed with exit status {status}")


def kill_when(reached: Callable[[], bool], store: Path, cache: Path) -> None:
    """Start the run, and kill its flow process when `reached` is true."""
    process = start(store, cache)
    while not reached():
        if process.poll() is not None:
            raise SystemExit("the run ended before it could be killed; try again")
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)  # the stage processes die with their parent
    process.wait()
    time.sleep(3)


def unfinished(store: Path, stage: str, pattern: str) -> list[Path]:
    """Return the committed parts of objects of a stage that have no manifest yet."""
    found = store.glob(f"objects/{stage}-*/parts/{pattern}.json")
    return [path for path in found if not (path.parents[1] / "manifest.json").exists()]


def train_parts(store: Path) -> bool:
    rounds = (
        json.loads((store / "runs/smoke/head.json").read_text())["rounds"]
        if (store / "runs/smoke/head.json").exists()
        else []
    )
    return len(rounds) == 3 and bool(unfinished(store, "train", "*"))


def generate_parts(store: Path) -> bool:
    done = {json.loads(path.read_text()).get("object_id") for path in store.glob("objects/evaluate-*/manifest.json")}
    return bool(done) and bool(unfinished(store, "generate", "shard-*"))


def pack(folder: Path, archive: Path) -> None:
    with tarfile.open(archive, "w:gz", compresslevel=9) as tar:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.name != "report.html":
                tar.add(path, path.relative_to(folder).as_posix())


def ids(store: Path) -> dict[str, Any]:
    """Return object id and manifest sum of every stage, by run and `round/stage`."""
    found: dict[str, Any] = {}
    for path in sorted(store.glob("runs/*/head.json")):
        head = json.loads(path.read_text())
        stages = {"base": head["base"], "data": head["data"]}
        stages |= {f"{e['round']}/{stage}": one for e in head["rounds"] for stage, one in e["stages"].items()}
        manifests = {
            name: json.loads((store / f"objects/{one}/manifest.json").read_text()) for name, one in stages.items()
        }
        found[head["run"]] = {name: {"object_id": m["object_id"], "sum": m["sum"]} for name, m in manifests.items()}
    objects = sorted(path.name for path in store.glob("objects/*"))
    return {"runs": found, "objects": objects}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("version")
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        tmp = Path(name)
        finished, cache = tmp / "finished", tmp / "cache"
        finish(finished, cache)
        finish(finished, cache, *OTHER)
        pack(finished, given.folder / f"store-{given.version}.tar.gz")
        (given.folder / f"ids-{given.version}.json").write_text(json.dumps(ids(finished), indent=1) + "\n")
        for stage, reached in (("generate", generate_parts), ("train", train_parts)):
            store = tmp / "interrupted" / stage
            kill_when(lambda store=store, reached=reached: reached(store), store, cache)
        pack(tmp / "interrupted", given.folder / f"interrupted-{given.version}.tar.gz")


if __name__ == "__main__":
    main()
