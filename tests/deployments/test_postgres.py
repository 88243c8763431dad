"""Several workers on a Prefect server with PostgreSQL, which dies and comes back while they work."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from spinreg_core.runs.head import read_head
from spinreg_core.store.open import open_store
from tests.deployments.test_worker import start_run
from tests.support.servers import postgres, prefect_server, prefect_worker

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("initdb") is None, reason="PostgreSQL is missing"),
    pytest.mark.long,
]
ENDED = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


def test_postgres_crash_stops_neither_of_two_workers(clone: Path, tmp_path: Path) -> None:
    with postgres() as database, prefect_server(tmp_path / "prefect", database.url) as server:
        server.env["SPINREG_CACHE"] = str(tmp_path / "cache")
        for command in ("work-pool create local --type process", "--no-prompt deploy --name spin/iterate"):
            done = server.cli(*command.split(), cwd=clone)
            assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
        store = open_store(str(tmp_path / "store"))
        common = ["config=deployments/configs/smoke.yaml", "until_round=0", f"store={store.url}"]
        with (
            prefect_worker(server, "--limit", "1", "--name", "one", cwd=tmp_path),
            prefect_worker(server, "--limit", "1", "--name", "two", cwd=tmp_path),
        ):
            runs = {name: start_run(server, *common, f"run={name}") for name in ("a", "b")}
            deadline = time.monotonic() + 240
            while not all((head := read_head(store, name)) is not None and head.base for name in runs):
                assert time.monotonic() < deadline, (server.home / "worker.log").read_text()[-3000:]
                time.sleep(0.2)
            database.ctl("restart", "-m", "immediate")  # as after a crash: the log is replayed, all connections end
            ended = {name: server.wait_for_state(run, ENDED, 400) for name, run in runs.items()}
        log = (server.home / "worker.log").read_text()[-3000:]
        assert {name: run["state_type"] for name, run in ended.items()} == dict.fromkeys(runs, "COMPLETED"), log
        starts, ends = zip(*((run["start_time"], run["end_time"]) for run in ended.values()), strict=True)
        assert max(starts) < min(ends), "the two did not run at the same time"
        for name in runs:
            head = read_head(store, name)
            assert head is not None
            assert head.stage(0, "evaluate") is not None
