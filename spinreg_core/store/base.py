"""The contract of a store: bytes under keys, with the two writes that commits are made of.

Decides: the meaning of create-only and compare-and-swap, valid keys, and that a reader never sees half a file.
Leaves out: the stores themselves (`folder.py`, `s3.py`), and the content of keys and the right to write (`runs/`).

Tags are opaque: equal tags mean unchanged content.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from spinreg_core.errors import BadInput, StoreRefused, problem_text

# In a store without a prefix, everything else belongs to others.
OURS = ("objects", "runs", "comparisons", "probes")
# The key that spinreg 0.1.0 wrote into a bucket to say that its commits lie in a folder.
COMMITS_MARKER = "commits.json"
PART_BYTES = 16 * 2**20  # of a file that is copied: a few parts are in memory at a time
NO_RIGHT = (errno.EACCES, errno.EPERM, errno.EROFS)
_LONGEST_NAME = 255  # bytes, on every usual file system


class Listed(NamedTuple):
    """One entry of a listing: key, size in bytes, and age in seconds since it was written, by the store's own clock."""

    key: str
    size: int
    age: float


class Store(Protocol):
    """Bytes under relative, '/'-separated keys. Only `delete` removes a key, and only `abort_unfinished` a write that
    never became one.

    Every method raises StoreRefused where permissions, credentials or space do not allow it, and StoreFailed where the
    store does not respond within the retry window.
    """

    url: str

    def check(self) -> None:
        """Raise BadInput for a place that cannot hold a store: no bucket, no permission, a file in the way."""

    def read(self, key: str) -> bytes | None:
        """Return the content, or None where the key does not exist."""

    def read_tagged(self, key: str) -> tuple[bytes, str] | None:
        """Return content and tag, read together, or None where the key does not exist."""

    def create(self, key: str, data: bytes) -> str:
        """Write a key that must not exist, and return its tag. Raises Conflict if it holds other content."""

    def replace(self, key: str, data: bytes, tag: str) -> str:
        """Write a key that must still have this tag, and return the new one. Raises Conflict if it changed."""

    def write(self, key: str, data: bytes) -> None:
        """Write a key, replacing any content. Only for views that can be rebuilt, such as reports."""

    def upload(self, path: Path, key: str) -> None:
        """Copy a local file of any size, in parts, to a key that has no other writer."""

    def download(self, key: str, path: Path) -> None:
        """Copy a key of any size to a local file. Raises FileNotFoundError where the key does not exist."""

    def delete(self, key: str) -> None:
        """Remove a key. Does nothing where the key does not exist."""

    def size(self, key: str) -> int | None:
        """Return the size in bytes, or None where the key does not exist."""

    def list(self, prefix: str) -> list[str]:
        """Return all keys below a prefix that ends in '/', sorted."""

    def entries(self, prefix: str) -> Sequence[Listed]:
        """Return the same keys with their sizes and ages."""

    def unfinished(self) -> Sequence[Listed]:
        """List writes that have not ended, under names of their own: in progress, or of a killed process."""

    def abort_unfinished(self, name: str) -> None:
        """Remove the data of an unfinished write. Does nothing where the write has ended."""

    def local_path(self, key: str) -> Path | None:
        """Return the path of a key on this machine, or None for a remote store."""

    def uri(self, key: str) -> str:
        """Return the address of a key for messages and people."""


def stays_inside(name: str) -> bool:
    """Return True for a relative, '/'-separated name that does not lead out of its folder."""
    return all(part not in ("", ".", "..") for part in name.split("/")) and min(name) >= " "


def require_own_commits(store: Store) -> None:
    """Raise BadInput for a store of spinreg 0.1.0 that holds files only, with its commits in a folder elsewhere."""
    if store.read(COMMITS_MARKER) is not None:
        found = f"holds {COMMITS_MARKER}: its commits lie in the folder that SPINREG_COMMITS named"
        expected = f"run `python scripts/join_commits.py {store.url} FOLDER` once to copy them into it"
        raise BadInput(f"store {store.url}", found, expected)


def require_inside(folder: Path, paths: Iterable[Path], field: str) -> None:
    """Raise BadInput, naming the configuration field, for a link that leads out of a user's folder.

    Such a link would store other files of this machine with the run. A folder of the Hugging Face cache links to the
    `blobs` of its own repository, and these count as inside.
    """
    root = folder.resolve()
    own = (root, root.parents[1] / "blobs") if len(root.parts) > 3 and root.parent.name == "snapshots" else (root,)
    for path in paths:
        real = path.resolve()
        if not any(real.is_relative_to(place) for place in own):
            raise BadInput(field, str(path) if path == real else f"{path}, a link to {real}",
                           f"files inside {folder}; name the other place itself, or copy the file")  # fmt: skip


@contextlib.contextmanager
def os_errors_as_store_refused(action: str) -> Iterator[None]:
    """Turn operating system errors inside the block into StoreRefused; FileNotFoundError passes through."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        expected = "check the path and the disk"
        if error.errno in NO_RIGHT:
            expected = "permission to do it"
        elif error.errno in (errno.ENOSPC, errno.EDQUOT):
            expected = (
                "free some space (`spinreg gc` lists objects that no run needs) and start the same command again, "
                "which resumes from its last commit"
            )
        raise StoreRefused(problem_text(action, error, expected)) from error


def valid_key(key: str) -> str:
    """Return the key. Raises BadInput for one that leads out of the store or that some file system cannot hold."""
    if not stays_inside(key.removesuffix("/")):
        raise BadInput("store key", repr(key), "a relative path without '.', '..', control characters or empty parts")
    raw = key.encode(errors="replace")
    if raw.decode() != key or any(len(part) > _LONGEST_NAME for part in raw.split(b"/")):
        raise BadInput("store key", repr(key), f"names of UTF-8 without NUL, of at most {_LONGEST_NAME} bytes")
    return key
