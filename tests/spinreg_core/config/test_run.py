"""The configuration: values that are refused, with which message, and the description of every field."""

from __future__ import annotations

import math
from typing import Any

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spinreg_core.config import (
    MUTABLE_FIELDS,
    EvaluationConfig,
    Group,
    RunConfig,
    TrainingConfig,
    fixed_fields,
    of_round,
)
from spinreg_core.config.resolve import differences

GROUPS = [name for name, field in RunConfig.model_fields.items() if isinstance(field.default, Group)]


def refusal(values: dict[str, Any]) -> str:
    with pytest.raises(pydantic.ValidationError) as caught:
        RunConfig.model_validate(values)
    return str(caught.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rounds": 1, "until_round": 2}, "give rounds (advance by) or until_round (advance to), not both"),
        ({"data": {"max_prompt_tokens": 512, "max_length": 512}}, "max_length (512) must exceed max_prompt_tokens"),
        (
            {"data": {"max_prompt_tokens": 100, "max_length": 140}, "generation": {"max_new_tokens": 41}},
            "generation.max_new_tokens (41) exceeds data.max_length - data.max_prompt_tokens (40)",
        ),
        ({"data": {"prompt_column": "q"}}, "prompt_column and response_column belong together; set both or neither"),
        (
            {"data": {"prompt_column": "q", "response_column": "a", "format": "messages"}},
            "need format prompt_response, but format is messages",
        ),
        ({"opponent": {"weighting": [1, 1], "history": 3}}, "lists 2 weights but opponent.history is 3"),
        ({"opponent": {"weighting": [0, 1], "history": 2}}, "the first of them positive"),
        ({"opponent": {"weighting": []}}, "the first of them positive"),
        ({"resources": {"nodes": 2}}, "resources.nodes is 2 but resources.rendezvous is not set"),
        (
            {"resources": {"nodes": 2, "rendezvous": "a:65536"}},
            "resources.rendezvous is a:65536; give a port of at most",
        ),
        ({"resources": {"nodes": 2, "rendezvous": "a"}}, "resources.rendezvous\n  String should match pattern"),
    ],
)
def test_cross_checks_name_their_fields_and_values(values: dict[str, Any], words: str) -> None:
    assert words in refusal(values)


@pytest.mark.parametrize(
    "values",
    [
        {"data": {"max_prompt_tokens": 100, "max_length": 140}, "generation": {"max_new_tokens": 40}},
        {"data": {"prompt_column": "q", "response_column": "a", "format": "prompt_response"}},
        {"data": {"prompt_column": "q", "response_column": "a"}},
        {"opponent": {"weighting": [0.5, 0.25], "history": 2}},
        {"opponent": {"weighting": [1, 0, 1], "history": "all"}},
        {"until_round": 0},
        {"objective": {"alpha": 0}},
        {"objective": {"alpha": 1, "beta": [0.1, 1.0]}},
    ],
)
def test_cross_checks_accept_matching_fields(values: dict[str, Any]) -> None:
    config = RunConfig.model_validate(values)
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("group", "field", "value"),
    [
        ("objective", "alpha", 1.01), ("objective", "alpha", -0.01), ("objective", "beta", 0),
        ("objective", "beta", math.inf), ("objective", "beta", [0.1, -1]), ("objective", "beta", []),
        ("objective", "link", "probit"), ("training", "learning_rate", math.nan), ("training", "learning_rate", []),
        ("training", "warmup", 1.5), ("training", "epochs", 0), ("training", "weight_decay", -1),
        ("opponent", "history", 0), ("opponent", "history", "some"), ("opponent", "decay", 0),
        ("generation", "temperature", 0), ("generation", "top_p", 0), ("generation", "top_k", -1),
        ("generation", "max_new_tokens", 0), ("data", "heldout_rows", 0), ("data", "max_bad_share", 2),
        ("evaluation", "bootstrap", 10), ("resources", "gpu_memory_utilization", 0),
        ("resources", "deadline_minutes", 0), ("resources", "lease_seconds", 0),
    ],
)  # fmt: skip
def test_fields_refuse_values_out_of_range(group: str, field: str, value: object) -> None:
    text = refusal({group: {field: value}})
    assert f"{group}.{field}" in text


@pytest.mark.parametrize("name", ["", "Demo", "-x", "a/b", "a b", "ä", "x" * 65, "../x", "a\n"])
def test_run_refuses_names_that_are_not_file_names(name: str) -> None:
    assert "run" in refusal({"run": name})


@pytest.mark.parametrize("name", ["a", "0", "x" * 64, "alpha-0.5_h.all"])
def test_run_accepts_file_names(name: str) -> None:
    assert RunConfig(run=name).run == name


def test_run_config_is_frozen() -> None:
    config = RunConfig()
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        config.run = "other"  # type: ignore[misc]
    for name in GROUPS:
        group = getattr(config, name)
        field = next(iter(type(group).model_fields))
        with pytest.raises(pydantic.ValidationError, match="frozen"):
            setattr(group, field, getattr(group, field))


