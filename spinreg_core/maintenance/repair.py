"""Making anew what `verify` found damaged, and what was made from it where it comes out otherwise.

Decides: the order of every step of a repair. Leaves out: what counts as damage (`verify.py`), how stages are made
(`stages/`, by way of the flow `spin`).

A repair is recorded in the head of its run, and whoever starts the run next finishes it before anything else; the
recorded advances are not touched. Nothing is removed. In this order, all of it under the lease of the run:

1. What was found damaged is read once more, and the tags of its manifests and parts are kept. It may be sound by now:
   somebody else has repaired it since, and then there is nothing to do. What cannot be made anew, because rules of the
   user have removed what it is made from, stays as it is.
2. Where a run that is being advanced has one of the objects, or one that was made from them, the repair is refused.
3. One compare-and-swap of the head: the stages are open again, and the head says which documents are to be set aside
   (with their tags), what the content of the objects was, and what was made from them.
4. These documents are set aside, parts first, each by compare-and-swap with its tag: a part is made void, a manifest is
   marked `removed` by this repair (a copy stays in `aside/`). Whoever makes the object does not find it any more, and
   its publication replaces the marked manifest; its files stay, for other runs that read them meanwhile.
5. The stages work, as any open ones, from the shards that are sound.
6. The content of the objects is compared with what it was. Where it is another one, or nobody knows what it was, what
   was made from them is next: one compare-and-swap of the head puts their record in place of this one, with all their
   parts, and it goes on with 4. Else one compare-and-swap takes the record away.

Killed before 3, nothing has happened. Killed after 3, the head says what is left: 4 does nothing where it was done, as
the tags are others then; 5 goes on from what is committed; 6 reads only. A writer that lost its lease fails at 3 and 6,
whose tags it does not have; what it still does in 4 is what its successor does, or nothing, because no tag of what was
made anew is that of what was damaged. A run that starts after 2 and shares an object reads the old files, or makes the
object itself: who publishes first counts, as always.

`verify`, `status` and `resume` tell of a repair that was not finished, and `spinreg gc` waits for it.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

from spinreg_core.config import RunConfig
from spinreg_core.errors import BadInput, Conflict, Damaged, LeaseHeld
from spinreg_core.maintenance.verify import Stage, Verdict, verify
from spinreg_core.runs.head import Head, Made, Repair, list_runs, require_config, require_head
from spinreg_core.runs.lease import RunLease, describe_lease, is_held
from spinreg_core.runs.manifest import Manifest, Part, Removed
from spinreg_core.runs.objects import now, read_manifest
from spinreg_core.runs.stages import complete_round, needed_by_later_stages, objects_now_and_next, stages_of
from spinreg_core.store import documents
from spinreg_core.store.base import Store


def begin(
    store: Store, session: RunLease, damaged: Collection[str], say: Callable[[str], object] = lambda line: None
) -> list[Stage]:
    """Steps 1 to 3 for those of these objects of the session's run that are damaged still; returns the stages that are
    open now. Raises LeaseHeld (another run is being advanced and has one of the objects) and LeaseLost."""
    verdict = verify(store, session.run, only=damaged)
    stages = _possible(verdict, {verdict.objects[object_id] for object_id in verdict.damaged}, say)
    if not stages:
        return []
    # With all that a stage makes on its way (answers of an evaluation, an average): it is looked for first. Base, data
    # and benchmarks are each by itself.
    taken = {o for o in verdict.damaged if verdict.objects[o] in stages}
    single = ("prepare", "benchmark")
    taken |= {o for o, stage in verdict.objects.items() if stage in stages and stage[1] not in single}
    bad = {problem.file for problem in verdict.problems}
    dependents = {o: verdict.dependents[o] for o in taken if o not in verdict.opened}
    after = {stage for found in dependents.values() for stage in found}
    _require_idle(store, session.run, taken | {o for o, stage in verdict.objects.items() if stage in after})
    repair = Repair(
        to=complete_round(session.head),
        stages=_listed(stages),
        replace=_documents(verdict, taken, lambda files: files is None or not bad.isdisjoint(files)),
        was={o: verdict.content.get(o) for o in dependents},
        dependents={o: _listed(found) for o, found in dependents.items()},
    )

    def change(head: Head) -> None:
        _open(head, stages)
        head.repair = repair if head.repair is None else _both(head.repair, repair)

    session.update(change)
    return sorted(stages)


def stages_to_make(
    store: Store, session: RunLease, config: RunConfig, say: Callable[[str], object] = lambda line: None
) -> Iterator[Stage]:
    """Finish the repair that the head records, if there is one: steps 4 to 6. Yields the stages to make, in their
    order; each must be committed when the next one is asked for. Those of rounds that were not complete are left open,
    as they were. Raises as `begin`."""
    while (repair := session.head.repair) is not None:
        session.check()
        _set_aside(store, session.run, repair.replace)
        stages, head = _stages(repair.stages), session.head
        if any(one and read_manifest(store, one) is None for one in (head.base, head.data)):
            yield 0, "prepare"
        for number in range(repair.to + 1):
            for stage in stages_of(number):
                if _is_missing(store, config, session.head, (number, stage), stages):
                    yield number, stage
        _go_on(store, session, say)


def _is_missing(store: Store, config: RunConfig, head: Head, made: Stage, opened: Collection[Stage]) -> bool:
    """Whether a stage was opened by the repair, or a rule removed what it made and an open stage reads that."""
    object_id = head.stage(*made)
    if object_id is None:
        return made in opened
    return read_manifest(store, object_id) is None and object_id in needed_by_later_stages(config, head)


def _go_on(store: Store, session: RunLease, say: Callable[[str], object]) -> None:
    """Step 6."""
    repair, verdict = session.head.repair, verify(store, session.run, only=())
    assert repair is not None
    others = [o for o, was in repair.was.items() if was is None or verdict.content.get(o) != was]
    stages = _possible(verdict, {stage for o in others for stage in _stages(repair.dependents[o])}, say)
    # Parts of stages that are open are made from the last rounds, and may be made from these.
    taken = {o for o, stage in verdict.objects.items() if stage in stages or (others and o in verdict.opened)}
    after = None
    if taken:
        say(f"not what it was: {', '.join(others)}")
        _require_idle(store, session.run, taken)
        replace = _documents(verdict, taken, lambda files: True)
        after = Repair(to=repair.to, stages=_listed(stages), replace=replace, was={}, dependents={})

    def change(head: Head) -> None:
        _open(head, stages)
        head.repair = after

    session.update(change)


def _possible(verdict: Verdict, stages: set[Stage], say: Callable[[str], object]) -> set[Stage]:
    """Those of these stages that can be made anew: what rules removed of their inputs can be made once more, as it was
    made from what is there. The others stay as they are, so that the run can go on."""
    while True:
        taken = {o for o, stage in verdict.objects.items() if stage in stages}
        gone = verdict.removed.keys() - taken
        lost = {one for one in gone if not gone.isdisjoint(verdict.made_from.get(one, ()))}
        impossible: dict[Stage, set[str]] = {}
        for object_id in taken:
            if found := lost.intersection(verdict.made_from.get(object_id, ())):
                impossible.setdefault(verdict.objects[object_id], set()).update(found)
        if not impossible:
            return stages
        for (number, stage), found in sorted(impossible.items()):
            why = f"made from {min(found)}, {verdict.removed[min(found)]}, as was what that is made from"
            say(f"{stage} of round {number} cannot be made anew and stays as it is: {why}")
        stages = stages - impossible.keys()


def _open(head: Head, stages: Collection[Stage]) -> None:
    for entry in head.rounds:
        entry.stages = {s: o for s, o in entry.stages.items() if (entry.round, s) not in stages}


def _both(old: Repair, new: Repair) -> Repair:
    """The record of a repair that finds another one unfinished."""
    # What was made from the new ones may be among what the old one opened, and then is not in the head.
    behind = _stages(old.stages).union(*map(_stages, old.dependents.values()))
    dependents = {o: _listed(_stages(found) | behind) for o, found in new.dependents.items()}
    dependents |= {o: _listed(_stages(f) | _stages(dependents.get(o, ()))) for o, f in old.dependents.items()}
    return Repair(
        to=max(old.to, new.to),
        stages=_listed(_stages(old.stages) | _stages(new.stages)),
        replace=old.replace | new.replace,
        was=new.was | old.was,
        dependents=dependents,
    )


def _documents(
    verdict: Verdict, objects: Collection[str], unsound: Callable[[Collection[str] | None], bool]
) -> dict[str, str]:
    """Manifests of objects, and those of their parts that are unsound, by what files they list (None: one that cannot
    be read): keys, and their tags."""
    return {
        key: tag for key, (tag, files) in verdict.documents.items()
        if key.split("/")[1] in objects and (key.endswith("/manifest.json") or unsound(files))
    }  # fmt: skip


def _set_aside(store: Store, run: str, replace: Mapping[str, str]) -> None:
    """Step 4."""
    for key, tag in sorted(replace.items(), key=lambda item: item[0].endswith("/manifest.json")):
        found = store.read_tagged(key)
        if found is None or found[1] != tag:
            continue
        if key.endswith("/manifest.json"):
            name = f"{hashlib.sha256(found[0]).hexdigest()[:16]}-manifest.json"
            store.create(f"objects/{key.split('/')[1]}/aside/{name}", found[0])
            document: Manifest | Part = _marked(store, run, key, found[0])
        else:
            document = Part(name=key.rpartition("/")[2].removesuffix(".json"), files=[], meta={}, void=True)
        with contextlib.suppress(Conflict):
            store.replace(key, documents.dump(document), tag)


def _marked(store: Store, run: str, key: str, raw: bytes) -> Manifest:
    """A manifest that says it was set aside; of one that cannot be read, no more than that there was one."""
    try:
        record = documents.parse(store, key, raw, Manifest)
    except (Damaged, BadInput):
        object_id = key.split("/")[1]
        record = Manifest(
            object_id=object_id, files=[], inputs={}, metrics={}, seconds=0.0, stage=object_id.rpartition("-")[0],
            round=0, versions={}, writer="", created=now(),
        )  # fmt: skip
    keys, old = sorted(record.removed_keys), record.removed
    why, at = (old.why, old.at) if keys and old else (f"set aside by the repair of run {run!r}", now())
    record.removed = Removed(marked=False, why=why, at=at, keys=keys, repair=run)
    return record


def _require_idle(store: Store, run: str, objects: Collection[str]) -> None:
    """Raise LeaseHeld where another run that is being advanced has one of these objects, or will take it over next."""
    for other in list_runs(store):
        if other == run:
            continue
        with contextlib.suppress(Damaged, BadInput):  # nobody can commit to a run whose head cannot be read
            head = require_head(store, other)
            if not is_held(head):
                continue
            shared = sorted(objects_now_and_next(require_config(store, other), head).keys() & objects)
            if shared:
                raise LeaseHeld(
                    f"run {other!r} is being advanced by {describe_lease(head.lease)} and has {shared[0]} too, "
                    f"which would be made anew for run {run!r}: wait for it, or cancel it; where its machine is gone, "
                    f"`spinreg run --run {other} --until-round 0` takes the lease and gives it back"
                )


def _stages(listed: Iterable[Made]) -> set[Stage]:
    return {(made.round, made.stage) for made in listed}


def _listed(stages: Iterable[Stage]) -> list[Made]:
    return [Made(round=number, stage=stage) for number, stage in sorted(stages)]
