"""`deployments/automations.py` on a real server: who is called crashed, and who is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from spinreg_core.runs.head import read_head
from spinreg_core.runs.stages import complete_round
from spinreg_core.store.open import open_store
from tests.deployments.test_cancel_retry import processes, wait
from tests.deployments.test_worker import start_run
from tests.support.servers import PrefectServer, prefect_worker

ROOT = Path(__file__).parents[2]


def register(server: PrefectServer, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / "deployments/automations.py"), *arguments]
    done = subprocess.run(command, env=server.env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def running(server: PrefectServer, flow: str) -> dict[str, Any]:
    """A flow run that says it is running; nobody executes it."""
    flow_id = server.api("POST", "flows/", {"name": flow})["id"]
    run: dict[str, Any] = server.api("POST", "flow_runs/", {"flow_id": flow_id, "state": {"type": "RUNNING"}})
    return run | {"flow": flow}


def beat(server: PrefectServer, run: dict[str, Any]) -> None:
    """The event that Prefect's flow engine sends every PREFECT_FLOWS_HEARTBEAT_FREQUENCY seconds."""
    event = {
        "occurred": datetime.now(UTC).isoformat(), "event": "prefect.flow-run.heartbeat", "id": str(uuid.uuid4()),
        "resource": {"prefect.resource.id": f"prefect.flow-run.{run['id']}", "prefect.resource.name": run["name"]},
        "related": [{"prefect.resource.id": f"prefect.flow.{run['flow_id']}", "prefect.resource.role": "flow",
                     "prefect.resource.name": run["flow"]}],
    }  # fmt: skip
    server.api("POST", "events", [event])


@pytest.fixture
def server(deployed_server: PrefectServer) -> Iterator[PrefectServer]:
    """Without automations afterwards: runs of other tests send a heartbeat every 30 seconds only."""
    yield deployed_server
    for automation in deployed_server.api("POST", "automations/filter", {}):
        deployed_server.api("DELETE", f"automations/{automation['id']}")


@pytest.mark.long
@pytest.mark.slow
def test_automation_marks_silent_runs_as_crashed_and_no_others(server: PrefectServer) -> None:
    assert "created" in register(server)
    assert "updated" in register(server, "--silent-seconds", "10")
    assert len([a for a in server.api("POST", "automations/filter", {}) if a["name"].startswith("spinreg")]) == 1
    flows = {"silent": "spin", "silent round": "round", "beating": "spin", "another's": "other", "done": "spin"}
    runs = {name: running(server, flow) for name, flow in flows.items()}
    for run in runs.values():
        beat(server, run)
    body = {"state": {"type": "COMPLETED"}}
    server.api("POST", f"flow_runs/{runs['done']['id']}/set_state", body)
    begin = time.monotonic()
    while True:
        beat(server, runs["beating"])
        states = {name: server.flow_run(run["id"])["state_type"] for name, run in runs.items()}
        if states["silent"] == states["silent round"] == "CRASHED" and time.monotonic() - begin > 15:
            break  # the one that goes on had more time than the silence that counts
        assert time.monotonic() - begin < 90, states
        time.sleep(2)
    states = {name: server.flow_run(run["id"])["state_type"] for name, run in runs.items()}
    assert states == {
        "silent": "CRASHED", "silent round": "CRASHED", "beating": "RUNNING", "another's": "RUNNING",
        "done": "COMPLETED",
    }  # fmt: skip
    assert "no heartbeat for 10 s" in server.flow_run(runs["silent"]["id"])["state"]["message"]


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_automation_run_that_dies_with_its_worker_can_be_retried(
    server: PrefectServer, clone: Path, tmp_path: Path
) -> None:
    """Its stage stands still for longer than the silence that counts, which is no silence: the flow's heart beats."""
    server.env["SPINREG_CACHE"] = str(tmp_path / "cache")
    register(server, "--silent-seconds", "60")
    parameters = ("config=deployments/configs/smoke.yaml", f"store={tmp_path / 'store'}", "until_round=1")
    with prefect_worker(server, "--limit", "1", cwd=tmp_path) as worker:
        run = start_run(server, *parameters)
        wait(lambda: list(tmp_path.glob("cache/work/*/round-1-generate/*/log.txt")), 240, "generate begins")
        stages = processes(server, "spinreg_core.stages")
        for pid in stages:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(90)
        assert server.flow_run(run)["state_type"] == "RUNNING"
        assert server.flow_run(run)["run_count"] == 1
        for pid in stages:
            os.kill(pid, signal.SIGCONT)
        os.kill(worker.pid, signal.SIGKILL)
        (flow_process,) = processes(server, "prefect.engine") or processes(server, "prefect.flow_engine")
        os.kill(flow_process, signal.SIGKILL)
        wait(lambda: not processes(server, "spinreg_core.stages"), 20, "stages end with the flow")
        assert server.flow_run(run)["state_type"] == "RUNNING", "nobody has told the server"
        ended = server.wait_for_state(run, {"CRASHED", "FAILED", "COMPLETED"}, 150)
        assert ended["state_type"] == "CRASHED"
        assert "no heartbeat for 60 s" in ended["state"]["message"]
    with prefect_worker(server, "--limit", "1", cwd=tmp_path):
        done = server.cli("flow-run", "retry", run)
        assert done.returncode == 0, done.stdout + done.stderr
        wait(lambda: server.flow_run(run)["state_type"] != "CRASHED", 60, "the retry begins")
        ended = server.wait_for_state(run, {"COMPLETED", "FAILED", "CRASHED"}, 300)
    assert ended["state_type"] == "COMPLETED", (server.home / "worker.log").read_text()[-3000:]
    head = read_head(open_store(str(tmp_path / "store")), "smoke")
    assert head is not None
    assert complete_round(head) == 1


@pytest.mark.long
def test_automations_unreachable_server_is_one_line(tmp_path: Path) -> None:
    env = {"PATH": os.environ["PATH"], "PREFECT_HOME": str(tmp_path), "PREFECT_API_URL": "http://127.0.0.1:9/api"}
    command = [sys.executable, str(ROOT / "deployments/automations.py")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith("automations.py: PREFECT_API_URL cannot be used: http://127.0.0.1:9/api")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("file", ["prefect.yaml", "deployments/docker.yaml", "deployments/kubernetes.yaml"])
def test_automation_margin_is_five_heartbeats_of_every_deployment(file: str) -> None:
    deployments = yaml.safe_load((ROOT / file).read_text())["deployments"]
    (frequency,) = {
        int(one["work_pool"]["job_variables"]["env"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"]) for one in deployments
    }
    source = (ROOT / "deployments/automations.py").read_text()
    (silent,) = (int(line.split()[2]) for line in source.splitlines() if line.startswith("SILENT_SECONDS ="))
    assert silent == 5 * frequency
