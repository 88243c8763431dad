"""`spinreg status` of a run in the middle of a round."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.cli import main
from spinreg_core.config import RunConfig
from spinreg_core.reports.status import format_status, run_status
from spinreg_core.runs import objects
from spinreg_core.runs.lease import hold_lease
from spinreg_core.runs.plans import StagePlan
from spinreg_core.runs.stages import STAGES
from spinreg_core.store.open import open_store


def test_status_in_mid_round_shows_parts_and_costs(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    config = RunConfig(run="r", store=store.url)
    assert format_status(store, None)[0] == f"no runs in {store.url}"
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_bytes(b"x" * 2048)

    def publish(plan: StagePlan) -> str:
        job = plan.job(config, store.url, "e1-a", tmp_path)
        objects.publish(store, job, tmp_path / "out", metrics={}, seconds=61)
        return job.object_id

    with hold_lease(store, config, "tester") as session:
        assert [list(e["stages"]) for e in run_status(store, "r")["rounds"]] == [["generate-heldout", "evaluate"]]
        session.begin_advance("tester", 2, None)
        assert [e["round"] for e in run_status(store, "r")["rounds"]] == [0, 1, 2], "up to the round it is to reach"
        session.commit_inputs("base-x", "data-x")
        session.commit(1, "generate", publish(STAGES["generate"].plan(config, session.head, 1)))
        plan = STAGES["mix-opponent"].plan(config, session.head, 1)
        for name in ("a", "b"):
            objects.commit_part(store, plan.job(config, store.url, "e1-a", tmp_path), name, [], {})
        text, document = format_status(store, "r")
        assert "lease: tester, pid" in text
    first, second = document["runs"][0]["rounds"][1:]
    assert first["stages"]["generate"] | {"object": None} == {
        "state": "done", "object": None, "seconds": 61, "bytes": 2048, "parts": 0,
    }  # fmt: skip
    assert [(stage["state"], stage["parts"]) for stage in list(first["stages"].values())[1:]] == [
        ("open", 2), ("open", 0), ("open", 0), ("open", 0),
    ]  # fmt: skip
    assert {stage["state"] for stage in second["stages"].values()} == {"open"}
    assert "round 1: generate done (61 s, 2.0 KiB), mix-opponent open (2 parts committed), train open" in text
    assert "unfinished advance: 0 -> 2, by tester" in text
    assert "lease: free" in format_status(store, "r")[0]


@pytest.mark.parametrize("name", ["head.json", "run.json"])
def test_status_of_a_damaged_run_shows_others(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    store = open_store(str(tmp_path / "store"))
    for run in ("a", "b", "c"):
        with hold_lease(store, RunConfig(run=run, store=store.url), "tester"):
            pass
    assert main(["status", "--store", store.url]) == 0
    (tmp_path / "store/runs/b" / name).write_bytes(b"{")
    capsys.readouterr()
    assert main(["status", "--store", store.url]) == 74
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines if not line.startswith(" ")] == ["a", "b", "c"]
    assert any(line.startswith(f"b: damaged: {store.url}/runs/b/{name}") for line in lines), lines
    for command in ("status", "resume", "gc"):  # what needs that run says the same
        assert main([command, "--store", store.url, *(["b"] if command != "gc" else [])]) == 74
        assert f"runs/b/{name}" in capsys.readouterr().err
    (tmp_path / "store/runs/b" / name).unlink()
    if name == "run.json":
        assert main(["resume", "--store", store.url, "b"]) == 74, "not: nothing is pending"
