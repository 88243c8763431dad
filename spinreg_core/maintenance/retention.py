"""The objects that the runs of a store need, and those that the users' rules (`RunConfig.keep`) release.

Decides: that a run which is unfinished or being advanced needs everything, and that a finished run needs the objects
its later rounds would read and those its rules keep. Leaves out: finding and removing files (`gc.py`).

The reads of later rounds are not listed here again: rounds are planned ahead (`spinreg_core.runs.stages`) as if the run
continued. That works because object ids are fingerprints of keys and not hashes of results.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from spinreg_core.config import KeepConfig, RunConfig
from spinreg_core.config.resolve import merge, validate
from spinreg_core.runs.head import HELDOUT, Head, list_runs, require_config, require_head
from spinreg_core.runs.lease import is_held
from spinreg_core.runs.plans import average_object
from spinreg_core.runs.stages import (
    complete_round,
    is_complete,
    needed_by_later_stages,
    objects_now_and_next,
    objects_of,
)
from spinreg_core.store.base import Store


@dataclass
class Needs:
    """The objects that the runs of a store need, as of one reading of all heads.

    kept: objects that a run needs with all their files.
    known: objects that are or will be part of runs, with the names of the runs they are part of.
    freed: objects that the rules of a run release, with the rule; another run may need them.
    notes: runs with rules that wait, and the reasons.
    complete: whether all runs are known. Otherwise an object of no known run may belong to a run with a lost head.
    """

    kept: set[str] = field(default_factory=set)
    known: dict[str, list[str]] = field(default_factory=dict)
    freed: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    complete: bool = True


def store_needs(store: Store, runs: Collection[str] | None = None, keep: Mapping[str, object] | None = None) -> Needs:
    """Return the needs of all runs of a store.

    `runs` have rules that count (default: all); other runs keep everything. `keep` has fields of the group `keep` of
    the configuration, which win over those of the runs.

    Raises BadInput and Damaged for an unreadable run: it may need anything.
    """
    needs, runs_here = Needs(), list_runs(store)
    named = {key.split("/")[1] for key in store.list("runs/")} | _empty_folders(store)
    for name in sorted(named - set(runs_here)):
        needs.complete = False
        needs.notes.append(f"runs/{name} has no head.json, and what it needs is not known: what no run knows stays. To "
                           "be rid of the run, remove the rest of it")  # fmt: skip
    if not runs_here and needs.complete and store.list("objects/"):
        needs.complete = False
        needs.notes.append("there is no run here: what no run knows stays. To be rid of it, remove objects/")
    for run in runs_here:
        head, config = require_head(store, run), require_config(store, run)
        if keep:
            config = validate(merge(config.model_dump(mode="json"), {"keep": dict(keep)}))
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
    """Return the empty folders of `runs/`: each may be the mount point of a file system that is not mounted."""
    runs = store.local_path("runs")
    if runs is None or not runs.is_dir():
        return set()
    return {path.name for path in runs.iterdir() if path.is_dir() and not any(path.iterdir())}


def waits_for(head: Head) -> str | None:
    """Return why a run may still read any of its objects, or None for a finished run."""
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
    """Return the objects of a finished run that its rules release and no later round reads, with the rule."""
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
