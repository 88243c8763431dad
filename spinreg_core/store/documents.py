"""The small JSON documents of the store (heads, manifests, parts, orders, verdicts): their types, reading and writing.

Decides: the schema number, and the errors for an unusable document. Undeclared fields may hold anything and are kept.
Leaves out: the documents of runs and objects (`spinreg_core.runs`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import pydantic
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    model_serializer,
)

from spinreg_core.errors import BadInput, Damaged
from spinreg_core.store.base import Store, valid_key

SCHEMA = 1


def _inside(name: str) -> str:
    try:
        # A key may end in a slash, the name of a file may not.
        return valid_key(name + "/x").removesuffix("/x")
    except BadInput as error:
        raise ValueError(str(error).partition("; expected ")[2]) from None


def _finite(value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError("a finite number that is not negative")
    return value


Name = Annotated[str, AfterValidator(_inside)]
Key = Annotated[str, StringConstraints(pattern=r"^objects/[^/]+/[^/]"), AfterValidator(_inside)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
# An integer stays an integer and a float a float, because the sum of a manifest covers its JSON text.
Number = Annotated[int | float, AfterValidator(_finite)]
Round = Annotated[int, Field(ge=0, lt=100_000)]


class Document(BaseModel):
    """A JSON document, or a part of one. Undeclared fields are kept as they are."""

    model_config = ConfigDict(extra="allow", strict=True, populate_by_name=True)

    @model_serializer(mode="wrap")
    def _leave_out_absent(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Optional fields that are None were never written: heads and manifests keep the bytes of earlier versions.
        said: dict[str, Any] = handler(self)
        absent = {info.alias or name for name, info in type(self).model_fields.items() if info.default is None}
        return {name: value for name, value in said.items() if value is not None or name not in absent}

    def check(self, where: str, key: str) -> None:
        """Raise Damaged if the document at `key` breaks a rule that the types of its fields do not express."""


D = TypeVar("D", bound=Document)


def plain(document: Document | None) -> Any:
    """Return a document as plain JSON values, without fields that were never set. None stays None."""
    return None if document is None else document.model_dump(mode="python", by_alias=True, exclude_unset=True)


def fields(document: Document | Mapping[str, object]) -> dict[str, object]:
    """Return the JSON fields of a stored document, with its schema number."""
    return {"schema": SCHEMA, **(plain(document) if isinstance(document, Document) else document)}


def dump(document: Document | Mapping[str, object]) -> bytes:
    """Return the bytes of a document as the store keeps them."""
    return json.dumps(fields(document), indent=1, sort_keys=True).encode()


def digest(manifest: Document) -> str:
    """Return the SHA-256 of a manifest without `removed`, which changes later: the value of its field `sum`."""
    said = {name: value for name, value in fields(manifest).items() if name not in ("sum", "removed")}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def parse(store: Store, key: str, raw: bytes, kind: type[D]) -> D:
    """Return the document in `raw`. Raises Damaged if it is not one, BadInput for another schema."""
    where = store.uri(key)
    try:
        content = json.loads(raw)
        schema = content.pop("schema")
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise Damaged(f"{where}: found {len(raw)} bytes that spinreg did not write ({error}); expected JSON") from None
    if schema != SCHEMA or not isinstance(schema, int):
        raise BadInput(where, f"schema {schema}", f"schema {SCHEMA}; it was written by another spinreg version")
    try:
        document = kind.model_validate(content)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        found = "nothing" if first["type"] == "missing" else repr(first["input"])[:200]
        text = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        text = "what spinreg wrote there" if first["type"] == "missing" else text
        raise Damaged(f"{where}: found {found} as {place}; expected {text[:1].lower()}{text[1:]}") from None
    document.check(where, key)
    return document


def read(store: Store, key: str, kind: type[D]) -> D | None:
    """Return the document at a key, or None if there is none. Raises as `parse`."""
    raw = store.read(key)
    return None if raw is None else parse(store, key, raw, kind)
