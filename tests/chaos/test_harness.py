"""The fault harness detects kills and losses, and its short form finds no loss."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spinreg_core.runs.head import head_key
from spinreg_core.runs.objects import manifest_key
from spinreg_core.store import documents
from spinreg_core.store.folder import FolderStore
from tests.chaos.one_run import Killer, Run
from tests.chaos.process_kinds import living, strike
from tests.chaos.writers import Attempt, Attempts
from tests.support.servers import PrefectServer

HEAD = {
    "schema": 1, "run": "r", "lease": {"epoch": 1, "holder": None, "beat": 0}, "advances": [], "rounds": [],
}  # fmt: skip
MANIFEST = {
    "schema": 1, "object_id": "train-a", "files": [], "inputs": {}, "stage": "train", "round": 1, "metrics": {},
    "seconds": 1, "versions": {}, "writer": "e1-test", "created": "now",
}  # fmt: skip
SLEEP = [sys.executable, "-c", "import time; print(flush=True); time.sleep(600)", "-m flows.spin"]


def test_strike_at_a_dead_process_does_not_count(tmp_path: Path) -> None:
    with subprocess.Popen(SLEEP, env={"SPINREG_CACHE": str(tmp_path)}, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert living(tmp_path) == {"flow": [process.pid]}
        assert strike([process.pid], signal.SIGTERM)
        assert living(tmp_path) == {}
        assert not strike([process.pid], signal.SIGKILL), "a zombie is not alive"
    assert not strike([process.pid], signal.SIGKILL)


def test_check_committed_after_a_changed_commit_reports_a_loss(tmp_path: Path) -> None:
    run = Run("r", tmp_path / "r", str(tmp_path / "store"), PrefectServer(0, tmp_path, {}), rounds=1)
    head = HEAD | {"rounds": [{"round": 1, "stages": {"train": "train-a"}}]}
    run.store.create(manifest_key("train-a"), documents.dump(MANIFEST))
    run.store.write(head_key("r"), documents.dump(head))
    run.check_committed()
    head = HEAD | {"rounds": [{"round": 1, "stages": {"train": "train-a"}}, {"round": 2, "stages": {}}]}
    run.store.write(head_key("r"), documents.dump(head))
    run.check_committed()
    assert run.losses == []
    run.store.write(manifest_key("train-a"), documents.dump(MANIFEST | {"seconds": 2}))
    run.store.write(head_key("r"), documents.dump(HEAD))
    run.check_committed()
    assert len(run.losses) == 2
    run.store.delete(head_key("r"))
    run.check_committed()
    assert run.losses[-1] == "r: head.json is gone"


def test_attempt_seconds_after_the_last_part_count_as_repeated(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.create(manifest_key("train-a"), documents.dump(MANIFEST | {"writer": "second"}))
    attempts = Attempts(tmp_path / "cache")
    attempts.all = {
        Path("1"): Attempt("round-1-train", "first", begin=0, end=10, kept=7),
        Path("2"): Attempt("round-1-train", "second", begin=11, end=15, kept=14),
        Path("3"): Attempt("round-1-evaluate", "second", begin=16, end=18),  # the same writer at another stage
    }
    assert attempts.seconds(store) == {"all": 16, "repeated": 3 + 2, "uncommitted": 10 + 2}


def test_attempts_with_a_work_folder_are_seen(tmp_path: Path) -> None:
    log = tmp_path / "work/run-1/round-1-train/e0001-a/log.txt"
    log.parent.mkdir(parents=True)
    log.write_text("")
    with Attempts(tmp_path) as attempts:
        begin = time.monotonic()
        while not attempts.begun(["round-1-train"], since=begin - 1):
            assert time.monotonic() < begin + 20
        log.write_text("step 2/6\ncheckpoint step-000002 committed: 1 MB\n")
        while attempts.all[log].kept is None:
            assert time.monotonic() < begin + 20
        attempts.ended()
    assert attempts.begun(["round-1-train"], since=time.monotonic()) is None
    assert attempts.all[log].over


def test_killer_over_many_draws_picks_every_place_and_kind() -> None:
    killer, places = Killer(random.Random(1)), ["prepare", "round-1-generate", "round-1-train"]
    chosen = [place for _ in range(4) for place in killer.plan(places, 3)]
    assert {chosen.count(place) for place in ["start", *places]} == {3}
    drawn = [killer.victim(["flow", "stage", "all"]) for _ in range(30)]
    assert {[kind for kind, _ in drawn].count(kind) for kind in ("flow", "stage", "all")} == {10}
    assert {signum for kind, signum in drawn if kind == "all"} == {signal.SIGKILL}
    assert {signum for kind, signum in drawn if kind == "stage"} == {signal.SIGKILL, signal.SIGTERM}


@pytest.mark.slow
def test_short_harness_run_loses_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos.harness", "--short"], capture_output=True, text=True, timeout=360
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    figures = json.loads(done.stdout.strip().splitlines()[-1])
    assert figures["losses"] == 0, figures["lost"]
    assert figures["kills"] == 3, "each victim was alive before and not after"
    assert figures["missed"] == 0
    assert figures["faults"] > 20
    assert figures["runs"] == 2
    assert figures["work_repeated_percent"] < 100
