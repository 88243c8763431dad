"""A store in a local or shared folder: atomic writes with locks and fsync.

Decides: create-only writes and compare-and-swap on a file system. Leaves out: the contract (`base.py`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from spinreg_core.errors import BadInput, Conflict, StoreFailed, StoreRefused, problem_text
from spinreg_core.store.base import OURS, PART_BYTES, Listed, os_errors_as_store_refused, require_own_commits, valid_key
from spinreg_core.store.transfers import track_transfer

SYNC_BYTES = 256 * 2**20  # of a copy, after which it is written through to the disk


def _lock(file: IO[str], path: Path, seconds: float) -> None:
    """Lock the file exclusively. Holders keep the lock for milliseconds: after `seconds` the holder is frozen."""
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > end:
                raise StoreFailed(
                    f"writing {path}: another process has held the lock {file.name} for {seconds:g} s; end it if it is "
                    "frozen (`fuser` names it)"
                ) from None
        time.sleep(0.01)


class FolderStore:
    """A local folder. Atomic by link and rename, durable by fsync, compare-and-swap under flock."""

    def __init__(self, root: Path, lock_seconds: float = 60.0) -> None:
        self.root = root
        self.url = str(root)
        self.lock_seconds = lock_seconds

    def check(self) -> None:
        try:
            os.lstat(self.root)
        except (ValueError, OSError) as error:  # a name with a NUL, or one that is too long
            if isinstance(error, ValueError) or error.errno == errno.ENAMETOOLONG:
                raise BadInput("store", f"{self.url!r} ({error})", "a folder that can be written to") from None
        if self.root.is_symlink() and not self.root.exists():
            raise BadInput(f"store {self.url}", "is a link that leads nowhere", "a folder (is it mounted?)")
        there = next(path for path in (self.root, *self.root.parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            reason = "not a folder" if not there.is_dir() else "not writable for this user"
            found = f"cannot be written to ({there} is {reason})"
            raise BadInput(f"store {self.url}", found, "a folder that can be written to")
        require_own_commits(self)

    def _path(self, key: str) -> Path:
        return self.root / valid_key(key)

    @contextlib.contextmanager
    def _temporary(self, path: Path) -> Iterator[Path]:
        temporary = path.parent / f".tmp-{uuid.uuid4().hex}"
        with os_errors_as_store_refused(f"writing {path}"):
            _make_folder(path.parent)
            try:
                with track_transfer(f"writing {path}"):
                    yield temporary
            finally:
                temporary.unlink(missing_ok=True)

    def read(self, key: str) -> bytes | None:
        with track_transfer(f"reading {self.uri(key)}"), os_errors_as_store_refused(f"reading {self.uri(key)}"):
            try:
                return self._path(key).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def read_tagged(self, key: str) -> tuple[bytes, str] | None:
        data = self.read(key)
        return None if data is None else (data, hashlib.sha256(data).hexdigest())

    def create(self, key: str, data: bytes) -> str:
        path = self._path(key)
        with self._temporary(path) as temporary:
            _write_durably(temporary, data)
            try:
                # A link fails if the name is taken, and the file is complete: there is no other atomic way.
                os.link(temporary, path)
            except FileExistsError:
                # Not there any more if it was deleted in between; the caller looks again.
                if self.read(key) != data:
                    raise Conflict(f"{self.uri(key)} exists with other content") from None
        _sync_folder(path.parent)
        return hashlib.sha256(data).hexdigest()

    def replace(self, key: str, data: bytes, tag: str) -> str:
        path = self._path(key)
        with os_errors_as_store_refused(f"writing {path}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = open(path.parent / f".lock-{path.name}", "w")  # noqa: SIM115
        with lock:
            _lock(lock, path, self.lock_seconds)
            current = self.read_tagged(key)
            if current is None or current[1] != tag:
                raise Conflict(f"{self.uri(key)} was changed by another writer")
            self.write(key, data)
        return hashlib.sha256(data).hexdigest()

    def write(self, key: str, data: bytes) -> None:
        path = self._path(key)
        with self._temporary(path) as temporary:
            _write_durably(temporary, data)
            os.replace(temporary, path)
        _sync_folder(path.parent)

    def upload(self, path: Path, key: str) -> None:
        target = self._path(key)
        with self._temporary(target) as temporary, track_transfer(f"storing {path.name} in {self.url}") as moved:
            _copy(path, temporary, moved)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, target)
        _sync_folder(target.parent)

    def download(self, key: str, path: Path) -> None:
        with (
            track_transfer(f"fetching {self.uri(key)}") as moved,
            os_errors_as_store_refused(f"fetching {self.uri(key)} to {path}"),
        ):
            _copy(self._path(key), path, moved)

    def delete(self, key: str) -> None:
        with os_errors_as_store_refused(f"deleting {self.uri(key)}"):
            self._path(key).unlink(missing_ok=True)

    def size(self, key: str) -> int | None:
        with os_errors_as_store_refused(f"reading {self.uri(key)}"):
            try:
                return self._path(key).stat().st_size
            except (FileNotFoundError, NotADirectoryError):
                return None

    def list(self, prefix: str) -> list[str]:
        return sorted(key for key, _ in self._found(self._path(prefix.rstrip("/"))))

    def entries(self, prefix: str) -> Sequence[Listed]:
        return self._aged(self._path(prefix.rstrip("/")))

    def unfinished(self) -> Sequence[Listed]:
        return [entry for name in OURS for entry in self._aged(self.root / name, unfinished=True)]

    def abort_unfinished(self, name: str) -> None:
        self.delete(name)

    def _found(self, folder: Path, unfinished: bool = False) -> Iterator[tuple[str, os.stat_result]]:
        """Yield keys below a folder, or names of unfinished writes.

        Raises StoreRefused rather than leave out keys that a run may need: for a folder that cannot be listed, and for
        a link to nothing or (below `folder`) to an empty folder, as a mount point is without its file system.
        """

        def missing(error: OSError) -> None:
            if isinstance(error, NotADirectoryError | FileNotFoundError) and not os.path.islink(error.filename):
                return  # not written yet, or removed since
            if os.path.basename(error.filename) == "lost+found":  # of a file system that is mounted here
                return
            expected = "folders that can be listed and links that lead somewhere (is a file system not mounted?)"
            raise StoreRefused(problem_text(f"listing {folder}", error, expected)) from error

        for place, folders, names in os.walk(folder, onerror=missing, followlinks=True):
            if not folders and not names and place != str(folder) and os.path.islink(place):
                missing(OSError(errno.ENOENT, "a link to an empty folder", place))
            for name in names:
                if name.startswith(".tmp-") is unfinished and not name.startswith(".lock-"):
                    path = Path(place) / name
                    try:
                        yield path.relative_to(self.root).as_posix(), path.stat()
                    except OSError as error:
                        missing(error)

    def _aged(self, folder: Path, unfinished: bool = False) -> Sequence[Listed]:
        # Files have times of the clock of the file system, which over a network is not this machine's.
        now = None
        with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=self.root, prefix=".tmp-") as file:
            now = os.fstat(file.fileno()).st_mtime
        found = list(self._found(folder, unfinished))
        if now is None:  # on a full disk, or without permission to write: the time of the last write at the earliest
            now = max((stat.st_mtime for _, stat in found), default=0.0)
        return sorted(Listed(key, stat.st_size, now - stat.st_mtime) for key, stat in found)

    def local_path(self, key: str) -> Path | None:
        return self._path(key)

    def uri(self, key: str) -> str:
        return str(self._path(key))


def _copy(source: Path, target: Path, moved: Callable[[int], None]) -> None:
    with open(source, "rb") as reader, open(target, "wb") as writer:
        copied = 0
        while data := reader.read(PART_BYTES):
            writer.write(data)
            copied += len(data)
            # Bytes in the page cache have not moved yet: a transfer to a dead disk must not look alive.
            if copied % SYNC_BYTES < PART_BYTES:
                writer.flush()
                os.fsync(writer.fileno())
            moved(len(data))


def _write_durably(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _make_folder(folder: Path) -> None:
    """Make a folder and its parents, with names as durable as the files that will be written there."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in new:
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some network file systems refuse to sync a folder
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)
