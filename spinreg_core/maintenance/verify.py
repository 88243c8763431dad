"""Check every file of a run against its manifest, without changing anything.

Decides: the objects of a run, what counts as damage, and the stages that were made from a damaged object.
Leaves out: repair (`repair.py`), the checks of single reads (`spinreg_core.runs`).

Parts (shards, checkpoints) of open stages are read too, because a stage continues from them.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from spinreg_core.errors import BadInput, Damaged, StoreRefused
from spinreg_core.runs.head import require_config, require_head
from spinreg_core.runs.manifest import File, Manifest, Part
from spinreg_core.runs.objects import manifest_key, part_key, part_names
from spinreg_core.runs.plans import ids_in
from spinreg_core.runs.stages import objects_now_and_next, objects_of
from spinreg_core.store import documents
from spinreg_core.store.base import NO_RIGHT, Store
from spinreg_core.store.hashing import sha256_file

# (round, stage)
StageId = tuple[int, str]
# The tag of every manifest and part at the time it was judged, and the keys of the files it lists (None: unreadable).
Documents = dict[str, tuple[str, list[str] | None]]
D = TypeVar("D", Manifest, Part)


@dataclass(frozen=True)
class Problem:
    """A difference from what was committed. `file` is a key of the store."""

    object_id: str
    file: str
    found: str
    expected: str


@dataclass
class Verification:
    """The result of `verify`.

    objects: every object of the run with the stage that makes it, also those of open stages that have files.
    opened: the objects of open stages.
    dependents: for each object, the committed stages that were made from it.
    made_from: for each object, the objects it was made from, by its manifest.
    content: for each object, one SHA-256 of what later stages read of it.
    removed: objects with files that `spinreg gc` has removed, and the reason. These files are not looked for.
    unfinished: stages that an unfinished repair has opened.
    """

    run: str
    objects: dict[str, StageId] = field(default_factory=dict)
    opened: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    dependents: dict[str, list[StageId]] = field(default_factory=dict)
    made_from: dict[str, list[str]] = field(default_factory=dict)
    content: dict[str, str] = field(default_factory=dict)
    removed: dict[str, str] = field(default_factory=dict)
    unfinished: list[StageId] = field(default_factory=list)
    documents: Documents = field(default_factory=dict)
    checked: int = 0
    bytes: int = 0

    @property
    def damaged(self) -> list[str]:
        return sorted({problem.object_id for problem in self.problems})


def verify(
    store: Store, run: str, *, only: Collection[str] | None = None, say: Callable[[str], None] = lambda line: None
) -> Verification:
    """Read every file of a run and compare it with its manifest; with `only`, the files of these objects alone.

    Raises BadInput if there is no such run, Damaged if the head or configuration of the run cannot be read.
    """
    head, config = require_head(store, run), require_config(store, run)
    committed = objects_of(config, head)
    done = set(committed.values())
    ahead = {o: stage for o, stage in objects_now_and_next(config, head).items() if stage not in done}
    opened = {o: stage for o, stage in ahead.items() if store.list(f"objects/{o}/")}
    result = Verification(run, committed | opened, list(opened))
    result.unfinished = [(made.round, made.stage) for made in (head.repair.stages if head.repair else ())]
    for object_id in result.objects:
        start, hashing = time.monotonic(), only is None or object_id in only
        found = _examined(store, object_id, open_=object_id in opened, hashing=hashing)
        while found.problems:
            again = _examined(store, object_id, open_=object_id in opened, hashing=False)
            if again.documents == found.documents:
                break
            # Its documents changed while it was read: the problems may be those of an object in between.
            found = _examined(store, object_id, open_=object_id in opened, hashing=hashing)
        result.problems += found.problems
        result.documents |= found.documents
        result.checked += found.checked
        result.bytes += found.bytes
        state = "DAMAGED" if found.problems else "ok"
        if found.record is not None:
            result.made_from[object_id] = sorted(set(ids_in(found.record.inputs)))
            # An object that a repair has set aside is still to be made again, so its content is unknown.
            if found.record.removed is None or found.record.removed.repair is None:
                result.content[object_id] = _content(found.record, found.parts)
            if found.record.removed_keys:
                result.removed[object_id] = found.record.why_removed
                state += f", {result.removed[object_id]}"
        if hashing:
            say(f"{object_id}: {found.checked} files, {state} ({time.monotonic() - start:.1f} s)")
    closures = {object_id: _closure(object_id, result.made_from) for object_id in committed}
    for made in result.objects:
        after = (stage for other, stage in committed.items() if other != made and made in closures[other])
        result.dependents[made] = list(dict.fromkeys(after))
    return result


def format_verdict(result: Verification) -> str:
    """Return a verification as a text for people."""
    after = [f"  {object_id}: {why}" for object_id, why in result.removed.items()]
    if result.unfinished:
        stages = ", ".join(f"{stage} of round {number}" for number, stage in result.unfinished)
        after.append(f"  a repair was not finished (of {stages}): the next start of the run finishes it")
    if not result.problems:
        return "\n".join([f"{result.run}: {result.checked} files of {len(result.objects)} objects, "
                          f"{result.bytes / 1e6:.1f} MB: all as committed", *after])  # fmt: skip
    lines = [f"{result.run}: {len(result.problems)} problems in {len(result.damaged)} of "
             f"{len(result.objects)} objects"]  # fmt: skip
    for problem in result.problems:
        lines.append(f"  {problem.file}: found {problem.found}; expected {problem.expected}")
    for object_id in result.damaged:
        number, stage = result.objects[object_id]
        made = ", ".join(f"{name} of round {n}" for n, name in result.dependents[object_id]) or "nothing"
        lines.append(f"  {object_id} is {stage} of round {number}; made from it: {made}")
    return "\n".join(lines + after)


def _strange(store: Store, object_id: str, record: Manifest) -> list[Problem]:
    """Find unlisted files in the folders of a policy: a library that loads the folder would read them."""
    listed = {entry.key for entry in record.files}
    folders = {key.rpartition("/")[0] for key in listed if key.rpartition("/")[0].endswith(("/policy", "/adapter"))}
    problems = []
    for folder in sorted(folders):
        try:
            problems += [
                Problem(object_id, key, "a file that no manifest lists", "what was committed alone")
                for key in store.list(folder) if key not in listed and not key.rpartition("/")[2].startswith(".tmp-")
            ]  # fmt: skip
        except StoreRefused as error:
            if not _is_damage(store, folder, error):
                raise
            problems.append(Problem(object_id, folder, f"what cannot be listed ({error.__cause__})", "a folder"))
    return problems


def _is_damage(store: Store, key: str, error: StoreRefused) -> bool:
    """Return whether a refusal means damage: not one of a server, and not one for a lack of rights."""
    return store.local_path(key) is not None and getattr(error.__cause__, "errno", None) not in NO_RIGHT


@dataclass
class _Examined:
    """An object: its manifest (None if missing or unreadable), its readable parts that are not void, its problems."""

    record: Manifest | None = None
    parts: list[Part] = field(default_factory=list)
    documents: Documents = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    checked: int = 0
    bytes: int = 0


def _examined(store: Store, object_id: str, *, open_: bool, hashing: bool) -> _Examined:
    """Read an object. Without `hashing` no problem is reported.

    open_: the object belongs to an open stage, which needs no manifest and continues from its parts.
    """
    found, problems, key = _Examined(), list[Problem](), manifest_key(object_id)

    def read(key: str, kind: type[D]) -> D | None:
        try:
            tagged = store.read_tagged(key)
        except StoreRefused as error:
            if not _is_damage(store, key, error):
                raise
            found.documents[key] = "", None
            problems.append(Problem(object_id, key, f"what cannot be read ({error.__cause__})",
                                    "what spinreg wrote there; remove it before --repair"))  # fmt: skip
            return None
        if tagged is None:
            return None
        try:
            document = documents.parse(store, key, tagged[0], kind)
        except (Damaged, BadInput) as error:
            found.documents[key] = tagged[1], None
            # Parts of a finished stage are not read any more.
            if open_ or key == manifest_key(object_id):
                problems.append(Problem(object_id, key, str(error), "what spinreg wrote there"))
            return None
        found.documents[key] = tagged[1], [entry.key for entry in document.files]
        return document

    found.record = read(key, Manifest)
    if key not in found.documents and not open_:
        problems.append(Problem(object_id, key, "nothing", "a manifest"))
    parts = [read(part_key(object_id, name), Part) for name in part_names(store, object_id)]
    found.parts = [part for part in parts if part is not None and not part.void]
    if not hashing:
        return found
    if found.record and found.record.sum is not None and found.record.sum != documents.digest(found.record):
        problems.append(Problem(object_id, key, "other content than its sum is of", "what spinreg wrote there"))
    read_by: list[Manifest | Part] = [*([found.record] if found.record else []), *(found.parts if open_ else [])]
    # The open stage will replace a manifest that is set aside or marked.
    if open_ and found.record and found.record.removed is not None:
        read_by.remove(found.record)
    gone = found.record.removed_keys if found.record else frozenset()
    for file, entry in {entry.key: entry for document in read_by for entry in document.files}.items():
        if file not in gone:
            problems += _check(store, object_id, entry)
            found.checked += 1
            found.bytes += entry.size
    if found.record and not open_:
        problems += _strange(store, object_id, found.record)
    found.problems = problems
    return found


def _content(record: Manifest, parts: list[Part]) -> str:
    """Return one SHA-256 of what later stages read of an object, by its manifest and parts.

    Other files (step metrics) hold times. Of a shard the drawn answers count, not the file, which holds times too.
    """
    read = ("policy/", "adapter/", "shards/", "pairs.parquet", "rows.parquet", "train.parquet", "heldout.parquet")
    found = {entry.name: entry.sha256 for entry in record.files if entry.name.startswith(read)}
    keys = {entry.key for entry in record.files}
    for part in parts:
        if "drawn" in part.meta:
            found |= {entry.name: part.meta["drawn"] for entry in part.files if entry.key in keys}
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def _check(store: Store, object_id: str, entry: File) -> Iterator[Problem]:
    key = entry.key
    try:
        yield from _compared(store, object_id, entry)
    # The file was removed after its size was read.
    except FileNotFoundError:
        yield Problem(object_id, key, "no file", f"{entry.size} bytes")
    except StoreRefused as error:
        if not _is_damage(store, key, error):
            raise
        yield Problem(object_id, key, f"what cannot be read ({error.__cause__})", "a file that can be read")


def _compared(store: Store, object_id: str, entry: File) -> Iterator[Problem]:
    size, key = store.size(entry.key), entry.key
    if size != entry.size:
        found = "no file" if size is None else f"{size} bytes"
        yield Problem(object_id, key, found, f"{entry.size} bytes")
        return
    local = store.local_path(key)
    if local is not None:
        sha256 = sha256_file(local)
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "file"
            # Not through the cache: its copy may be sound while the file in the store is not.
            store.download(key, path)
            sha256 = sha256_file(path)
    if sha256 != entry.sha256:
        yield Problem(object_id, key, f"SHA-256 {sha256}", entry.sha256)


def _closure(object_id: str, inputs: dict[str, list[str]]) -> set[str]:
    found: set[str] = set()
    todo = [object_id]
    while todo:
        for one in inputs.get(todo.pop(), ()):
            if one not in found:
                found.add(one)
                todo.append(one)
    return found
