"""A run as a deployment, started by a Prefect worker that can be a victim too.

A restart is a new flow run with the same parameters, with a new worker if the old one is gone. `poll` and `wait` use
the state of the flow run and the life of its process. If worker and flow die together, the server learns of it only
after minutes (deployments/automations.py).
"""

from __future__ import annotations

import json
import subprocess
import time
from typing import Any

from tests.chaos.one_run import Run
from tests.chaos.process_kinds import living
from tests.support.servers import PREFECT, PrefectServer
from tests.support.whole_runs import ROOT, SMOKE, environment

_STATUS = {"COMPLETED": 0, "FAILED": 1, "CRASHED": 1, "CANCELLED": 1}
_START_SECONDS = 60.0


def deploy(server: PrefectServer) -> None:
    """Deploy `spin/iterate` from prefect.yaml."""
    for command in ("work-pool create local --type process", "--no-prompt deploy --name spin/iterate"):
        done = server.cli(*command.split(), cwd=ROOT)
        assert done.returncode == 0, done.stdout + done.stderr


class FlowRun:
    def __init__(self, run: Run) -> None:
        self.run, self.returncode, self.begin, self.seen = run, None, time.monotonic(), False
        self._asked = 0.0
        if "worker" not in living(run.cache):
            env = environment(run.folder, run.server, **run.env)
            with run.log.open("ab") as log:
                subprocess.Popen(
                    [*PREFECT, "worker", "start", "--pool", "local", "--limit", "1"], cwd=run.folder, env=env,
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                )  # fmt: skip
        groups: dict[str, dict[str, Any]] = {}
        for name, value in run.parameters().items():
            group, _, field = name.partition(".")
            groups.setdefault(group, {})[field] = value
        parameters = {"config": SMOKE, "run": run.name, "until_round": run.rounds, "store": run.url} | groups
        deployment = run.server.api("GET", "deployments/name/spin/iterate")
        path = f"deployments/{deployment['id']}/create_flow_run"
        body = {"parameters": json.loads(json.dumps(parameters)), "state": {"type": "SCHEDULED"}}
        self.id = run.server.api("POST", path, body)["id"]

    def poll(self) -> int | None:
        if self.returncode is None and time.monotonic() - self._asked > 0.5:
            self._asked = time.monotonic()
            alive = living(self.run.cache)
            self.seen = self.seen or "flow" in alive
            try:
                state = self.run.server.flow_run(self.id)["state_type"]
            except OSError:  # the server was just killed
                return None
            late = time.monotonic() - self.begin > _START_SECONDS
            gone = "flow" not in alive and (self.seen or ("worker" not in alive and late))
            self.returncode = _STATUS.get(state, -9 if gone and "worker" not in alive else None)
        return self.returncode

    def wait(self, timeout: float) -> int:
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("flow run", timeout)
            time.sleep(0.1)
        assert self.returncode is not None
        return self.returncode
