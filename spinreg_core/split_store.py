"""Files in a bucket, commits in a folder: for S3 servers without conditional writes.

Decides: which keys lie where, and that a bucket whose commits lie elsewhere says so. Leaves out: both stores themselves
(`store.py`, `s3_store.py`).

What two writers may meet over is small: heads, configurations, manifests, parts. They lie in `$SPINREG_COMMITS`, a
folder that all machines of a run share and whose file system honours flock and link (a local disk, NFSv4, Lustre with
-o flock), below the bucket's and prefix's names. Files of weights and rows, which have one writer each, stay in the
bucket.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from spinreg_core import documents
from spinreg_core.documents import SCHEMA
from spinreg_core.errors import BadInput
from spinreg_core.s3_store import COMMITS_MARKER, S3Store
from spinreg_core.store import FolderStore, Listed, Store

VARIABLE = "SPINREG_COMMITS"
_FILES = re.compile(r"objects/[^/]+/data/")


class SplitStore:
    """The two as one store; `url` is the bucket's."""

    def __init__(self, url: str, commits: str) -> None:
        if not commits.startswith("/"):
            raise BadInput(VARIABLE, repr(commits), "an absolute path of a folder that all machines share")
        self._files = S3Store(url)
        self._commits = FolderStore(Path(commits) / self._files.bucket / self._files.prefix)
        self.url = self._files.url
        self._marked = False  # as far as we know

    def check(self) -> None:
        """As every store's; also refuses a bucket whose commits lie in it, or in another folder. Changes nothing: the
        bucket is marked as ours by the first commit."""
        self._commits.check()
        self._files.check_bucket()
        found = self._files.read(COMMITS_MARKER)
        if found is None:
            inside = next((key for key in self._files.list("runs") if key.endswith("/head.json")), None)
            if inside is not None:
                raise BadInput("store", f"{self.url} with {inside}, a run whose commits lie in the bucket",
                               f"a prefix without runs, or no {VARIABLE}")  # fmt: skip
        elif (folder := documents.parse(self._files, COMMITS_MARKER, found)["commits"]) != self._commits.url:
            raise BadInput(VARIABLE, f"commits of {self.url} in {self._commits.url}", f"{folder}, where its runs are")

    def _of(self, key: str) -> Store:
        return self._files if _FILES.match(key) else self._commits

    def read(self, key: str) -> bytes | None:
        return self._of(key).read(key)

    def read_tagged(self, key: str) -> tuple[bytes, str] | None:
        return self._of(key).read_tagged(key)

    def create(self, key: str, data: bytes) -> str:
        if not self._marked:
            if self._files.read(COMMITS_MARKER) is None:
                self._files.write(COMMITS_MARKER, documents.dump({"schema": SCHEMA, "commits": self._commits.url}))
            self._marked = True
        return self._commits.create(key, data)

    def replace(self, key: str, data: bytes, tag: str) -> str:
        return self._commits.replace(key, data, tag)

    def write(self, key: str, data: bytes) -> None:
        self._of(key).write(key, data)

    def upload(self, path: Path, key: str) -> None:
        self._of(key).upload(path, key)

    def download(self, key: str, path: Path) -> None:
        self._of(key).download(key, path)

    def delete(self, key: str) -> None:
        self._of(key).delete(key)

    def size(self, key: str) -> int | None:
        return self._of(key).size(key)

    def list(self, prefix: str) -> list[str]:
        return sorted([*self._commits.list(prefix), *filter(_FILES.match, self._files.list(prefix))])

    def entries(self, prefix: str) -> Sequence[Listed]:
        own = [entry for entry in self._files.entries(prefix) if _FILES.match(entry.key)]
        return sorted([*self._commits.entries(prefix), *own])

    def unfinished(self) -> Sequence[Listed]:
        return [*self._commits.unfinished(), *self._files.unfinished()]

    def drop(self, name: str) -> None:
        (self._files if "?" in name else self._commits).drop(name)  # an upload has its id behind a question mark

    def local_path(self, key: str) -> Path | None:
        return self._of(key).local_path(key)

    def uri(self, key: str) -> str:
        return self._of(key).uri(key)
