"""Bytes under keys, with the two writes that commits are made of: what every store promises, and one in a local folder.

Decides: what create-only and compare-and-swap mean, and that a reader never sees half a file.
Leaves out: stores on S3 (`s3.py`), what the bytes are (`runs/objects.py`, `runs/head.py`) and who may write
(`runs/head.py`).

Tags are opaque: equal tags mean unchanged content.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from spinreg_core.errors import BadInput, StoreRefused

OURS = ("objects", "runs", "comparisons", "probes")  # what lies beside these, in a store without a prefix, is others'
PART_BYTES = 16 * 2**20  # multipart size: a file passes through a few of these
NO_RIGHT = (errno.EACCES, errno.EPERM, errno.EROFS)
_LONGEST_NAME = 255  # bytes, on every usual file system


class Listed(NamedTuple):
    """`age`: seconds since it was written, by the store's own clock."""

    key: str
    size: int
    age: float


class Store(Protocol):
    """Keys are relative, '/'-separated. Nothing is deleted but by `delete`, and `abort_unfinished`, which no key knows
    of."""

    url: str

    def check(self) -> None:
        """Raise BadInput where nothing can be kept: no such bucket, no permission, no server, a file in the way."""

    def read(self, key: str) -> bytes | None:
        """Content, or None where the key does not exist."""

    def read_tagged(self, key: str) -> tuple[bytes, str] | None:
        """Content and its tag, read together."""

    def create(self, key: str, data: bytes) -> str:
        """Write a key that must not exist; returns its tag. Conflict if it holds other content."""

    def replace(self, key: str, data: bytes, tag: str) -> str:
        """Write a key whose tag must still be `tag`; returns the new tag. Conflict if it changed."""

    def write(self, key: str, data: bytes) -> None:
        """Write a key whatever it held. Only for views that can be rebuilt (reports)."""

    def upload(self, path: Path, key: str) -> None:
        """Copy a local file of any size to a key nobody else writes; streamed in parts."""

    def download(self, key: str, path: Path) -> None:
        """Copy a key of any size to a local file; FileNotFoundError where there is none."""

    def delete(self, key: str) -> None:
        """Remove a key. Does nothing where it does not exist."""

    def size(self, key: str) -> int | None:
        """Length in bytes, or None where the key does not exist."""

    def list(self, prefix: str) -> list[str]:
        """All keys below a prefix ending in '/', sorted."""

    def entries(self, prefix: str) -> Sequence[Listed]:
        """The same with sizes and ages."""

    def unfinished(self) -> Sequence[Listed]:
        """Writes that were begun and not ended, by names of their own: under way, or their process was killed."""

    def abort_unfinished(self, name: str) -> None:
        """Remove what is there of an unfinished write. Does nothing where it has ended."""

    def local_path(self, key: str) -> Path | None:
        """Where the bytes lie on this machine, or None for a remote store."""

    def uri(self, key: str) -> str:
        """The address a person can open."""


def stays_inside(name: str) -> bool:
    """Whether a relative '/'-separated name is one of something inside the place it is relative to."""
    return all(part not in ("", ".", "..") for part in name.split("/")) and min(name) >= " "


def require_inside(folder: Path, paths: Iterable[Path], field: str) -> None:
    """Raise BadInput, naming the configuration field, for a link that leads out of a folder somebody handed over: what
    it shows of this machine would be stored with the run. The hub's cache of a repository is one folder with its blobs.
    """
    root = folder.resolve()
    own = (root, root.parents[1] / "blobs") if len(root.parts) > 3 and root.parent.name == "snapshots" else (root,)
    for path in paths:
        real = path.resolve()
        if not any(real.is_relative_to(place) for place in own):
            raise BadInput(field, str(path) if path == real else f"{path}, a link to {real}",
                           f"files inside {folder}; name the other place itself, or copy the file")  # fmt: skip


@contextlib.contextmanager
def os_errors_as_store_refused(what: str) -> Iterator[None]:
    """An error of the operating system, but for a file that is not there, as StoreRefused."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        expected = "the right to do it" if error.errno in NO_RIGHT else "what belongs there, on a disk that works"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            expected = (
                "room; what was committed stays. Free some (`spinreg gc` lists what no run needs any more), and the "
                "same command goes on from there"
            )
        raise StoreRefused(f"{what}: found {error}; expected {expected}") from error


def valid_key(key: str) -> str:
    if not stays_inside(key.removesuffix("/")):
        raise BadInput("store key", repr(key), "a relative path without '.', '..', control characters or empty parts")
    raw = key.encode(errors="replace")
    if raw.decode() != key or any(len(part) > _LONGEST_NAME for part in raw.split(b"/")):
        raise BadInput("store key", repr(key), f"names of UTF-8 without NUL, of at most {_LONGEST_NAME} bytes")
    return key
