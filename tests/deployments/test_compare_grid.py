"""`compare/grid` by a real server with two workers, one for its pool and one for its members'. What becomes of a member
that fails: tests/flows/test_compare.py, and by a real one tests/e2e/test_smoke.py."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from spinreg_core.runs.head import read_head
from spinreg_core.runs.stages import complete_round
from spinreg_core.store.open import open_store
from tests.support.servers import PrefectServer, prefect_worker

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1500)]


def grid(server: PrefectServer, store: str, **more: Any) -> str:
    given = {"config": "deployments/configs/smoke.yaml", "until_round": 2, "alpha": [1, 0.5], "history": [1, "all"]}
    arguments = [part for name, value in ({"store": store} | given | more).items()
                 for part in ("-p", f"{name}={value if isinstance(value, str) else json.dumps(value)}")]  # fmt: skip
    done = server.cli("deployment", "run", "compare/grid", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split("UUID: ")[1].split()[0]


def children(server: PrefectServer) -> list[dict[str, Any]]:
    found = server.api("POST", "flow_runs/filter", {"flows": {"name": {"any_": ["spin"]}}, "sort": "START_TIME_ASC"})
    return [run for run in found if run["parent_task_run_id"] is not None]


def test_grid_members_share_objects_and_can_be_added(
    deployed_server: PrefectServer, clone: Path, tmp_path: Path
) -> None:
    server, store = deployed_server, open_store(str(tmp_path / "store"))
    server.env["SPINREG_CACHE"] = str(tmp_path / "cache")
    with prefect_worker(server, "--limit", "2", cwd=tmp_path), prefect_worker(server, pool="control", cwd=tmp_path):
        first = grid(server, store.url, history=[1])
        end = time.monotonic() + 300
        while not store.list("objects/"):  # the first member runs; the comparison dies with its process
            assert time.monotonic() < end
            time.sleep(0.5)
        for pid in server.clients():
            with contextlib.suppress(OSError):
                if f"PREFECT__FLOW_RUN_ID={first}".encode() in Path(f"/proc/{pid}/environ").read_bytes():
                    os.kill(pid, signal.SIGKILL)
        server.wait_for_state(first, {"CRASHED"}, 120)
        begun = children(server)
        assert [run["parameters"]["run"] for run in begun] == ["grid-alpha-1-h-1-s0"]
        # Started again with more: what is under way is waited for, and nothing is made twice.
        second = server.wait_for_state(grid(server, store.url), {"COMPLETED", "FAILED", "CRASHED"}, 900)
        assert (second["state_type"], second["state_name"]) == ("COMPLETED", "Completed"), second["state"]["message"]
        runs = {run["parameters"]["run"]: run for run in children(server)}
        assert len(children(server)) == len(runs) == 4
        assert begun[0]["id"] == runs["grid-alpha-1-h-1-s0"]["id"]
        for name in runs:
            head = read_head(store, name)
            assert head is not None
            assert complete_round(head) == 2
        manifests = [key.split("/")[1] for key in store.list("objects/") if key.endswith("manifest.json")]
        trained = [name for name in manifests if name.startswith("train-")]
        assert len(trained) == 1 + 4, "round 1 once, round 2 by every member"
        writers = {key.split("/")[1]: set() for key in store.list("objects/")}
        for key in store.list("objects/"):
            if key.endswith(".safetensors"):
                writers[key.split("/")[1]].add(key.split("/")[2])
        assert all(len(found) <= 1 for found in writers.values()), "no object was computed twice"
        data = json.loads(store.read("comparisons/grid/report.json") or b"")
        assert [one["run"] for one in data["runs"]] == list(runs)
        assert data["against"] == "grid-alpha-1-h-1-s0"
        shown = {artifact["key"] for artifact in server.api("POST", "artifacts/filter", {})}
        assert {"grid-members", "grid-metrics", "grid-comparison", "grid-configuration"} <= shown
        # In the pool of its members it would wait for itself.
        worse = server.cli("deployment", "run", "compare/grid", "-p", "deployment=compare/grid", "-p", "until_round=1")
        assert worse.returncode == 0
        third = server.wait_for_state(
            worse.stdout.split("UUID: ")[1].split()[0], {"FAILED", "CRASHED", "COMPLETED"}, 120
        )
        assert third["state_type"] == "FAILED"
        assert "pool" in third["state"]["message"]
