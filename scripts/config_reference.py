"""Write docs/configuration.md, the reference of every field, from the models in spinreg_core/config.py.

Decides: the page's introduction and how a type reads to a person. Leaves out: fields, defaults and descriptions
(the models). Run it after changing them (`make docs`); a test fails when the page is out of date.
"""

from __future__ import annotations

import json
import types
import typing
from pathlib import Path
from typing import Any

import annotated_types
import yaml
from pydantic.fields import FieldInfo

from spinreg_core.config import MUTABLE_FIELDS, Group, RunConfig

PAGE = Path(__file__).resolve().parents[1] / "docs/configuration.md"

EXAMPLE = """\
run: zephyr-alpha
model: /models/my-chat-model
dataset: s3://data/conversations.jsonl
store: s3://runs/spinreg
until_round: 3
objective:
  alpha: 0.5
  beta: [0.1, 0.1, 5.0]        # rounds 1, 2, and 3 onwards
training:
  learning_rate: [5.0e-7, 1.0e-7]
opponent:
  history: all
"""

INTRODUCTION = f"""\
<!-- Made by scripts/config_reference.py (`make docs`). Change spinreg_core/config.py or that script, not this page. -->
# Configuration

Everything that defines a run is one tree, `spinreg_core.config.RunConfig`. Nothing else has defaults: what is not
said is what stands below, and the defaults together are the demo.

## Where values come from

1. A **parameter** wins: `-p rounds=3` or `-p objective='{{"alpha": 1}}'` of `prefect deployment run`, a field of the
   form in the Prefect UI, an option such as `--model` or `-p objective.alpha=1` of the command `spinreg`.
2. Then the **file** named by `config` (`--config`): YAML, or JSON where the name ends in `.json`; a path or a URI
   (`s3://…`). A group in a parameter is laid over the group of the file field by field; a list replaces a list.
3. Then, without a file, the **existing run** of that name: `-p run=NAME -p rounds=1` goes on with NAME as it is.
   With a file, the file and the defaults are the whole of what is wanted.
4. Then the **defaults**.

`rounds` and `until_round` say the same thing in two ways, so one of them as a parameter replaces either of them in
the file. What came out is printed, shown in Prefect and stored with the run. A value out of range, an unknown field
or two fields that contradict each other end the run before anything is loaded, with one line per field.

## Going on with a run

A run keeps the configuration it was started with. Only these may be given other values later, because they say how
far, how to run and what to keep, and change what comes out by no more than the rounding of sums: {{mutable}}. Any other
difference is refused with the list of what differs; take another run name for another experiment. Runs in one store
share what they have in common, so a grid over alpha and history prepares the data and does the first round once.

## Values that change from round to round

`training.learning_rate` and `objective.beta` take a number, or a list for rounds 1, 2, …; the last entry of a list
holds from there on.

## Example

```yaml
{EXAMPLE}```

```
spinreg plan --config my.yaml                          # what it will need
spinreg run --config my.yaml -p objective.alpha=1      # one field changed
prefect deployment run spin/iterate -p config=s3://runs/my.yaml -p rounds=1
```

On the command line values are JSON, or text where they are no JSON: `-p training.learning_rate='[5e-7, 1e-7]'`.

"""


def type_text(annotation: Any) -> str:
    """A type as a person reads it, ranges included, e.g. `number > 0, or list of numbers > 0`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return type_text(arguments[0]) + bounds(arguments[1:])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_text(part) for part in arguments)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is list:
        return f"list of ({type_text(arguments[0])})"
    if origin is dict:
        return "mapping of names to values"
    return {int: "whole number", float: "number", str: "text", bool: "true or false"}[annotation]


def bounds(metadata: typing.Iterable[Any]) -> str:
    """The range that constraints stand for, e.g. ` ≥ 0, < 1`."""
    parts: list[str] = []
    for item in metadata:
        for constraint in item.metadata if isinstance(item, FieldInfo) else [item]:
            for kind, sign in (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤")):
                if isinstance(constraint, getattr(annotated_types, kind.capitalize())):
                    parts.append(f"{sign} {getattr(constraint, kind):,}".replace(",", " "))
            if isinstance(constraint, annotated_types.MinLen):
                parts.append("not empty")
    text = ", ".join(parts)
    return f", {text}" if text.startswith("not") else f" {text}" if text else ""


def table(model: type[Group]) -> str:
    """A Markdown table of the fields of one group."""
    lines = ["| field | type and range | default | what it is |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        if isinstance(field.default, Group):
            continue
        default = "unset" if field.default is None else f"`{json.dumps(field.default).strip(chr(34))}`"
        about = " ".join(str(field.description).split()).replace("|", "\\|")
        kinds = [kind for kind in typing.get_args(field.annotation) if kind is not types.NoneType]
        optional = types.NoneType in typing.get_args(field.annotation)
        kind = type_text(typing.Union[tuple(kinds)] if optional else field.annotation)  # noqa: UP007
        kind += bounds(field.metadata) + (", or unset" if optional else "")
        lines.append(f"| `{name}` | {kind} | {default} | {about} |")
    return "\n".join(lines)


def page() -> str:
    """The whole of docs/configuration.md."""
    RunConfig.model_validate(yaml.safe_load(EXAMPLE))
    places = list(RunConfig.model_fields)
    names = sorted(MUTABLE_FIELDS, key=lambda name: (places.index(name.split(".")[0]), name))
    mutable = ", ".join(f"`{name}`" for name in names)
    parts = [INTRODUCTION.replace("{mutable}", mutable) + "## The run\n\n" + table(RunConfig)]
    for name, field in RunConfig.model_fields.items():
        if isinstance(field.default, Group):
            parts.append(f"## `{name}`\n\n{type(field.default).__doc__}\n\n{table(type(field.default))}")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE}")
