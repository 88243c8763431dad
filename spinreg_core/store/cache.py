"""Cache of this machine: copies of remote objects, and converted or downloaded models.

Decides: the folder, and the removal of copies of objects, least recently used first, to stay within $SPINREG_CACHE_GB.
An object in use is never removed. Leaves out: verification of copies (`runs/`), and models (`models/`), which do not
count towards the limit.

    objects/<object id>/   copies of one object; a user holds a shared lock on `.used`, whose mtime is its last use
    arriving/<random>/     files in transfer, at their final size; the fetching process holds a lock on `.used`
    leaving/<random>/      an object that was renamed to be removed

The locks are flocks, which end with their process. A process that removes an object's folder locks it exclusively and
renames it first, so that half an object is never found under its name. Leftovers of killed processes in `arriving` and
`leaving` are removed by the next fetch. Without flock (some network file systems) nothing is removed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import math
import os
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from spinreg_core.errors import BadInput, StoreFailed

LIMIT_VARIABLE = "SPINREG_CACHE_GB"
SILENCE_SECONDS = 60.0  # without a byte from another process that fetches the same object; then fetch it here
LOCK_SECONDS = 60.0  # after which another process that holds a lock counts as frozen
_HELD = "another process has held"
_FROZEN = "for a minute; end it if it is frozen (`fuser` names it)"
_POLL_SECONDS = 0.2
_in_use: dict[Path, int] = {}  # the open lock of each object's folder that this process uses
_warned: set[str] = set()  # limits whose excess was reported


def cache_folder() -> Path:
    """Return `$SPINREG_CACHE`, or ~/.cache/spinreg; created if missing, and safe to delete between runs.

    Raises BadInput for a place that cannot hold a folder, and early for an invalid limit.
    """
    cache_limit()
    given = os.environ.get("SPINREG_CACHE") or "~/.cache/spinreg"
    try:
        folder = Path(given).expanduser().absolute()
    except RuntimeError as error:  # ~NAME of an unknown user
        raise BadInput("SPINREG_CACHE", f"{given!r} ({error})", "a folder that can be found") from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput("SPINREG_CACHE", f"{folder} ({error.strerror})", "a folder, or a place for one") from None
    return folder


def require_cache() -> None:
    """Raise BadInput for a cache folder that cannot be made or written to."""
    folder = cache_folder()
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise BadInput("SPINREG_CACHE", f"{folder} ({error.strerror})", "a folder that can be written to") from None


def cache_limit() -> int | None:
    """Return the limit on copies of objects (`$SPINREG_CACHE_GB`) in bytes, or None. Raises BadInput."""
    text = os.environ.get(LIMIT_VARIABLE)
    if not text:
        return None
    try:
        gigabytes = float(text)
    except ValueError:
        gigabytes = math.nan
    if not 0 < gigabytes < math.inf:
        raise BadInput(LIMIT_VARIABLE, repr(text), "a positive number of gigabytes (10^9 bytes), or nothing")
    return int(gigabytes * 1e9)


def pin(object_id: str) -> Path:
    """Return the folder for copies of an object, kept until this process or the block of `pinned` ends."""
    folder = cache_folder() / "objects" / object_id
    handle = _in_use.get(folder)
    while handle is None or not _is_lock_of(handle, folder):
        if handle is not None:
            os.close(handle)
            _in_use.pop(folder, None)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(folder / ".used", os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # removed between these lines
            handle = None
            continue
        try:
            if _flock(handle, fcntl.LOCK_SH, LOCK_SECONDS) is False:
                raise StoreFailed(f"using {folder}: {_HELD} its .used {_FROZEN}")
        except BaseException:
            os.close(handle)
            raise
        _in_use[folder] = handle
    os.utime(handle)
    return folder


@contextlib.contextmanager
def pinned() -> Iterator[None]:
    """Release objects that were fetched inside the block at its end: for processes that live for days."""
    before = set(_in_use)
    try:
        yield
    finally:
        for folder in set(_in_use) - before:
            os.close(_in_use.pop(folder))


@contextlib.contextmanager
def fetch_lock(folder: Path) -> Iterator[None]:
    """Let one process at a time fetch into an object's folder. The others wait as long as bytes arrive."""
    with _opened(folder / ".fetching") as handle:
        seen, since = None, time.monotonic()
        while _flock(handle, fcntl.LOCK_EX) is False and time.monotonic() - since < SILENCE_SECONDS:
            now = _newest(cache_folder() / "arriving")
            if now != seen:
                seen, since = now, time.monotonic()
            time.sleep(_POLL_SECONDS)
        yield


