"""SHA-256 of files. Reading a file counts as a transfer."""

from __future__ import annotations

import hashlib
from pathlib import Path

from spinreg_core.store.base import PART_BYTES, os_errors_as_store_refused
from spinreg_core.store.transfers import track_transfer


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal. Raises StoreRefused for a file that cannot be read."""
    digest = hashlib.sha256()
    with (
        os_errors_as_store_refused(f"reading {path}"),
        track_transfer(f"reading {path}") as moved,
        open(path, "rb") as file,
    ):
        while data := file.read(PART_BYTES):
            digest.update(data)
            moved(len(data))
    return digest.hexdigest()
