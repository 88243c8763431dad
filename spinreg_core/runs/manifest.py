"""The manifest of an object and its parts: its files, and those that garbage collection has removed.

Decides: that listed files lie in their own object under safe names, because stores are shared.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import Field, StringConstraints

from spinreg_core.errors import Damaged
from spinreg_core.store.documents import Count, Document, Key, Name, Number, Round


class File(Document):
    """A file of an object: its name in the object, its key in the store, its size in bytes, and its SHA-256."""

    name: Name
    key: Key
    size: Count
    sha256: Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]


class Removal(Document):
    """The files that an object has lost to garbage collection, or is marked to lose.

    `before` is the state before the mark. `repair` names the run that is repairing the object: its manifest is set
    aside, and the object counts as absent until it is made again.
    """

    marked: bool
    why: str
    at: str
    keys: list[Key]
    before: Removal | None = None
    repair: str | None = None


class Manifest(Document):
    """The description of a finished object: its stage, the objects it was made from, and its files.

    All fields are set, except in a manifest that only marks an unfinished object as removed. `sum` is the SHA-256 of
    the manifest without `removed`, which garbage collection changes later.
    """

    object_id: Name
    files: list[File]
    inputs: dict[str, Any]
    removed: Removal | None = None
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
        # Files of a marked object are still there; it has lost those of the state before the mark.
        if removed is not None and removed.marked:
            removed = removed.before
        return frozenset(removed.keys if removed is not None else ())

    @property
    def why_removed(self) -> str:
        """The rule that removed files and the time, for messages."""
        assert self.removed is not None
        return f"removed by retention ({self.removed.why}, {self.removed.at})"

    def file(self, name: str) -> File | None:
        """Return the file of a name, or None."""
        return next((file for file in self.files if file.name == name), None)


class Part(Document):
    """Files that a stage commits before it is finished: a shard of answers, a step checkpoint.

    A repair has set a void part aside; it counts as absent.
    """

    name: Name
    files: list[File]
    meta: dict[str, Any]
    void: bool = False
    writer: str = ""
    created: str = ""

    def check(self, where: str, key: str) -> None:
        _require_own_files(where, key, [file.key for file in self.files])


def files_below(prefix: str, files: Iterable[File]) -> list[File]:
    """Return the files below a folder of their object."""
    return [file for file in files if file.name.startswith(f"{prefix}/")]


def _require_own_files(where: str, key: str, files: list[str]) -> None:
    own = "/".join(key.split("/")[:2]) + "/"
    for found in files:
        if not found.startswith(own):
            raise Damaged(f"{where}: found a file at {found!r}; expected files of {own} as spinreg lists them")
