"""Small JSON documents of the store: heads, manifests, parts, orders, verdicts and others.

Decides: their schema number, the fields that readers rely on, and the errors of an unusable document. Stores are
shared, so the files of a manifest or part must lie in its own object. Leaves out: the meaning of documents. A field
that no reader relies on may hold anything.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from typing import Annotated, Any, NotRequired

import pydantic
from pydantic import AfterValidator, Field, StringConstraints
from typing_extensions import TypedDict

from spinreg_core.errors import BadInput, Damaged
from spinreg_core.store.base import Store, valid_key

SCHEMA = 1


def _inside(name: str) -> str:
    try:
        return valid_key(name + "/x").removesuffix("/x")  # a key may end in a slash, a file's name may not
    except BadInput as error:
        raise ValueError(str(error).partition("; expected ")[2]) from None


Name = Annotated[str, AfterValidator(_inside)]
Key = Annotated[str, StringConstraints(pattern=r"^objects/[^/]+/[^/]"), AfterValidator(_inside)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Number = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Round = Annotated[int, Field(ge=0, lt=100_000)]


class File(TypedDict):
    name: Name
    key: Key
    size: Count
    sha256: Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]


class Removed(TypedDict):
    marked: bool
    why: str
    at: str
    keys: list[Key]
    before: NotRequired[Removed]  # of a marked manifest: its record before it was marked
    repair: NotRequired[str]  # the run whose repair set the manifest aside


class Manifest(TypedDict):
    object_id: Name
    files: list[File]
    inputs: dict[str, Any]
    removed: NotRequired[Removed]
    # A manifest that only marks an object without files (`maintenance/`) has none of these.
    stage: NotRequired[str]
    round: NotRequired[Round]
    metrics: NotRequired[dict[str, Any]]
    seconds: NotRequired[Number]
    versions: NotRequired[dict[str, str]]
    writer: NotRequired[str]
    created: NotRequired[str]


class Part(TypedDict):
    name: Name
    files: list[File]
    meta: dict[str, Any]
    void: NotRequired[bool]  # set aside by a repair, and ignored


class Holder(TypedDict):
    label: str
    host: str
    pid: Count
    identity: NotRequired[str | None]


class Lease(TypedDict):
    epoch: Count
    holder: Holder | None
    beat: Count
    seconds: NotRequired[Number]


# `ended`: the reason for ending before round `to`. `ended_by`: the conditions (`until`) that were met.
Advance = TypedDict(
    "Advance",
    {
        "by": str, "from": Round, "to": Round, "done": bool,
        "ended": NotRequired[str | None], "ended_by": NotRequired[dict[str, Any]],
    },
)  # fmt: skip


class Entry(TypedDict):
    round: Round
    stages: dict[str, Name]
    measured: NotRequired[dict[str, Name]]  # benchmarks of the iterate, by kind and name


class Made(TypedDict):
    round: Round
    stage: str


class Repair(TypedDict):
    """A repair in progress (`maintenance/`).

    `to`: the last complete round. `was`: SHA-256 of each object's content, None if unknown.
    """

    to: Round
    stages: list[Made]
    replace: dict[Key, str]
    was: dict[Name, str | None]
    dependents: dict[Name, list[Made]]


class Head(TypedDict):
    run: str
    lease: Lease
    advances: list[Advance]
    rounds: list[Entry]
    base: NotRequired[Name | None]
    data: NotRequired[Name | None]
    repair: NotRequired[Repair]


class Configuration(TypedDict):
    config: dict[str, Any]
    epoch: NotRequired[Count]  # of the lease under which it was written; 0: before the run had a head


class Order(TypedDict):
    attempt: str | None
    epoch: Count
    job: NotRequired[dict[str, Any]]


class Failure(TypedDict):
    status: int
    message: str


class Marker(TypedDict):
    commits: str
    id: NotRequired[str]


class Usage(TypedDict):
    prompt_tokens: Count
    answer_tokens: Count
    counted: bool


class Verdict(TypedDict):
    request: dict[str, Any]
    content: str
    finish: str
    usage: Usage
    payer: str


_KINDS: dict[str, Any] = {
    "head.json": Head, "run.json": Configuration, "manifest.json": Manifest, "order.json": Order,
    "commits.json": Marker,
}  # fmt: skip


@cache
def _adapter(kind: Any) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(kind)


def _kind(key: str) -> Any:
    folder, _, name = key.rpartition("/")
    if key.startswith("verdicts/"):
        return Verdict
    if name.endswith("-manifest.json"):  # set aside by a repair
        return Manifest
    return Failure if folder.endswith("/failures") else _KINDS.get(name, Part)


def dump(document: dict[str, Any]) -> bytes:
    return json.dumps(document, indent=1, sort_keys=True).encode()


def digest(document: dict[str, Any]) -> str:
    """Return the SHA-256 of a manifest as it was made, without later records of removal: its field `sum`."""
    said = {name: value for name, value in document.items() if name not in ("sum", "removed")}
    return hashlib.sha256(json.dumps(json.loads(dump(said)), sort_keys=True).encode()).hexdigest()


def parse(store: Store, key: str, raw: bytes) -> dict[str, Any]:
    """Return the document in `raw`. Raises Damaged for other content, and BadInput for another schema."""
    where = store.uri(key)
    try:
        document = json.loads(raw)
        schema = document["schema"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise Damaged(f"{where}: found {len(raw)} bytes that spinreg did not write ({error}); expected JSON") from None
    if schema != SCHEMA or not isinstance(schema, int):
        raise BadInput(where, f"schema {schema}", f"schema {SCHEMA}; it was written by another spinreg version")
    try:
        _adapter(_kind(key)).validate_python(document, strict=True)
        if key.endswith("manifest.json") and (document["files"] or "removed" not in document):
            for field in ("stage", "round", "metrics", "seconds", "versions", "writer", "created"):
                if field not in document:
                    raise Damaged(f"{where}: found no {field}; expected a manifest as spinreg wrote it")
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        found = "nothing" if first["type"] == "missing" else repr(first["input"])[:200]
        text = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        text = "what spinreg wrote there" if first["type"] == "missing" else text
        raise Damaged(f"{where}: found {found} as {place}; expected {text[:1].lower()}{text[1:]}") from None
    if key.startswith("objects/"):
        _require_own_files(where, key, document)
    return document  # type: ignore[no-any-return]


def _require_own_files(where: str, key: str, document: dict[str, Any]) -> None:
    own = "/".join(key.split("/")[:2]) + "/"
    keys = [entry["key"] for entry in document["files"]] + document.get("removed", {}).get("keys", [])
    for found in keys:
        if not found.startswith(own):
            raise Damaged(f"{where}: found a file at {found!r}; expected files of {own} as spinreg lists them")


def read(store: Store, key: str) -> dict[str, Any] | None:
    """Return the document at a key, or None where the key does not exist. Raises as `parse`."""
    raw = store.read(key)
    return None if raw is None else parse(store, key, raw)
