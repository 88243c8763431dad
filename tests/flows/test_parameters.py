"""The parameters of `spin`: their form, order, types and descriptions, and their way to the configuration."""

from __future__ import annotations

from typing import Any

import pytest
from prefect import flow
from prefect.utilities.callables import parameter_schema
from pydantic import TypeAdapter, ValidationError

from flows.parameters import form_of, run_parameters
from flows.spin import spin
from spinreg_core.config import Group, RunConfig, versions
from spinreg_core.config.resolve import resolve
from spinreg_core.config.versions import RemovedField
from spinreg_core.errors import BadInput

GROUPS: dict[str, type[Group]] = {
    name: type(field.default) for name, field in RunConfig.model_fields.items() if isinstance(field.default, Group)
}


def given(group: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return what is left of `values` after the way through the form."""
    return form_of(group).model_validate(values).model_dump(mode="json")


@pytest.mark.parametrize("group", GROUPS)
def test_form_untouched_gives_nothing(group: str) -> None:
    assert form_of(group)().model_dump() == {}
    assert given(group, {}) == {}


@pytest.mark.parametrize("group", GROUPS)
def test_form_keeps_given_fields_whatever_their_value(group: str) -> None:
    defaults = GROUPS[group]().model_dump(mode="json")
    assert given(group, defaults) == defaults
    for name, value in defaults.items():
        assert given(group, {name: value}) == {name: value}


def test_form_keeps_null_where_it_is_a_value() -> None:
    assert given("data", {"prompts_per_round": None}) == {"prompts_per_round": None}


def test_form_has_no_boolean_fields() -> None:
    """A switch has no empty state in the UI, so it would always be given."""
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
def test_form_refuses_the_values_that_its_group_refuses(group: str, values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        GROUPS[group].model_validate(values)
    with pytest.raises(ValidationError):
        form_of(group).model_validate(values)


def test_form_leaves_checks_across_fields_to_the_configuration() -> None:
    """A length that fits the prompt length of the file may be too small for the default's."""
    partial = given("data", {"max_length": 128})
    with pytest.raises(ValidationError, match="must exceed"):
        GROUPS["data"].model_validate(partial)
    found = resolve({"data": partial | {"max_prompt_tokens": 20}, "generation": {"max_new_tokens": 30}})
    assert found.data.max_length == 128


def test_form_removed_field_passes_at_its_old_default_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(versions.REMOVED, "opponent.tempo", RemovedField("slow", "use opponent.decay"))
    assert given("opponent", {"tempo": "slow", "decay": 0.25}) == {"decay": 0.25}
    with pytest.raises(BadInput, match=r"opponent\.tempo.*use opponent\.decay"):
        given("opponent", {"tempo": "fast"})


@pytest.mark.parametrize("group", GROUPS)
def test_form_schema_has_ranges_and_descriptions_but_no_defaults(group: str) -> None:
    form, real = (TypeAdapter(model).json_schema() for model in (form_of(group), GROUPS[group]))
    assert (form["title"], form["description"]) == (real["title"], real["description"])
    assert list(form["properties"]) == list(real["properties"])
    assert "required" not in form
    for name, field in real["properties"].items():
        default = "unset" if field["default"] is None else field["default"]
        described = {"description": f"{field['description']} Default: {default}."}
        assert form["properties"][name] == {k: v for k, v in field.items() if k != "default"} | described, name


def test_spin_schema_is_made_of_the_configuration() -> None:
    """Its order, titles, types, ranges, defaults and descriptions: a new field or group needs no line in flows/."""
    schema = parameter_schema(spin)
    names = [name for name in RunConfig.model_fields if name not in GROUPS]
    assert names == ["run", "rounds", "until_round", "model", "dataset", "store", "seed"]
    order = ["run", "rounds", "until_round", "model", "dataset", "store", "config", "seed", *GROUPS]
    assert [(name, field["position"], field["title"]) for name, field in schema.properties.items()] == [
        (name, position, name) for position, name in enumerate(order)
    ]
    assert not schema.required
    real = RunConfig.model_json_schema()["properties"]
    for name in names:
        shown, default = schema.properties[name], RunConfig.model_fields[name].default
        types = real[name].get("anyOf") or [{"type": real[name]["type"]}]
        assert [kind["type"] for kind in shown["anyOf"]] == [*(k["type"] for k in types if k["type"] != "null"), "null"]
        ranges = {key: value for kind in (*types, real[name]) for key, value in kind.items()}
        kept = ("minimum", "maximum", "exclusiveMaximum", "pattern", "minLength")
        assert {k: v for k, v in shown["anyOf"][0].items() if k in kept} == {
            k: v for k, v in ranges.items() if k in kept
        }
        assert shown["default"] is None
        told = "" if default is None else f" Default: {default}."
        assert shown["description"] == f"{real[name]['description']}{told}"
    assert schema.properties["config"]["description"].startswith("Path or URI of a run configuration file")
    assert schema.definitions is not None
    for name, group in GROUPS.items():
        shown = {k: v for k, v in schema.properties[name].items() if k not in ("position", "title")}
        reference = {"$ref": f"#/definitions/{group.__name__}"}
        assert shown in ({"default": {}} | reference, {"default": {}, "allOf": [reference]}), name
        assert list(schema.definitions[group.__name__]["properties"]) == list(group.model_fields)


def test_run_parameters_reach_the_function_by_name() -> None:
    @flow
    @run_parameters
    def echo(config: str | None = None, **parameters: Any) -> list[Any]:
        """Do something."""
        return [config, parameters]

    properties = parameter_schema(echo).properties
    assert properties["seed"]["description"] == f"{RunConfig.model_fields['seed'].description} Default: 0."
    checked = echo.validate_parameters({"seed": "4", "data": {"heldout_rows": 5}, "config": "a.yaml"})
    config, parameters = echo.fn(**checked)
    assert (config, parameters["seed"]) == ("a.yaml", 4)
    assert parameters["data"].model_dump() == {"heldout_rows": 5}
