"""`spinreg win-rate`: the answers of two runs, held against each other by a judge."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest

from flows.cli import main
from spinreg_core.config import RunConfig
from spinreg_core.errors import EXIT_BAD_INPUT
from spinreg_core.runs.lease import hold_lease
from spinreg_core.store.base import Store
from tests.spinreg_core.benchmarks.test_win_rate import prefers_own, store  # noqa: F401
from tests.support.judge_server import Does, judge_server

ROUND = ("generate", "mix-opponent", "train")


@pytest.fixture
def runs(store: Store) -> Store:  # noqa: F811
    """`ours` and `theirs` differ in round 1 and share round 0; the rows of `elsewhere` are others."""
    for run, data, answers in (
        ("ours", "data", "evaluate-1"),
        ("theirs", "data", "evaluate-0"),
        ("elsewhere", "x", "y"),
    ):
        with hold_lease(store, RunConfig(run=run, store=store.url), "test") as session:
            session.commit_inputs("base", data)
            session.commit(0, "evaluate", "evaluate-0")
            for stage in ROUND:
                session.commit(1, stage, f"{stage}-of-{run}")
            session.commit(1, "evaluate", answers)
    return store


def test_two_runs_are_compared_and_nothing_is_asked_twice(runs: Store, capsys: pytest.CaptureFixture[str]) -> None:
    with judge_server(prefers_own) as server:
        judge = ["-p", f"judge.base_url={server.url}", "-p", "judge.model=judge", "-p", "judge.tries=1"]
        command = ["win-rate", "ours", "theirs", "--store", runs.url, *judge]
        assert main([*command, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        # As in test_win_rate: two wins, a tie of places, equal texts; one prompt has no verdict in both orders.
        assert found["metrics"]["win_rate"]["value"] == pytest.approx((1 + 1 + 0.5 + 0.5) / 4)
        assert found["metrics"]["first_place"]["n"] == 6
        assert found["fingerprints"]["policies"] == ["train-of-ours", "train-of-theirs"]
        assert (found["round"], found["cost"]["requests"], len(server.bodies)) == (1, 8, 8)
        assert main(command) == 0
        assert "ours against theirs, round 1, 5 prompts, judged by judge" in (text := capsys.readouterr().out)
        assert "win_rate: 0.75 [" in text
        assert len(server.bodies) == 8, "what was paid for is found again"


def test_what_was_asked_is_kept_on_sigterm(runs: Store) -> None:
    with judge_server(lambda b, n: Does("[[A]]", seconds=2.0)) as server:
        judge = ["-p", f"judge.base_url={server.url}", "-p", "judge.model=judge", "-p", "judge.at_once=3"]
        command = [sys.executable, "-m", "flows.cli", "win-rate", "ours", "theirs", "--store", runs.url, *judge]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        while len(server.bodies) < 3:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "Traceback" not in error
    assert len(runs.list("verdicts/")) == len(server.bodies) == 3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["ours", "theirs", "--round", "2"], "--round: found 2; expected a round that both runs have evaluated (0, 1)"),
        (["ours", "theirs", "--round", "0"], "round 0: found the same policy in 'ours' and 'theirs'"),
        (["ours", "elsewhere"], "run 'elsewhere': found held-out rows of other data than 'ours' has"),
        (["ours", "nobody"], "nobody"),
    ],
)
def test_what_cannot_be_compared(
    runs: Store, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    judge = ["-p", "judge.base_url=http://127.0.0.1:9/v1", "-p", "judge.model=judge"]
    assert main(["win-rate", *more, "--store", runs.url, *judge]) == EXIT_BAD_INPUT
    assert message in capsys.readouterr().err
