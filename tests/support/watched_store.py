"""Stores that are watched or interrupted before some of their calls, and what tests of maintenance ask of a store."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from spinreg_core.maintenance.gc import Removable, find_removable, remove_items
from spinreg_core.maintenance.retention import Needs, store_needs
from spinreg_core.maintenance.verify import verify
from spinreg_core.runs.head import Head, read_head
from spinreg_core.store.base import Store

CHANGES = ("create", "replace", "write", "upload", "delete", "abort_unfinished")
CALLS = (*CHANGES, "read", "read_tagged", "download", "size", "list", "entries", "unfinished")


class Watched:
    """A store that says so before each of some calls."""

    def __init__(self, store: Store, before: Callable[[], None], calls: tuple[str, ...] = CALLS) -> None:
        self._store, self._before, self._calls = store, before, calls

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)
        if name not in self._calls:
            return found

        def call(*arguments: Any) -> Any:
            self._before()
            return found(*arguments)

        return call


class Altered:
    """A store with other functions in place of some calls: `Altered(store, size=...)`."""

    def __init__(self, store: Store, **calls: Callable[..., Any]) -> None:
        self._store, self._calls = store, calls

    def __getattr__(self, name: str) -> Any:
        return self._calls.get(name) or getattr(self._store, name)


def head_of(store: Store, run: str) -> Head:
    head = read_head(store, run)
    assert head is not None
    return head


def gc(store: Store, runs: list[str] | None = None) -> list[Removable]:
    def needs_now() -> Needs:
        return store_needs(store, runs)

    return remove_items(store, find_removable(store, needs_now(), rules_only=runs is not None), needs_now)


def sound(store: Store) -> bool:
    return all(verify(store, run).problems == [] for run in {key.split("/")[1] for key in store.list("runs/")})


class Killed(BaseException):
    pass
