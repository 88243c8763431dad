"""Garbage collection: find objects that no run needs, and remove them so that no needed object can be lost.

Decides: what is left over, and the order of every step of a removal. Leaves out: the needs of runs (`retention.py`),
the command (`flows`).

An object is removed in steps. Each is a compare-and-swap of its manifest, or has no effect if it is done twice:

1. The manifest is marked. A run that would make or take over the object does not find it any more; its files are there.
2. The heads of all runs are read again, and objects that a run needs by now are unmarked. A run needs the objects that
   it has or will take over next. Ids of base and data are not known ahead, so `prepare` reads both again after its
   commit: either its commit is seen here, or it sees the mark and makes the object again.
3. The parts are deleted, the manifest lists the files to go, and the files are deleted. The manifest stays for lineage,
   and so that `status` and `verify` tell removed files from lost ones. A new publication of the object replaces it, by
   compare-and-swap.

An object that was removed and has come back in part goes in the same steps.

A kill leaves a whole object, a marked one, or one that lists the files it lost. The next removal finishes it.
"""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, TypeVar

from spinreg_core.errors import BadInput, Conflict, Damaged
from spinreg_core.formatting import format_bytes, format_duration
from spinreg_core.maintenance.retention import Needs
from spinreg_core.runs.manifest import Manifest, Part, Removal
from spinreg_core.runs.objects import manifest_key, now, read_record
from spinreg_core.store import documents
from spinreg_core.store.base import OURS, Listed, Store

D = TypeVar("D", Manifest, Part)
# A file that no manifest lists may be on its way into one, and an object of no run may just have been made for one.
GRACE_SECONDS = 7 * 86400.0
# Measurements are small and expensive to make again, so they stay.
_MEASURED = ("benchmark-", "lm-eval-", "mt-bench-", "win-rate-")
# Rules remove these files of an object; the others are small and describe it.
_WEIGHTY = ("policy/", "adapter/", "shards/")


@dataclass(frozen=True)
class Removable:
    """Something to remove.

    kind: "object" is removed by way of a mark, and `record` is its manifest now; "files" are `keys` that no run reads;
        "upload" is a write that never ended; "unmark" takes back the mark of an object that is needed again.
    orphan: no run may know the object when it is removed.
    """

    kind: str
    object_id: str
    what: str
    why: str
    keys: tuple[str, ...] = ()
    bytes: int = 0
    orphan: bool = False
    record: Manifest | None = None


def find_removable(store: Store, needs: Needs, *, rules_only: bool = False) -> list[Removable]:
    """Return what can be removed, and change nothing. `rules_only` leaves out leftovers and objects of no run.

    Objects that cannot be read, or lie behind a link, are added to `needs.notes` and left as they are.
    """
    objects: dict[str, list[Listed]] = defaultdict(list)
    for entry in store.entries("objects/"):
        objects[entry.key.split("/")[1]].append(entry)
    items: list[Removable] = []
    linked = _behind_links(store)
    for object_id, entries in objects.items():
        if object_id.startswith(_MEASURED):
            continue
        if behind := next((entry.key for entry in entries if linked(entry.key)), None):
            needs.notes.append(f"{behind} lies behind a link: what that leads to may be another store's, or this one's "
                               f"by another name, and {object_id} is left as it is")  # fmt: skip
            continue
        try:
            items += _of_object(store, needs, object_id, entries, rules_only)
        except (Damaged, BadInput) as error:
            needs.notes.append(f"{error}; {object_id} is left as it is")
    if not rules_only:
        ours = tuple(f"{name}/" for name in OURS)
        old = [entry for entry in store.unfinished()
               if entry.age > GRACE_SECONDS and entry.key.startswith(ours) and not linked(entry.key)]  # fmt: skip
        items += [Removable("upload", "", e.key, f"a write that never ended, {format_duration(e.age)} old", (e.key,),
                            e.size) for e in old]  # fmt: skip
    return items


def _behind_links(store: Store) -> Callable[[str], bool]:
    """Return a test whether a key leads to another place by a link; never true in a bucket."""
    top = store.local_path("objects")
    root = "" if top is None else os.path.realpath(top.parent)

    def linked(key: str) -> bool:
        path = store.local_path(key)
        return path is not None and os.path.realpath(path) != os.path.join(root, *key.split("/"))

    return linked


