"""Cancelling, crashing and retrying a deployed run: nothing is left behind, nothing finished is repeated."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from spinreg_core.runs.head import read_head
from spinreg_core.runs.stages import complete_round
from spinreg_core.store.open import open_store
from tests.deployments.test_worker import start_run
from tests.support.browser import CHROMIUM, new_page
from tests.support.servers import PrefectServer, prefect_worker

pytestmark = pytest.mark.slow


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def processes(server: PrefectServer, what: str) -> list[int]:
    return [pid for pid in server.clients() if what in command_of(pid)]


def wait(condition: Callable[[], object], seconds: float, what: str) -> None:
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < seconds, f"{what}: not within {seconds} s"
        time.sleep(0.1)


@pytest.mark.long
def test_spin_cancelled_then_crashed_can_be_retried(
    deployed_server: PrefectServer, clone: Path, tmp_path: Path
) -> None:
    server, place = deployed_server, tmp_path / "store"
    server.env["SPINREG_CACHE"] = str(tmp_path / "cache")
    parameters = ("config=deployments/configs/smoke.yaml", f"store={place}", "until_round=2")
    store = open_store(str(place))

    def stage_begun(name: str) -> Callable[[], object]:
        return lambda: list(tmp_path.glob(f"cache/work/*/{name}/*/log.txt"))

    with prefect_worker(server, "--limit", "1", cwd=tmp_path):
        cancelled = start_run(server, *parameters)
        wait(stage_begun("round-1-generate"), 240, "generate begins")
        assert server.cli("flow-run", "cancel", cancelled).returncode == 0
        # Up to 10 s until the worker looks, then the stage has 20 s to end in order.
        wait(lambda: not processes(server, "spinreg_core.stages"), 60, "no stage process is left")
        server.wait_for_state(cancelled, {"CANCELLED"}, 60)
        head = read_head(store, "smoke")
        assert head is not None
        assert head.lease.holder is None, "a cancelled run gives its lease back"

        crashed = start_run(server, *parameters)
        wait(stage_begun("round-2-mix-opponent"), 240, "round 2 has begun")
        (flow_process,) = processes(server, "prefect.engine") or processes(server, "prefect.flow_engine")
        os.kill(flow_process, signal.SIGKILL)
        wait(lambda: not processes(server, "spinreg_core.stages"), 20, "the stage ends with its killed flow")
        server.wait_for_state(crashed, {"CRASHED"}, 60)
        finished = [key for key in store.list("objects/") if key.endswith("manifest.json")]
        before = {key: store.read(key) for key in finished}
        done = server.cli("flow-run", "retry", crashed)
        assert done.returncode == 0, done.stdout + done.stderr
        wait(lambda: server.flow_run(crashed)["state_type"] not in ("CRASHED", "FAILED"), 60, "the retry begins")
        run = server.wait_for_state(crashed, {"COMPLETED", "FAILED", "CRASHED"}, 300)
        assert run["state_type"] == "COMPLETED", (server.home / "worker.log").read_text()[-3000:]
        assert run["run_count"] == 2
    head = read_head(store, "smoke")
    assert head is not None
    assert complete_round(head) == 2
    # Round 2 went on in its own flow run, not in that of round 1, which Prefect would have handed it.
    rounds = server.api("POST", "flow_runs/filter", {"flow_runs": {"parent_flow_run_id": {"any_": [crashed]}}})
    assert sorted((nested["name"], nested["state_type"]) for nested in rounds) == [
        ("smoke/round-1", "COMPLETED"), ("smoke/round-2", "COMPLETED"),
    ]  # fmt: skip
    assert {key: store.read(key) for key in finished} == before
    tasks = server.api("POST", "task_runs/filter", {})
    assert "Reused" in {task["state"]["name"] for task in tasks}, [(t["name"], t["state"]["name"]) for t in tasks]
    names = {task["name"] for task in tasks}
    for number in (1, 2):
        assert {f"smoke/round-{number}/{stage}" for stage in ("generate", "mix-opponent", "train", "evaluate")} <= names
    assert "smoke/round-0/evaluate" in names
    own = {crashed, *(nested["id"] for nested in rounds)}  # other tests use this server, and this run's name, too
    artifacts = {a["key"]: a for a in server.api("POST", "artifacts/filter", {}) if a["flow_run_id"] in own}
    assert artifacts["smoke-round-1-metrics"]["type"] == "table"
    assert str(place) in artifacts["smoke-round-1"]["data"]
    assert artifacts["smoke-round-1-train"]["type"] == "progress"
    assert "alpha" in artifacts["smoke-configuration"]["data"]
    assert "report.html" in artifacts["smoke-report"]["data"]
    if CHROMIUM.exists():
        with new_page(viewport={"width": 1400, "height": 2000}) as page:
            for key, text in (
                ("smoke-round-1-metrics", "held-out NLL"), ("smoke-round-1", str(place)),
                ("smoke-configuration", "alpha"), ("smoke-report", "report.html"),
            ):  # fmt: skip
                page.goto(f"{server.url}/artifacts/artifact/{artifacts[key]['id']}")
                page.get_by_text(text).first.wait_for(timeout=60_000)
