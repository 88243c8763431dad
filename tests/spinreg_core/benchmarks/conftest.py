"""Fixtures of the benchmarks' tests: the store with tiny policies of the stages' tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.generation_fixtures import House


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    monkeypatch.setenv("SPINREG_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return House(tmp_path)