def _of_object(store: Store, needs: Needs, object_id: str, entries: list[Listed], rules_only: bool) -> list[Removable]:
    record, sizes = read_record(store, object_id), {entry.key: entry.size for entry in entries}
    manifest = sizes.pop(manifest_key(object_id), None)
    removed = None if record is None else record.removed
    marked = removed is not None and removed.marked
    # Seconds since the last write to the object; our own mark does not count.
    age = min((e.age for e in entries if e.key in sizes or not marked), default=GRACE_SECONDS)
    entries = [entry for entry in entries if entry.key in sizes]
    orphan = object_id not in needs.known and (age >= GRACE_SECONDS or marked) and needs.complete and not rules_only
    rule = needs.freed.get(object_id) if object_id not in needs.kept else None
    what = object_id if record is None or not record.stage else f"{record.stage} of round {record.round}"
    if needs.known.get(object_id):
        what += f" of {', '.join(needs.known[object_id])}"

    def item(kind: str, why: str, keys: Iterable[str], **more: Any) -> list[Removable]:
        chosen = tuple(keys)
        size = sum(sizes[key] for key in chosen)
        return [Removable(kind, object_id, what, why, chosen, size, record=record, **more)] if chosen else []

    if marked and not rule and object_id in needs.known:
        assert record is not None
        return [Removable("unmark", object_id, what, "needed again", record=record)] if record.stage else []
    if orphan:
        why = "no run knows it" if manifest is not None else "unfinished, and no run continues it"
        if marked:
            assert removed is not None
            why = removed.why
        return item("object", why, sizes, orphan=True)
    if rule and (marked or (record is not None and removed is None)):
        assert record is not None
        stay = {entry.key for entry in record.files if not entry.name.startswith(_WEIGHTY)}
        young = {e.key for e in entries if e.age < GRACE_SECONDS} - _named(store, object_id, record, sizes)
        keys = [key for key in sizes if key not in stay | young]
        return item("object", rule, keys) if removed_by(record, keys) else []
    return [] if rules_only else _leftovers(store, object_id, record, entries, item)


def removed_by(record: Manifest, keys: Iterable[str]) -> set[str]:
    """Return the files of a manifest that are among these keys."""
    return {entry.key for entry in record.files} & set(keys)


def _leftovers(
    store: Store,
    object_id: str,
    record: Manifest | None,
    entries: list[Listed],
    item: Callable[[str, str, Iterable[str]], list[Removable]],
) -> list[Removable]:
    """Find the leftovers of an object that stays: of a killed removal, of a finished stage, and of killed writers."""
    keys = {entry.key for entry in entries}
    gone = frozenset() if record is None else record.removed_keys
    files = {entry.key for entry in record.files} if record else set()
    found = item("files", "left of a removal", sorted(keys & gone - set(_parts(object_id, keys))))
    strange = [e for e in entries if e.key not in files | gone and f"objects/{object_id}/data/" in e.key]
    superseded: list[str] = []
    if record is not None and record.removed is None and strange:
        for key, part in _read(store, _parts(object_id, keys), Part).items():
            own = [entry.key for entry in part.files]
            if part.void or not files.issuperset(own):
                superseded += [key, *(k for k in own if k in keys - files)]
    found += item("files", "checkpoints of a finished stage", dict.fromkeys(superseded))
    old = [e.key for e in strange if e.age >= GRACE_SECONDS and e.key not in superseded]
    if old:
        named = _named(store, object_id, record, keys)
        found += item("files", "no manifest names it, for a week or more", [key for key in old if key not in named])
    return found


def _named(store: Store, object_id: str, record: Manifest | None, keys: Iterable[str]) -> set[str]:
    """Return the keys that the manifest, the parts and manifests set aside list, and the keys of these documents."""
    aside = [key for key in keys if key.startswith(f"objects/{object_id}/aside/")]
    parts = _parts(object_id, keys)
    found: list[Manifest | Part] = [*_read(store, parts, Part).values(), *([record] if record else [])]
    for key in aside:
        # The manifest may have been set aside because it is unreadable.
        with contextlib.suppress(Damaged, BadInput):
            found += _read(store, [key], Manifest).values()
    return {*parts, *aside, *(entry.key for document in found for entry in document.files)}


def _parts(object_id: str, keys: Iterable[str]) -> list[str]:
    return sorted(key for key in keys if key.startswith(f"objects/{object_id}/parts/"))


def _read(store: Store, keys: Iterable[str], kind: type[D]) -> dict[str, D]:
    found = ((key, documents.read(store, key, kind)) for key in keys)
    return {key: document for key, document in found if document is not None}


