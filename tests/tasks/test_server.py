"""Artifacts and flow runs with a real Prefect server that is killed, hangs and comes back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.servers import PrefectServer, prefect_server

pytestmark = pytest.mark.slow

FLOWS = '''
import os, pathlib, sys, time
from prefect import flow, task
from spinreg_core.runtime.progress import ProgressLine
from tasks import artifacts, server

here = pathlib.Path(os.environ["HERE"])
server.PATIENCE_SECONDS = float(os.environ["PATIENCE"])

def gate(name):
    """Tell the test that we are here, and wait until it lets us go on."""
    if name in os.environ["GATES"].split():
        (here / f"{name}.reached").touch()
        while not (here / f"{name}.go").exists():
            time.sleep(0.05)

@task(retries=1, retry_delay_seconds=0.1, tags=["spinreg"])
def work(number, part):
    with open(here / "trace", "a") as trace:
        print(number, part, file=trace)
    if part == "b" and not (here / f"failed{number}").exists():
        (here / f"failed{number}").touch()
        raise RuntimeError("once")

@flow(name="inner")
def inner(number):
    progress = artifacts.StageProgress(f"stage-{number}")
    server.call_task(work, number, "a")
    gate(f"in-{number}")
    for done in range(1, 6):
        progress(ProgressLine(f"shards: {done} of 5 committed", done, 5))
    server.call_task(work, number, "b")
    artifacts.show_table(f"table-{number}", [{"round": number}], "a table")
    server.wait_for_server(server.PATIENCE_SECONDS)
    return number

@flow(name="outer")
def outer():
    for number in (1, 2, 3):
        assert server.call_subflow(inner, number) == number
    artifacts.show_markdown("summary", "# All", "the summary")
    gate("outer-end")
    assert server.wait_for_server(120)
    assert server.flush(30)

outer()
'''


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    with prefect_server(tmp_path_factory.mktemp("prefect")) as started:
        yield started


@pytest.fixture
def start(server: PrefectServer, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []

    def go(*, patience: float, gates: str = "") -> subprocess.Popen[bytes]:
        if server.running is None:
            server.start()
        (tmp_path / "flows.py").write_text(FLOWS)
        env = server.env | {"HERE": str(tmp_path), "PATIENCE": str(patience), "GATES": gates}
        with (tmp_path / "log").open("wb") as log:
            started.append(
                subprocess.Popen([sys.executable, "flows.py"], cwd=tmp_path, env=env, stdout=log, stderr=log)
            )
        return started[-1]

    yield go
    for process in started:
        if process.poll() is None:
            process.kill()


def wait_until(condition: Callable[[], object], process: subprocess.Popen[bytes], log: Path, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.1)


def last_outer(server: PrefectServer) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The newest run of `outer` and its nested flow runs, oldest first."""
    names = {f["id"]: f["name"] for f in server.api("POST", "flows/filter", {})}
    runs = server.api("POST", "flow_runs/filter", {"sort": "EXPECTED_START_TIME_DESC"})
    outer = next(run for run in runs if names[run["flow_id"]] == "outer")
    wanted = {"flow_runs": {"parent_flow_run_id": {"any_": [outer["id"]]}}, "sort": "EXPECTED_START_TIME_ASC"}
    return outer, server.api("POST", "flow_runs/filter", wanted)


def artifacts(server: PrefectServer, runs: list[dict[str, Any]], what: str = "data") -> dict[str, Any]:
    found = server.api("POST", "artifacts/filter", {})
    ids = {run["id"] for run in runs}
    return {a["key"]: a[what] for a in found if a["flow_run_id"] in ids}


