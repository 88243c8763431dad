"""Several parts by one process: what becomes of the others where the judge is away."""

from __future__ import annotations

import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spinreg_core.benchmarks.registry import measured_of, plan_benchmark
from spinreg_core.config import RunConfig
from spinreg_core.errors import JudgeAway
from spinreg_core.runs.job import Job
from spinreg_core.runs.objects import publish
from spinreg_core.stages import benchmark
from spinreg_core.store.open import open_store
from tests.support.builders import make_head
from tests.support.judge_server import Does, judge_server

HEAD = make_head(
    base="policy-0",
    data="data",
    stages={0: {"evaluate": "evaluate-0"}, 1: {"train": "policy-1", "evaluate": "evaluate-1"}},
)


def test_run_judge_away_is_waited_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPINREG_CACHE", str(tmp_path / "cache"))
    store = open_store(str(tmp_path / "store"))
    data = {"prompt_id": ["a"], "messages": ['[{"role": "user", "content": "Why?"}]'], "answer": ["human"]}
    tables = {"data": ("heldout.parquet", data)} | {
        f"evaluate-{n}": ("rows.parquet", {"prompt_id": ["a"], "sample_text": [f"policy {n}"]}) for n in (0, 1)
    }
    for name, (file, columns) in tables.items():
        (tmp_path / name).mkdir()
        pq.write_table(pa.table(columns), tmp_path / name / file)
        job = Job("base", name, {}, store.url, "w", 0, {}, RunConfig(), tmp_path)
        publish(store, job, tmp_path / name, metrics={})
    with judge_server(lambda _b, _n: Does(status=500)) as server:
        judge = {"base_url": server.url, "model": "judge", "at_once": 1, "patience_seconds": 1.5}
        wanted = {"store": store.url, "judge": judge, "benchmarks": {"win_rate": ["human", "base", "previous"]}}
        config = RunConfig.model_validate(wanted)
        plan = plan_benchmark(config, HEAD, 1)
        assert plan is not None
        job = plan.job(config, store.url, "e1-a", tmp_path / "work")
        started = time.monotonic()
        with pytest.raises(JudgeAway, match=r"patience_seconds \(1.5\)"):
            benchmark.run(job)
        assert time.monotonic() - started < 2.5
        assert all("human" in text for text in server.asked()), "the parts after it were not begun"
        server.script = lambda _b, _n: Does("[[A]]")
        benchmark.run(job)
    assert list(measured_of(store, plan)) == ["win-rate human", "win-rate base", "win-rate previous"]
