"""A spare process becomes the stage it is given, and is never left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from spinreg_core.errors import StageFailed
from spinreg_core.runs.job import Job
from tasks import prewarm as spare
from tasks.prewarm import discard_spare, prepare_spare, take_spare
from tasks.stage_process import run_stage

WHO = """
    import os, sys
    from spinreg_core.runtime.main import main

    def run(job):
        print("process", os.getpid(), __name__, "torch" in sys.modules, job.round)
        return {"object_id": "x"}

    main(run)
"""


@pytest.fixture(autouse=True)
def none_left() -> Iterator[None]:
    yield
    discard_spare()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def spare_pid() -> int:
    assert spare._spare is not None
    return spare._spare.pid


def run(job: Job) -> list[str]:
    lines: list[str] = []
    run_stage(job, on_line=lines.append, take=take_spare)
    return lines


def test_the_spare_becomes_the_stage(toy_stage: Callable[[str], Job]) -> None:
    prepare_spare()
    pid = spare_pid()
    prepare_spare()
    assert spare_pid() == pid, "one at most"
    lines = run(toy_stage(WHO))
    assert lines[0] == f"process {pid} __main__ True 1"
    assert spare._spare is None
    assert not alive(pid)


@pytest.mark.parametrize("reaped", [False, True])
def test_without_a_living_spare_the_process_is_a_fresh_one(toy_stage: Callable[[str], Job], reaped: bool) -> None:
    prepare_spare()
    pid, process = spare_pid(), spare._spare
    assert process is not None
    os.kill(pid, 9)
    if reaped:
        process.wait()
    else:
        while alive(pid):
            time.sleep(0.01)
    assert run(toy_stage(WHO))[0].split()[3] == "False", "no torch in it"


def test_a_stage_in_a_spare_is_watched_as_any_other(toy_stage: Callable[[str], Job]) -> None:
    job = toy_stage("""
        import time
        from spinreg_core.runtime.main import main
        main(lambda job: time.sleep(300))
    """)
    prepare_spare()
    pid = spare_pid()
    with pytest.raises(StageFailed, match="deadline_minutes"):
        run_stage(job, on_line=print, take=take_spare, deadline_seconds=1)
    assert not alive(pid)


def test_a_discarded_spare_is_gone_at_once() -> None:
    prepare_spare()
    pid = spare_pid()
    discard_spare()
    assert not alive(pid)
    discard_spare()


def test_a_spare_ends_with_the_process_that_started_it() -> None:
    code = "from tasks import spare; spare.prepare_spare(); print(spare._spare.pid, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as p:
        assert p.stdout is not None
        pid = int(p.stdout.readline())
        p.kill()
    end = time.monotonic() + 30  # it may be in the middle of its imports
    while alive(pid):
        assert time.monotonic() < end
        time.sleep(0.05)
