"""SHA-256 of files, counted as a transfer while it reads."""

from __future__ import annotations

import hashlib
from pathlib import Path

from spinreg_core.store.base import PART_BYTES, refusals
from spinreg_core.store.transfers import moving


def sha256_file(path: Path) -> str:
    """Raises StoreRefused for a file that is there and cannot be read."""
    digest = hashlib.sha256()
    with refusals(f"reading {path}"), moving(f"reading {path}") as moved, open(path, "rb") as file:
        while data := file.read(PART_BYTES):
            digest.update(data)
            moved(len(data))
    return digest.hexdigest()
