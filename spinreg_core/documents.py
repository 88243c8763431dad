"""The small JSON documents of the store (heads, configurations, manifests, parts): written and read in one way.

Decides: the schema number they carry, the errors of a document that cannot be used, and that the files a manifest or
part lists lie in its own object under names that lead nowhere else: stores are shared. Leaves out: what they say.
"""

from __future__ import annotations

import json
import re
from typing import Any

from spinreg_core.errors import BadInput, Damaged
from spinreg_core.store import Store, stays_inside

SCHEMA = 1
_SHA256 = re.compile("[0-9a-f]{64}")


def dump(document: dict[str, Any]) -> bytes:
    return json.dumps(document, indent=1, sort_keys=True).encode()


def parse(store: Store, key: str, raw: bytes) -> dict[str, Any]:
    """The document in `raw`. Raises Damaged for anything that is none, BadInput for one of another schema."""
    try:
        document = json.loads(raw)
        schema = document["schema"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise Damaged(
            f"{store.uri(key)}: found {len(raw)} bytes that spinreg did not write ({error}); expected JSON"
        ) from None
    if schema != SCHEMA:
        raise BadInput(
            store.uri(key), f"schema {schema}", f"schema {SCHEMA}; it was written by another spinreg version"
        )
    if key.startswith("objects/"):
        _require_own_files(store, key, document)
    return document


def _require_own_files(store: Store, key: str, document: dict[str, Any]) -> None:
    own = "/".join(key.split("/")[:2]) + "/"
    try:
        for entry in document["files"]:
            for place in (entry["name"], entry["key"].removeprefix(own)):
                if not stays_inside(place):
                    raise ValueError(f"a file named {place!r}")
            if not entry["key"].startswith(own):
                raise ValueError(f"a file at {entry['key']!r}")
            if not _SHA256.fullmatch(entry["sha256"]) or type(entry["size"]) is not int or entry["size"] < 0:
                raise ValueError(f"SHA-256 {entry['sha256']!r} and size {entry['size']!r} of {entry['name']!r}")
        for gone in document.get("removed", {}).get("keys", ()):
            if not gone.startswith(own) or not stays_inside(gone):
                raise ValueError(f"a file at {gone!r}")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        found = f"no {error}" if isinstance(error, KeyError) else error
        raise Damaged(f"{store.uri(key)}: found {found}; expected files of {own} as spinreg lists them") from None


def read(store: Store, key: str) -> dict[str, Any] | None:
    """The document at a key, or None where there is none. Raises as `parse`."""
    raw = store.read(key)
    return None if raw is None else parse(store, key, raw)
