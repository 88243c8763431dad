"""Where spinreg keeps copies it can make again: files of remote stores, converted and downloaded models.

Decides: the folder; that copies of objects stay within $SPINREG_CACHE_GB, those unused for longest leaving first, and
never one that a process uses. Leaves out: what a copy must be (`runs/objects.py`); models (`models/source.py`: not
counted).

    objects/<object id>/   copies of one object; who uses it holds a shared lock on `.used`, whose mtime says since when
    arriving/<random>/     files on their way, in the size they will have; who fetches them holds a lock on `.used`
    leaving/<random>/      was an object until it was renamed to be removed

The locks are flocks, which end with their process. Who removes an object's folder holds its lock alone and renames it
first, so that half an object is never found under its name; what killed processes left in `reserve_space` and `leaving`
goes when something is fetched next. Without locks (some network file systems) nothing is removed.
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
_SILENCE_SECONDS = 60.0  # of a process that fetches what we need too, after which we fetch it ourselves
_LOCK_SECONDS = 60.0  # after which another process that holds a lock counts as frozen
_HELD = "was held by another process for a minute"
_FROZEN = "a frozen one? `fuser` names it"
_POLL_SECONDS = 0.2
_in_use: dict[Path, int] = {}  # the open lock of each object's folder this process uses
_said: set[str] = set()


def cache_folder() -> Path:
    """`$SPINREG_CACHE`, else ~/.cache/spinreg; created if missing. Safe to delete between runs. Raises BadInput for a
    limit that is none, before there is anything to limit, and for a place where no folder can be."""
    cache_limit()
    given = os.environ.get("SPINREG_CACHE") or "~/.cache/spinreg"
    try:
        folder = Path(given).expanduser().absolute()
    except RuntimeError as error:  # ~NAME of nobody
        raise BadInput("SPINREG_CACHE", f"{given!r} ({error})", "a folder that can be found") from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput("SPINREG_CACHE", f"{folder} ({error.strerror})", "a folder, or a place for one") from None
    return folder


def require_cache() -> None:
    """Raise BadInput where there is no cache, or none that can be written to."""
    folder = cache_folder()
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise BadInput("SPINREG_CACHE", f"{folder} ({error.strerror})", "a folder that can be written to") from None


def cache_limit() -> int | None:
    """Bytes that copies of objects may take on this machine (`$SPINREG_CACHE_GB`), or None. Raises BadInput."""
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
    """The folder for copies of an object, which stays until this process ends or the block of `pinned` does."""
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
            if _flock(handle, fcntl.LOCK_SH, _LOCK_SECONDS) is False:
                raise StoreFailed(f"using {folder}: found that its .used {_HELD}; expected it to be let go ({_FROZEN})")
        except BaseException:
            os.close(handle)
            raise
        _in_use[folder] = handle
    os.utime(handle)
    return folder


@contextlib.contextmanager
def pinned() -> Iterator[None]:
    """What is fetched inside is in use until the end of the block only: for processes that live for days."""
    before = set(_in_use)
    try:
        yield
    finally:
        for folder in set(_in_use) - before:
            os.close(_in_use.pop(folder))


@contextlib.contextmanager
def fetch_lock(folder: Path) -> Iterator[None]:
    """One process at a time fetches into an object's folder; the others wait as long as bytes arrive."""
    handle = os.open(folder / ".fetching", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        seen, since = None, time.monotonic()
        while _flock(handle, fcntl.LOCK_EX) is False and time.monotonic() - since < _SILENCE_SECONDS:
            now = _newest(cache_folder() / "arriving")
            if now != seen:
                seen, since = now, time.monotonic()
            time.sleep(_POLL_SECONDS)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def reserve_space(sizes: Sequence[int]) -> Iterator[list[Path]]:
    """Empty files of these sizes, to be filled and moved into an object's folder; there is room for them, if there can
    be. What is left of them at the end is removed."""
    cache = cache_folder()
    folder = cache / "arriving" / uuid.uuid4().hex
    with _alone(cache) as alone:
        if alone:
            _sweep(cache)
            _make_room(cache, sum(sizes))
        folder.mkdir(parents=True)
        handle = os.open(folder / ".used", os.O_RDWR | os.O_CREAT, 0o666)
        _flock(handle, fcntl.LOCK_EX, _LOCK_SECONDS)
        paths = [folder / str(number) for number in range(len(sizes))]
        for path, size in zip(paths, sizes, strict=True):  # so that the next one knows what will be there
            path.touch()
            os.truncate(path, size)
    try:
        yield paths
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def _make_room(cache: Path, needed: int) -> None:
    """Remove objects nobody uses, those unused for longest first, until there is room for so many bytes."""
    limit = cache_limit()
    if limit is None:
        return
    # What arrives is counted first: a file that moves into its object meanwhile counts twice, which does no harm.
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
    if total > limit and LIMIT_VARIABLE not in _said:
        _said.add(LIMIT_VARIABLE)
        print(f"cache: {total / 1e9:.3g} GB are in use at once, more than {LIMIT_VARIABLE}={limit / 1e9:g}; going on",
              flush=True)  # fmt: skip


def _removed(cache: Path, folder: Path) -> bool:
    """Whether a folder that nobody uses was removed; False where it is in use."""
    gone = cache / "leaving" / uuid.uuid4().hex
    gone.parent.mkdir(exist_ok=True)
    try:
        handle = os.open(folder / ".used", os.O_RDWR | os.O_CREAT, 0o666)
    except FileNotFoundError:
        return False
    try:
        if not _flock(handle, fcntl.LOCK_EX) or not _is_lock_of(handle, folder):
            return False
        os.rename(folder, gone)
    finally:
        os.close(handle)
    shutil.rmtree(gone, ignore_errors=True)
    return True


def _sweep(cache: Path) -> None:
    """Remove what processes left that were killed while they fetched or removed."""
    for folder in _folders(cache / "arriving"):
        _removed(cache, folder)
    for folder in _folders(cache / "leaving"):
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _alone(cache: Path) -> Iterator[bool]:
    """One process of the machine at a time, for as long as room is made; False where a frozen one does not end."""
    handle = os.open(cache / ".room", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        alone = _flock(handle, fcntl.LOCK_EX, _LOCK_SECONDS) is not False
        if not alone:
            print(f"cache: {cache / '.room'} {_HELD} ({_FROZEN}); going on without making room", flush=True)
        yield alone
    finally:
        os.close(handle)


def _flock(handle: int, how: int, seconds: float = 0.0) -> bool | None:
    """Whether the lock is ours; False where another process has held it for so long, None where there are no locks."""
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
        time.sleep(0.02)  # who is not frozen needs milliseconds


def _is_lock_of(handle: int, folder: Path) -> bool:
    """Whether what we have open is still the lock of the folder, which may have been removed and made anew before."""
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
    """Of all files, each counted once however many names it has."""
    return sum({s.st_ino: s.st_size for s in _stats(folder) if stat.S_ISREG(s.st_mode)}.values())


def _newest(folder: Path) -> int:
    return max((s.st_mtime_ns for s in _stats(folder)), default=0)
