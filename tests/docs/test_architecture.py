"""docs/architecture.md shows the same table of packages as the house rules."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def rooms() -> dict[str, str]:
    """Return the table ROOMS of tests/test_house_rules.py."""
    for node in ast.parse((ROOT / "tests/test_house_rules.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ROOMS":
            return dict(ast.literal_eval(node.value))
    raise AssertionError("tests/test_house_rules.py has no table ROOMS")


def test_table_of_packages_equals_the_house_rules() -> None:
    section = (ROOT / "docs/architecture.md").read_text().split("## Rooms of spinreg_core")[1].split("\n## ")[0]
    found = re.findall(r"^\| `(\w+)` \| [^|]+ \|([^|]*)\|$", section, re.MULTILINE)
    assert [(package, imports.split()) for package, imports in found] == [
        (package, imports.split()) for package, imports in rooms().items()
    ]
