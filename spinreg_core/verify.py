"""Is what a run is made of still what was committed? Every byte is read, and what is damaged can be made again.

Decides: which objects a run is made of, what counts as damage, which stages were made from a damaged object, and what
is set aside so that running the run again makes exactly that anew.
Leaves out: making it (the flow `spin`, as any missing stage), single reads, which are checked anyway (`objects.py`).

No file is changed or removed: a damaged object's manifest goes to `aside/`, and the stage that finds no manifest works
again, with files of its own. Shards that are sound stay. What comes out may differ where an engine does not repeat
itself; then what was made from the old one is made anew as well (`flows/repair.py`).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spinreg_core.errors import BadInput, Damaged
from spinreg_core.head import Session, require_config, require_head
from spinreg_core.objects import (
    manifest_key,
    part_names,
    read_manifest,
    read_part,
    read_record,
    removed_keys,
    sha256_file,
    why_removed,
)
from spinreg_core.rounds import ids_in, objects_of
from spinreg_core.store import Store

Stage = tuple[int, str]  # (round, stage)


@dataclass(frozen=True)
class Problem:
    """Something that is not as it was committed. `file`: its key in the store."""

    object_id: str
    file: str
    found: str
    expected: str


@dataclass
class Verdict:
    """`objects`: every object of the run and the stage that makes it ((0, "prepare") for base and data).
    `dependents`: of each damaged object, the committed stages that were made from it. `files`: SHA-256 by object and
    name of what later stages read, as the manifests say; of shards that of the answers alone. `removed`: objects that
    `spinreg gc` has taken files from, and why; these files are not looked for."""

    run: str
    objects: dict[str, Stage] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    dependents: dict[str, list[Stage]] = field(default_factory=dict)
    files: dict[str, dict[str, str]] = field(default_factory=dict)
    removed: dict[str, str] = field(default_factory=dict)
    checked: int = 0
    bytes: int = 0

    @property
    def damaged(self) -> list[str]:
        return sorted({problem.object_id for problem in self.problems})


def verify(store: Store, run: str, *, say: Callable[[str], None] = lambda line: None) -> Verdict:
    """Read every file of a run and compare it with its manifest. Raises BadInput where there is no such run, Damaged
    where the run's own head or configuration cannot be read."""
    head = require_head(store, run)
    verdict = Verdict(run, objects_of(require_config(store, run), head))
    inputs: dict[str, set[str]] = {}
    for object_id in verdict.objects:
        before, checked, start = len(verdict.problems), verdict.checked, time.monotonic()
        try:
            manifest = read_record(store, object_id)
        except (Damaged, BadInput) as error:
            verdict.problems.append(Problem(object_id, manifest_key(object_id), str(error), "a manifest"))
            continue
        if manifest is None:
            verdict.problems.append(Problem(object_id, manifest_key(object_id), "nothing", "a manifest"))
            continue
        inputs[object_id] = set(ids_in(manifest["inputs"]))
        verdict.files[object_id] = _content(store, manifest)
        removed = removed_keys(manifest)
        if removed:
            verdict.removed[object_id] = why_removed(manifest)
        for entry in manifest["files"]:
            if entry["key"] in removed:
                continue
            verdict.problems += _check(store, object_id, entry)
            verdict.checked += 1
            verdict.bytes += entry["size"]
        state = "ok" if len(verdict.problems) == before else "DAMAGED"
        if removed:
            state += f", {why_removed(manifest)}"
        say(f"{object_id}: {verdict.checked - checked} files, {state} ({time.monotonic() - start:.1f} s)")
    for damaged in verdict.damaged:
        verdict.dependents[damaged] = [
            stage for object_id, stage in verdict.objects.items()
            if object_id != damaged and damaged in _closure(object_id, inputs)
        ]  # fmt: skip
    return verdict


