"""Small objects for tests of the cache, in which several processes fetch the same ones."""

from __future__ import annotations

import random

from spinreg_core.runs.fetch import fetch_folder
from spinreg_core.store.base import Store
from spinreg_core.store.cache import pinned

SIZE = 100_000  # bytes of an object's policy


def content(name: str) -> bytes:
    return random.Random(name).randbytes(SIZE)


def fetch_policy(store: Store, name: str) -> None:
    with pinned():
        assert (fetch_folder(store, name, "policy") / "weights").read_bytes() == content(name)
