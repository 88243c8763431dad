"""docs/configuration.md equals the output of scripts/config_reference.py and covers every field."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml

from spinreg_core.config import MUTABLE_FIELDS, Group, RunConfig
from spinreg_core.config.resolve import validate

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/configuration.md").read_text()
SCRIPT: dict[str, Any] = runpy.run_path(str(ROOT / "scripts/config_reference.py"))


def rows() -> dict[str, list[str]]:
    """Return the cells of every field's row, by `group.field` (the run's own fields without a group)."""
    found = {}
    group = ""
    for line in PAGE.splitlines():
        if heading := re.match(r"## (?:`(\w+)`|The run)$", line):
            group = f"{heading[1]}." if heading[1] else ""
        if line.startswith("| `"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            found[group + cells[0].strip("`")] = cells[1:]
    return found


def test_page_equals_the_output_of_the_script() -> None:
    assert SCRIPT["page"]() == PAGE, "run `make docs`"


def test_page_for_every_field_has_one_row_with_all_cells() -> None:
    expected = set()
    for name, field in RunConfig.model_fields.items():
        if isinstance(field.default, Group):
            expected |= {f"{name}.{inner}" for inner in type(field.default).model_fields}
        else:
            expected.add(name)
    assert set(rows()) == expected
    assert all(len(cells) == 3 and all(cells) for cells in rows().values())


@pytest.mark.parametrize(
    ("field", "kind", "default"),
    [
        ("objective.alpha", "number ≥ 0, ≤ 1", "`0.5`"),
        ("objective.beta", "number > 0 or list of (number > 0), not empty", "`0.1`"),
        ("opponent.history", "whole number ≥ 1 or `all`", "`all`"),
        ("data.prompts_per_round", "whole number ≥ 1, or unset", "`32`"),
        ("training.checkpoint_every_steps", "whole number ≥ 1, or unset", "`50`"),
        ("training.activation_checkpointing", "`none`, `selective`, `full`", "`none`"),
        ("rounds", "whole number ≥ 1, ≤ 10 000, or unset", "unset"),
    ],
)
def test_row_of_a_field_shows_type_range_and_default(field: str, kind: str, default: str) -> None:
    assert rows()[field][:2] == [kind, default]


def test_the_mutable_fields_are_named() -> None:
    paragraph = PAGE.split("## Changing an existing run")[1].split("Any other")[0]
    assert set(re.findall(r"`([\w.]+)`", paragraph)) == set(MUTABLE_FIELDS)


def test_example_is_a_valid_configuration() -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    config = validate(yaml.safe_load(example))
    assert isinstance(config.objective.beta, list)
    assert isinstance(config.training.learning_rate, list)
