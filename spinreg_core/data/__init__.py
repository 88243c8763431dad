"""Supervised data: reading, checking, splitting, tokenising rows. Importing this loads nothing heavy."""

from spinreg_core.data.formats import Rejected, Row
from spinreg_core.data.load import Loaded, load_heldout, load_rows, require_usable
from spinreg_core.data.split import split_rows

__all__ = ["Loaded", "Rejected", "Row", "load_heldout", "load_rows", "require_usable", "split_rows"]
