"""Probe a store for the two conditional writes that commits are made of: some servers accept and ignore conditions.

Decides: the requests of the probe, and the messages for a server that fails it. Leaves out: the meaning of the writes
(`base.py`).
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable

from spinreg_core.errors import BadInput, Conflict, StoreFailed, StoreRefused
from spinreg_core.store.base import Store

_REMEDY = (
    "use a folder store on a shared file system, or a server with conditional writes (AWS S3, MinIO, "
    "SeaweedFS 4.48 or later)"
)


def require_conditional_writes(store: Store) -> None:
    """Raise BadInput for a server that ignores If-None-Match or If-Match: two writers could mix there unnoticed.

    Writes a probe key of a few bytes, and removes it.
    """
    name, failure = uuid.uuid4().hex, None
    try:
        _probe(store, f"probes/{name}")
    except BadInput as error:
        failure = error
    for left in (name, f".lock-{name}"):  # a folder store makes the lock
        with contextlib.suppress(OSError, StoreFailed):  # a probe that stays behind does no harm
            store.delete(f"probes/{left}")
    if failure is not None:
        raise failure


def _probe(store: Store, key: str) -> None:
    where = f"store {store.url}"

    def overwrites(write: Callable[[], object]) -> bool:
        try:
            write()
        except Conflict:
            return False
        except StoreRefused as error:
            raise BadInput(
                where, f"cannot be written to: {error.__cause__}", "permission to write, and space"
            ) from None
        except OSError as error:
            raise BadInput(where, f"does not support conditional writes: {error}", _REMEDY) from None
        return True

    overwrites(lambda: store.create(key, b"first"))
    if overwrites(lambda: store.create(key, b"second")):
        raise BadInput(where, "is on a server that overwrote a key despite If-None-Match: *", _REMEDY)
    tagged = store.read_tagged(key)
    assert tagged is not None
    replaced = overwrites(lambda: store.replace(key, b"third", tagged[1]))
    if not replaced or overwrites(lambda: store.replace(key, b"fourth", tagged[1])):
        raise BadInput(where, "is on a server that does not honour If-Match", _REMEDY)
