"""Benchmark failures that end the flow run, and those that do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flows import round as flow
from spinreg_core import api
from spinreg_core.config import RunConfig
from spinreg_core.errors import JudgeAway, LeaseLost, StageFailed, StagePreempted
from spinreg_core.runs.lease import hold_lease
from spinreg_core.store.open import open_store
from tasks.context import Context, use_context


@pytest.mark.parametrize(
    ("error", "ends"),
    [(JudgeAway("a"), False), (StageFailed("a"), False), (StagePreempted("a"), True), (LeaseLost("a"), True)],
)
def test_measure_with_a_failure_keeps_it_and_with_preemption_stops(
    error: Exception, ends: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, config = open_store(str(tmp_path / "store")), RunConfig(store=str(tmp_path / "store"))

    def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr(api, "plan_benchmark", lambda *_: object())
    monkeypatch.setattr(flow, "run_task", fails)
    monkeypatch.setattr(flow, "run_log", lambda: print)
    with hold_lease(store, config, "tester") as session, use_context(Context(config, store, session)) as context:
        if ends:
            with pytest.raises(type(error)):
                flow.measure(0)
        else:
            flow.measure(0)
        assert context.failures == ([] if ends else [error])