def set_aside(
    store: Store, session: Session, verdict: Verdict, objects: Sequence[str], *, with_parts: bool = False
) -> list[Stage]:
    """Make these objects of a run missing, so that it makes them anew; returns the stages that will work.

    Shards of theirs that are sound stay committed, unless `with_parts` says that they were made from something else. An
    object that another stage makes on its way (samples of an evaluation, an average) takes that stage with it.
    """
    stages = {verdict.objects[object_id] for object_id in objects}
    bad = {problem.file for problem in verdict.problems}
    # By the stage's own object too: it is what is looked for first. Base, data and benchmarks are each by itself.
    single = ("prepare", "benchmark")
    ids = set(objects) | {o for o, stage in verdict.objects.items() if stage in stages and stage[1] not in single}
    for object_id in sorted(ids):
        key = manifest_key(object_id)
        found = store.read(key)
        if found is not None:
            store.create(f"objects/{object_id}/aside/{time.time_ns()}-manifest.json", found)
            store.delete(key)
        for name in part_names(store, object_id):
            try:
                part = read_part(store, object_id, name)
                sound = part is None or not bad & {entry["key"] for entry in part["files"]}
            except (Damaged, BadInput):
                sound = False
            if with_parts or not sound:
                store.delete(f"objects/{object_id}/parts/{name}.json")

    def forget(head: dict[str, Any]) -> None:
        for entry in head["rounds"]:
            for stage in list(entry["stages"]):
                if (entry["round"], stage) in stages:
                    del entry["stages"][stage]
            for name, object_id in list(entry.get("measured", {}).items()):
                if object_id in ids:
                    del entry["measured"][name]

    session.update(forget)
    return sorted(stages)


def changed(store: Store, verdict: Verdict, objects: Sequence[str]) -> list[str]:
    """Of objects that were made anew, those whose files are not what they had been, or had been nobody knows."""
    found = []
    for object_id in objects:
        manifest = read_manifest(store, object_id)
        now = _content(store, manifest) if manifest else None
        if now != verdict.files.get(object_id):
            found.append(object_id)
    return found


def described(verdict: Verdict) -> str:
    """A text for people."""
    removed = [f"  {object_id}: {why}" for object_id, why in verdict.removed.items()]
    if not verdict.problems:
        return "\n".join([f"{verdict.run}: {verdict.checked} files of {len(verdict.objects)} objects, "
                          f"{verdict.bytes / 1e6:.1f} MB: all as committed", *removed])  # fmt: skip
    lines = [f"{verdict.run}: {len(verdict.problems)} problems in {len(verdict.damaged)} of "
             f"{len(verdict.objects)} objects"]  # fmt: skip
    for problem in verdict.problems:
        lines.append(f"  {problem.file}: found {problem.found}; expected {problem.expected}")
    for object_id in verdict.damaged:
        number, stage = verdict.objects[object_id]
        after = ", ".join(f"{name} of round {n}" for n, name in verdict.dependents.get(object_id, ())) or "nothing"
        lines.append(f"  {object_id} is {stage} of round {number}; made from it: {after}")
    return "\n".join(lines + removed)


def _content(store: Store, manifest: dict[str, Any]) -> dict[str, str]:
    """What later stages read of an object; the rest (step metrics, say) holds times."""
    read = ("policy/", "adapter/", "shards/", "pairs.parquet", "rows.parquet", "train.parquet", "heldout.parquet")
    found = {entry["name"]: entry["sha256"] for entry in manifest["files"] if entry["name"].startswith(read)}
    for name in part_names(store, manifest["object_id"]):
        try:
            part = read_part(store, manifest["object_id"], name)
        except (Damaged, BadInput):
            continue
        if part is not None and "drawn" in part["meta"]:
            found |= {entry["name"]: part["meta"]["drawn"] for entry in part["files"]}
    return found


def _check(store: Store, object_id: str, entry: dict[str, Any]) -> Iterator[Problem]:
    size, key = store.size(entry["key"]), entry["key"]
    if size != entry["size"]:
        found = "no file" if size is None else f"{size} bytes"
        yield Problem(object_id, key, found, f"{entry['size']} bytes")
        return
    local = store.local_path(key)
    if local is not None:
        sha256 = sha256_file(local)
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "file"
            store.download(key, path)  # not by way of the cache, which has a copy of its own
            sha256 = sha256_file(path)
    if sha256 != entry["sha256"]:
        yield Problem(object_id, key, f"SHA-256 {sha256}", entry["sha256"])


def _closure(object_id: str, inputs: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    todo = [object_id]
    while todo:
        for one in inputs.get(todo.pop(), ()):
            if one not in found:
                found.add(one)
                todo.append(one)
    return found
