"""Open the store that a URL names: a folder or an S3 bucket."""

from __future__ import annotations

import os
from pathlib import Path

from spinreg_core.errors import BadInput, redacted
from spinreg_core.store.base import Store
from spinreg_core.store.folder import FolderStore


def open_store(url: str) -> Store:
    """Open `s3://bucket/prefix`, `file:///path` or a local folder (created on first write).

    With SPINREG_COMMITS in the environment commits of a bucket lie in the folder it names (`split.py`).
    Raises BadInput for other schemes, and for an S3 URL without a bucket.
    """
    if url.startswith("s3://"):
        if commits := os.environ.get("SPINREG_COMMITS"):
            from spinreg_core.store.split import SplitStore

            return SplitStore(url, commits)
        from spinreg_core.store.s3 import S3Store

        return S3Store(url)
    if "://" in url and not url.startswith("file://"):
        raise BadInput("store", repr(redacted(url)), "a local folder, file:///path or s3://bucket/prefix")
    try:
        return FolderStore(Path(url.removeprefix("file://")).expanduser().absolute())
    except RuntimeError as error:  # ~NAME of nobody
        raise BadInput("store", f"{url!r} ({error})", "a folder that can be found") from None
