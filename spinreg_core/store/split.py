"""Files in a bucket, commits in a folder: for S3 servers without conditional writes.

Decides: which keys lie where, and that a bucket whose commits lie elsewhere says so. Leaves out: both stores themselves
(`base.py`, `s3.py`).

What two writers may meet over is small: heads, configurations, manifests, parts. They lie in `$SPINREG_COMMITS`, a
folder that all machines of a run share and whose file system honours flock and link (a local disk, NFSv4, Lustre with
-o flock), below the bucket's and prefix's names. Files of weights and rows, which have one writer each, stay in the
bucket. Both hold a `commits.json` with one random id, so that a folder which is not mounted is not taken for an empty
one; markers of earlier versions have none, and get one with the next commit.
"""

from __future__ import annotations

import contextlib
import os
import re
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spinreg_core.errors import BadInput, Conflict
from spinreg_core.store import documents
from spinreg_core.store.base import Listed, Store
from spinreg_core.store.documents import SCHEMA
from spinreg_core.store.folder import FolderStore
from spinreg_core.store.s3 import COMMITS_MARKER, S3Store

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

    def check(self) -> None:
        """As every store's; also refuses a bucket whose commits lie in it, or in another folder. Changes nothing: the
        bucket is marked as ours by the first commit."""
        self._commits.check()
        self._files.check_bucket()
        marker = documents.read(self._files, COMMITS_MARKER)
        if marker is not None:
            self._require_folder_of(marker)
            return
        inside = next((key for key in self._files.list("runs") if key.endswith("/head.json")), None)
        if inside is not None:
            raise BadInput("store", f"{self.url} with {inside}, a run whose commits lie in the bucket",
                           f"a prefix without runs, or no {VARIABLE}")  # fmt: skip

    def _require_folder_of(self, marker: dict[str, Any]) -> None:
        """Raise BadInput unless our folder is the very one that the bucket's marker tells of: an empty mount point has
        its path too, and to whoever takes that for the folder the bucket's files are of no run."""
        if marker["commits"] != self._commits.url:
            raise BadInput(VARIABLE, f"commits of {self.url} in {self._commits.url}",
                           f"{marker['commits']}, where its runs are")  # fmt: skip
        own = documents.read(self._commits, COMMITS_MARKER)
        if "id" in marker:
            found = f"without a {COMMITS_MARKER}" if own is None else f"with {own.get('id', 'none')} as its id"
            same = own is not None and own.get("id") == marker["id"]
        else:  # of a version that gave none
            found, same = "without any file", any(names for _, _, names in os.walk(self._commits.root))
        if not same:
            raise BadInput(VARIABLE, f"{self._commits.url} {found}",
                           f"the folder with the commits of {self.url} (is its file system mounted?)")  # fmt: skip

    def _mark(self) -> None:
        """Let bucket and folder name one id, the folder first: a kill then leaves no bucket without a folder."""
        marker = documents.read(self._files, COMMITS_MARKER)
        if marker is not None:
            self._require_folder_of(marker)
            if "id" in marker:
                return
        about = {"schema": SCHEMA, "commits": self._commits.url}
        with contextlib.suppress(Conflict):  # it has one: of a process that was killed here, or is as far as we are
            self._commits.create(COMMITS_MARKER, documents.dump(about | {"id": uuid.uuid4().hex}))
        own = documents.read(self._commits, COMMITS_MARKER)
        assert own is not None
        self._files.write(COMMITS_MARKER, documents.dump(about | {"id": own["id"]}))
        # Another first start, with another folder, may have found no marker either. Who reads before the other has
        # written is refused at its next commit.
        marker = documents.read(self._files, COMMITS_MARKER)
        assert marker is not None
        self._require_folder_of(marker)

    def _of(self, key: str) -> Store:
        return self._files if _FILES.match(key) else self._commits

    def read(self, key: str) -> bytes | None:
        return self._of(key).read(key)

    def read_tagged(self, key: str) -> tuple[bytes, str] | None:
        return self._of(key).read_tagged(key)

    def create(self, key: str, data: bytes) -> str:
        self._mark()
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

    def abort_unfinished(self, name: str) -> None:
        (self._files if "?" in name else self._commits).abort_unfinished(name)  # "?": an upload's id

    def local_path(self, key: str) -> Path | None:
        return self._of(key).local_path(key)

    def uri(self, key: str) -> str:
        return self._of(key).uri(key)
