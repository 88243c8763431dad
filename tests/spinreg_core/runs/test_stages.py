"""The table of stages, and what follows from it for complete rounds and for objects that are still to be read."""

from __future__ import annotations

from spinreg_core.runs.head import HELDOUT
from spinreg_core.runs.plans import plan_generate, plan_heldout
from spinreg_core.runs.stages import (
    complete_round,
    is_complete,
    needed_by_later_stages,
    objects_now_and_next,
    stages_of,
)
from tests.support.builders import make_config, make_head


def test_stages_of_round_0_evaluate_the_base() -> None:
    assert stages_of(0) == ["generate-heldout", "evaluate"]
    assert stages_of(1) == ["generate", "mix-opponent", "train", "generate-heldout", "evaluate"]
    assert stages_of(2) == stages_of(1)


def test_round_without_a_stage_is_not_complete() -> None:
    for stage in stages_of(1):
        head = make_head(1)
        del head.rounds[1].stages[stage]
        assert is_complete(head, 1) == (stage == HELDOUT), "heads of 0.1.0 name no held-out answers"
        assert complete_round(head) == (stage == HELDOUT)


def test_complete_round_counts_rounds_without_a_gap() -> None:
    head = make_head(3)
    assert complete_round(head) == 3
    del head.rounds[2].stages["train"]
    assert complete_round(head) == 1


def test_needed_objects_are_those_that_the_next_round_reads() -> None:
    config = make_config(generation__engine="hf", opponent__history=1)
    needed = needed_by_later_stages(config, make_head(2))
    assert needed >= {"train-2", "data-x", "base-x", "evaluate-0", "evaluate-2"}
    assert not needed & {"train-1", "generate-1", "generate-2", "generate-heldout-2", "evaluate-1"}


def test_needed_objects_of_an_open_evaluation_include_its_answers() -> None:
    head = make_head(1)
    del head.rounds[1].stages["evaluate"]
    needed = needed_by_later_stages(make_config(generation__engine="hf"), head)
    assert needed >= {"generate-heldout-1", "train-1"}


def test_answers_that_a_head_leaves_unnamed_count_as_needed() -> None:
    """A repair of their evaluation reads them, so `spinreg gc` must not take them for objects of no run."""
    head = make_head(1)
    del head.rounds[1].stages[HELDOUT]
    found = objects_now_and_next(make_config(generation__engine="auto"), head)
    for engine in ("hf", "vllm"):
        assert found[plan_heldout(make_config(generation__engine=engine), head, 1).object_id] == (1, HELDOUT)


def test_objects_to_come_include_those_of_every_engine_for_auto() -> None:
    head = make_head(1)
    found = objects_now_and_next(make_config(generation__engine="auto"), head)
    for engine in ("hf", "vllm"):
        assert plan_generate(make_config(generation__engine=engine), head, 2).object_id in found
    assert {"generate-1", "train-1", "base-x"} <= found.keys()
