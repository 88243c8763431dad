"""Which objects the runs of a store need, and which of them the users' rules (`RunConfig.keep`) let go.

Decides: that a run which is not finished, or is being advanced, needs everything; that a finished one needs what its
later rounds would read, and what its rules keep. Leaves out: finding and removing files (`gc.py`).

What later rounds read is not written down here a second time: rounds are planned ahead (`runs/plans.py`) as if the run
went on, which works because object ids are fingerprints and not hashes of what comes out.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from spinreg_core.config import KeepConfig, RunConfig
from spinreg_core.config.resolve import merge, validate
from spinreg_core.runs.head import HELDOUT, Head, list_runs, require_config, require_head
from spinreg_core.runs.lease import is_held
from spinreg_core.runs.plans import average_object, objects_of
from spinreg_core.runs.stages import complete_round, is_complete, needed_by_later_stages, objects_now_and_next
from spinreg_core.store.base import Store


@dataclass
class Needs:
    """`kept`: objects that some run needs, with all their files. `known`: objects that are part of runs, and those
    runs, or will be part of one. `freed`: objects that the rules of some run let go, and why; others may need them.
    `notes`: runs whose rules wait, and for what. `complete`: whether all runs are known, so that what is of none is
    of none indeed."""

    kept: set[str] = field(default_factory=set)
    known: dict[str, list[str]] = field(default_factory=dict)
    freed: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    complete: bool = True


def store_needs(store: Store, runs: Collection[str] | None = None, keep: dict[str, Any] | None = None) -> Needs:
    """What all runs of a store need. `runs`: those whose rules count (default: all; the others keep everything).
    `keep`: fields of the configuration's group of that name, in place of theirs.

    Raises BadInput and Damaged where a run cannot be read: it may need anything.
    """
    needs, runs_here = Needs(), list_runs(store)
    named = {key.split("/")[1] for key in store.list("runs/")} | _empty_folders(store)
    for name in sorted(named - set(runs_here)):
        needs.complete = False  # its head may have been lost
        needs.notes.append(f"runs/{name} has no head.json, and what it needs is not known: what no run knows stays. To "
                           "be rid of the run, remove the rest of it")  # fmt: skip
    if not runs_here and needs.complete and store.list("objects/"):
        needs.complete = False
        needs.notes.append("there is no run here: what no run knows stays. To be rid of it, remove objects/")
    for run in runs_here:
        head, config = require_head(store, run), require_config(store, run)
        if keep:
            config = validate(merge(config.model_dump(mode="json"), {"keep": keep}))
        own, ahead = set(objects_of(config, head)), set(objects_now_and_next(config, head))
        for object_id in own | ahead:
            needs.known.setdefault(object_id, []).extend([run] if object_id in own else [])
        waits = waits_for(head)
        if waits:
            needs.kept |= own | ahead
            if (runs is None or run in runs) and config.keep != KeepConfig():
                needs.notes.append(f"run {run!r} {waits}: its rules wait for that")
        else:
            freed = released_by_rules(config, head) if runs is None or run in runs else {}
            needs.kept |= own - freed.keys()
            needs.freed |= freed
    return needs


def _empty_folders(store: Store) -> set[str]:
    """Of runs: what a place looks like where no file system is mounted."""
    runs = store.local_path("runs")
    if runs is None or not runs.is_dir():
        return set()
    return {path.name for path in runs.iterdir() if path.is_dir() and not any(path.iterdir())}


def waits_for(head: Head) -> str | None:
    """Why a run may still read any of its objects; None for a finished one."""
    if is_held(head):
        return "is being advanced (where its machine is gone: `spinreg run` of it with --until-round 0 ends that)"
    advance = head.pending_advance
    if advance is not None:
        return f"has an unfinished advance {advance.from_} -> {advance.to}"
    if head.repair is not None:
        return "has an unfinished repair"
    if complete_round(head) < head.last_round or not is_complete(head, 0):
        return f"has stages to do up to round {head.last_round}"
    return None


def released_by_rules(config: RunConfig, head: Head) -> dict[str, str]:
    """Objects of a finished run that its rules let go and its later rounds do not read, with the rule."""
    last, keep, found = complete_round(head), config.keep, dict[str, str]()
    if keep.policies != "all":
        rule = f"keep.policies: {keep.policies}"
        for number in range(1, last + 1 - keep.policies):
            found[str(head.stage(number, "train"))] = rule
            if config.training.average is not None:
                found[average_object(config, head, number)] = rule
    if keep.generations != "all":
        rule = f"keep.generations: {keep.generations}"
        for number in range(last + 1):
            found |= {one: rule for stage in ("generate", HELDOUT) if (one := head.stage(number, stage))}
    later = needed_by_later_stages(config, head)
    return {object_id: rule for object_id, rule in found.items() if object_id not in later}
