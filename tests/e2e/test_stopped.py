"""SIGTERM to a run or to one of its stages gives the right state in Prefect, and the next start resumes."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from spinreg_core.runs.head import read_head
from spinreg_core.runs.stages import complete_round
from spinreg_core.store.open import open_store
from tests.support.servers import PrefectServer, prefect_server
from tests.support.whole_runs import SMOKE, environment, run, stage_processes, start, wait_until

pytestmark = pytest.mark.slow


def states(server: PrefectServer, name: str) -> dict[str, str]:
    """Return the state names of the flow runs and task runs of a run, by name."""
    found: list[dict[str, Any]] = []
    for kind in ("flow_runs", "task_runs"):
        found += server.api("POST", f"{kind}/filter", {"sort": "EXPECTED_START_TIME_ASC"})
    return {f["name"]: f["state_name"] for f in found if f["name"].startswith(f"{name}/")}


@pytest.mark.long
@pytest.mark.parametrize("whom", ["run", "stage"])
def test_sigterm_to_run_or_stage_is_shown_and_the_next_start_resumes(
    prefect_server: PrefectServer, tmp_path: Path, whom: str
) -> None:
    name, log = f"stopped-{whom}", tmp_path / "log"
    store = open_store(str(tmp_path / "store"))
    env = environment(tmp_path, prefect_server)
    arguments = ["--config", SMOKE, "--run", name, "--until-round", "1", "--store", store.url,
                 "-p", "resources.retries=0", "-p", "training.epochs=40"]  # fmt: skip
    process = start(arguments, env, log)
    wait_until(lambda: "step 5/" in log.read_text(), process, log)
    if whom == "run":
        process.send_signal(signal.SIGTERM)
    else:
        for pid, command in stage_processes():
            if str(tmp_path) in command:  # the one that waits for the next stage too
                os.kill(pid, signal.SIGTERM)
    status = process.wait(timeout=120)
    text, seen = log.read_text(), states(prefect_server, name)
    if whom == "run":
        assert status == 143, text[-3000:]
        assert "stopped by SIGTERM; committed work stays" in text
        assert seen[f"{name}/spin"] == "Crashed"
        assert seen[f"{name}/round-1"] == "Crashed"
    else:
        assert status == 1, text[-3000:]
        assert {seen[f"{name}/{what}"] for what in ("spin", "round-1", "round-1/train")} == {"Preempted"}
    assert "checkpoint step-" in text
    again = run(arguments, env, tmp_path / "again")
    assert "resuming from the checkpoint of step" in again
    head = read_head(store, name)
    assert head is not None
    assert complete_round(head) == 1


@pytest.mark.long
@pytest.mark.parametrize("where", ["embedded", "ctrl-c", "ctrl-c twice", "killed before"])
def test_run_stopped_without_a_reachable_server_ends_and_frees_lease(
    tmp_path: Path, interruptible: None, where: str
) -> None:
    """`timeout`, systemd and a terminal signal the whole process group, so the embedded server gets the signal too."""
    name, log = "group", tmp_path / "log"
    store = open_store(str(tmp_path / "store"))
    arguments = ["--config", SMOKE, "--run", name, "--until-round", "2", "--store", store.url,
                 "-p", "resources.retries=0", "-p", "training.epochs=40"]  # fmt: skip
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(prefect_server(tmp_path / "server")) if where == "killed before" else None
        process = start(arguments, environment(tmp_path, server), log)
        wait_until(lambda: "step 5/" in log.read_text(), process, log)
        if server is None:
            os.killpg(process.pid, signal.SIGINT if "ctrl-c" in where else signal.SIGTERM)
            if where == "ctrl-c twice":
                wait_until(lambda: "Crash detected" in log.read_text(), process, log)
                time.sleep(0.25)
                os.killpg(process.pid, signal.SIGINT)
        else:
            server.stop(signal.SIGKILL)
            process.send_signal(signal.SIGTERM)
        status = process.wait(timeout=90)
    text = log.read_text()
    assert status == (130 if "ctrl-c" in where else 143), text[-3000:]
    assert f"stopped by {'Ctrl-C' if 'ctrl-c' in where else 'SIGTERM'}; committed work stays" in text
    assert "goes on without a flow run" not in text
    head = read_head(store, name)
    assert head is not None
    assert head.lease.holder is None
    assert complete_round(head) == 0
