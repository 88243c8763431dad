"""The parameters of `spin` as the form in the Prefect UI wants them: all fields shown, none of them filled in.

Decides: how the groups of `RunConfig` become parameters of a deployment. Measured with Prefect 3.7.7: the form
submits every default it is shown, so that a group with defaults would override a configuration file or a stored
run with each of them, and an optional group (`DataConfig | None`) shows no field until it is opened, and then
does the same. A field without a default in the schema stays empty and is not submitted unless it is filled in.
Leaves out: the checks across fields, which only the resolved configuration can be held to.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, create_model, model_serializer

from spinreg_core.config import Group, RunConfig
from spinreg_core.config import run as config

F = TypeVar("F", bound=Callable[..., Any])


def _nothing_filled_in(schema: dict[str, Any]) -> None:
    for field in schema["properties"].values():
        field.pop("default", None)


class Form(BaseModel):
    """Base of all groups of the form. `model_dump()` has the fields that were said, and no others."""

    model_config = ConfigDict(extra="forbid", frozen=True, json_schema_extra=_nothing_filled_in)

    @model_serializer(mode="wrap")
    def _only_said(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if name in self.model_fields_set}


def form_of(group: type[Group]) -> type[Form]:
    """The fields of `group` with their ranges; their defaults are in the descriptions only."""
    fields: dict[str, Any] = {}
    for name, field in group.model_fields.items():
        shown = copy.copy(field)
        default = "unset" if field.default is None else field.default
        shown.description = f"{field.description} Default: {default}."
        shown.default = None
        fields[name] = (field.annotation, shown)
    return create_model(group.__name__, __doc__=group.__doc__, __base__=Form, **fields)


def document_parameters(function: F) -> F:
    """Append an `Args:` section with the descriptions of `RunConfig`: it is where Prefect looks for them.

    (Prefect drops the description of `Annotated[..., Field(description=...)]`, and the range of
    `= Field(..., ge=1)`; so the range stays in Annotated and the description comes from here.)
    """
    lines = []
    for name, field in RunConfig.model_fields.items():
        if field.description:  # groups have none; their class docstring is shown
            default = "" if field.default is None else f" Default: {field.default}."
            lines.append(f"    {name}: {field.description}{default}")
    text = inspect.getdoc(function) or ""
    function.__doc__ = "\n".join([text, *([] if "Args:" in text else ["", "Args:"]), *lines])
    return function


if TYPE_CHECKING:  # for the type checker a form is its group: the same fields
    from spinreg_core.config import BenchmarksConfig as BenchmarksForm
    from spinreg_core.config import DataConfig as DataForm
    from spinreg_core.config import EvaluationConfig as EvaluationForm
    from spinreg_core.config import GenerationConfig as GenerationForm
    from spinreg_core.config import JudgeConfig as JudgeForm
    from spinreg_core.config import KeepConfig as KeepForm
    from spinreg_core.config import ObjectiveConfig as ObjectiveForm
    from spinreg_core.config import OpponentConfig as OpponentForm
    from spinreg_core.config import ResourcesConfig as ResourcesForm
    from spinreg_core.config import TrackingConfig as TrackingForm
    from spinreg_core.config import TrainingConfig as TrainingForm
    from spinreg_core.config import UntilConfig as UntilForm
else:
    DataForm = form_of(config.DataConfig)
    OpponentForm = form_of(config.OpponentConfig)
    ObjectiveForm = form_of(config.ObjectiveConfig)
    GenerationForm = form_of(config.GenerationConfig)
    TrainingForm = form_of(config.TrainingConfig)
    EvaluationForm = form_of(config.EvaluationConfig)
    ResourcesForm = form_of(config.ResourcesConfig)
    KeepForm = form_of(config.KeepConfig)
    BenchmarksForm = form_of(config.BenchmarksConfig)
    JudgeForm = form_of(config.JudgeConfig)
    UntilForm = form_of(config.UntilConfig)
    TrackingForm = form_of(config.TrackingConfig)
