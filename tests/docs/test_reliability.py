"""docs/reliability.md names only tests that there are, and under each promise some."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/reliability.md").read_text()
PROMISES = re.split(r"^## (?=\d\.)", PAGE.split("\n## Try it yourself")[0], flags=re.MULTILINE)[1:]


def test_every_test_that_is_named_exists() -> None:
    named = re.findall(r"`(?:tests/[\w/*.]+/)?(test_\w+\*?\.py)(?:: (test_\w+))?[^`]*`", PAGE)
    assert len(named) > 10
    for file, test in named:
        found = list((ROOT / "tests").rglob(file))
        assert found, file
        assert not test or any(f"def {test}(" in path.read_text() for path in found), f"{file}: {test}"


def test_every_promise_has_tests() -> None:
    assert [promise[0] for promise in PROMISES] == list("12345")
    for promise in PROMISES:
        assert re.search(r"`[^`]*test_\w+|bad-input\.md", promise), promise[:40]
