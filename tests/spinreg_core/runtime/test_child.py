"""A stage in a child process ends when its caller may not go on."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from spinreg_core.errors import LeaseLost
from spinreg_core.runtime.child import run_in_process
from tests.support.builders import make_job


def test_run_in_process_kills_the_child_when_the_check_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def check() -> None:
        calls.append(1)
        if len(calls) > 1:
            raise LeaseLost("run 'mine' was taken over")

    with pytest.raises(LeaseLost, match="taken over"):
        run_in_process(make_job("train", tmp_path), "tests.support.sleeping_stage", check)
    assert not psutil.pid_exists(int(capsys.readouterr().out))