def test_server_present_shows_every_round_and_artifact(
    server: PrefectServer, start: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    process = start(patience=60)
    assert process.wait(timeout=120) == 0, (tmp_path / "log").read_text()
    outer, nested = last_outer(server)
    assert outer["state_type"] == "COMPLETED"
    assert [(run["state_type"], run["parameters"]) for run in nested] == [
        ("COMPLETED", {"number": n}) for n in (1, 2, 3)
    ]
    shown = artifacts(server, [outer, *nested])
    assert shown["summary"] == "# All"
    assert {f"table-{n}" for n in (1, 2, 3)} <= shown.keys()
    assert [shown[f"stage-{n}"] for n in (1, 2, 3)] == [100.0] * 3
    said = artifacts(server, nested, "description")
    assert said["stage-1"] == "shards: 5 of 5 committed"


@pytest.mark.long
def test_server_short_absence_is_waited_for(
    server: PrefectServer, start: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    process = start(patience=120, gates="in-1")
    wait_until((tmp_path / "in-1.reached").exists, process, tmp_path / "log", 60)
    server.stop(signal.SIGKILL)
    (tmp_path / "in-1.go").touch()
    time.sleep(8)
    server.start()
    assert process.wait(timeout=120) == 0, (tmp_path / "log").read_text()
    outer, nested = last_outer(server)
    assert [run["state_type"] for run in [outer, *nested]] == ["COMPLETED"] * 4
    shown = artifacts(server, [outer, *nested])
    assert {"summary", "table-1", "table-2", "table-3", "stage-1", "stage-2", "stage-3"} <= shown.keys()
    assert shown["stage-1"] == 100.0


@pytest.mark.long
def test_server_away_does_not_stop_the_work(
    server: PrefectServer, start: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    """Only artifacts are delayed until the server comes back."""
    process = start(patience=3, gates="in-1 outer-end")
    wait_until((tmp_path / "in-1.reached").exists, process, tmp_path / "log", 60)
    server.stop(signal.SIGKILL)
    left_alone(process, tmp_path)
    server.start()
    (tmp_path / "outer-end.go").touch()
    assert process.wait(timeout=180) == 0, (tmp_path / "log").read_text()
    shown_afterwards(server)


@pytest.mark.long
def test_server_that_hangs_does_not_stop_the_work(
    server: PrefectServer, start: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    """It accepts connections and never answers. Prefect alone would wait for nine minutes in this flow."""
    process = start(patience=3, gates="in-1 outer-end")
    wait_until((tmp_path / "in-1.reached").exists, process, tmp_path / "log", 60)
    assert server.running is not None
    os.killpg(server.running.pid, signal.SIGSTOP)
    try:
        left_alone(process, tmp_path)
    finally:
        os.killpg(server.running.pid, signal.SIGCONT)
    (tmp_path / "outer-end.go").touch()
    assert process.wait(timeout=180) == 0, (tmp_path / "log").read_text()
    shown_afterwards(server)


def left_alone(process: subprocess.Popen[bytes], tmp_path: Path) -> None:
    """Let the flow do all its work without a server."""
    (tmp_path / "in-1.go").touch()
    wait_until((tmp_path / "outer-end.reached").exists, process, tmp_path / "log", 120)
    trace = (tmp_path / "trace").read_text().splitlines()
    assert [line for line in trace if line.startswith(("2", "3"))] == ["2 a", "2 b", "2 b", "3 a", "3 b", "3 b"]


def shown_afterwards(server: PrefectServer) -> None:
    outer, nested = last_outer(server)
    assert outer["state_type"] == "COMPLETED"
    assert [(run["parameters"], run["state_type"]) for run in nested] == [({"number": 1}, "COMPLETED")]
    assert "went on" in nested[0]["state"]["message"]
    shown = artifacts(server, [outer, *nested])
    assert {"summary", "table-1", "table-2", "table-3"} <= shown.keys()
    assert [shown[f"stage-{n}"] for n in (1, 2, 3)] == [100.0] * 3


def test_artifacts_without_a_server_return_at_once(tmp_path: Path) -> None:
    code = """
import time
from spinreg_core.runtime.progress import ProgressLine
from tasks import artifacts, server
start = time.monotonic()
artifacts.show_table("t", [{"a": 1}], "d")
for i in range(1000):
    artifacts.StageProgress("p")(ProgressLine("s", i, 1000))
assert time.monotonic() - start < 30, time.monotonic() - start  # a thousand refused calls would take minutes
assert not server.flush(0.5)
"""
    env = os.environ | {"PREFECT_API_URL": "http://127.0.0.1:9/api", "PREFECT_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=env, timeout=300, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
