"""The public face: a run without Prefect is the run that a flow makes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import spinreg_core
from spinreg_core.config import ObjectiveConfig, RunConfig
from spinreg_core.errors import BadInput
from tests.support.whole_runs import ROOT, SMOKE

IDS = json.loads((ROOT / "tests/data/ids-0.1.0.json").read_text())["runs"]["smoke"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> spinreg_core.Run:
    tmp = tmp_path_factory.mktemp("api")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPINREG_CACHE", str(tmp / "cache"))
        return spinreg_core.run(ROOT / SMOKE, store=str(tmp / "store"), until_round=1)


@pytest.mark.slow
def test_run_makes_the_objects_that_a_flow_of_0_1_0_made(finished: spinreg_core.Run) -> None:
    head = finished.head
    assert (head.base, head.data) == (IDS["base"]["object_id"], IDS["data"]["object_id"])
    wanted = {name: entry["object_id"] for name, entry in IDS.items() if name[0] in "01"}
    assert {name: head.stage(int(name[0]), name[2:]) for name in wanted} == wanted
    assert finished.complete_round == 1
    assert head.pending_advance is None


@pytest.mark.slow
def test_a_finished_run_gives_metrics_samples_and_policies(finished: spinreg_core.Run) -> None:
    metrics = finished.metrics(1)["heldout_nll"]
    assert metrics["low"] < metrics["value"] < metrics["high"]
    assert finished.report()["rounds"][1]["metrics"]["heldout_nll"]["value"] == metrics["value"]
    assert [set(sample) >= {"messages", "answer", "sample"} for sample in finished.samples(1)] == [True, True]
    policy = spinreg_core.load_policy(finished.policy(1))
    base = spinreg_core.load_policy(finished.policy(0))
    assert sum(p.numel() for p in policy.parameters()) == sum(p.numel() for p in base.parameters())
    with pytest.raises(BadInput, match="round 2"):
        finished.policy(2)


@pytest.mark.slow
def test_running_a_finished_run_again_changes_nothing(
    finished: spinreg_core.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPINREG_CACHE", str(tmp_path / "cache"))
    before = finished.store.list("objects/")
    said: list[str] = []
    again = spinreg_core.run(ROOT / SMOKE, store=finished.store.url, until_round=1, say=said.append)
    assert finished.store.list("objects/") == before
    assert again.complete_round == 1
    assert "round 1 is complete" in said[0]


@pytest.mark.slow
def test_run_called_twice_in_a_process_advances_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPINREG_CACHE", str(tmp_path / "cache"))
    store = str(tmp_path / "store")
    small = {"store": store, "data": {"heldout_rows": 2, "prompts_per_round": 2}, "training": {"batch_size": 2}}
    reached = [spinreg_core.run(ROOT / SMOKE, until_round=n, **small).complete_round for n in (0, 1)]
    assert reached == [0, 1]


def test_run_of_a_configuration_keeps_the_other_fields_of_a_group(tmp_path: Path) -> None:
    config = RunConfig(store=str(tmp_path), objective=ObjectiveConfig(alpha=0.25, beta=0.5), until_round=2)

    def stop(_line: str) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        spinreg_core.run(config, say=stop, objective={"alpha": 1.0}, rounds=1)
    stored = spinreg_core.read_run(str(tmp_path), "demo").config
    assert (stored.objective.alpha, stored.objective.beta) == (1.0, 0.5)
    assert (stored.rounds, stored.until_round) == (1, None)


def test_read_run_of_an_unknown_run_names_those_that_exist(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="nobody"):
        spinreg_core.read_run(str(tmp_path), "nobody")


def test_import_of_the_face_offers_every_name_and_loads_no_torch() -> None:
    code = (
        "import sys, spinreg_core\n"
        "assert 'torch' not in sys.modules and 'pydantic' not in sys.modules\n"
        "for name in spinreg_core.__all__:\n"
        "    if name != 'self_play_loss': getattr(spinreg_core, name)\n"
        "assert not {'torch', 'transformers', 'prefect', 'vllm', 'datasets'} & sys.modules.keys()\n"
        "assert spinreg_core.self_play_loss.__module__ == 'spinreg_core.selfplay.loss'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError):
        _ = spinreg_core.nothing
