"""The small JSON documents of the store (heads, configurations, manifests, parts): written and read in one way.

Decides: the schema number they carry and the errors of a document that cannot be used. Leaves out: what they say.
"""

from __future__ import annotations

import json
from typing import Any

from spinreg_core.errors import BadInput, Damaged
from spinreg_core.store import Store

SCHEMA = 1


def dump(document: dict[str, Any]) -> bytes:
    return json.dumps(document, indent=1, sort_keys=True).encode()


def parse(store: Store, key: str, raw: bytes) -> dict[str, Any]:
    """The document in `raw`. Raises Damaged for anything that is none, BadInput for one of another schema."""
    try:
        document = json.loads(raw)
        schema = document["schema"]
    except (ValueError, TypeError, KeyError) as error:
        raise Damaged(
            f"{store.uri(key)}: found {len(raw)} bytes that spinreg did not write ({error}); expected JSON"
        ) from None
    if schema != SCHEMA:
        raise BadInput(
            store.uri(key), f"schema {schema}", f"schema {SCHEMA}; it was written by another spinreg version"
        )
    return document


def read(store: Store, key: str) -> dict[str, Any] | None:
    """The document at a key, or None where there is none. Raises as `parse`."""
    raw = store.read(key)
    return None if raw is None else parse(store, key, raw)
