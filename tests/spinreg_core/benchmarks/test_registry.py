"""Parts of benchmarks in a run's head, in tables and in the status."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from spinreg_core.benchmarks.registry import measured_of, plan_benchmark, record_measured, results_of
from spinreg_core.benchmarks.results import write_part
from spinreg_core.config import RunConfig
from spinreg_core.evaluation.intervals import wilson
from spinreg_core.reports.status import format_status, run_status
from spinreg_core.reports.tables import metrics_markdown, metrics_rows, metrics_table
from spinreg_core.runs.head import HELDOUT
from spinreg_core.runs.lease import RunLease, hold_lease
from spinreg_core.runs.objects import publish
from spinreg_core.runs.plans import StagePlan, plan_heldout
from spinreg_core.runs.stages import objects_of
from spinreg_core.store.base import Store
from spinreg_core.store.open import open_store
from tests.support.builders import make_config

TASKS = ["gsm8k", "arc_challenge"]


def config(store: Store, tasks: list[str], **fields: Any) -> RunConfig:
    return make_config(store=store.url, benchmarks={"tasks": tasks, "backend": "hf"} | fields)


def measure(store: Store, plan: StagePlan, right: int, folder: Path) -> str:
    """Publish a part as its stage does, with so many of ten questions right."""
    name = plan.key["name"]
    document = {
        "kind": "lm-eval", "name": name, "primary": "acc", "better": "higher", "metrics": {"acc": wilson(right, 10)},
        "settings": {}, "fingerprints": {}, "versions": {}, "cost": {},
    }  # fmt: skip
    items = [(f"{name}/{i}", "acc", float(i < right)) for i in range(10)]
    metrics = write_part(folder / plan.object_id, document, items)
    job = plan.job(RunConfig(), store.url, "e1-a", folder)
    return str(publish(store, job, folder / plan.object_id, metrics=metrics).object_id)


def parts(configuration: RunConfig, session: RunLease, iterate: int = 0) -> list[StagePlan]:
    plan = plan_benchmark(configuration, session.head, iterate)
    assert plan is not None
    return [StagePlan(p["stage"], iterate, p["key"], p["inputs"], p["extra"]) for p in plan.extra["parts"]]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


def test_record_measured_parts_are_named_in_the_head(store: Store, tmp_path: Path) -> None:
    wanted = config(store, TASKS)
    with hold_lease(store, wanted, "test") as session:
        session.commit_inputs("base-1", "data-1")
        answers = plan_heldout(wanted, session.head, 0).object_id
        session.commit(0, HELDOUT, answers)
        session.commit(0, "evaluate", "evaluate-1")
        plan = plan_benchmark(wanted, session.head, 0)
        assert plan is not None
        assert measured_of(store, plan) == {}
        first, second = parts(wanted, session)
        measure(store, second, 3, tmp_path)
        assert measured_of(store, plan) == {"lm-eval arc_challenge": second.object_id}
        record_measured(session, 0, measured_of(store, plan))
        assert [found["name"] for found in results_of(store, wanted, session.head, 0)] == ["arc_challenge"]
        measure(store, first, 4, tmp_path)
        record_measured(session, 0, measured_of(store, plan))
        # In the order of the configuration; what it asked for earlier comes last.
        assert [found["name"] for found in results_of(store, wanted, session.head, 0)] == TASKS
        other = config(store, ["piqa", "arc_challenge"])
        found = results_of(store, other, session.head, 0)
        assert [(one["name"], one["object_id"]) for one in found] == [
            ("arc_challenge", second.object_id), ("gsm8k", first.object_id)]  # fmt: skip
        # With other settings it is another object, which takes its place. The old one stays in the store.
        limited = parts(config(store, TASKS, limit=5), session)[0]
        measure(store, limited, 5, tmp_path)
        record_measured(session, 0, {"lm-eval gsm8k": limited.object_id})
        assert session.head.measured(0)["lm-eval gsm8k"] == limited.object_id
        known = objects_of(wanted, session.head)
        assert known[limited.object_id] == known[second.object_id] == (0, "benchmark")
        assert answers in known
        before = session.head
        record_measured(session, 0, {"lm-eval gsm8k": limited.object_id})
        assert session.head is before  # nothing to write
    entry = run_status(store, wanted.run)["rounds"][0]
    assert entry["measured"]["lm-eval gsm8k"]["state"] == "done"
    assert "measured: lm-eval arc_challenge done" in format_status(store, wanted.run)[0]


def test_metrics_tables_have_a_line_per_benchmark(store: Store) -> None:
    def entry(number: int, **right: int) -> dict[str, Any]:
        found = [
            {"kind": "lm-eval", "name": name, "primary": "acc", "better": "higher", "metrics": {"acc": wilson(n, 10)}}
            for name, n in right.items()
        ]
        return {"round": number, "metrics": {"exact_match": wilson(1, 10)}, "benchmarks": found}

    verdict = {"headline": "A headline.", "sentences": []}
    data = {"rounds": [entry(0, gsm8k=5), entry(1, gsm8k=9, piqa=2)], "verdict": verdict, "alarms": [],
            "primary": {"reason": "A reason."}}  # fmt: skip
    assert metrics_rows(data)[1:] == [
        {"metric": "gsm8k acc ↑ (lm-eval, n 10)", "better": "higher", "base": "0.50 [0.24, 0.76]",
         "round 1": "0.90 [0.60, 0.98]"},
        {"metric": "piqa acc ↑ (lm-eval, n 10)", "better": "higher", "base": "-", "round 1": "0.20 [0.06, 0.51]"},
    ]  # fmt: skip
    assert "| piqa acc ↑ (lm-eval, n 10) | - | 0.20 [0.06, 0.51] |" in metrics_markdown(data)
    assert "gsm8k acc ↑ (lm-eval, n 10)  0.50 [0.24, 0.76]  0.90 [0.60, 0.98]" in metrics_table(data)