@pytest.mark.parametrize("values", [{"alpha": 1}, *({name: {"no_such_field": 1}} for name in GROUPS)])
def test_groups_refuse_unknown_fields(values: dict[str, Any]) -> None:
    assert "Extra inputs are not permitted" in refusal(values)


def described(schema: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    models = {"RunConfig": schema} | schema["$defs"]
    return [(f"{model}.{name}", field) for model, s in models.items() for name, field in s["properties"].items()]


def test_fields_have_a_description_and_a_default() -> None:
    fields = described(RunConfig.model_json_schema())
    assert len(fields) > 50
    for name, field in fields:
        if "$ref" not in field:  # a group: described by its docstring
            assert len(field.get("description", "")) > 15, name
        assert "default" in field, name


def test_groups_have_a_docstring() -> None:
    for name in GROUPS:
        assert type(getattr(RunConfig(), name)).__doc__, name


def test_descriptions_state_the_unit() -> None:
    units = {
        "tokens": "tokens)", "_seconds": "s)", "_minutes": "(minutes)", "_gib": "(GiB)", "_share": "(0..1",
        "utilization": "(0..1)", "heldout_rows": "(rows)", "max_length": "(tokens)",
    }  # fmt: skip
    checked = 0
    for name, field in described(RunConfig.model_json_schema()):
        for part, unit in units.items():
            if name.endswith(part):
                assert unit in field["description"], name
                checked += 1
    assert checked >= 9


def test_mutable_fields_exist() -> None:
    plain, nested = {n for n in MUTABLE_FIELDS if "." not in n}, {n for n in MUTABLE_FIELDS if "." in n}
    assert set(RunConfig.model_fields) >= plain
    for name in nested:
        group, field = name.split(".")
        assert field in type(RunConfig.model_fields[group].default).model_fields, name


def test_fixed_fields_are_all_but_the_mutable_ones() -> None:
    fixed = fixed_fields(RunConfig())
    assert set(fixed) == set(RunConfig.model_fields) - MUTABLE_FIELDS
    assert set(TrainingConfig.model_fields) - set(fixed["training"]) == {
        "activation_checkpointing", "checkpoint_every_steps", "checkpoint_every_minutes", "checkpoints_kept",
        "max_nonfinite_steps",
    }  # fmt: skip
    assert set(EvaluationConfig.model_fields) - set(fixed["evaluation"]) == {"alarm_real_drop"}


def test_defaults_survive_json() -> None:
    config = RunConfig()
    assert RunConfig.model_validate_json(config.model_dump_json()) == config


@given(st.lists(st.floats(1e-9, 1e3), min_size=1, max_size=6), st.integers(1, 12))
def test_of_round_list_holds_its_last_entry(values: list[float], n: int) -> None:
    assert of_round(values, n) == (values[n - 1] if n <= len(values) else values[-1])


def test_of_round_single_value_holds_in_every_round() -> None:
    assert [of_round(0.1, n) for n in (1, 2, 9)] == [0.1, 0.1, 0.1]


def test_of_round_follows_the_schedule_of_spin() -> None:
    config = RunConfig.model_validate(
        {"training": {"learning_rate": [5e-7, 5e-7, 1e-7]}, "objective": {"beta": [0.1, 0.1, 5.0]}}
    )
    assert [of_round(config.training.learning_rate, n) for n in (1, 2, 3, 4)] == [5e-7, 5e-7, 1e-7, 1e-7]
    assert [of_round(config.objective.beta, n) for n in (2, 3, 8)] == [0.1, 5.0, 5.0]


def test_differences_names_each_leaf_that_differs_and_no_other() -> None:
    old = RunConfig()
    new = RunConfig.model_validate(
        {"seed": 1, "objective": {"beta": [0.1, 0.2]}, "training": {"learning_rate": 1e-5}, "data": {"subset": "x"}}
    )
    assert differences(old.model_dump(mode="json"), new.model_dump(mode="json")) == [
        "seed: 0 -> 1",
        "data.subset: None -> 'x'",
        "objective.beta: 0.1 -> [0.1, 0.2]",
        "training.learning_rate: 5e-06 -> 1e-05",
    ]


def test_differences_equal_configurations_have_none() -> None:
    values = RunConfig().model_dump(mode="json")
    assert differences(values, RunConfig.model_validate(values).model_dump(mode="json")) == []
    assert differences({"a": 1}, {"a": 1.0}) == []  # what JSON does to 1.0


def test_differences_sees_fields_that_one_side_lacks() -> None:
    assert differences({"a": 1, "g": {"b": 2}}, {"g": {}, "c": 3}) == [
        "a: 1 -> '(absent)'",
        "g.b: 2 -> '(absent)'",
        "c: '(absent)' -> 3",
    ]


@given(st.floats(allow_nan=False), st.floats(allow_nan=False))
def test_differences_sees_the_smallest_difference_of_numbers(a: float, b: float) -> None:
    assert bool(differences({"x": a}, {"x": b})) == (a != b)
