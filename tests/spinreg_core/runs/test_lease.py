"""A holder counts as dead only on proof."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spinreg_core.runs.head import Holder
from spinreg_core.runs.lease import is_dead, make_holder


@pytest.fixture
def other() -> Iterator[Holder]:
    """A living process as the holder."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield make_holder("other", process.pid)
    process.kill()
    process.communicate()


@pytest.mark.parametrize("problem", [errno.EMFILE, errno.EACCES, errno.ENOENT])
def test_is_dead_of_an_unreadable_living_holder_is_false(
    other: Holder, problem: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.read_text

    def read_text(path: Path, *args: Any, **named: Any) -> str:
        if str(path) == f"/proc/{other.pid}/stat":
            raise OSError(problem, os.strerror(problem))
        return real(path, *args, **named)

    monkeypatch.setattr(Path, "read_text", read_text)
    assert make_holder("other", other.pid).identity is None
    assert not is_dead(other)


def test_is_dead_is_true_for_an_ended_or_replaced_process(other: Holder) -> None:
    assert not is_dead(other)
    assert not is_dead(make_holder("me"))
    assert is_dead(other.model_copy(update={"identity": f"{other.identity}0"})), "started at another time"
    os.kill(other.pid, 9)
    os.waitpid(other.pid, 0)
    assert is_dead(other)
    assert not is_dead(other.model_copy(update={"identity": None})), "of another machine, for all that is known"
