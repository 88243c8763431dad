"""Tests of this room use toy stages, which neither sync files nor look at installed packages."""

from __future__ import annotations

from pathlib import Path

import pytest

from spinreg_core.store.folder import FolderStore
from tests.support.repairs import Dice
from tests.support.toy_runs import quick

__all__ = ["quick"]


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "store")


@pytest.fixture
def dice() -> Dice:
    return Dice()