def remove_items(
    store: Store,
    items: Sequence[Removable],
    needs_now: Callable[[], Needs],
    say: Callable[[str], None] = lambda line: None,
) -> list[Removable]:
    """Remove what was found, except objects that a run needs by now. Returns what was removed.

    `needs_now` reads the heads of all runs again. After an interruption, find and remove again to finish.
    """
    done: list[Removable] = []
    needs = needs_now()
    marks: list[tuple[Removable, str]] = []
    for item in items:
        if item.kind == "object" and not _needed(item, needs):
            tag = _mark(store, item)
            if tag is not None:
                marks.append((item, tag))
    # Read after all marks are written: a run that took an object over before its mark is seen here, and one that comes
    # later does not find the object.
    needs = needs_now()
    for item, tag in marks:
        if _needed(item, needs):
            say(f"{item.object_id} is needed by now, and stays")
            _unmark(store, item.object_id, tag)
        elif _remove_marked(store, item, tag):
            done.append(item)
            say(f"removed {item.object_id}")
    for item in items:
        if item.kind == "unmark":
            found = store.read_tagged(manifest_key(item.object_id))
            if found is not None:
                _unmark(store, item.object_id, found[1])
        elif item.kind == "files":
            for key in item.keys:
                store.delete(key)
            done.append(item)
        elif item.kind == "upload":
            store.abort_unfinished(item.keys[0])
            done.append(item)
    return done


def _needed(item: Removable, needs: Needs) -> bool:
    return item.object_id in needs.kept or (item.orphan and (item.object_id in needs.known or not needs.complete))


def _mark(store: Store, item: Removable) -> str | None:
    """Mark an object. Returns the tag of the marked manifest, or None if the object has changed since it was found."""
    key = manifest_key(item.object_id)
    found = store.read_tagged(key)
    record = None if found is None else documents.parse(store, key, found[0], Manifest)
    if record != item.record:
        return None
    # An unfinished object gets a mark in place of a manifest: a later publication sees that parts may have gone.
    record = record or Manifest(object_id=item.object_id, files=[], inputs={})
    old = record.removed
    if old is not None and old.marked:
        old = old.before
    # Files that were removed earlier stay listed.
    keys = dict.fromkeys([*record.removed_keys, *item.keys])
    record.removed = Removal(marked=True, why=item.why, at=now(), keys=list(keys), before=old)
    try:
        if found is None:
            return store.create(key, documents.dump(record))
        return store.replace(key, documents.dump(record), found[1])
    except Conflict:
        return None


def _unmark(store: Store, object_id: str, tag: str) -> None:
    key = manifest_key(object_id)
    record = documents.read(store, key, Manifest)
    if record is None or record.removed is None or not record.removed.marked or not record.stage:
        # The object was published in between, or the mark stands for an unfinished object and may stay.
        return
    record.removed = record.removed.before
    try:
        store.replace(key, documents.dump(record), tag)
    except Conflict:
        return


def _remove_marked(store: Store, item: Removable, tag: str) -> bool:
    """Remove a marked object. Returns False if it was published again in between."""
    key = manifest_key(item.object_id)
    record = documents.read(store, key, Manifest)
    if record is None or record.removed is None or not record.removed.marked:
        return False
    # Parts go before their files, because a stage that finds a part relies on its files.
    parts = _parts(item.object_id, item.keys)
    for part in parts:
        store.delete(part)
    record.removed.marked, record.removed.before = False, None
    try:
        store.replace(key, documents.dump(record), tag)
    except Conflict:
        return False
    for other in item.keys:
        if other not in parts:
            store.delete(other)
    return True


def format_items(items: Sequence[Removable], notes: Sequence[str], where: str, *, removed: bool) -> str:
    """Return a text for people with the objects, the reasons and the sizes."""
    lines = [f"note: {note}" for note in notes]
    items = [item for item in items if item.kind != "unmark"]
    if not items:
        return "\n".join([*lines, f"{where}: nothing to remove"])
    for item in sorted(items, key=lambda item: -item.bytes):
        files = f"{len(item.keys)} file{'s' if len(item.keys) != 1 else ''}"
        lines.append(f"  {format_bytes(item.bytes):>9}  {files:>10}  {item.what}: {item.why}")
        if item.object_id and item.object_id != item.what:
            lines[-1] += f" ({item.object_id})"
    total = f"{format_bytes(sum(item.bytes for item in items))} in {sum(len(item.keys) for item in items)} files"
    verb = "removed" if removed else "would be removed"
    lines.append(f"{total} {verb} from {where}" + ("" if removed else "; --delete removes it"))
    return "\n".join(lines)


class ListedItem(TypedDict):
    """One line of `spinreg gc --json`."""

    object: str | None
    what: str
    why: str
    keys: list[str]
    bytes: int


class Listing(TypedDict):
    """The output of `spinreg gc --json`."""

    removed: bool
    bytes: int
    items: list[ListedItem]
    notes: list[str]


def as_json(items: Sequence[Removable], notes: Sequence[str], *, removed: bool) -> Listing:
    """Return the same as plain values."""
    listed: list[ListedItem] = [
        {"object": item.object_id or None, "what": item.what, "why": item.why, "keys": list(item.keys),
         "bytes": item.bytes} for item in items if item.kind != "unmark"
    ]  # fmt: skip
    return {"removed": removed, "bytes": sum(item.bytes for item in items), "items": listed, "notes": list(notes)}
