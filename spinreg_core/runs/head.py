"""The head of a run (its lease, its recorded advances, the objects of its rounds) and its stored configuration.

Leaves out: taking the lease and changing a head (`lease.py`), the stages of a round (`stages.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from spinreg_core.config import RunConfig, fixed_fields
from spinreg_core.config.resolve import differences, resolve, stored_config
from spinreg_core.errors import BadInput, ConfigChanged, Damaged, SpinregError
from spinreg_core.runs.manifest import Manifest
from spinreg_core.store import documents
from spinreg_core.store.base import Store
from spinreg_core.store.documents import Count, Document, Key, Name, Number, Round
from spinreg_core.store.open import open_store

# Heads of 0.1.0 do not name this stage: its answers were made inside the evaluation.
HELDOUT = "generate-heldout"


class Holder(Document):
    """The process that holds a lease."""

    label: str
    host: str
    pid: Count
    identity: str | None = None

    def __str__(self) -> str:
        return f"{self.label} (pid {self.pid} on {self.host})"


class Lease(Document):
    """The right to advance a run. `epoch` counts holders, `beat` renewals.

    `seconds` is the holder's `resources.lease_seconds`: others wait that long before they take the lease over.
    """

    epoch: Count
    holder: Holder | None
    beat: Count
    seconds: Number | None = None


class Advance(Document):
    """An advance of a run from one round to another, recorded before it starts.

    `ended` is the reason for an end before its round, `ended_by` the conditions (`until`) that ended it.
    """

    by: str
    from_: Round = Field(alias="from")
    to: Round
    done: bool
    ended: str | None = None
    ended_by: dict[str, Any] | None = None


class Entry(Document):
    """The objects of a round: object ids by stage, and by kind and name of benchmark."""

    round: Round
    stages: dict[str, Name]
    measured: dict[str, Name] = Field(default_factory=dict)


class RoundStage(Document):
    """A stage of a round."""

    round: Round
    stage: str


class Repair(Document):
    """An unfinished repair (`spinreg_core.maintenance`).

    `to` is the last round that was complete. `replace` maps documents to set aside to their tags. `was` has the SHA-256
    of the content of objects before the repair, or None if it is unknown.
    """

    to: Round
    stages: list[RoundStage]
    replace: dict[Key, str]
    was: dict[Name, str | None]
    dependents: dict[Name, list[RoundStage]]


class Head(Document):
    """The head of a run: its lease, its recorded advances, and the objects of its rounds."""

    run: str
    lease: Lease
    advances: list[Advance]
    rounds: list[Entry]
    base: Name | None = None
    data: Name | None = None
    repair: Repair | None = None

    def entry(self, round_number: int) -> Entry | None:
        """Return the entry of a round, or None before its first commit."""
        return next((entry for entry in self.rounds if entry.round == round_number), None)

    def stage(self, round_number: int, stage: str) -> str | None:
        """Return the committed object of a round's stage, or None."""
        entry = self.entry(round_number)
        return None if entry is None else entry.stages.get(stage)

    def require_stage(self, round_number: int, stage: str) -> str:
        """Return the object of a committed stage. Raises SpinregError if the stage is open."""
        found = self.stage(round_number, stage)
        if found is None:
            raise SpinregError(f"run {self.run!r}: round {round_number} has no committed {stage}")
        return found

    def measured(self, iterate: int) -> dict[str, str]:
        """Return the latest objects with benchmarks of an iterate, by kind and name (`lm-eval gsm8k`)."""
        entry = self.entry(iterate)
        return {} if entry is None else dict(entry.measured)

    def enter(self, round_number: int, stage: str, object_id: str) -> None:
        """Record the object of a round's stage."""
        entry = self.entry(round_number)
        if entry is None:
            entry = Entry(round=round_number, stages={})
            self.rounds.append(entry)
        entry.stages[stage] = object_id

    @property
    def last_round(self) -> int:
        """The last round that has begun."""
        return max((entry.round for entry in self.rounds), default=0)

    @property
    def pending_advance(self) -> Advance | None:
        """The recorded advance that has not been finished, or None."""
        return next((advance for advance in reversed(self.advances) if not advance.done), None)

    @property
    def ended_early(self) -> str | None:
        """The reason for which the last advance ended early, as the rest of a sentence; None if it did not."""
        last = self.advances[-1] if self.advances else None
        return f"ended before round {last.to}: {last.ended}" if last is not None and last.ended else None

    @property
    def has_begun(self) -> bool:
        """True once anything is committed; from then on the configuration is fixed."""
        return self.base is not None or bool(self.rounds)


