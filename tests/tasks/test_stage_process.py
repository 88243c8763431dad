"""A stage process really starts, ends in every way it can, and never leaves anything of its group behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.states import Failed

from spinreg_core.config import RunConfig
from spinreg_core.errors import BadInput, Damaged, JudgeAway, StageFailed, StagePreempted
from spinreg_core.runs.job import Job
from spinreg_core.runtime.failures import describe_error
from spinreg_core.runtime.progress import ProgressLine
from tasks.run_stage import may_retry
from tasks.stage_process import run_process, run_stage, start_process


def alive(pid: int) -> bool:
    """Return whether a process runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def pids_in(folder: Path, count: int) -> list[int]:
    """The process ids that `count` processes have written into `folder`."""
    found: list[int] = []

    def complete() -> bool:
        found[:] = [int(text) for f in folder.glob("*.pid") if (text := f.read_text())]
        return len(found) == count

    assert wait_until(complete, 20), f"expected {count} process ids, found {found}"
    return found


# Starts a grandchild, as an engine does, and notes both process ids.
FAMILY = """
import os, pathlib, subprocess, sys, time
here = pathlib.Path(os.environ["PIDS"])
code = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(300)"
child = subprocess.Popen([sys.executable, "-c", code])
(here / "child.pid").write_text(str(child.pid))
(here / "self.pid").write_text(str(os.getpid()))
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    monkeypatch.setenv("PIDS", str(tmp_path))

    def write(body: str) -> list[str]:
        file = tmp_path / "script.py"
        file.write_text(textwrap.dedent(body))
        return [sys.executable, str(file)]

    return write


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path) -> Iterator[None]:
    """Ends what a failed test left running; a test that passes has asserted that there is nothing."""
    yield
    for pid in (int(text) for f in tmp_path.glob("*.pid") if (text := f.read_text())):
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


def run(command: list[str], tmp_path: Path, **options: object) -> list[str]:
    lines: list[str] = []
    arguments = {"name": "toy", "on_line": lines.append} | options
    run_process(start_process(command), tmp_path / "log.txt", **arguments)  # type: ignore[arg-type]
    return lines


def test_run_stage_returns_result_output_and_progress(toy_stage: Callable[[str], Job]) -> None:
    job = toy_stage("""
        import json, types
        from spinreg_core.runtime.progress import Progress
        from spinreg_core.runtime.main import main

        def run(job):
            print("round", job.round, "of", job.config.run)
            progress = Progress("toy-stage", 3, "rows")
            for _ in range(3):
                progress.update()
            (job.workdir / "result.json").write_text(json.dumps({"inputs": job.inputs}))
            return types.SimpleNamespace(object_id=job.object_id)

        if __name__ == "__main__":
            main(run)
    """)
    lines: list[str] = []
    progress: list[ProgressLine] = []
    assert run_stage(job, on_line=lines.append, on_progress=progress.append) == {"inputs": {"a": ["b"]}}
    assert lines[0] == "round 1 of demo"
    assert lines[-1].startswith("[toy-stage] committed toy-stage-0 after")
    assert progress[-1].text.startswith("[toy-stage] 3/3 rows (100 %), ")
    assert Job.load(job.workdir / "job.json") == job
    assert (job.workdir / "log.txt").read_text().splitlines()[0] == lines[0]


def test_without_result_file_the_result_is_empty(toy_stage: Callable[[str], Job]) -> None:
    assert run_stage(toy_stage("print('nothing to report')")) == {}


def test_bad_input_keeps_the_stages_own_message(toy_stage: Callable[[str], Job]) -> None:
    job = toy_stage("""
        from spinreg_core.errors import BadInput
        from spinreg_core.runtime.main import main

        def run(job):
            print("bad input: an earlier line that only looks like it")
            raise BadInput("row 3", "no answer\\nrow 7: no prompt", "both")

        main(run)
    """)
    with pytest.raises(BadInput) as caught:
        run_stage(job)
    assert str(caught.value) == "row 3: found no answer\nrow 7: no prompt; expected both"


def test_damage_found_by_a_stage_is_damage_and_not_retried(toy_stage: Callable[[str], Job]) -> None:
    job = toy_stage("""
        from spinreg_core.errors import Damaged
        from spinreg_core.runtime.main import main

        def run(job):
            raise Damaged("pairs.parquet: found 3 bytes; expected 4000")

        main(run)
    """)
    with pytest.raises(Damaged, match=r"^pairs\.parquet: found 3 bytes; expected 4000$"):
        run_stage(job)


def test_a_judge_that_is_away_is_not_waited_for_again(script: Callable[[str], list[str]], tmp_path: Path) -> None:
    status, said = describe_error(JudgeAway("judge.base_url, host/v1: HTTP 500"), "benchmark", RunConfig())
    with pytest.raises(JudgeAway, match=r"^judge\.base_url, host/v1: HTTP 500$") as caught:
        run(script(f"import sys; print({said!r}); sys.exit({status})"), tmp_path)
    for error, again in ((caught.value, False), (StageFailed("out of memory"), True)):
        state: Any = Failed(message=str(error), data=error)
        assert may_retry(None, None, state) is again  # type: ignore[arg-type]


@pytest.mark.parametrize("body", ["os.kill(os.getpid(), 15)", "sys.exit(143)"])
def test_sigterm_from_outside_is_a_preemption(script: Callable[[str], list[str]], tmp_path: Path, body: str) -> None:
    with pytest.raises(StagePreempted, match="stopped from outside"):
        run(script(f"import os, sys; {body}"), tmp_path)


def test_sigkill_points_at_the_out_of_memory_killer(script: Callable[[str], list[str]], tmp_path: Path) -> None:
    command = script("import os; [print('line', i, flush=True) for i in range(50)]; os.kill(os.getpid(), 9)")
    with pytest.raises(StageFailed, match=r"SIGKILL.*out-of-memory") as caught:
        run(command, tmp_path)
    assert not isinstance(caught.value, StagePreempted)
    shown = [line.strip() for line in str(caught.value).splitlines()[1:]]
    assert shown == [f"line {i}" for i in range(30, 50)]


def test_another_status_is_a_failure_with_the_traceback(script: Callable[[str], list[str]], tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match=r"exit status 1(.|\n)*ZeroDivisionError"):
        run(script("1 / 0"), tmp_path)


def test_full_disk_under_the_log_is_reported_and_ends_no_stage(script: Callable[[str], list[str]]) -> None:
    lines: list[str] = []
    body = "print('x' * 200_000, flush=True); print('the end', flush=True)"
    run_process(start_process(script(body)), Path("/dev/full"), name="toy", on_line=lines.append)
    assert lines[-1] == "the end"
    with pytest.raises(
        StageFailed, match=r"(?s)exit status 3.*/dev/full lacks lines from here on: No space left.*the end"
    ):
        run_process(
            start_process(script(body + "; raise SystemExit(3)")), Path("/dev/full"), name="toy", on_line=lines.append
        )


def test_credentials_in_output_are_removed(script: Callable[[str], list[str]], tmp_path: Path) -> None:
    lines: list[str] = []
    body = "print('proxy http://me:S3cret@host:1 is slow', flush=True)"
    run_process(start_process(script(body)), tmp_path / "log", name="toy", on_line=lines.append)
    assert lines == ["proxy http://***@host:1 is slow"]
    assert "S3cret" not in (tmp_path / "log").read_text()


def test_deadline_ends_a_group_that_ignores_sigterm(script: Callable[[str], list[str]], tmp_path: Path) -> None:
    command = script(f"import signal; signal.signal(15, signal.SIG_IGN)\n{FAMILY}\ntime.sleep(300)")
    with pytest.raises(StageFailed, match="deadline_minutes"):
        run(command, tmp_path, deadline_seconds=2.0, grace_seconds=0.5)
    assert [alive(pid) for pid in pids_in(tmp_path, 2)] == [False, False]


def test_sigterm_leaves_the_process_time_to_commit(script: Callable[[str], list[str]], tmp_path: Path) -> None:
    command = script("""
        import signal, sys, time
        def leave(*_):
            time.sleep(1)
            print("committed", flush=True)
            sys.exit(143)
        signal.signal(15, leave)
        print("ready", flush=True)
        time.sleep(300)
    """)
    with pytest.raises(StageFailed, match="deadline"):
        run(command, tmp_path, deadline_seconds=1.5)
    assert (tmp_path / "log.txt").read_text().split() == ["ready", "committed"]


def test_error_of_check_ends_the_process(script: Callable[[str], list[str]], tmp_path: Path) -> None:
    def check() -> None:
        if len(list(tmp_path.glob("*.pid"))) == 2:
            raise RuntimeError("the lease is gone")

    with pytest.raises(RuntimeError, match="the lease is gone"):
        run(script(f"{FAMILY}\ntime.sleep(300)"), tmp_path, check=check)
    assert [alive(pid) for pid in pids_in(tmp_path, 2)] == [False, False]


def test_a_lingering_grandchild_ends_with_a_good_stage(script: Callable[[str], list[str]], tmp_path: Path) -> None:
    start = time.monotonic()
    run(script(f"{FAMILY}\nprint('done')"), tmp_path)
    assert time.monotonic() - start < 10  # the grandchild holds the output pipe for 300 s
    assert [alive(pid) for pid in pids_in(tmp_path, 2)] == [False, False]


def test_stuck_display_delays_nothing_and_keeps_the_log(script: Callable[[str], list[str]], tmp_path: Path) -> None:
    count = 200_000
    seen: list[str] = []

    def stuck(line: str) -> None:
        seen.append(line)
        time.sleep(60)

    start = time.monotonic()
    run(script(f"for i in range({count}): print('line', i)"), tmp_path, on_line=stuck)
    assert time.monotonic() - start < 30
    assert len(seen) == 1
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert len(lines) == count
    assert lines[-1] == f"line {count - 1}"


def test_slow_display_gets_the_count_of_missed_lines(script: Callable[[str], list[str]], tmp_path: Path) -> None:
    seen: list[str] = []

    def slow(line: str) -> None:
        seen.append(line)
        time.sleep(0.5 if len(seen) == 1 else 0)

    body = "import time\nfor i in range(5000): print(i)\ntime.sleep(1.5)\nprint('end')"
    run(script(body), tmp_path, on_line=slow)
    assert seen[-1] == "end"
    notes = [line for line in seen if "lines left out here; all are in" in line]
    missed = sum(int(note.split()[0].lstrip("(")) for note in notes)
    assert missed > 0
    assert len(seen) - len(notes) + missed == 5001


def test_errors_of_the_display_are_ignored(script: Callable[[str], list[str]], tmp_path: Path) -> None:
    seen: list[str] = []

    def broken(line: str) -> None:
        seen.append(line)
        raise OSError("display gone")

    run(script("print('a'); print('b')"), tmp_path, on_line=broken)
    assert seen == ["a", "b"]


def test_one_endless_line_and_carriage_returns(script: Callable[[str], list[str]], tmp_path: Path) -> None:
    body = "import sys; sys.stdout.write('x' * 3_000_000 + '\\n 10%\\r 50%\\r100%\\n\\xe4\\n'); sys.stdout.flush()"
    lines = run(script(body), tmp_path)
    assert max(map(len, lines)) <= 65536
    assert sum(line.count("x") for line in lines) == 3_000_000
    assert lines[-2:] == ["100%", "ä"]


def test_progress_lines_are_thinned_but_the_last_is_kept(script: Callable[[str], list[str]], tmp_path: Path) -> None:
    progress: list[ProgressLine] = []
    body = """
        from spinreg_core.runtime.progress import Progress
        p = Progress("toy", 1000, "rows", every=0)
        for _ in range(1000):
            p.update()
    """
    lines = run(script(body), tmp_path, on_progress=progress.append)
    assert [p.done for p in progress] == [1, 1000]
    assert len(lines) == 2
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 1000


def test_run_process_works_in_another_thread(script: Callable[[str], list[str]], tmp_path: Path) -> None:
    lines: list[str] = []
    thread = threading.Thread(target=lambda: lines.extend(run(script("print('hello')"), tmp_path)))
    thread.start()
    thread.join(timeout=20)
    assert lines == ["hello"]


def driver(tmp_path: Path, job: Job) -> subprocess.Popen[str]:
    """A process that runs the job as a task does, with SIGTERM as an exception, as in Prefect."""
    job.workdir.mkdir(exist_ok=True)
    job.save(tmp_path / "driver-job.json")
    code = f"""
