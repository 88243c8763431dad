"""Fingerprints hold all that can change a result and nothing else, so that runs share what is equal."""

from __future__ import annotations

from typing import Any

import pytest

from spinreg_core.config import RunConfig
from spinreg_core.errors import BadInput, SpinregError
from spinreg_core.runs.head import HELDOUT, Head
from spinreg_core.runs.objects import fingerprint
from spinreg_core.runs.plans import (
    average_key,
    average_object,
    plan_evaluate,
    plan_generate,
    plan_heldout,
    plan_mix_opponent,
    plan_train,
    policy_object,
)
from spinreg_core.runs.stages import STAGES, before_corrections, stages_of
from tests.support.builders import make_config, make_head


def config(**changes: Any) -> RunConfig:
    return (
        make_config(generation__engine="hf") if not changes else make_config(**{"generation__engine": "hf"} | changes)
    )


def object_id(stage: str, round_number: int, done: Head | None = None, **changes: Any) -> str:
    return STAGES[stage].plan(config(**changes), done or make_head(round_number), round_number).object_id


# (stage, change) -> does the change make another object of round 1? Of round 2?
CASES = [
    ("generate", {"objective__alpha": 1.0}, False, False),
    ("generate", {"objective__beta": 0.7}, False, False),
    ("generate", {"opponent__history": 1}, False, False),
    ("generate", {"training__learning_rate": 1e-7}, False, False),
    ("generate", {"resources__retries": 9}, False, False),
    ("generate", {"run": "other", "until_round": 7}, False, False),
    ("generate", {"keep__policies": 1, "keep__generations": "needed"}, False, False),
    ("generate", {"generation__temperature": 0.7}, True, True),
    ("generate", {"generation__max_new_tokens": 12}, True, True),
    ("generate", {"generation__shard_size": 5}, True, True),
    ("generate", {"resources__kv_cache_tokens": 5}, False, False),
    ("generate", {"generation__tensor_parallel": 2}, False, False),
    ("generate", {"generation__answers_per_prompt": 2}, True, True),
    ("generate", {"opponent__geometric_share": 0.5}, False, True),  # the base's mixture with itself is the base
    ("generate", {"opponent__geometric_share": 0.5, "opponent__geometric_alpha": 0.9}, False, True),
    ("generate", {"generation__dtype": "bfloat16"}, True, True),
    ("generate", {"generation__dtype": "float32"}, False, False),  # what auto means with fp32 training
    ("generate", {"training__precision": "mixed"}, True, True),
    ("generate", {"data__prompts_per_round": 7}, True, True),
    ("generate", {"seed": 1}, True, True),
    ("mix-opponent", {"objective__alpha": 0.3}, False, False),  # 0 < alpha < 1 reads the same two scores
    ("mix-opponent", {"objective__alpha": 1.0}, False, True),  # in round 1 both references are the base
    ("mix-opponent", {"opponent__history": 1}, False, True),
    ("mix-opponent", {"opponent__weighting": "recency"}, False, True),
    ("mix-opponent", {"opponent__truncated": "keep"}, True, True),
    ("mix-opponent", {"resources__tokens_per_pass": 3}, False, False),
    ("train", {"objective__alpha": 0.3}, False, True),
    ("train", {"objective__beta": [0.1, 5.0]}, False, True),
    ("train", {"training__learning_rate": [5e-6, 1e-6]}, False, True),
    ("train", {"objective__link": "hinge"}, True, True),
    ("train", {"training__checkpoint_every_steps": 3}, False, False),
    ("train", {"training__activation_checkpointing": "full"}, False, False),
    ("train", {"resources__tokens_per_pass": 3}, False, False),
    ("train", {"training__batch_size": 16}, True, True),
    ("evaluate", {"objective__alpha": 0.3}, False, True),
    ("evaluate", {"resources__tokens_per_pass": 3}, False, False),
    ("evaluate", {"evaluation__bootstrap": 500}, True, True),
]


