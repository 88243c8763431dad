"""Bytes under keys, in a folder or an S3 bucket, with conditional writes and a cache on this machine."""

from spinreg_core.store.base import Store
from spinreg_core.store.open import open_store

__all__ = ["Store", "open_store"]
