"""The parameters of `spin`: the fields of `RunConfig`, as the form of the Prefect UI needs them, and their resolution.

To add a parameter, add a field to a group of `spinreg_core.config`; this module follows.

Decides: that the form shows every field and fills none of them in.
Leaves out: checks across fields, which only the resolved configuration can pass or fail.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    create_model,
    model_serializer,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from spinreg_core.config import Group, RunConfig
from spinreg_core.config.versions import without_removed
from spinreg_core.runs.head import resolve_run

F = TypeVar("F", bound=Callable[..., Any])


class Form(BaseModel):
    """Base of all groups of the form. `model_dump()` has the fields that were given, and no others.

    The form of Prefect 3.7.7 submits every default that it shows. A group with defaults would therefore override the
    fields of a configuration file or of a stored run. An optional group (`DataConfig | None`) shows no field until it
    is opened, and then does the same. A field without a default in the schema is submitted only when it is filled in.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    group: ClassVar[str]  # its name in RunConfig

    @model_validator(mode="before")
    @classmethod
    def _without_removed(cls, values: object) -> object:
        # Schedules and automations of an earlier deployment still send the fields of its form.
        return without_removed(values, cls.group) if isinstance(values, dict) else values

    @model_serializer(mode="wrap")
    def _only_given(self, handler: SerializerFunctionWrapHandler) -> dict[str, object]:
        return {name: value for name, value in handler(self).items() if name in self.model_fields_set}


def form_of(name: str) -> type[Form]:
    """Return the form of a group of `RunConfig`: its fields and ranges, with the defaults in the descriptions."""
    group = type(RunConfig.model_fields[name].default)
    fields: dict[str, Any] = {}
    for inner, field in group.model_fields.items():
        shown = copy.copy(field)
        default = "unset" if field.default is None else field.default
        shown.description = f"{field.description} Default: {default}."
        # A factory is a default that pydantic leaves out of the schema.
        shown.default, shown.default_factory = PydanticUndefined, lambda: None
        fields[inner] = (field.annotation, shown)
    form = create_model(group.__name__, __doc__=group.__doc__, __base__=Form, **fields)
    form.group = name
    return form


def run_parameters(function: F) -> F:
    """Give a function the fields of `RunConfig` as keyword parameters, and their descriptions in its docstring.

    The function takes `**parameters`. Its own parameters, and their lines under `Args:`, come after `store`, where the
    form shows the other addresses.
    """
    # Prefect reads parameters from the signature. All of them are keywords, so that it hands them over by name.
    own = inspect.signature(function, eval_str=True)
    parameters = [_parameter(name, field) for name, field in RunConfig.model_fields.items()]
    place = list(RunConfig.model_fields).index("store") + 1
    parameters[place:place] = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in own.parameters.values()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    function.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    # Prefect takes descriptions from the docstring, and drops that of `Annotated[..., Field(description=...)]`.
    lines = [
        f"    {name}: {field.description}{'' if field.default is None else f' Default: {field.default}.'}"
        for name, field in RunConfig.model_fields.items()
        if field.description  # groups have none; the form shows the docstring of their class
    ]
    text = inspect.getdoc(function) or ""
    function.__doc__ = "\n".join([text, *([] if "Args:" in text else ["", "Args:"]), *lines])
    return function


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    """The parameter for a field of `RunConfig`: an empty form for a group; None, unless it is given, for any other."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    if isinstance(field.default, Group):
        form = form_of(name)
        return inspect.Parameter(name, keyword, annotation=form, default=form())
    # Prefect drops the range of `= Field(..., ge=1)`, and keeps that of Annotated.
    annotation = Annotated[(field.annotation | None, *field.metadata)] if field.metadata else field.annotation | None  # type: ignore[operator]
    return inspect.Parameter(name, keyword, annotation=annotation, default=None)


def resolve_parameters(config: str | None, parameters: Mapping[str, object]) -> RunConfig:
    """Return the configuration of a call of `spin`; an existing run gives the fields that the call does not.

    Raises BadInput.
    """
    filled = {
        name: value.model_dump(mode="json") if isinstance(value, BaseModel) else value
        for name, value in parameters.items()
    }
    given = {name: value for name, value in filled.items() if value is not None and value != {}}
    return resolve_run(given, config)