@pytest.mark.parametrize(("stage", "changes", "first", "second"), CASES)
def test_plan_with_a_changed_field_makes_another_object(
    stage: str, changes: dict[str, Any], first: bool, second: bool
) -> None:
    for round_number, differs in ((1, first), (2, second)):
        assert (object_id(stage, round_number, **changes) != object_id(stage, round_number)) is differs


@pytest.mark.parametrize("stage", stages_of(1))
def test_plan_with_other_inputs_makes_another_object(stage: str) -> None:
    other = make_head(2, data="data-y", base="base-y")
    assert object_id(stage, 1, other) != object_id(stage, 1, make_head(2))
    changed = make_head(2)
    changed.rounds[1].stages |= {"train": "train-z", "generate": "generate-z", "mix-opponent": "mix-opponent-z"}
    if stage == HELDOUT:  # of round 2's own policy alone
        changed.rounds[2].stages["train"] = "train-z"
    assert object_id(stage, 2, changed) != object_id(stage, 2, make_head(2))


def test_plan_evaluate_of_the_base_is_the_same_for_every_alpha() -> None:
    assert object_id("evaluate", 0, objective__alpha=1.0) == object_id("evaluate", 0, objective__alpha=0.25)


def test_plans_read_earlier_pairs_or_policies_by_source() -> None:
    replay = STAGES["mix-opponent"].plan(config(), make_head(3), 3)
    assert [e["round"] for e in replay.inputs["earlier"]] == [2, 1]
    assert STAGES["generate"].plan(config(), make_head(3), 3).inputs["policies"] == {"2": "train-2"}
    again = config(opponent__source="regenerate", opponent__history=2)
    assert STAGES["mix-opponent"].plan(again, make_head(3), 3).inputs["earlier"] == []
    assert STAGES["generate"].plan(again, make_head(3), 3).inputs["policies"] == {"2": "train-2", "1": "train-1"}
    both = config(opponent__source="regenerate", opponent__history=2, opponent__replay_share=0.5)
    assert [e["round"] for e in STAGES["mix-opponent"].plan(both, make_head(3), 3).inputs["earlier"]] == [2]
    assert STAGES["generate"].plan(both, make_head(3), 3).extra["replay_share"] == 0.5
    assert (
        STAGES["generate"].plan(both, make_head(3), 1).object_id
        == STAGES["generate"].plan(again, make_head(3), 1).object_id
    )


def test_plan_mix_opponent_without_a_limit_has_the_id_of_0_1_0() -> None:
    plan = STAGES["mix-opponent"].plan
    assert "max_pairs" not in plan(config(), make_head(3), 3).key["opponent"]
    limited = [plan(config(opponent__max_pairs=most), make_head(3), 3).object_id for most in (None, 64, 65)]
    assert len(set(limited)) == 3
    assert limited[0] == plan(config(), make_head(3), 3).object_id


def test_plan_mix_opponent_of_reference_iterate_reads_the_policies_of_all_iterates() -> None:
    plan = STAGES["mix-opponent"].plan
    found = plan(config(objective__reference="iterate"), make_head(3), 3)
    assert found.inputs["iterates"] == {"2": "train-2", "1": "train-1", "0": "base-x"}
    previous = plan(config(objective__reference="previous"), make_head(3), 3)
    assert "iterates" not in previous.key
    assert found.object_id != previous.object_id == plan(config(), make_head(3), 3).object_id
    none = config(objective__reference="iterate", opponent__history=3, opponent__weighting=[1, 0, 1])
    assert set(plan(none, make_head(3), 3).inputs["iterates"]) == {"2", "0"}


def test_plan_train_has_the_guard_only_where_it_is_on() -> None:
    plan = STAGES["train"].plan
    assert "guard" not in plan(config(), make_head(3), 3).key
    assert plan(config(objective__guard=6), make_head(3), 3).key["guard"] == 6


