"""Runs whose stages are a few lines that read what the real ones read and make files out of it, by the real `do_stage`.

What a run comes to is a function of its configuration: whatever is removed from the store in between.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spinreg_core.config import RunConfig
from spinreg_core.config.resolve import validate
from spinreg_core.maintenance.repair import stages_to_make
from spinreg_core.runs import fetch, objects
from spinreg_core.runs.head import ROUND_STAGES, complete_round, read_head, stage_object
from spinreg_core.runs.job import Job
from spinreg_core.runs.lease import hold_lease
from spinreg_core.runs.plans import average_key
from spinreg_core.store.base import Store
from tasks.context import Context, current_context, use_context
from tasks.prepare import prepare
from tasks.run_stage import do_stage


class Interrupted(Exception):
    """A stage was killed."""


def config(run: str, **groups: Any) -> RunConfig:
    quiet = {"resources": {"lease_seconds": 600}, "generation": {"engine": "hf"}}
    return validate({"run": run} | quiet | groups)


def advance(store: Store, config: RunConfig, until: int, *, killed_at: tuple[int, str] | None = None) -> None:
    """As the flow `spin` does. `killed_at`: the stage in whose middle the run ends, with Interrupted."""

    def check() -> None:
        pass

    _killed.clear()
    with hold_lease(store, config, "test") as session:
        with use_context(Context(config, store, session, check)):
            for number, stage in stages_to_make(store, session, config):
                prepare.fn(config.run) if stage == "prepare" else do_stage(stage, number)
        session.begin_advance(f"to {until}", None, until)
        with use_context(Context(config, store, session, check)):
            prepare.fn(config.run)
            for number in range(until + 1):
                for stage in ("evaluate",) if number == 0 else ROUND_STAGES:
                    if (number, stage) == killed_at:
                        _killed.append(stage)
                    do_stage(stage, number)
        session.finish_advance()


_killed: list[str] = []


def toy(job: Job, *_name: object) -> dict[str, Any]:
    """In place of a stage's process."""
    store = current_context().store
    if job.stage == "prepare":
        base = _publish(store, job, "base", {"model": job.config.model}, {"policy/weights": b"the base"})
        rows = {"train.parquet": b"rows", "heldout.parquet": b"other rows"}
        return {
            "base": base,
            "data": _publish(store, job, "data", {"dataset": job.config.dataset}, rows),
            "summary": {},
        }
    {"generate": _generate, "mix-opponent": _mix, "train": _train, "evaluate": _evaluate}[job.stage](store, job)
    return {}


def _generate(store: Store, job: Job) -> None:
    read = [fetch.fetch_file(store, job.inputs["data"], "train.parquet").read_bytes()]
    read += [_policy(store, policy) for policy in job.inputs["policies"].values()]
    names = ["shard-00000", "shard-00001"]
    committed = objects.usable_parts(store, job.object_id)
    for number, name in enumerate(names):
        if name not in committed:
            answers = _made(job.key | {"shard": number}, read)
            folder = _folder(job, {f"shards/{number:05d}.parquet": answers})
            objects.commit_part(store, job, name, objects.upload(store, job, folder), {"drawn": answers.decode()})
        _perhaps_killed(store, job)
    objects.publish(store, job, _folder(job, {}), metrics={}, parts=names)


def _mix(store: Store, job: Job) -> None:
    read = [_policy(store, job.inputs["previous"]), _policy(store, job.inputs["base"])]
    for generations in (job.inputs["generations"], *(e["generations"] for e in job.inputs["earlier"])):
        read += [path.read_bytes() for path in fetch.fetch_files(store, generations, "shards").values()]
    for pairs in (*(e["pairs"] for e in job.inputs["earlier"]), *job.extra["scored"]):
        fetch.fetch_file(store, pairs, "pairs.parquet").read_bytes()  # known scores: they change nothing
    _perhaps_killed(store, job)
    files = {"pairs.parquet": _made(job.key, read), "summary.json": b"{}"}
    objects.publish(store, job, _folder(job, files), metrics={})


