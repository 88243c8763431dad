"""Runs with toy stages: a few lines read what the real stages read and make files of it, under the library's own loop.

What a run comes to is a function of its configuration, whatever is removed from the store in between.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import sys
import time
import types
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from spinreg_core.config import RunConfig
from spinreg_core.config.resolve import validate
from spinreg_core.maintenance import repair
from spinreg_core.runs import fetch, objects
from spinreg_core.runs.head import read_head
from spinreg_core.runs.job import Job
from spinreg_core.runs.lease import hold_lease
from spinreg_core.runs.loop import do_prepare, do_stage, run_stages
from spinreg_core.runs.plans import average_key
from spinreg_core.runs.stages import STAGES, complete_round
from spinreg_core.store.base import Store
from spinreg_core.store.folder import FolderStore

Make = Callable[[dict[str, Any], list[bytes]], bytes]


class Interrupted(Exception):
    """A stage was killed."""


def config(run: str, **groups: Any) -> RunConfig:
    quiet = {"resources": {"lease_seconds": 600}, "generation": {"engine": "hf"}}
    return validate({"run": run} | quiet | groups)


def digest_of(key: dict[str, Any], read: list[bytes]) -> bytes:
    """The content of a file that a stage makes: a digest of its key and of all it reads."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode())
    for content in read:
        digest.update(content)
    return digest.hexdigest().encode()


def advance(
    store: Store, config: RunConfig, until: int, *, killed_at: tuple[int, str] | None = None, make: Make = digest_of
) -> None:
    """Advance a run as the flow `spin` does. `killed_at`: the stage in whose middle the run ends, with Interrupted."""
    with hold_lease(store, config, "test") as session:

        def call(stage: str) -> Callable[[int], object]:
            def do(number: int) -> object:
                toy = ToyStages(store, make, killed=(number, stage) == killed_at)
                return do_stage(store, session, config, stage, number, toy)

            return do

        def prepare() -> None:
            do_prepare(store, session, config, ToyStages(store, make))

        calls = {stage: call(stage) for stage in STAGES}
        repair.finish(store, session, config, prepare, calls, print)
        session.begin_advance(f"to {until}", None, until)
        prepare()
        for number in range(until + 1):
            run_stages(number, calls)
        session.finish_advance()


class ToyStages:
    """Stand in for the processes of stages. `killed`: the process ends in its middle."""

    def __init__(self, store: Store, make: Make, *, killed: bool = False) -> None:
        self.store, self.make, self.killed = store, make, killed

    def __call__(self, job: Job, name: str) -> dict[str, Any]:
        made: dict[str, Any] | None = getattr(self, job.stage.replace("-", "_"))(job)
        return made or {}

    def prepare(self, job: Job) -> dict[str, Any]:
        base = self._publish(job, "base", {"model": job.config.model}, {"policy/weights": b"the base"})
        rows = {"train.parquet": b"rows", "heldout.parquet": b"other rows"}
        return {"base": base, "data": self._publish(job, "data", {"dataset": job.config.dataset}, rows)}

    def generate(self, job: Job) -> None:
        read = [fetch.fetch_file(self.store, job.inputs["data"], "train.parquet").read_bytes()]
        read += [self._policy(policy) for policy in job.inputs["policies"].values()]
        names = ["shard-00000", "shard-00001"]
        committed = objects.usable_parts(self.store, job.object_id)
        for number, name in enumerate(names):
            if name not in committed:
                answers = self.make(job.key | {"shard": number}, read)
                files = objects.upload(self.store, job, _folder(job, {f"shards/{number:05d}.parquet": answers}))
                objects.commit_part(self.store, job, name, files, {"drawn": answers.decode()})
            self._die_if_killed(job)
        objects.publish(self.store, job, _folder(job, {}), metrics={}, parts=names)

    def mix_opponent(self, job: Job) -> None:
        read = [self._policy(job.inputs["previous"]), self._policy(job.inputs["base"])]
        for generations in (job.inputs["generations"], *(e["generations"] for e in job.inputs["earlier"])):
            read += [path.read_bytes() for path in fetch.fetch_files(self.store, generations, "shards").values()]
        # Known scores are read too, and change nothing.
        for pairs in (*(e["pairs"] for e in job.inputs["earlier"]), *job.extra["scored"]):
            fetch.fetch_file(self.store, pairs, "pairs.parquet").read_bytes()
        self._die_if_killed(job)
        files = {"pairs.parquet": self.make(job.key, read), "summary.json": b"{}"}
        objects.publish(self.store, job, _folder(job, files), metrics={})

    def train(self, job: Job) -> None:
        read = [fetch.fetch_file(self.store, job.inputs["pairs"], "pairs.parquet").read_bytes()]
        read.append(self._policy(job.inputs["previous"]))
        policy = self.make(job.key, read)
        checkpoint = objects.upload(self.store, job, _folder(job, {"step-000001/state": b"half of it"}))
        objects.commit_part(self.store, job, "step-000001", checkpoint, {})
        self._die_if_killed(job)
        if job.config.training.average is not None:
            before, base = job.inputs["before"], job.inputs["base"]
            key = average_key(job.config.training, job.object_id, before, base)
            mean = self.make(key, [policy, self._policy(before), self._policy(base)])
            self._publish(job, "average", key, {"policy/weights": mean}, inputs=key)
        files = {"policy/weights": policy, "metrics.jsonl": b"{}\n", "summary.json": b"{}"}
        # Its checkpoint stays, as after a kill right here.
        objects.publish(self.store, job, _folder(job, files), metrics={})

    def evaluate(self, job: Job) -> None:
        self._die_if_killed(job)
        samples = fetch.fetch_files(self.store, job.inputs["heldout"], "shards").values()
        read = [path.read_bytes() for path in samples]
        read += [self._policy(policy) for name in ("policy", "base", "previous") if (policy := job.inputs[name])]
        for name in ("evaluate_base", "evaluate_previous"):
            if job.inputs[name]:
                read.append(fetch.fetch_file(self.store, job.inputs[name], "rows.parquet").read_bytes())
        files = {"rows.parquet": self.make(job.key, read), "metrics.json": b"{}"}
        objects.publish(self.store, job, _folder(job, files), metrics={})

    def _policy(self, object_id: str) -> bytes:
        return (fetch.fetch_folder(self.store, object_id, "policy") / "weights").read_bytes()

    def _publish(
        self, job: Job, stage: str, key: dict[str, Any], files: dict[str, bytes], inputs: dict[str, Any] | None = None
    ) -> str:
        made = Job(stage, objects.fingerprint(stage, key), key, job.store, job.writer, job.round, inputs or {},
                   job.config, job.workdir)  # fmt: skip
        if objects.read_manifest(self.store, made.object_id) is None:
            objects.publish(self.store, made, _folder(made, files), metrics={})
        return made.object_id

    def _die_if_killed(self, job: Job) -> None:
        if self.killed:
            objects.upload(self.store, job, _folder(job, {"torn": b"no manifest will name it"}))
            raise Interrupted


