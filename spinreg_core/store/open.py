"""Open the store that a URL names: a folder or an S3 bucket."""

from __future__ import annotations

import os
from pathlib import Path

from spinreg_core.errors import BadInput, redacted
from spinreg_core.store.base import Store
from spinreg_core.store.folder import FolderStore


def open_store(url: str) -> Store:
    """Open `s3://bucket/prefix`, `file:///path` or a local folder (created on first write).

    Raises BadInput for other schemes, for an S3 URL without a bucket, and for a bucket while SPINREG_COMMITS is set.
    """
    if url.startswith("s3://"):
        # Ignoring it would hide all runs of a store that spinreg 0.1.0 kept in that folder.
        if os.environ.get("SPINREG_COMMITS"):
            expected = (
                "remove it from the environment, after `python scripts/join_commits.py BUCKET FOLDER` has copied the "
                "commits of an existing store from that folder into its bucket"
            )
            raise BadInput("SPINREG_COMMITS", "is set, but spinreg keeps commits in the bucket itself now", expected)
        from spinreg_core.store.s3 import S3Store

        return S3Store(url)
    if "://" in url and not url.startswith("file://"):
        raise BadInput("store", repr(redacted(url)), "a local folder, file:///path or s3://bucket/prefix")
    try:
        return FolderStore(Path(url.removeprefix("file://")).expanduser().absolute())
    except RuntimeError as error:  # ~NAME of an unknown user
        raise BadInput("store", f"{url!r} ({error})", "a folder that can be found") from None
