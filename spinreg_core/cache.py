"""Where spinreg keeps copies it can make again: converted models, downloads, verified files.

Decides: the folder, and that it exists. Leaves out: what lies in it (`model_source.py`, `objects.py`).
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$SPINREG_CACHE`, else ~/.cache/spinreg; created if missing. Safe to delete between runs."""
    folder = Path(os.environ.get("SPINREG_CACHE") or "~/.cache/spinreg").expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return folder