def _train(store: Store, job: Job) -> None:
    read = [fetch.fetch_file(store, job.inputs["pairs"], "pairs.parquet").read_bytes()]
    read.append(_policy(store, job.inputs["previous"]))
    policy = _made(job.key, read)
    folder = _folder(job, {"step-000001/state": b"half of it"})
    objects.commit_part(store, job, "step-000001", objects.upload(store, job, folder), {})
    _perhaps_killed(store, job)
    if job.config.training.average is not None:
        before, base = job.inputs["before"], job.inputs["base"]
        key = average_key(job.config.training, job.object_id, before, base)
        mean = _made(key, [policy, _policy(store, before), _policy(store, base)])
        if objects.read_manifest(store, objects.fingerprint("average", key)) is None:
            _publish(store, job, "average", key, {"policy/weights": mean}, inputs=key)
    files = {"policy/weights": policy, "metrics.jsonl": b"{}\n", "summary.json": b"{}"}
    objects.publish(store, job, _folder(job, files), metrics={})  # and is killed before it removes its checkpoint


def _evaluate(store: Store, job: Job) -> None:
    part = job.extra["generate"]
    generate = Job("generate", part["object_id"], part["key"], job.store, job.writer, job.round, part["inputs"],
                   job.config, job.workdir / "generate", part["extra"])  # fmt: skip
    if objects.read_manifest(store, generate.object_id) is None:
        _generate(store, generate)
    _perhaps_killed(store, job)
    samples = fetch.fetch_files(store, generate.object_id, "shards").values()
    read = [path.read_bytes() for path in samples]
    read += [_policy(store, policy) for name in ("policy", "base", "previous") if (policy := job.inputs[name])]
    for name in ("evaluate_base", "evaluate_previous"):
        if job.inputs[name]:
            read.append(fetch.fetch_file(store, job.inputs[name], "rows.parquet").read_bytes())
    files = {"rows.parquet": _made(job.key, read), "metrics.json": b"{}"}
    objects.publish(store, job, _folder(job, files), metrics={})


def _policy(store: Store, object_id: str) -> bytes:
    return (fetch.fetch_folder(store, object_id, "policy") / "weights").read_bytes()


def _made(key: dict[str, Any], read: list[bytes]) -> bytes:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode())
    for content in read:
        digest.update(content)
    return digest.hexdigest().encode()


def _folder(job: Job, files: dict[str, bytes]) -> Path:
    folder = job.workdir / random.randbytes(4).hex()
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def _publish(
    store: Store,
    job: Job,
    stage: str,
    key: dict[str, Any],
    files: dict[str, bytes],
    inputs: dict[str, Any] | None = None,
) -> str:
    made = Job(stage, objects.fingerprint(stage, key), key, job.store, job.writer, job.round, inputs or {}, job.config,
               job.workdir)  # fmt: skip
    if objects.read_manifest(store, made.object_id) is None:
        objects.publish(store, made, _folder(made, files), metrics={})
    return made.object_id


def _perhaps_killed(store: Store, job: Job) -> None:
    if _killed and job.stage == _killed[0]:
        _killed.clear()
        objects.upload(store, job, _folder(job, {"torn": b"what nobody will name"}))
        raise Interrupted


def outcome(store: Store, run: str) -> dict[str, str]:
    """SHA-256 of every policy and evaluation of a run, as its manifests have them."""
    head = read_head(store, run)
    assert head is not None
    found: dict[str, str] = {}
    for number in range(complete_round(head) + 1):
        for stage, name in (("train", "policy/weights"), ("evaluate", "rows.parquet")):
            object_id = stage_object(head, number, stage)
            if object_id is not None:
                record = objects.require_manifest(store, object_id)
                (found[f"{name} {number}"],) = (e["sha256"] for e in record["files"] if e["name"] == name)
    return found


def content(store: Store) -> dict[str, bytes | None]:
    return {key: store.read(key) for prefix in ("objects/", "runs/") for key in store.list(prefix)}


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Stages are toys, and nothing waits for a disk, or for lists of installed packages."""
    monkeypatch.setenv("SPINREG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tasks.run_stage.watched_stage", toy)
    monkeypatch.setattr("tasks.prepare.watched_stage", toy)
    monkeypatch.setattr("os.fsync", lambda _: None)
    monkeypatch.setattr("spinreg_core.runs.objects.versions", dict)
    _killed.clear()
    return toy
