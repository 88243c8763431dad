"""The manifest of an object and its parts: the files it is made of, and what garbage collection took from it.

Decides: that listed files lie in their own object under safe names, because stores are shared.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, StringConstraints

from spinreg_core.errors import Damaged
from spinreg_core.store.documents import Count, Document, Key, Name, Number, Round


class File(Document):
    """A file of an object: its name there, its key in the store, its size in bytes, its content's SHA-256."""

    name: Name
    key: Key
    size: Count
    sha256: Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]


class Removed(Document):
    """The files that an object has lost to garbage collection, or is marked to lose.

    `before` is the state before the mark; `repair` names the run whose repair set the manifest aside.
    """

    marked: bool
    why: str
    at: str
    keys: list[Key]
    before: Removed | None = None
    repair: str | None = None


class Manifest(Document):
    """The description of a finished object: what made it, from which objects, and its files.

    All fields are there but in one that only marks an object without a manifest as removed (`maintenance/gc.py`).
    """

    object_id: Name
    files: list[File]
    inputs: dict[str, Any]
    removed: Removed | None = None
    stage: str = ""
    round: Round = 0
    metrics: dict[str, Any] = Field(default_factory=dict)
    seconds: Number = 0.0
    versions: dict[str, str] = Field(default_factory=dict)
    writer: str = ""
    created: str = ""
    key: Any = None
    sum: Any = None

    def check(self, where: str, key: str) -> None:
        if self.files or self.removed is None:
            for field in ("stage", "round", "metrics", "seconds", "versions", "writer", "created"):
                if field not in self.model_fields_set:
                    raise Damaged(f"{where}: found no {field}; expected a manifest as spinreg wrote it")
        removed = [] if self.removed is None else self.removed.keys
        _require_own_files(where, key, [*(file.key for file in self.files), *removed])

    @property
    def removed_keys(self) -> frozenset[str]:
        """Keys of the files that the object has lost to `spinreg gc`."""
        removed = self.removed
        if removed is not None and removed.marked:
            removed = removed.before
        return frozenset(removed.keys if removed is not None else ())

    @property
    def why_removed(self) -> str:
        assert self.removed is not None
        return f"removed by retention ({self.removed.why}, {self.removed.at})"

    def file(self, name: str) -> File | None:
        return next((file for file in self.files if file.name == name), None)

    def below(self, prefix: str) -> list[File]:
        """The files below a folder of the object."""
        return [file for file in self.files if file.name.startswith(f"{prefix}/")]


class Part(Document):
    """Files that a stage has committed before it was finished: a shard of answers, a step checkpoint.

    A void part was set aside by a repair and counts as absent.
    """

    name: Name
    files: list[File]
    meta: dict[str, Any]
    void: bool = False
    writer: str = ""
    created: str = ""

    def check(self, where: str, key: str) -> None:
        _require_own_files(where, key, [file.key for file in self.files])


def _require_own_files(where: str, key: str, files: list[str]) -> None:
    own = "/".join(key.split("/")[:2]) + "/"
    for found in files:
        if not found.startswith(own):
            raise Damaged(f"{where}: found a file at {found!r}; expected files of {own} as spinreg lists them")