def test_plan_mix_opponent_refers_to_the_iterate_before() -> None:
    for history in (1, 2, "all"):
        plan = STAGES["mix-opponent"].plan(config(opponent__history=history), make_head(3), 3)
        assert plan.inputs["previous"] == "train-2"
        assert plan.inputs["base"] == "base-x"
        assert STAGES["train"].plan(config(opponent__history=history), make_head(3), 3).inputs["previous"] == "train-2"


def test_policy_object_of_an_untrained_iterate_raises() -> None:
    assert policy_object(make_head(1), 0) == "base-x"
    with pytest.raises(SpinregError, match="no iterate 2"):
        policy_object(make_head(1), 2)


def test_plan_heldout_makes_one_object_per_iterate() -> None:
    ids = {plan_heldout(config(), make_head(2), n).object_id for n in range(3)}
    assert len(ids) == 3
    assert plan_heldout(config(objective__alpha=1.0), make_head(2), 1).object_id in ids


def test_plans_use_averages_in_the_configured_roles() -> None:
    done = make_head(3)
    policy, base = "train-2", "base-x"
    for roles in (["opponent"], ["reference"], ["start"], ["opponent", "reference", "start"]):
        own = config(training__average="ema", training__average_weight=0.25, training__average_as=roles)
        average = average_object(own, done, 2)
        assert average.startswith("average-")
        assert average != average_object(config(training__average="ema", training__average_weight=0.5), done, 2)
        assert average != average_object(own, done, 1)
        assert average_object(own, done, 0) == base
        found = {
            "opponent": plan_generate(own, done, 3).inputs["policies"]["2"],
            "reference": plan_mix_opponent(own, done, 3).inputs["previous"],
            "start": plan_train(own, done, 3).inputs["previous"],
        }
        assert found == {role: average if role in roles else policy for role in found}
        train = plan_train(own, done, 3)
        assert (train.inputs["before"], train.inputs["base"]) == (average, base)
        key = average_key(own.training, policy, average_object(own, done, 1), base)
        assert average == fingerprint("average", key)
        assert plan_evaluate(own, done, 2).inputs["policy"] == policy, "what a round trained is what is evaluated"
    assert plan_train(config(), done, 3).object_id == plan_train(config(training__average=None), done, 3).object_id


def test_config_with_average_and_lora_rank_is_refused() -> None:
    with pytest.raises(BadInput, match="average cannot be combined with lora_rank"):
        config(training__average="ema", training__lora_rank=4)
    with pytest.raises(BadInput, match="average_weight needs average"):
        config(training__average_weight=0.3)


def test_corrections_mark_the_affected_configurations_only() -> None:
    marked = {}
    for precision in ("fp32", "mixed", "bf16"):
        for rank in (None, 4) if precision != "bf16" else (None,):
            for number in (1, 2):
                for stage in stages_of(number):
                    plan = STAGES[stage].plan(
                        config(training__precision=precision, training__lora_rank=rank), make_head(number), number
                    )
                    assert (plan.object_id != plan.id_before_corrections) == bool(plan.corrections)
                    if plan.corrections:
                        marked[precision, rank, number, stage] = plan.corrections
    scored = ("mix-opponent", "train", "evaluate")
    assert marked == {("bf16", None, number, stage): ("packing",) for number in (1, 2) for stage in scored} | {
        ("mixed", 4, 2, "train"): ("start",)
    }
    assert STAGES["train"].plan(config(training__weight_decay=0.1), make_head(1), 1).corrections == ("decay",)


def test_before_corrections_names_the_rounds_with_old_results() -> None:
    bf16 = config(training__precision="bf16")
    head = make_head(stages={0: {}, 1: {}, 2: {}})
    for number in (0, 1, 2):
        for stage in stages_of(number):
            plan = STAGES[stage].plan(bf16, head, number)
            head.enter(number, stage, plan.id_before_corrections if number < 2 else plan.object_id)
    assert before_corrections(bf16, head) == {"packing": [0, 1]}
    assert before_corrections(config(), head) == {}
