"""Verified local copies of objects: files, parts and folders, checked against their manifests.

Leaves out: writing objects (`objects.py`), the cache itself (`spinreg_core.store`).
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path

from spinreg_core.errors import Damaged, Removed, StoreRefused
from spinreg_core.runs.manifest import File, Manifest, Part, files_below
from spinreg_core.runs.objects import require_manifest
from spinreg_core.store.base import Store, os_errors_as_store_refused
from spinreg_core.store.cache import fetch_lock, pin, reserve_space
from spinreg_core.store.hashing import sha256_file

# (path, size, mtime_ns, sha256) of the files that this process has hashed: a policy of many gigabytes is hashed once.
_verified: set[tuple[str, int, int, str]] = set()


def _verify(path: Path, entry: File, where: str) -> None:
    try:
        with os_errors_as_store_refused(f"reading {path}"):
            stat = path.stat()
    except FileNotFoundError:
        raise Damaged(f"{where}: found no file; expected {entry.size} bytes") from None
    if stat.st_size != entry.size:
        raise Damaged(f"{where}: found {stat.st_size} bytes; expected {entry.size}")
    mark = (str(path), stat.st_size, stat.st_mtime_ns, entry.sha256)
    if mark not in _verified:
        found = sha256_file(path)
        if found != entry.sha256:
            raise Damaged(f"{where}: found SHA-256 {found}; expected {entry.sha256}")
        _verified.add(mark)


def _sound(path: Path, entry: File) -> bool:
    try:
        _verify(path, entry, str(path))
    except (Damaged, StoreRefused):
        return False
    return True


def _local(store: Store, entries: Sequence[File]) -> list[Path]:
    """Return verified local files with the bytes of entries of one object: in place, or in the cache.

    A file that arrives is hashed. A file that is there is hashed at its first use in this process, and compared by size
    and time of change at later ones. A spoilt copy in the cache is fetched again, as the store may still be sound.
    """
    in_place = [path for entry in entries if (path := store.local_path(entry.key)) is not None]
    if len(in_place) == len(entries):
        for path, entry in zip(in_place, entries, strict=True):
            _verify(path, entry, store.uri(entry.key))
        return in_place
    folder = pin(entries[0].key.split("/")[1])
    wanted = {folder / entry.sha256: entry for entry in entries}
    missing = {path: entry for path, entry in wanted.items() if not _sound(path, entry)}
    if missing:
        with fetch_lock(folder):
            # Another process may have fetched them while this one waited for the lock.
            missing = {path: entry for path, entry in missing.items() if not _sound(path, entry)}
            with reserve_space([entry.size for entry in missing.values()]) as targets:
                for (path, entry), target in zip(missing.items(), targets, strict=True):
                    _download(store, entry, target)
                    os.replace(target, path)
    return [folder / entry.sha256 for entry in entries]


def _download(store: Store, entry: File, target: Path) -> None:
    where = store.uri(entry.key)
    try:
        store.download(entry.key, target)
    except FileNotFoundError:
        raise Damaged(f"{where}: found no file; expected {entry.size} bytes") from None
    _verify(target, entry, where)


def fetch_file(store: Store, object_id: str, name: str) -> Path:
    """Return a verified local copy of one file of a finished object. Raises Damaged, Removed."""
    record = require_manifest(store, object_id)
    entry = record.file(name)
    if entry is None:
        raise Damaged(f"{store.uri(f'objects/{object_id}')}: found no file {name!r} in its manifest; expected one")
    return _local(store, _present(store, record, [entry]))[0]


def fetch_files(store: Store, object_id: str, prefix: str) -> dict[str, Path]:
    """Return verified local copies of the files below `prefix` of a finished object, by name.

    Raises Damaged, Removed.
    """
    record = require_manifest(store, object_id)
    return _by_name(store, _present(store, record, files_below(prefix, record.files)))


def _present(store: Store, record: Manifest, entries: list[File]) -> list[File]:
    """Return the entries. Raises Removed if garbage collection has taken the file of one of them."""
    removed = record.removed_keys
    for entry in entries:
        if entry.key in removed:
            raise Removed(f"{store.uri(entry.key)}: {record.why_removed}; a run of the same configuration under "
                          "another name makes it again")  # fmt: skip
    return entries


def fetch_part(store: Store, part: Part) -> dict[str, Path]:
    """Return verified local copies of a part's files, by name. Raises Damaged."""
    return _by_name(store, part.files)


def _by_name(store: Store, entries: Sequence[File]) -> dict[str, Path]:
    return {entry.name: path for entry, path in zip(entries, _local(store, entries), strict=True)}


def fetch_folder(store: Store, object_id: str, prefix: str) -> Path:
    """Return a verified local folder with the files below `prefix` under their own names. Raises Damaged, Removed.

    The folder is the store's own for a folder store. For a remote store it consists of links to copies in the cache.
    """
    record = require_manifest(store, object_id)
    return folder_of(store, object_id, _present(store, record, files_below(prefix, record.files)), prefix)


def folder_of(store: Store, object_id: str, files: Iterable[File], prefix: str) -> Path:
    """Return the folder as `fetch_folder` does, for an object without a manifest yet, from its uploaded files."""
    entries = files_below(prefix, files)
    if not entries:
        raise Damaged(
            f"{store.uri(f'objects/{object_id}')}: found no files below {prefix!r} in its manifest; expected some"
        )
    paths = {name.removeprefix(f"{prefix}/"): path for name, path in _by_name(store, entries).items()}
    in_place = store.local_path(entries[0].key.removesuffix(entries[0].name) + prefix)
    if in_place is not None:
        # Libraries that load a model look for files by their names: an unlisted file would be read unverified.
        there = {path.relative_to(in_place).as_posix() for path in in_place.rglob("*") if path.is_file()}
        strange = sorted(name for name in there - paths.keys() if not name.rpartition("/")[2].startswith(".tmp-"))
        if strange:
            raise Damaged(
                f"{in_place}: found {strange[0]!r}, which no manifest lists; expected what was committed alone"
            )
        return in_place
    digest = hashlib.sha256(json.dumps([[e.name, e.sha256] for e in entries]).encode()).hexdigest()[:16]
    folder = pin(object_id) / f"{prefix}-{digest}"
    for name, path in paths.items():
        link = folder / name
        # The link is missing, or it leads to a copy that was spoilt and has been fetched again.
        if not link.exists() or not os.path.samefile(link, path):
            link.parent.mkdir(parents=True, exist_ok=True)
            temporary = link.with_name(f".tmp-{uuid.uuid4().hex}")
            os.link(path, temporary)
            # Replaced in one step, because other processes may be reading the folder. POSIX rename does nothing if both
            # names are links to one file already (another process was faster), so the temporary name may remain.
            os.replace(temporary, link)
            temporary.unlink(missing_ok=True)
    return folder
