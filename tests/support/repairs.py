"""Damage to toy runs, and its repair as the command does it."""

from __future__ import annotations

import json
from typing import Any

from spinreg_core.maintenance.repair import begin
from spinreg_core.maintenance.verify import verify
from spinreg_core.runs import objects
from spinreg_core.runs.head import head_key, require_config
from spinreg_core.runs.lease import hold_lease, make_holder
from spinreg_core.runs.stages import objects_of
from spinreg_core.store.base import Store
from spinreg_core.store.documents import plain
from tests.support.toy_runs import Make, advance, digest_of
from tests.support.watched_store import head_of


def damage(store: Store, object_id: str | None) -> str:
    """Put other bytes into the first file of an object. Returns its id."""
    assert object_id is not None
    file = objects.require_manifest(store, object_id).files[0]
    path = store.local_path(file.key)
    assert path is not None
    # It may be a hard link to a file of another store.
    path.unlink()
    path.write_bytes(b"X" * file.size)
    return object_id


def repair(store: Store, run: str, damaged: list[str] | None = None, *, make: Make = digest_of) -> None:
    """Make again what is damaged, by the steps of `spinreg verify --repair`."""
    damaged = verify(store, run).damaged if damaged is None else damaged
    with hold_lease(store, require_config(store, run), "spinreg verify --repair") as session:
        begin(store, session, damaged)
    advance(store, require_config(store, run), 0, make=make)


def expire_lease(store: Store, run: str) -> None:
    """Clear the lease of a process that was killed, as if it had run out."""
    raw, tag = store.read_tagged(head_key(run)) or (b"", "")
    head = json.loads(raw)
    head["lease"]["holder"] = None
    store.replace(head_key(run), json.dumps(head).encode(), tag)


def take_lease(store: Store, run: str) -> None:
    """Give the lease to another process."""
    raw, tag = store.read_tagged(head_key(run)) or (b"", "")
    head = json.loads(raw)
    epoch = head["lease"]["epoch"] + 1
    head["lease"] = {"epoch": epoch, "holder": plain(make_holder("second")), "beat": 0}
    store.replace(head_key(run), json.dumps(head).encode(), tag)


class Dice:
    """Make stages that do not repeat themselves: once `thrown` changes, the same stage comes out otherwise.

    What was made of what is remembered, to see whether a run is of one piece.
    """

    def __init__(self) -> None:
        self.thrown, self.read = 0, dict[bytes, list[bytes]]()

    def __call__(self, key: dict[str, Any], read: list[bytes]) -> bytes:
        made = digest_of(key, [*read, str(self.thrown).encode()])
        self.read[made] = read
        return made

    def of_one_piece(self, store: Store, run: str) -> bool:
        """Return whether all that a run consists of was made of what is there now."""
        there = set[bytes]()
        for object_id in objects_of(require_config(store, run), head_of(store, run)):
            there |= {store.read(file.key) or b"" for file in objects.require_manifest(store, object_id).files}
        return all(there.issuperset(self.read.get(made, ())) for made in there)
