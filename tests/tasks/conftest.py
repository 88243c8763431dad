"""A stage of a few lines, run as stages are."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from spinreg_core.config import RunConfig
from spinreg_core.runs.job import Job


@pytest.fixture
def toy_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Job]:
    """Makes `spinreg_core.stages.toy_stage` importable in child processes, and a job for it."""
    stages = tmp_path / "stages"
    stages.mkdir()
    (tmp_path / "sitecustomize.py").write_text(
        f"import spinreg_core.stages\nspinreg_core.stages.__path__.append({str(stages)!r})\n"
    )
    # A PYTHONPATH of the tests names the checkout that they test, which the stage must import as well.
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("PIDS", str(tmp_path))

    def write(body: str) -> Job:
        (stages / "toy_stage.py").write_text(textwrap.dedent(body))
        return Job("toy-stage", "toy-stage-0", {}, "s", "e1-w", 1, {"a": ["b"]}, RunConfig(), tmp_path / "work")

    return write
