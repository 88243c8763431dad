"""Does a store's server do the two writes that commits are made of? Many answer as if they did.

Decides: how that is found out, and what is said where it does not. Leaves out: what the writes promise (`base.py`).
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable

from spinreg_core.errors import BadInput, Conflict, StoreFailed, StoreRefused
from spinreg_core.store.base import Store


def require_conditional_writes(store: Store) -> None:
    """Refuse a store whose server ignores If-None-Match or If-Match: two writers could mix there unseen.

    Writes a probe key of a few bytes, and removes it. Raises BadInput.
    """
    name, refused = uuid.uuid4().hex, None
    try:
        _probe(store, f"probes/{name}")
    except BadInput as error:
        refused = error
    for left in (name, f".lock-{name}"):  # the lock: of a folder
        with contextlib.suppress(OSError, StoreFailed):  # a store that keeps everything is none the worse for it
            store.delete(f"probes/{left}")
    if refused is not None:
        raise refused


def _probe(store: Store, key: str) -> None:
    expected = (
        "an S3 server with conditional writes (AWS, SeaweedFS >= 4.48, MinIO), or SPINREG_COMMITS (docs/reliability.md)"
    )

    def overwrites(write: Callable[[], object]) -> bool:
        try:
            write()
        except Conflict:
            return False
        except StoreRefused as error:
            found = f"{store.url}, which cannot be written to: {error.__cause__}"
            raise BadInput("store", found, "room, and the right to write") from None
        except OSError as error:
            raise BadInput("store", f"{store.url}, which refuses conditional writes: {error}", expected) from None
        return True

    overwrites(lambda: store.create(key, b"first"))
    if overwrites(lambda: store.create(key, b"second")):
        raise BadInput("store", f"{store.url}, whose server overwrote a key in spite of If-None-Match: *", expected)
    tagged = store.read_tagged(key)
    assert tagged is not None
    if overwrites(lambda: store.replace(key, b"third", tagged[1])) and not overwrites(
        lambda: store.replace(key, b"fourth", tagged[1])
    ):
        return
    raise BadInput("store", f"{store.url}, whose server does not go by If-Match", expected)
