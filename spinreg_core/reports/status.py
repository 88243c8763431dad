"""What is done of a run, what is missing and what it cost, the pending advance, and whose lease it is.

Reads only the store.
"""

from __future__ import annotations

from typing import Any

from spinreg_core.config import RunConfig
from spinreg_core.errors import BadInput, Damaged, SpinregError, StoreRefused
from spinreg_core.evaluation.early_stopping import ended_early
from spinreg_core.formatting import format_bytes
from spinreg_core.runs.head import (
    complete_round,
    list_runs,
    pending_advance,
    require_config,
    require_head,
    stage_object,
)
from spinreg_core.runs.objects import part_names, read_record, removed_keys
from spinreg_core.runs.plans import STAGE_PLANS, measured_objects
from spinreg_core.runs.stages import stages_of
from spinreg_core.store.base import Store
from spinreg_core.store.documents import plain


def run_status(store: Store, run: str) -> dict[str, Any]:
    """Everything `spinreg status` shows, as plain values. Raises BadInput where there is no such run, Damaged where
    its head or configuration cannot be read."""
    head = require_head(store, run)
    config, rounds = require_config(store, run), []
    pending = pending_advance(head)
    last = max(head.last_round, pending.to if pending else 0)
    for number in range(last + 1):
        stages: dict[str, dict[str, Any]] = {}
        for stage in stages_of(number):
            object_id = stage_object(head, number, stage)
            manifest = None if object_id is None else read_record(store, object_id)
            state = "open" if object_id is None else "missing from the store"
            if manifest is not None:
                state = "done, removed by retention" if removed_keys(manifest) else "done"
            stages[stage] = {
                "state": state, "object": object_id, "seconds": manifest["seconds"] if manifest else None,
                "bytes": sum(file["size"] for file in manifest["files"]) if manifest else None,
                "parts": 0 if object_id else _parts(store, config, head, number, stage),
            }  # fmt: skip
        measured = {}
        for name, object_id in measured_objects(head, number).items():
            manifest = read_record(store, object_id)
            measured[name] = {
                "object": object_id, "state": "missing from the store" if manifest is None else "done",
                "seconds": manifest["seconds"] if manifest else None,
            }  # fmt: skip
        rounds.append({"round": number, "stages": stages, "measured": measured})
    return {
        "run": run, "store": store.url, "complete_round": complete_round(head), "pending": plain(pending),
        "ended": ended_early(head), "repair": plain(head.repair), "lease": plain(head.lease), "rounds": rounds,
    }  # fmt: skip


def _readable(store: Store, run: str) -> dict[str, Any]:
    try:
        return run_status(store, run)
    except (Damaged, BadInput, StoreRefused) as error:
        if isinstance(error, StoreRefused) and store.local_path("runs") is None:  # of a server: not this run's alone
            raise
        return {"run": run, "store": store.url, "damaged": str(error)}


def _parts(store: Store, config: RunConfig, head: dict[str, Any], number: int, stage: str) -> int:
    """Shards or checkpoints that an open stage has committed; 0 where what it needs is open too."""
    try:
        return len(part_names(store, STAGE_PLANS[stage](config, head, number).object_id))
    except SpinregError:
        return 0


def format_status(store: Store, run: str | None) -> tuple[str, dict[str, Any]]:
    """A text for people and the same as plain values; of one run, or of every run in the store, of which one that
    cannot be read (`damaged` says why) hides no other."""
    found = [run_status(store, run)] if run is not None else [_readable(store, name) for name in list_runs(store)]
    lines = [] if found else [f"no runs in {store.url}"]
    for one in found:
        if "damaged" in one:
            lines.append(f"{one['run']}: damaged: {one['damaged']}")
            continue
        holder = one["lease"]["holder"]
        lines.append(f"{one['run']}: {one['complete_round']} complete rounds in {one['store']}")
        lines.append(
            "  lease: " + (f"{holder['label']}, pid {holder['pid']} on {holder['host']}" if holder else "free")
        )
        if one["pending"]:
            lines.append(
                f"  unfinished advance: {one['pending']['from']} -> {one['pending']['to']}, by {one['pending']['by']}"
            )
        if one["ended"]:
            lines.append(f"  {one['ended']}")
        if one["repair"]:
            stages = ", ".join(f"{made['stage']} of round {made['round']}" for made in one["repair"]["stages"])
            lines.append(f"  unfinished repair: {stages}, up to round {one['repair']['to']}")
        for entry in one["rounds"]:
            cells = [
                f"{stage} {s['state']}"
                + (f" ({s['seconds']:.0f} s, {format_bytes(s['bytes'])})" if s["seconds"] is not None else "")
                + (f" ({s['parts']} parts committed)" if s["parts"] else "")
                for stage, s in entry["stages"].items()
            ]
            lines.append(f"  round {entry['round']}: " + ", ".join(cells))
            cells = [
                f"{name} {m['state']}" + (f" ({m['seconds']:.0f} s)" if m["seconds"] is not None else "")
                for name, m in entry["measured"].items()
            ]
            if cells:
                lines.append("    measured: " + ", ".join(cells))
    return "\n".join(lines), {"runs": found}