import pathlib, signal
from spinreg_core.runs.job import Job
from tasks.stage_process import run_stage
class TerminationSignal(BaseException): pass
def handler(*_): raise TerminationSignal
signal.signal(signal.SIGTERM, handler)
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell started the tests in the background
try:
    run_stage(Job.load(pathlib.Path({str(tmp_path / "driver-job.json")!r})), on_line=print)
except BaseException as error:
    print("ended with", type(error).__name__, flush=True)
"""
    return subprocess.Popen([sys.executable, "-u", "-c", code], stdout=subprocess.PIPE, text=True)


LONG_STAGE = f"""
{FAMILY}
from spinreg_core.runtime.main import main
def run(job):
    (here / "running.pid").write_text(str(os.getpid()))
    time.sleep(300)
main(run)
"""


@pytest.mark.parametrize(
    ("signum", "name"), [(signal.SIGTERM, "TerminationSignal"), (signal.SIGINT, "KeyboardInterrupt")]
)
def test_ending_the_caller_ends_the_stage_and_its_children(
    toy_stage: Callable[[str], Job], tmp_path: Path, signum: int, name: str
) -> None:
    caller = driver(tmp_path, toy_stage(LONG_STAGE))
    pids = pids_in(tmp_path, 3)
    start = time.monotonic()
    caller.send_signal(signum)
    output, _ = caller.communicate(timeout=15)
    assert output.splitlines()[-1] == f"ended with {name}"
    assert time.monotonic() - start < 5
    assert not any(alive(pid) for pid in pids)


def test_killing_the_caller_ends_the_stage_and_its_children(toy_stage: Callable[[str], Job], tmp_path: Path) -> None:
    caller = driver(tmp_path, toy_stage(LONG_STAGE))
    pids = pids_in(tmp_path, 3)
    caller.kill()
    caller.communicate(timeout=15)
    assert wait_until(lambda: not any(alive(pid) for pid in pids), 8), [pid for pid in pids if alive(pid)]


def test_killing_the_caller_while_the_stage_still_imports(toy_stage: Callable[[str], Job], tmp_path: Path) -> None:
    """The caller is gone before the stage could ask who its parent is."""
    late = f"{FAMILY}\ntime.sleep(2)\n" + LONG_STAGE.replace(FAMILY, "")
    caller = driver(tmp_path, toy_stage(late))
    pids = pids_in(tmp_path, 2)
    caller.kill()
    caller.communicate(timeout=15)
    assert all(alive(pid) for pid in pids)
    assert wait_until(lambda: not any(alive(pid) for pid in pids), 15), [pid for pid in pids if alive(pid)]


def test_process_leads_a_group_of_its_own(script: Callable[[str], list[str]], tmp_path: Path) -> None:
    """Ctrl-C in the terminal reaches the task alone, which then gives the stage its time."""
    lines = run(script("import os; print(os.getpgrp() == os.getpid(), os.getsid(0))"), tmp_path)
    assert lines[0].startswith("True ")
    assert int(lines[0].split()[1]) != os.getsid(0)


@pytest.mark.long
def test_the_embedded_server_ends_with_a_killed_flow(tmp_path: Path) -> None:
    """Prefect stops the server itself when a flow ends normally."""
    source = """
import sys, time
from prefect import flow
from prefect.server.api.server import SubprocessASGIServer
from tasks.stage_process import end_embedded_server_with_us

@flow
def waiting():
    end_embedded_server_with_us()
    (server,) = SubprocessASGIServer._instances.values()
    print(server.server_process.pid, flush=True)
    time.sleep(300)

waiting()
"""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    env |= {"PREFECT_HOME": str(tmp_path), "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120"}
    caller = subprocess.Popen([sys.executable, "-c", source], env=env, text=True, stdout=subprocess.PIPE)
    assert caller.stdout is not None
    server = next(int(line) for line in caller.stdout if line.strip().isdigit())
    assert alive(server)
    caller.kill()
    caller.wait()
    end = time.monotonic() + 60
    while alive(server):
        assert time.monotonic() < end, "the server outlived its flow"
        time.sleep(0.1)
