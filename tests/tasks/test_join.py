"""What a further machine takes from an order in the store, and what it does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spinreg_core.config import RunConfig
from spinreg_core.errors import BadInput
from spinreg_core.stages.job import Job
from spinreg_core.store import open_store
from tasks.join import _ordered


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


def test_an_order_of_another_run(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="expected one of generate, mix-opponent, train, evaluate of run other"):
        _ordered(fields(), open_store(str(tmp_path)), "other", tmp_path)
