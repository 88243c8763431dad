"""Repair: make damaged objects again, and their dependents too if the result differs.

Decides: the order of every step of a repair. Leaves out: what counts as damage (`verify.py`), running stages
(`flows`, `spinreg_core.api`).

A repair is recorded in the head of its run, and the next start of the run finishes it before anything else. Recorded
advances stay as they are, and nothing is removed. All steps happen under the lease of the run, in this order:

1. The damaged objects are read once more, and the tags of their manifests and parts are kept. Objects that are sound by
   now (another repair was faster) are left out, and so are objects whose inputs were removed by rules of the user.
2. The repair is refused while another run that is being advanced has one of the objects or of their dependents.
3. One compare-and-swap of the head opens the stages again. The head then lists the documents to set aside with their
   tags, the content of the objects before the repair, and their dependents.
4. The documents are set aside, parts first, each by compare-and-swap with its tag. A part becomes void; a manifest is
   marked `removed` by this repair, with a copy in `aside/`. A stage does not find the object any more, and its
   publication replaces the marked manifest. The files stay, because other runs may be reading them.
5. The stages run, as any open stages, from the sound shards.
6. The content of the objects is compared with their content before. If it differs, or was unknown, the dependents are
   next: one compare-and-swap of the head puts a record for them in place of this one, with all their parts, and step 4
   follows. Otherwise one compare-and-swap removes the record.

A kill before step 3 leaves no trace. After it, the head says what is left: step 4 has no effect if it is repeated,
since the tags have changed; step 5 continues from what is committed; step 6 only reads. A writer that lost its lease
fails at steps 3 and 6, because it lacks the tag of the head. In step 4 it can only do what its successor does, because
no object made again has the tag of a damaged one. A run that starts after step 2 and shares an object reads the old
files or makes the object itself: the first publication counts, as always.

`verify`, `status` and `resume` report an unfinished repair, and `spinreg gc` waits for it.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping

from spinreg_core.config import RunConfig
from spinreg_core.errors import BadInput, Conflict, Damaged, LeaseHeld
from spinreg_core.maintenance.verify import StageId, Verification, verify
from spinreg_core.runs.head import HELDOUT, Head, Repair, RoundStage, list_runs, require_config, require_head
from spinreg_core.runs.lease import RunLease, describe_lease, is_held
from spinreg_core.runs.manifest import Manifest, Part, Removal
from spinreg_core.runs.objects import now, read_manifest
from spinreg_core.runs.stages import complete_round, needed_by_later_stages, objects_now_and_next, stages_of
from spinreg_core.store import documents
from spinreg_core.store.base import Store


def begin(
    store: Store, lease: RunLease, damaged: Collection[str], say: Callable[[str], object] = lambda line: None
) -> list[StageId]:
    """Do steps 1 to 3 for those of these objects of the run that are still damaged. Returns the stages it has opened.

    Raises LeaseHeld if another run that is being advanced has one of the objects, and LeaseLost.
    """
    result = verify(store, lease.run, only=damaged)
    stages = _possible(result, {result.objects[object_id] for object_id in result.damaged}, say)
    if not stages:
        return []
    # Set aside everything that a stage makes (an average of policies too): a stage takes over what it finds. Base, data
    # and each benchmark are made independently of each other, although they share a stage.
    taken = {o for o in result.damaged if result.objects[o] in stages}
    single = ("prepare", "benchmark")
    taken |= {o for o, stage in result.objects.items() if stage in stages and stage[1] not in single}
    bad = {problem.file for problem in result.problems}
    dependents = {o: result.dependents[o] for o in taken if o not in result.opened}
    after = {stage for found in dependents.values() for stage in found}
    _require_idle(store, lease.run, taken | {o for o, stage in result.objects.items() if stage in after})
    repair = Repair(
        to=complete_round(lease.head),
        stages=_listed(stages),
        replace=_documents(result, taken, lambda files: files is None or not bad.isdisjoint(files)),
        was={o: result.content.get(o) for o in dependents},
        dependents={o: _listed(found) for o, found in dependents.items()},
    )

    def change(head: Head) -> None:
        _open(head, stages)
        head.repair = repair if head.repair is None else _both(head.repair, repair)

    lease.update(change)
    return sorted(stages)


def finish(
    store: Store,
    lease: RunLease,
    config: RunConfig,
    prepare: Callable[[], object],
    stages: Mapping[str, Callable[[int], object]],
    say: Callable[[str], object],
) -> None:
    """Finish the repair that the head records, if there is one: steps 4 to 6.

    Calls `prepare` and the `stages` that are to be made; each returns when it is committed. Stages of rounds that were
    not complete are left open. Raises as `begin`, and what the stages raise.
    """
    while (repair := lease.head.repair) is not None:
        lease.check()
        _set_aside(store, lease.run, repair.replace)
        opened, head = _stages(repair.stages), lease.head
        if any(one and read_manifest(store, one) is None for one in (head.base, head.data)):
            prepare()
        for number in range(repair.to + 1):
            for stage in stages_of(number):
                if _is_missing(store, config, lease.head, (number, stage), opened):
                    stages[stage](number)
        _go_on(store, lease, say)


def _is_missing(store: Store, config: RunConfig, head: Head, made: StageId, opened: Collection[StageId]) -> bool:
    """Return whether the repair opened a stage, or a rule removed its object and an open stage reads that."""
    object_id, (number, stage) = head.stage(*made), made
    if object_id is None:
        # Heads of 0.1.0 do not name the held-out answers that an evaluation needs to be made again.
        return made in opened or (stage == HELDOUT and (number, "evaluate") in opened)
    return read_manifest(store, object_id) is None and object_id in needed_by_later_stages(config, head)


def _go_on(store: Store, lease: RunLease, say: Callable[[str], object]) -> None:
    """Do step 6."""
    repair, result = lease.head.repair, verify(store, lease.run, only=())
    assert repair is not None
    others = [o for o, was in repair.was.items() if was is None or result.content.get(o) != was]
    stages = _possible(result, {stage for o in others for stage in _stages(repair.dependents[o])}, say)
    # Parts of open stages were made from the last rounds, which may include the objects that differ now.
    taken = {o for o, stage in result.objects.items() if stage in stages or (others and o in result.opened)}
    after = None
    if taken:
        say(f"not what it was: {', '.join(others)}")
        _require_idle(store, lease.run, taken)
        replace = _documents(result, taken, lambda files: True)
        after = Repair(to=repair.to, stages=_listed(stages), replace=replace, was={}, dependents={})

    def change(head: Head) -> None:
        _open(head, stages)
        head.repair = after

    lease.update(change)


def _possible(result: Verification, stages: set[StageId], say: Callable[[str], object]) -> set[StageId]:
    """Return those of these stages that can be made again; the others stay committed, so that the run can continue.

    An input that rules have removed can be made once more if its own inputs are there.
    """
    while True:
        taken = {o for o, stage in result.objects.items() if stage in stages}
        gone = result.removed.keys() - taken
        lost = {one for one in gone if not gone.isdisjoint(result.made_from.get(one, ()))}
        impossible: dict[StageId, set[str]] = {}
        for object_id in taken:
            if found := lost.intersection(result.made_from.get(object_id, ())):
                impossible.setdefault(result.objects[object_id], set()).update(found)
        if not impossible:
            return stages
        for (number, stage), found in sorted(impossible.items()):
            why = f"made from {min(found)}, {result.removed[min(found)]}, as was what that is made from"
            say(f"{stage} of round {number} cannot be made again and stays as it is: {why}")
        stages = stages - impossible.keys()


def _open(head: Head, stages: Collection[StageId]) -> None:
    for entry in head.rounds:
        entry.stages = {s: o for s, o in entry.stages.items() if (entry.round, s) not in stages}


def _both(old: Repair, new: Repair) -> Repair:
    """Return the record of a repair that starts while another one is unfinished."""
    # Dependents of the new objects may be stages that the old repair has opened, and then the head does not name them.
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
    result: Verification, objects: Collection[str], unsound: Callable[[Collection[str] | None], bool]
) -> dict[str, str]:
    """Return the keys and tags of the manifests of objects, and of those of their parts that are unsound.

    `unsound` gets the keys of the files that a part lists, or None for an unreadable one.
    """
    return {
        key: tag for key, (tag, files) in result.documents.items()
        if key.split("/")[1] in objects and (key.endswith("/manifest.json") or unsound(files))
    }  # fmt: skip


def _set_aside(store: Store, run: str, replace: Mapping[str, str]) -> None:
    """Do step 4."""
    # Manifests come last: a stage that found a manifest gone and its old parts present would continue from those.
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
    """Return a manifest marked as set aside; of an unreadable one only its id and stage are known."""
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
    record.removed = Removal(marked=False, why=why, at=at, keys=keys, repair=run)
    return record


def _require_idle(store: Store, run: str, objects: Collection[str]) -> None:
    """Raise LeaseHeld if another run that is being advanced has one of these objects or will take it over next."""
    for other in list_runs(store):
        if other == run:
            continue
        # No process can commit to a run with an unreadable head.
        with contextlib.suppress(Damaged, BadInput):
            head = require_head(store, other)
            if not is_held(head):
                continue
            shared = sorted(objects_now_and_next(require_config(store, other), head).keys() & objects)
            if shared:
                raise LeaseHeld(
                    f"run {other!r} is being advanced by {describe_lease(head.lease)} and has {shared[0]} too, "
                    f"which would be made again for run {run!r}: wait for it, or cancel it; where its machine is gone, "
                    f"`spinreg run --run {other} --until-round 0` takes the lease and gives it back"
                )


def _stages(listed: Iterable[RoundStage]) -> set[StageId]:
    return {(made.round, made.stage) for made in listed}


def _listed(stages: Iterable[StageId]) -> list[RoundStage]:
    return [RoundStage(round=number, stage=stage) for number, stage in sorted(stages)]
