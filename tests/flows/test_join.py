"""A further machine takes its work from an order in the store."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows import join
from flows.join import _ordered
from spinreg_core.config import RunConfig
from spinreg_core.errors import BadInput, StoreFailed
from spinreg_core.runs.job import Job
from spinreg_core.store.open import open_store


def fields(**changes: Any) -> dict[str, Any]:
    job = Job("train", "train-1", {}, "/elsewhere", "e0001-a", 1, {}, RunConfig(run="mine"), Path("/elsewhere"))
    found: dict[str, Any] = json.loads(json.dumps(job.fields() | changes))
    return found


def test_an_order_decides_neither_the_store_nor_the_folder(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    job = _ordered(fields(), store, "mine", tmp_path / "work")
    assert (job.store, job.workdir) == (store.url, tmp_path / "work")


@pytest.mark.parametrize("changes", [{"stage": "prepare"}, {"stage": "answer"}, {"stage": "../x"}, {"writer": "../x"}])
def test_stages_that_are_not_for_other_machines(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        _ordered(fields(**changes), open_store(str(tmp_path)), "mine", tmp_path)


def test_join_refuses_the_order_of_another_run(tmp_path: Path) -> None:
    with pytest.raises(
        BadInput, match="expected one of generate, mix-opponent, train, generate-heldout, evaluate of run other"
    ):
        _ordered(fields(), open_store(str(tmp_path)), "other", tmp_path)


class _Enough(Exception):
    pass


def test_join_waits_for_an_absent_store_and_for_orders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said, and asked again: neither ends the machine's part in the run."""
    store = open_store(str(tmp_path))
    store.write("runs/mine/order.json", b'{"attempt": ')
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if "no order" in line:
            raise _Enough

    def away(_store: object, _run: str) -> None:
        raise StoreFailed("away" if len(said) < 4 else "no order")

    monkeypatch.setattr(join, "_POLL_SECONDS", 0.01)
    real = join.read_order
    monkeypatch.setattr(join, "read_order", lambda *given: real(*given) if len(said) < 2 else away(*given))
    with pytest.raises(_Enough):
        join.join_run(store.url, "mine", say=say)
    assert "expected JSON" in said[1]
    assert said[2:4] == ["away", "away"]


def test_a_store_that_is_away_while_a_stage_runs_does_not_end_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def away(_store: object, _run: str) -> None:
        asked.append(1)
        raise StoreFailed("away")

    def process(*_given: object, check: Callable[[], None], **_named: object) -> None:
        time.sleep(0.02)
        check()

    monkeypatch.setattr(join, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(join, "read_order", away)
    monkeypatch.setattr(join, "run_process", process)
    monkeypatch.setattr(join, "start_process", lambda *_given, **_named: None)
    store = open_store(str(tmp_path))
    join._take_part(store, "mine", _ordered(fields(), store, "mine", tmp_path / "work"), "a", print)
    assert asked
