"""CONTRIBUTING.md names files that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PATHS = sorted(set(re.findall(r"`([\w-]+/[\w./-]*)`", (ROOT / "CONTRIBUTING.md").read_text())))


@pytest.mark.parametrize("path", PATHS)
def test_path_in_contributing_exists(path: str) -> None:
    assert (ROOT / path).exists() or (ROOT / "spinreg_core" / path).exists()


def test_contributing_names_paths_of_every_room() -> None:
    assert {path.partition("/")[0] for path in PATHS} >= {"flows", "tasks", "spinreg_core", "tests", "scripts"}
