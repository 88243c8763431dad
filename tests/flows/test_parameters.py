"""The form says nothing that nobody said, refuses what the configuration refuses, and describes every field."""

from __future__ import annotations

from typing import Any

import pytest
from prefect.utilities.callables import parameter_schema
from pydantic import TypeAdapter, ValidationError

from flows.parameters import document_parameters, form_of
from spinreg_core.config import DataConfig, Group, RunConfig
from spinreg_core.config.resolve import resolve

GROUPS: dict[str, type[Group]] = {
    name: type(field.default) for name, field in RunConfig.model_fields.items() if isinstance(field.default, Group)
}


def said(group: type[Group], values: dict[str, Any]) -> dict[str, Any]:
    """What is left of `values` after the way through the form."""
    return form_of(group).model_validate(values).model_dump(mode="json")


@pytest.mark.parametrize("group", GROUPS.values())
def test_an_untouched_form_says_nothing(group: type[Group]) -> None:
    assert form_of(group)().model_dump() == {}
    assert said(group, {}) == {}


@pytest.mark.parametrize("group", GROUPS.values())
def test_what_was_said_arrives_whatever_its_value(group: type[Group]) -> None:
    defaults = group().model_dump(mode="json")
    assert said(group, defaults) == defaults
    for name, value in defaults.items():
        assert said(group, {name: value}) == {name: value}


def test_null_is_said_where_it_is_a_value() -> None:
    assert said(DataConfig, {"prompts_per_round": None}) == {"prompts_per_round": None}


def test_the_form_has_no_switches() -> None:
    """One has no empty state in the UI: it would always say something."""
    assert not [n for group in GROUPS.values() for n, field in group.model_fields.items() if field.annotation is bool]


@pytest.mark.parametrize(
    ("group", "values"),
    [
        ("data", {"heldout_rows": 0}),
        ("data", {"heldout_rows": None}),
        ("data", {"no_such_field": 1}),
        ("objective", {"alpha": 1.01}),
        ("objective", {"beta": [0.1, -1]}),
        ("training", {"optimizer": "sgd"}),
    ],
)
def test_refuses_what_the_group_refuses(group: str, values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        GROUPS[group].model_validate(values)
    with pytest.raises(ValidationError):
        form_of(GROUPS[group]).model_validate(values)


def test_checks_across_fields_wait_for_the_other_fields() -> None:
    """A length that only fits the prompt length of the file must not be held against the default's."""
    partial = said(DataConfig, {"max_length": 128})
    with pytest.raises(ValidationError, match="must exceed"):
        DataConfig.model_validate(partial)
    found = resolve({"data": partial | {"max_prompt_tokens": 20}, "generation": {"max_new_tokens": 30}})
    assert found.data.max_length == 128


@pytest.mark.parametrize("group", GROUPS.values())
def test_schema_has_ranges_and_descriptions_but_no_defaults(group: type[Group]) -> None:
    form, real = (TypeAdapter(model).json_schema() for model in (form_of(group), group))
    assert form["description"] == real["description"]
    assert list(form["properties"]) == list(real["properties"])
    for name, field in real["properties"].items():
        shown = form["properties"][name]
        assert shown.get("default") is None, name
        assert ("default" in shown) == (field.get("type") == "boolean"), name
        default = "unset" if field["default"] is None else field["default"]
        assert shown["description"] == f"{field['description']} Default: {default}."
        kept = {key: value for key, value in field.items() if key not in ("default", "description", "title")}
        if field.get("type") != "boolean":
            assert kept.items() <= shown.items(), name


def test_prefect_finds_the_descriptions() -> None:
    def function(rounds: int | None = None, config: str | None = None, seed: int | None = None) -> None:
        """Do something.

        Args:
            config: A file.
        """

    properties = parameter_schema(document_parameters(function)).properties
    assert properties["config"]["description"] == "A file."
    assert properties["rounds"]["description"] == RunConfig.model_fields["rounds"].description
    assert properties["seed"]["description"] == f"{RunConfig.model_fields['seed'].description} Default: 0."
