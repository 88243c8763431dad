"""docs/reliability.md names tests that exist, and some under each promise."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/reliability.md").read_text()
PROMISES = re.split(r"^## (?=\d\.)", PAGE.split("\n## Try it yourself")[0], flags=re.MULTILINE)[1:]


def test_page_names_only_tests_that_exist() -> None:
    named = re.findall(r"`(?:tests/[\w/*.]+/)?(test_\w+\*?\.py)(?:: (test_\w+))?[^`]*`", PAGE)
    assert len(named) > 10
    for file, test in named:
        found = list((ROOT / "tests").rglob(file))
        assert found, file
        assert not test or any(f"def {test}(" in path.read_text() for path in found), f"{file}: {test}"


def test_page_names_tests_for_every_promise() -> None:
    assert [promise[0] for promise in PROMISES] == list("12345")
    for promise in PROMISES:
        assert re.search(r"`[^`]*test_\w+|bad-input\.md", promise), promise[:40]
