"""The status of runs: finished and missing stages with their cost, pending advances, lease holders.

Reads the store only.
"""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict, final

from spinreg_core.config import RunConfig
from spinreg_core.errors import BadInput, Damaged, SpinregError, StoreRefused
from spinreg_core.formatting import format_bytes
from spinreg_core.runs.head import Head, list_runs, require_config, require_head
from spinreg_core.runs.manifest import Manifest
from spinreg_core.runs.objects import part_names, read_record
from spinreg_core.runs.stages import STAGES, complete_round, stages_of
from spinreg_core.store.base import Store
from spinreg_core.store.documents import plain


class ObjectStatus(TypedDict):
    """A stage or benchmark of a round. Stages have `bytes` and `parts`, too.

    `parts` counts the shards or checkpoints that an open stage has committed.
    """

    state: str
    object: str | None
    seconds: float | None
    bytes: NotRequired[int | None]
    parts: NotRequired[int]


class RoundStatus(TypedDict):
    round: int
    stages: dict[str, ObjectStatus]
    measured: dict[str, ObjectStatus]


@final
class RunStatus(TypedDict):
    """The status of a run. `ended` says why it ended before its round, or is None."""

    run: str
    store: str
    complete_round: int
    pending: dict[str, Any] | None
    ended: str | None
    repair: dict[str, Any] | None
    lease: dict[str, Any]
    rounds: list[RoundStatus]


@final
class DamagedRun(TypedDict):
    """A run that cannot be read; `damaged` says why."""

    run: str
    store: str
    damaged: str


class StoreStatus(TypedDict):
    runs: list[RunStatus | DamagedRun]


def run_status(store: Store, run: str) -> RunStatus:
    """Return the status of a run as plain JSON values: `seconds` in wall-clock seconds, `bytes` of committed files.

    Raises:
        BadInput: the store has no such run.
        Damaged: the head or the configuration of the run cannot be read.
    """
    head, config = require_head(store, run), require_config(store, run)
    last = max(head.last_round, head.pending_advance.to if head.pending_advance else 0)
    rounds: list[RoundStatus] = []
    for number in range(last + 1):
        found = {stage: _stage(store, config, head, number, stage) for stage in stages_of(number)}
        measured = {name: _measured(store, one) for name, one in head.measured(number).items()}
        rounds.append({"round": number, "stages": found, "measured": measured})
    return {
        "run": run, "store": store.url, "complete_round": complete_round(head), "pending": plain(head.pending_advance),
        "ended": head.ended_early, "repair": plain(head.repair), "lease": plain(head.lease), "rounds": rounds,
    }  # fmt: skip


def format_status(store: Store, run: str | None) -> tuple[str, StoreStatus]:
    """Return the status of a run, or of all runs in the store, as text and as plain JSON values.

    Among all runs, one that cannot be read hides no other. Raises as `run_status`, and StoreRefused.
    """
    found: list[RunStatus | DamagedRun]
    found = [run_status(store, run)] if run is not None else [_readable(store, name) for name in list_runs(store)]
    lines = [line for one in found for line in _lines(one)] or [f"no runs in {store.url}"]
    return "\n".join(lines), {"runs": found}


def _stage(store: Store, config: RunConfig, head: Head, number: int, stage: str) -> ObjectStatus:
    object_id = head.stage(number, stage)
    state, record = _state(store, object_id)
    return {
        "state": state, "object": object_id, "seconds": record.seconds if record else None,
        "bytes": sum(file.size for file in record.files) if record else None,
        "parts": 0 if object_id else _parts(store, config, head, number, stage),
    }  # fmt: skip


def _measured(store: Store, object_id: str) -> ObjectStatus:
    state, record = _state(store, object_id)
    return {"object": object_id, "state": state, "seconds": record.seconds if record else None}


def _state(store: Store, object_id: str | None) -> tuple[str, Manifest | None]:
    """Return the state of an object in words, and its manifest."""
    if object_id is None:
        return "open", None
    record = read_record(store, object_id)
    if record is None:
        return "missing from the store", None
    return ("done, removed by retention" if record.removed_keys else "done"), record


def _parts(store: Store, config: RunConfig, head: Head, number: int, stage: str) -> int:
    try:
        return len(part_names(store, STAGES[stage].plan(config, head, number).object_id))
    except SpinregError:
        # An earlier stage is open too, so the object has no id yet.
        return 0


def _readable(store: Store, run: str) -> RunStatus | DamagedRun:
    try:
        return run_status(store, run)
    except (Damaged, BadInput, StoreRefused) as error:
        # A folder may refuse the files of one run; a server that refuses, refuses them all.
        if isinstance(error, StoreRefused) and store.local_path("runs") is None:
            raise
        return {"run": run, "store": store.url, "damaged": str(error)}


def _lines(one: RunStatus | DamagedRun) -> list[str]:
    if "damaged" in one:
        return [f"{one['run']}: damaged: {one['damaged']}"]
    holder = one["lease"]["holder"]
    told = f"{holder['label']}, pid {holder['pid']} on {holder['host']}" if holder else "free"
    lines = [f"{one['run']}: {one['complete_round']} complete rounds in {one['store']}", f"  lease: {told}"]
    if pending := one["pending"]:
        lines.append(f"  unfinished advance: {pending['from']} -> {pending['to']}, by {pending['by']}")
    if one["ended"]:
        lines.append(f"  {one['ended']}")
    if repair := one["repair"]:
        stages = ", ".join(f"{made['stage']} of round {made['round']}" for made in repair["stages"])
        lines.append(f"  unfinished repair: {stages}, up to round {repair['to']}")
    for entry in one["rounds"]:
        cells = []
        for stage, s in entry["stages"].items():
            cost = f" ({s['seconds']:.0f} s, {format_bytes(s['bytes'] or 0)})" if s["seconds"] is not None else ""
            parts = f" ({s['parts']} parts committed)" if s["parts"] else ""
            cells.append(f"{stage} {s['state']}{cost}{parts}")
        lines.append(f"  round {entry['round']}: " + ", ".join(cells))
        cells = [
            f"{name} {m['state']}" + (f" ({m['seconds']:.0f} s)" if m["seconds"] is not None else "")
            for name, m in entry["measured"].items()
        ]
        if cells:
            lines.append("    measured: " + ", ".join(cells))
    return lines
