"""The one table of stages: their names, their order in a round, their plans; and the stages that a run has ahead.

Leaves out: the stages themselves (`spinreg_core.stages`), their order over rounds (`loop.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from spinreg_core.config import RunConfig
from spinreg_core.runs.head import HELDOUT, Head
from spinreg_core.runs.plans import (
    StagePlan,
    average_object,
    for_each_possible_engine,
    ids_in,
    plan_evaluate,
    plan_generate,
    plan_heldout,
    plan_mix_opponent,
    plan_train,
)


@dataclass(frozen=True)
class Stage:
    """A stage of a round. Those `of_base` also belong to round 0, which evaluates the base."""

    name: str
    plan: Callable[[RunConfig, Head, int], StagePlan]
    of_base: bool = False


STAGES = {
    stage.name: stage
    for stage in (
        Stage("generate", plan_generate),
        Stage("mix-opponent", plan_mix_opponent),
        Stage("train", plan_train),
        Stage(HELDOUT, plan_heldout, of_base=True),
        Stage("evaluate", plan_evaluate, of_base=True),
    )
}


def stages_of(round_number: int) -> list[str]:
    """Return the names of a round's stages, in their order."""
    return [stage.name for stage in STAGES.values() if round_number or stage.of_base]


def is_complete(head: Head, round_number: int) -> bool:
    """Return whether all stages of a round are committed.

    Only the evaluation reads held-out answers, so a round of an older head is complete without them.
    """
    entry = head.entry(round_number)
    return entry is not None and entry.stages.keys() | {HELDOUT} >= {*stages_of(round_number)}


def complete_round(head: Head) -> int:
    """Return the last complete round; 0 also for a run without any."""
    done = 0
    while is_complete(head, done + 1):
        done += 1
    return done


def before_corrections(config: RunConfig, head: Head) -> dict[str, list[int]]:
    """Return, by correction, the rounds with a committed result from before it."""
    found: dict[str, set[int]] = {}
    for entry in head.rounds if head.base and head.data else ():
        for stage, object_id in entry.stages.items():
            plan = STAGES[stage].plan(config, head, entry.round)
            if object_id == plan.id_before_corrections:
                for name in plan.corrections:
                    found.setdefault(name, set()).add(entry.round)
    return {name: sorted(rounds) for name, rounds in found.items()}


def committed(head: Head) -> Iterator[tuple[int, str, str]]:
    """Yield (round, stage, object id) round by round: `base` and `data` first, `benchmark` after a round's stages."""
    yield from ((0, stage, one) for stage, one in (("base", head.base), ("data", head.data)) if one)
    for entry in sorted(head.rounds, key=lambda entry: entry.round):
        yield from ((entry.round, name, entry.stages[name]) for name in STAGES | entry.stages if name in entry.stages)
        yield from ((entry.round, "benchmark", one) for one in entry.measured.values())


def objects_of(config: RunConfig, head: Head) -> dict[str, tuple[int, str]]:
    """Return every object of a run, also averages, with the (round, stage) that makes it: base and data `prepare`."""
    found: dict[str, tuple[int, str]] = {}
    for number, stage, object_id in committed(head):
        if stage == "train" and config.training.average is not None:
            found.setdefault(average_object(config, head, number), (number, stage))
        found.setdefault(object_id, (number, "prepare" if stage in ("base", "data") else stage))
    return found


def needed_by_later_stages(config: RunConfig, head: Head) -> set[str]:
    """Return the objects that stages to come may read, in this round and in all later ones."""
    found: set[str] = set()
    for plan in _ahead(config, head)[1]:
        found |= set(ids_in([plan.inputs, plan.extra.get("scored")]))
    return found


def objects_now_and_next(config: RunConfig, head: Head) -> dict[str, tuple[int, str]]:
    """Return the objects of a run and those that it will make or take over next, as `objects_of` does."""
    found: dict[str, tuple[int, str]] = {}
    for planned in for_each_possible_engine(config):
        found |= objects_of(planned, _ahead(planned, head)[0])
    return found


def _ahead(config: RunConfig, head: Head) -> tuple[Head, list[StagePlan]]:
    """Return the head as it will be some rounds later, and the plans of the stages until then."""
    # Possible because object ids are fingerprints of keys: the id of a result is known before the result.
    head, plans = head.model_copy(deep=True), list[StagePlan]()
    if not head.base or not head.data:
        return head, []
    weighting, history = config.opponent.weighting, config.opponent.history
    # An iterate with weight 0 in the next round may have a weight in a later one, where it is further back.
    window = max(history if isinstance(history, int) else 1, len(weighting) if isinstance(weighting, list) else 1)
    for number in range(max(head.last_round, complete_round(head) + window) + 1):
        for stage in stages_of(number):
            # Also answers without a name whose evaluation is committed: a repair may need them, so they must stay.
            if head.stage(number, stage) is None:
                plans.append(STAGES[stage].plan(config, head, number))
                head.enter(number, stage, plans[-1].object_id)
    return head, plans
