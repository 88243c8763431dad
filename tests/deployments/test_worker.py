"""`spin/iterate` by a real server and worker, with the documented commands, from a copy of the repository."""

from __future__ import annotations

import re
import time
from datetime import datetime
from pathlib import Path

import pytest

from spinreg_core.config import RunConfig
from spinreg_core.config.resolve import resolve
from spinreg_core.runs.head import read_config, read_head
from spinreg_core.runs.stages import complete_round
from spinreg_core.store.open import open_store
from tests.support.servers import PrefectServer, prefect_worker

pytestmark = pytest.mark.slow


def start_run(server: PrefectServer, *parameters: str) -> str:
    """`prefect deployment run spin/iterate -p ...`; returns the flow run's id."""
    arguments = [part for parameter in parameters for part in ("-p", parameter)]
    done = server.cli("deployment", "run", "spin/iterate", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"UUID: (\S+)", done.stdout)
    assert found is not None, done.stdout
    return found[1]


def time_of(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))


@pytest.mark.long
def test_worker_runs_one_at_a_time_in_the_deployed_folder(
    deployed_server: PrefectServer, clone: Path, tmp_path: Path
) -> None:
    server = deployed_server
    server.env["SPINREG_CACHE"] = str(tmp_path / "cache")
    with prefect_worker(server, "--limit", "1", cwd=tmp_path):
        # Two at once, in whatever order: each one round further.
        config = ("config=deployments/configs/smoke.yaml", "rounds=1", 'data={"heldout_rows": 6}')
        runs = [start_run(server, *config), start_run(server, *config)]
        ended = [server.wait_for_state(run, {"COMPLETED", "FAILED", "CRASHED"}, 400) for run in runs]
    log = (server.home / "worker.log").read_text()[-3000:]
    assert [run["state_type"] for run in ended] == ["COMPLETED"] * 2, log
    one, other = sorted(ended, key=lambda run: str(run["start_time"]))
    assert time_of(other["start_time"]) >= time_of(one["end_time"])

    head = read_head(open_store(str(clone / "spinreg-store")), "smoke")
    assert head is not None
    assert complete_round(head) == 2
    assert not list(tmp_path.glob("spinreg-store"))


def test_worker_without_parameters_runs_the_demo(deployed_server: PrefectServer, clone: Path, tmp_path: Path) -> None:
    server, store = deployed_server, open_store(str(clone / "spinreg-store"))
    server.env["SPINREG_CACHE"] = str(tmp_path / "cache")
    with prefect_worker(server, "--limit", "1", cwd=tmp_path):
        run = start_run(server)
        end = time.monotonic() + 120
        while (head := read_head(store, "demo")) is None or not head.advances:
            assert time.monotonic() < end, (server.home / "worker.log").read_text()[-3000:]
            time.sleep(0.5)
        assert server.cli("flow-run", "cancel", run).returncode == 0
        server.wait_for_state(run, {"CANCELLED"}, 90)
    assert head is not None
    assert [(a.from_, a.to) for a in head.advances] == [(0, 1)]
    demo = resolve({}, str(clone / "deployments/configs/demo.yaml"))
    assert read_config(store, "demo") == RunConfig() == demo.model_copy(update={"until_round": None})