class Configuration(Document):
    """The stored configuration of a run, and the epoch of the lease it was written under (0 before the first)."""

    config: dict[str, Any]
    epoch: Count | None = None


def head_key(run: str) -> str:
    return f"runs/{run}/head.json"


def config_key(run: str) -> str:
    return f"runs/{run}/run.json"


def read_head(store: Store, run: str) -> Head | None:
    """Return the head of a run, or None if there is no such run."""
    head = documents.read(store, head_key(run), Head)
    if head is not None:
        name_heldout_answers(store, head)
    return head


def name_heldout_answers(store: Store, head: Head) -> None:
    """Enter the held-out answers that evaluations of 0.1.0 were made from, as their manifests say.

    The manifest decides, not the configuration: `engine: auto` may have stood for another engine on another machine.
    Answers of an evaluation without a readable manifest stay unnamed; `spinreg verify` reports that manifest.
    """
    # A repair opens the stage while the evaluation of the old answers is still committed.
    opened = {made.round for made in (head.repair.stages if head.repair else ()) if made.stage == HELDOUT}
    for entry in head.rounds:
        evaluation = entry.stages.get("evaluate")
        if evaluation is not None and HELDOUT not in entry.stages and entry.round not in opened:
            with contextlib.suppress(Damaged, BadInput):
                manifest = documents.read(store, f"objects/{evaluation}/manifest.json", Manifest)
                answers = None if manifest is None else manifest.inputs.get("heldout")
                if isinstance(answers, str):
                    entry.stages[HELDOUT] = answers


def require_head(store: Store, run: str) -> Head:
    """Return the head of a run. Raises BadInput with the names of existing runs if there is no such run."""
    head = read_head(store, run)
    if head is None:
        raise BadInput("run", repr(run), f"one of the runs of {store.url}: {', '.join(list_runs(store)) or '(none)'}")
    return head


def read_config(store: Store, run: str) -> RunConfig | None:
    """Return the configuration of a run, or None if there is no such run.

    Raises Damaged if the run exists and its configuration does not.
    """
    document = documents.read(store, config_key(run), Configuration)
    if document is not None:
        return stored_config(document.config, store.uri(config_key(run)))
    head = documents.read(store, head_key(run), Head)
    return require_config(store, run) if head is not None and head.has_begun else None


def resolve_run(given: Mapping[str, object], file: str | None) -> RunConfig:
    """Return the configuration of fields and a file; an existing run gives the fields that both leave out.

    Raises BadInput, and what the store of the configuration raises where it cannot be used.
    """
    wanted = resolve(given, file)
    store = open_store(wanted.store)
    store.check()
    return resolve(given, file, stored=read_config(store, wanted.run))


def require_config(store: Store, run: str) -> RunConfig:
    """Return the configuration of an existing run. Raises Damaged if it is missing."""
    return read_config_with_tag(store, run)[0]


def read_config_with_tag(store: Store, run: str) -> tuple[RunConfig, str]:
    """Return the stored configuration of an existing run, and its tag."""
    found = store.read_tagged(config_key(run))
    if found is None:
        raise Damaged(f"{store.uri(config_key(run))}: found nothing; expected the configuration of run {run!r}")
    document = documents.parse(store, config_key(run), found[0], Configuration)
    return stored_config(document.config, store.uri(config_key(run))), found[1]


def list_runs(store: Store) -> list[str]:
    """Return the names of the runs in a store, sorted."""
    return sorted({key.split("/")[1] for key in store.list("runs/") if key.endswith("/head.json")})


def check_config(stored: RunConfig, given: RunConfig) -> None:
    """Raise ConfigChanged unless both differ only in the fields that may change."""
    found = differences(fixed_fields(stored), fixed_fields(given))
    if found:
        raise ConfigChanged(given.run, found)
