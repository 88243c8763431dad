"""Write docs/configuration.md, the reference of every field, from the models in spinreg_core/config/.

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
<!-- Made by scripts/config_reference.py (`make docs`). Change spinreg_core/config/ or that script, not this page. -->
# Configuration

One tree, `spinreg_core.config.RunConfig`, defines a run. It holds every default; together they are the demo.

## Where values come from

1. A **parameter** wins: `-p rounds=3` or `-p objective='{{"alpha": 1}}'` of `prefect deployment run`, a field of the
   form in the Prefect UI, or an option such as `--model` or `-p objective.alpha=1` of the command `spinreg`.
2. Next comes the **file** named by `config` (`--config`), at a path or a URI (`s3://…`). It is YAML, or JSON if its
   name ends in `.json`. Parameters of a group replace single fields of the file's group; a list replaces a list.
3. Without a file, the **existing run** of that name comes next: `-p run=NAME -p rounds=1` advances NAME unchanged.
   A file and the defaults together are a whole configuration, so that with a file the existing run gives no values.
4. Last come the **defaults**.

`rounds` and `until_round` are two ways to set the target, so either of them as a parameter replaces both in the file.
The resulting configuration is printed, shown in Prefect and stored with the run. A value out of range, an unknown
field or two fields that contradict each other end the run before anything is loaded, with one line per field.

## Changing an existing run

A run keeps the configuration it was started with. Only these fields may change later:

{{mutable}}.

They set how far and how to run and what to keep, and change results by no more than the rounding of sums. Any other
difference is refused with the list of differences; use another run name for another experiment. Runs in one store share
their common objects, so a grid over alpha and history prepares the data and runs the first round once.

A later version of spinreg may add fields and remove fields. An existing run then keeps its behaviour: an added field
gets the value that equals the behaviour of before, whatever its default is. A removed field in a file or a parameter is
accepted if it is null or at its old default; any other value is refused with the name of its replacement.

## Values that change from round to round

`training.learning_rate` and `objective.beta` take a number, or a list for rounds 1, 2, …; the last entry of a list
holds from there on.

## Example

```yaml
{EXAMPLE}```

```
spinreg plan --config my.yaml                          # memory, disk and time that it needs
spinreg run --config my.yaml -p objective.alpha=1      # one field changed
prefect deployment run spin/iterate -p config=s3://runs/my.yaml -p rounds=1
```

Values on the command line are JSON, or text if they are not valid JSON: `-p training.learning_rate='[5e-7, 1e-7]'`.

"""


def type_text(annotation: Any) -> str:
    """Return a type as a person reads it, ranges included, e.g. `number > 0, or list of numbers > 0`."""
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
    """Return the range that constraints stand for, e.g. ` ≥ 0, < 1`."""
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
    """Return a Markdown table of the fields of one group."""
    lines = ["| field | type and range | default | description |", "|---|---|---|---|"]
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