def _folder(job: Job, files: dict[str, bytes]) -> Path:
    folder = job.workdir / random.randbytes(4).hex()
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def outcome(store: Store, run: str) -> dict[str, str]:
    """SHA-256 of every policy and evaluation of a run, as its manifests have them."""
    head = read_head(store, run)
    assert head is not None
    found: dict[str, str] = {}
    for number in range(complete_round(head) + 1):
        for stage, name in (("train", "policy/weights"), ("evaluate", "rows.parquet")):
            object_id = head.stage(number, stage)
            if object_id is not None:
                file = objects.require_manifest(store, object_id).file(name)
                assert file is not None
                found[f"{name} {number}"] = file.sha256
    return found


def content(store: Store) -> dict[str, bytes | None]:
    return {key: store.read(key) for prefix in ("objects/", "runs/") for key in store.list(prefix)}


def make_old(root: Path, days: float = 8) -> None:
    """Set the times of all files below a folder back, beyond the grace period of `spinreg gc`."""
    for path in root.rglob("*"):
        then = time.time() - days * 86400
        os.utime(path, (then, then))


def install_engine(monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    """Make this machine one where `engine: auto` stands for `engine`."""
    vllm = types.ModuleType("vllm")
    vllm.__spec__ = ModuleSpec("vllm", None)
    monkeypatch.setitem(sys.modules, "vllm", vllm if engine == "vllm" else None)


def littered(store: FolderStore) -> None:
    """Two runs that share, rules, a run that is gone, a stage that was killed, a write that was."""
    advance(store, config("a", keep={"policies": 1, "generations": "needed"}, opponent={"history": 1}), 2)
    advance(store, config("b", opponent={"history": 1}), 1)
    with pytest.raises(Interrupted):
        advance(store, config("c", seed=5), 1, killed_at=(1, "generate"))
    with pytest.raises(Interrupted):
        advance(store, config("d", seed=6), 1, killed_at=(1, "generate"))
    shutil.rmtree(store.root / "runs" / "c")
    (store.root / "objects" / ".tmp-x").write_bytes(b"half")
    make_old(store.root)


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait neither for a disk nor for lists of installed packages."""
    monkeypatch.setenv("SPINREG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("os.fsync", lambda _: None)
    monkeypatch.setattr("spinreg_core.runs.objects.versions", dict)
