"""Members of a comparison: their configurations, their common objects, and their order."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spinreg_core.benchmarks.registry import parts_of, record_measured
from spinreg_core.comparison.grid import (
    Member,
    check_stored,
    members_of,
    open_reason,
    reference_of,
    replaced_reference,
    require_two,
    rounds_open,
    waits_for,
)
from spinreg_core.errors import BadInput, ConfigChanged, SpinregError
from spinreg_core.runs.head import Repair, read_head
from spinreg_core.runs.lease import hold_lease
from spinreg_core.runs.objects import publish
from spinreg_core.runs.stages import stages_of
from spinreg_core.store.open import open_store
from tests.support.builders import make_head

BASE: dict[str, Any] = {"until_round": 3, "model": "random:tiny"}


def names(members: list[Member]) -> list[str]:
    return [member.run for member in members]


def test_members_of_default_grid_starts_with_plain_spin() -> None:
    members = members_of("g", BASE)
    assert names(members) == [f"g-alpha-{a}-h-{h}-s0" for a in ("1", "0.5", "0") for h in ("1", "all")]
    assert reference_of(members, None) == members[0].run
    for member in members:
        assert (member.config.until_round, member.parameters["run"], member.target) == (3, member.run, 3)
    assert members[3].config.objective.alpha == 0.5
    assert members[3].config.opponent.history == "all"


def test_members_of_a_grid_has_every_seed() -> None:
    members = members_of("g", BASE, alpha=[0.25], history=[1, 2], seeds=[3, 4])
    assert [(m.config.opponent.history, m.config.seed) for m in members] == [(1, 3), (1, 4), (2, 3), (2, 4)]
    assert reference_of(members, None) == members[0].run, "without plain SPIN the first"
    assert reference_of(members, members[2].run) == members[2].run


def test_members_of_references_differ_only_with_a_history() -> None:
    members = members_of("g", BASE, alpha=[1], history=[1, "all"], reference=["previous", "iterate"])
    assert names(members) == ["g-alpha-1-h-1-previous-s0", "g-alpha-1-h-all-previous-s0", "g-alpha-1-h-all-iterate-s0"]
    assert [m.config.objective.reference for m in members] == ["previous", "previous", "iterate"]
    assert reference_of(members, None) == members[0].run


def test_members_of_beta_0_adds_it_to_beta_prev() -> None:
    members = members_of("g", BASE | {"objective": {"beta": 0.1}}, beta_0=[0, 0.1, 0.3], history=[1])
    for member, added in zip(members, (0, 0.1, 0.3), strict=True):
        objective = member.config.objective
        assert isinstance(objective.beta, float)
        assert objective.beta * objective.alpha == pytest.approx(0.1), "the previous policy's weight"
        assert objective.beta * (1 - objective.alpha) == pytest.approx(added), "the base's"


def test_members_of_variations_may_set_any_field() -> None:
    different = {"rms": {"training": {"optimizer": "rmsprop"}}, "adam": {"training": {"optimizer": "adamw"}}}
    members = members_of("g", BASE | {"training": {"epochs": 2}}, variations=different)
    assert names(members) == ["g-rms-s0", "g-adam-s0"]
    assert [(m.config.training.optimizer, m.config.training.epochs) for m in members] == [("rmsprop", 2), ("adamw", 2)]


def test_members_of_variations_may_set_prompts_per_round() -> None:
    different = {"few": {"data": {"prompts_per_round": 8}}, "same": {"data": {"round_prompts": "same"}}}
    members = members_of("g", BASE | {"data": {"max_prompt_tokens": 300}}, variations=different)
    assert [m.config.data.prompts_per_round for m in members] == [8, 32]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"alpha": [0.5], "history": [1]}, r"members: found 1 x 1 \(variations x seeds\); expected at least two"),
        ({"alpha": [0.5, 0.5]}, r"alpha: found \[0.5, 0.5\], with a value named twice; expected every value once"),
        ({"reference": ["iterate"] * 2}, "reference: found .* every value once"),
        ({"seeds": [1, 1]}, "seeds: found .* every seed once"),
        ({"alpha": [0.5, 1.5]}, r"member 'g-alpha-1.5-h-1-s0': .*\n.*objective.alpha: found 1.5"),
        ({"alpha": [1], "beta_0": [0.1]}, "beta_0 cannot be set with alpha; use one of them"),
        ({"beta_0": [-0.1, 0]}, r"beta_0: found \[-0.1, 0\]; expected finite weights of at least 0"),
        ({"variations": {"a": {}, "b": None}}, "variation 'b': found None; expected fields by name"),
        (
            {"variations": {"a": {}, "b": {"training": {"optimizer": "rmsprop"}}}},
            "variations: found g-a-s0 and g-b-s0, which are equal",
        ),
        (
            {"variations": {"a": {}, "b": {"keep": {"policies": 2}}}},
            "variations: found g-a-s0 and g-b-s0, which are equal",
        ),
        ({"variations": {"a": {"seed": 1}, "b": {}}}, "variation 'a' cannot set seed; set fields"),
        ({"variations": {"a": {}, "b": {}}, "alpha": [1]}, "variations cannot be set with alpha"),
        (
            {"variations": {"a": {}, "b": {"data": {"max_prompt_tokens": 300}}}},
            r"variations: found g-a-s0 and g-b-s0, with other held-out rows "
            r"\(data.max_prompt_tokens: 512 -> 300\); expected the same held-out rows",
        ),
        (
            {"variations": {"a": {}, "b": {"evaluation": {"final_answer": "none"}}}, "seeds": [0, 1]},
            r"\(evaluation.final_answer: 'auto' -> 'none'\)",
        ),
        ({"variations": {"A b": {}, "b": {}}}, "member 'g-A b-s0'"),
    ],
)
def test_members_of_bad_arguments_is_bad_input(given: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        members_of("g", BASE, **given)
    with pytest.raises(BadInput, match="until_round: found None"):
        members_of("g", {})
    with pytest.raises(BadInput, match="against: found 'x'; expected one of g-"):
        reference_of(members_of("g", BASE), "x")


def test_makes_is_equal_for_shared_objects() -> None:
    """By the fingerprints of the stages: round 1 whatever alpha and history, round 2 whatever histories above 1."""
    members = {(m.config.objective.alpha, m.config.opponent.history, m.config.seed): m.makes
               for m in members_of("g", BASE, alpha=[1, 0.5, 0], history=[1, 2, "all"], seeds=[0, 1])}  # fmt: skip
    for (one, a), (other, b) in itertools.combinations(members.items(), 2):
        common = {place for place, object_id in a.items() if b[place] == object_id}
        round_1 = {(0, "base"), *((n, stage) for n in (0, 1) for stage in stages_of(n))}
        if one[2] != other[2]:
            assert common == {(0, "base")}
        elif one[0] == other[0] and 1 not in (one[1], other[1]):
            assert common == round_1 | {(2, stage) for stage in stages_of(1)} | {(3, "generate")}
        else:
            assert round_1 < common
            assert common - round_1 <= {(2, "generate"), (2, "mix-opponent")}


def test_waits_for_a_member_that_makes_a_shared_object(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    plain, mixed, other_seed = members_of("g", BASE | {"store": store.url}, alpha=[1, 0.5], history=[1], seeds=[0, 1])[
        :3
    ]
    assert (mixed.config.seed, other_seed.config.seed) == (1, 0)
    head = None
    assert waits_for(mixed, store, [(plain, None)]) is plain, "of another seed the base is the same"
    begun = make_head(base="base-x", stages={})
    assert waits_for(mixed, store, [(plain, begun)]) is None, "and nothing else"
    assert waits_for(other_seed, store, []) is None
    with hold_lease(store, plain.config, "tester") as session:
        session.begin_advance("tester", None, 3)
        session.commit_inputs("base-x", "data-x")
        for number, stages in ((0, stages_of(0)), (1, stages_of(1)), (2, ["generate"])):
            for stage in stages:
                head = read_head(store, plain.run)
                assert waits_for(other_seed, store, [(mixed, begun), (plain, head)]) is plain, (number, stage)
                session.commit(number, stage, f"{stage}-{number}")
        assert waits_for(other_seed, store, [(mixed, begun), (plain, read_head(store, plain.run))]) is None
    with hold_lease(store, other_seed.config, "tester") as session:  # which has it itself
        session.commit_inputs("base-x", "data-x")
        for number, stages in ((0, stages_of(0)), (1, stages_of(1)), (2, ["generate"])):
            for stage in stages:
                assert waits_for(other_seed, store, [(plain, None)]) is plain
                session.commit(number, stage, f"{stage}-{number}")
    assert waits_for(other_seed, store, [(plain, None)]) is None


def test_open_reason_follows_the_state_of_the_run(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    base = BASE | {"store": store.url, "until_round": 1}
    member, other = members_of("g", base, alpha=[1, 0], history=[1])
    assert open_reason(store, member) == rounds_open(store, member) == "the store has nothing of it"
    with hold_lease(store, member.config, "tester") as session:
        session.begin_advance("tester", None, 1)
        session.commit_inputs("base-x", "data-x")
        for stage in stages_of(0):
            session.commit(0, stage, f"{stage}-0")
        assert open_reason(store, member) == rounds_open(store, member) == "round 0 of 1 is complete"
        for stage in stages_of(1):
            session.commit(1, stage, f"{stage}-1")
        assert rounds_open(store, member) is None
        assert open_reason(store, member) == "its advance is not finished", "what is measured is not there yet"
        session.finish_advance()
        assert open_reason(store, member) is None
        repair = Repair(to=1, stages=[], replace={}, was={}, dependents={})
        session.update(lambda head: setattr(head, "repair", repair))
        assert rounds_open(store, member) == "its repair is not finished"
        session.update(lambda head: setattr(head, "repair", None))
    check_stored(store, [member, other])
    changed = members_of("g", base | {"training": {"epochs": 9}}, alpha=[1, 0], history=[1])
    with pytest.raises(ConfigChanged, match=r"run 'g-alpha-1-h-1-s0' exists .*\n.*training.epochs"):
        check_stored(store, changed)
    assert "training.epochs" in str(rounds_open(store, changed[0])), "an old flow run of that name has made it"
    (tmp_path / "store/runs" / member.run / "head.json").write_bytes(b"{")
    assert "head.json" in str(open_reason(store, member)), "damage is the end of one member"
    check_stored(store, changed)


def test_rounds_open_after_early_stopping_is_none(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    base = BASE | {"store": store.url, "until": {"kl_base_above": 3.0}}
    member, _ = members_of("g", base, alpha=[1, 0], history=[1])
    with hold_lease(store, member.config, "tester") as session:
        session.begin_advance("tester", None, 3)
        session.commit_inputs("base-x", "data-x")
        assert rounds_open(store, member) == "round 0 of 3 is complete"
        session.finish_advance(ended_by=member.config.until)
    assert rounds_open(store, member) is open_reason(store, member) is None
    looser, _ = members_of("g", base | {"until": {"kl_base_above": 300.0}}, alpha=[1, 0], history=[1])
    assert rounds_open(store, looser) == "round 0 of 3 is complete", "other conditions may let it go on"
    member, _ = members_of("g", BASE | {"store": store.url}, alpha=[1, 0], history=[1])
    assert rounds_open(store, member) == "round 0 of 3 is complete", "without the condition it goes on"


def test_open_reason_with_missing_benchmark_names_the_round(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    base = BASE | {"store": store.url, "until_round": 1}

    def wanting(**benchmarks: Any) -> list[Member]:
        return members_of("g", base | {"benchmarks": {"tasks": ["gsm8k"]} | benchmarks}, alpha=[1, 0], history=[1])

    plain, other = wanting(limit=10)
    with hold_lease(store, plain.config, "tester") as session:
        session.begin_advance("tester", None, 1)
        session.commit_inputs("base-x", "data-x")
        for stage in stages_of(0):
            session.commit(0, stage, f"{stage}-0")
        assert waits_for(other, store, [(plain, read_head(store, plain.run))]) is plain, "the base's benchmark"
        for stage in stages_of(1):
            session.commit(1, stage, f"{stage}-1")
        session.finish_advance()
        assert rounds_open(store, plain) is None
        assert "round 0 is not measured in full" in str(open_reason(store, plain))
        for number in (0, 1):
            (part,) = parts_of(plain.config, session.head, number)
            # By a machine with another lm-eval, and a GPU: the same all the same.
            part = replace(part, key=part.key | {"lm_eval": "0.0.1", "backend": "vllm"})
            publish(store, part.job(plain.config, store.url, "e1-a", tmp_path), tmp_path / "none", metrics={})
            record_measured(session, number, {"lm-eval gsm8k": part.object_id})
    assert open_reason(store, plain) is None
    assert waits_for(other, store, [(plain, read_head(store, plain.run))]) is None
    # Asked for something else, it is not measured with that.
    for changed in ({"limit": 1319}, {"limit": 10, "fewshot": {"gsm8k": 0}}, {"limit": 10, "questions_as": "chat"},
                    {"limit": 10, "backend": "hf"}):  # fmt: skip
        again, other = wanting(**changed)
        assert "round 0 is not measured in full" in str(open_reason(store, again)), changed
        assert waits_for(other, store, [(again, read_head(store, again.run))]) is again, changed
    assert "round 1 is not" in str(open_reason(store, wanting(limit=1319, rounds=[1])[0]))
    # Task files that only the machines have which measure: a flow run there finds out.
    elsewhere, other = wanting(limit=10, include_path=str(tmp_path / "elsewhere"))
    assert "as far as this machine can tell" in str(open_reason(store, elsewhere))
    assert waits_for(other, store, [(elsewhere, read_head(store, plain.run))]) is None


def test_open_reason_with_another_judge_names_the_round(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))

    def judged_by(model: str) -> Member:
        judge = {"base_url": "http://127.0.0.1:1/v1", "model": model}
        return members_of("g", BASE | {"store": store.url, "until_round": 1, "judge": judge,
                                       "benchmarks": {"win_rate": ["human"]}})[0]  # fmt: skip

    member = judged_by("one")
    with hold_lease(store, member.config, "tester") as session:
        session.begin_advance("tester", None, 1)
        session.commit_inputs("base-x", "data-x")
        for stage in stages_of(0):
            session.commit(0, stage, f"{stage}-0")
        for stage in stages_of(1):
            session.commit(1, stage, f"{stage}-1")
        session.finish_advance()
        for number in (0, 1):
            (part,) = parts_of(member.config, session.head, number)
            record_measured(session, number, {"win-rate human": part.object_id})
    assert open_reason(store, member) is None
    assert "round 0 is not measured in full" in str(open_reason(store, judged_by("another")))


def test_replaced_reference_prefers_the_same_variation() -> None:
    members = members_of("g", BASE, alpha=[0.5, 1], history=[1], seeds=[0, 1])
    half, _, plain, plain_too = members
    assert reference_of(members, None) == plain.run
    assert replaced_reference(members, [half, plain_too], plain.run) == plain_too.run
    assert replaced_reference(members, [plain, plain_too], half.run) == plain.run, "else plain SPIN"


def test_require_two_with_one_member_raises() -> None:
    members = members_of("g", BASE)
    require_two(members, {})
    with pytest.raises(SpinregError, match=r"only 1 members finished.*\n  - b: failed so"):
        require_two(members[:1], {"b": "failed so"})