@contextlib.contextmanager
def reserve_space(sizes: Sequence[int]) -> Iterator[list[Path]]:
    """Yield files of these sizes, to be filled and moved into an object's folder, after making room for them.

    Files that are still there at the end of the block are removed.
    """
    cache = cache_folder()
    folder = cache / "arriving" / uuid.uuid4().hex
    with _alone(cache) as alone:
        if alone:
            _sweep(cache)
            _make_room(cache, sum(sizes))
        folder.mkdir(parents=True)
        handle = os.open(folder / ".used", os.O_RDWR | os.O_CREAT, 0o666)
        _flock(handle, fcntl.LOCK_EX, LOCK_SECONDS)
        paths = [folder / str(number) for number in range(len(sizes))]
        # At their final size, so that other processes count the space that they will take.
        for path, size in zip(paths, sizes, strict=True):
            path.touch()
            os.truncate(path, size)
    try:
        yield paths
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def _make_room(cache: Path, needed: int) -> None:
    """Remove unused objects, least recently used first, until so many bytes fit within the limit."""
    limit = cache_limit()
    if limit is None:
        return
    # Count arriving files first: one that moves into its object between the two counts is counted twice, never missed.
    total = needed + _bytes(cache / "arriving")
    found = []
    for folder in _folders(cache / "objects"):
        size = _bytes(folder)
        total += size
        with contextlib.suppress(FileNotFoundError):
            found.append(((folder / ".used").stat().st_mtime_ns, size, folder))
    for _, size, folder in sorted(found):
        if total <= limit:
            return
        if _removed(cache, folder):
            total -= size
    if total > limit and LIMIT_VARIABLE not in _warned:
        _warned.add(LIMIT_VARIABLE)
        print(f"cache: {total / 1e9:.3g} GB are in use at once, more than {LIMIT_VARIABLE}={limit / 1e9:g}; continuing",
              flush=True)  # fmt: skip


def _removed(cache: Path, folder: Path) -> bool:
    """Remove the folder of an unused object. Return False if it is in use."""
    gone = cache / "leaving" / uuid.uuid4().hex
    gone.parent.mkdir(exist_ok=True)
    try:
        with _opened(folder / ".used") as handle:
            if not _flock(handle, fcntl.LOCK_EX) or not _is_lock_of(handle, folder):
                return False
            os.rename(folder, gone)
    except FileNotFoundError:  # another process was faster
        return False
    shutil.rmtree(gone, ignore_errors=True)
    return True


def _sweep(cache: Path) -> None:
    """Remove leftovers of processes that were killed while they fetched or removed an object."""
    for folder in _folders(cache / "arriving"):
        _removed(cache, folder)
    for folder in _folders(cache / "leaving"):
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _alone(cache: Path) -> Iterator[bool]:
    """Let one process of the machine at a time make room. Yields False if a frozen one does not let go."""
    with _opened(cache / ".room") as handle:
        alone = _flock(handle, fcntl.LOCK_EX, LOCK_SECONDS) is not False
        if not alone:
            print(f"cache: {_HELD} {cache / '.room'} {_FROZEN}; continuing without making room", flush=True)
        yield alone


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """Open a lock file, made if missing. Closing it releases the lock."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        yield handle
    finally:
        os.close(handle)


def _flock(handle: int, how: int, seconds: float = 0.0) -> bool | None:
    """Take a lock. Return False if another process has held it for `seconds`, and None if flock is not supported."""
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(handle, how | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            return None
        time.sleep(0.02)  # a holder that is not frozen needs milliseconds


def _is_lock_of(handle: int, folder: Path) -> bool:
    """Return False if the folder was removed, or removed and made again, since its lock was opened."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(folder / ".used"))
    except FileNotFoundError:
        return False


def _folders(parent: Path) -> list[Path]:
    return [path for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []


def _stats(folder: Path) -> Iterator[os.stat_result]:
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                yield os.lstat(os.path.join(place, name))


def _bytes(folder: Path) -> int:
    """Return the size of all files. A file with several names counts once."""
    return sum({s.st_ino: s.st_size for s in _stats(folder) if stat.S_ISREG(s.st_mode)}.values())


def _newest(folder: Path) -> int:
    return max((s.st_mtime_ns for s in _stats(folder)), default=0)
