"""Real runs while the Prefect server is away, and cancellation of a run without a worker."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from spinreg_core.runs.head import read_head
from spinreg_core.runs.stages import complete_round
from spinreg_core.store.open import open_store
from tests.support.servers import PrefectServer, prefect_server
from tests.support.whole_runs import SMOKE, environment, stage_processes, start, wait_until

pytestmark = pytest.mark.slow


@pytest.mark.long
def test_run_without_a_reachable_server_completes_stages_and_rounds(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with prefect_server(tmp_path / "prefect") as server:
        env = environment(tmp_path, server)
        process = start(["--config", SMOKE, "--store", str(tmp_path / "store")], env, log)
        wait_until(lambda: "/round-1/generate' - [" in log.read_text(), process, log)
        server.stop(signal.SIGKILL)
        # From here on every stage begins without a server: three of round 1, four of round 2.
        store = open_store(str(tmp_path / "store"))
        wait_until(lambda: (head := read_head(store, "smoke")) and complete_round(head) == 2, process, log)
        assert log.read_text().count("goes on without its tags") >= 7, log.read_text()[-4000:]
        server.start()
        assert process.wait(timeout=180) == 0, log.read_text()[-4000:]
        (run,) = [r for r in server.api("POST", "flow_runs/filter", {}) if r["name"] == "smoke/spin"]
        assert run["state_type"] == "COMPLETED"
        shown = {artifact["key"] for artifact in server.api("POST", "artifacts/filter", {})}
        assert {"smoke-report", "smoke-round-1", "smoke-round-2-metrics"} <= shown


def cancel(server: PrefectServer, run_id: str) -> None:
    """Cancel a flow run as the UI does."""
    server.api("POST", f"flow_runs/{run_id}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})


@pytest.mark.long
def test_run_without_a_worker_when_cancelled_ends(prefect_server: PrefectServer, tmp_path: Path) -> None:
    server, log = prefect_server, tmp_path / "log"
    env = environment(tmp_path, server)
    store = open_store(str(tmp_path / "store"))
    process = start(["--config", SMOKE, "--store", store.url, "--run", "cancelled"], env, log)
    wait_until(lambda: list(tmp_path.glob("cache/work/*/round-1-generate/*/log.txt")), process, log)
    (run,) = [r for r in server.api("POST", "flow_runs/filter", {}) if r["name"] == "cancelled/spin"]
    cancel(server, run["id"])
    assert process.wait(timeout=120) == 1
    assert "spinreg: the run was cancelled" in log.read_text()
    assert server.flow_run(run["id"])["state_type"] == "CANCELLED"
    mine = [command for _, command in stage_processes() if str(tmp_path) in command]
    assert mine == [], "nothing of the stage is left"
    head = read_head(store, "cancelled")
    assert head is not None
    assert head.lease.holder is None
    assert complete_round(head) == 0
