"""A run with every kind of opponent: earlier iterates, mixtures, averages, several answers to a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from spinreg_core.models.averaging import average_policy
from spinreg_core.runs.fetch import fetch_file, fetch_folder
from spinreg_core.runs.head import read_head
from spinreg_core.runs.objects import require_manifest
from spinreg_core.store.open import open_store
from tests.support.servers import PrefectServer
from tests.support.whole_runs import SMOKE, environment, run

pytestmark = pytest.mark.slow


@pytest.mark.long
def test_run_with_every_kind_of_opponent_trains_on_all_of_them(prefect_server: PrefectServer, tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    settings = {
        "opponent.source": "regenerate", "opponent.history": "all", "opponent.geometric_share": 0.5,
        "opponent.replay_share": 0.5,
        "generation.answers_per_prompt": 2, "generation.shard_size": 24,
        "training.average": "slerp",
        "training.average_weight": 0.4,
    }  # fmt: skip
    parameters = [word for name, value in settings.items() for word in ("-p", f"{name}={value}")]
    text = run(["--config", SMOKE, "--run", "all", "--until-round", "2", "--store", store.url, *parameters],
               environment(tmp_path, prefect_server), tmp_path / "log")  # fmt: skip
    head = read_head(store, "all")
    assert head is not None

    def made(number: int, stage: str) -> dict[str, Any]:
        found = head.stage(number, stage)
        assert found is not None
        return require_manifest(store, found)

    base, first = head.base, made(1, "train")
    average = made(2, "mix-opponent")["inputs"]["previous"]
    assert average.startswith("average-")
    assert made(2, "train")["inputs"]["previous"] == average
    assert made(2, "generate")["inputs"]["policies"] == {"1": average, "0": base}
    assert require_manifest(store, average).inputs == {"policy": first["object_id"], "before": base, "base": base}

    folders = [fetch_folder(store, name, "policy") for name in (base, base, first["object_id"], average)]
    average_policy("slerp", 0.4, *folders[:3], tmp_path / "again")  # type: ignore[arg-type]
    again, found = (load_file(f / "model.safetensors") for f in (tmp_path / "again", folders[3]))
    assert all(bool((again[name] == found[name]).all()) for name in found)

    pairs = pq.read_table(fetch_file(store, made(2, "mix-opponent")["object_id"], "pairs.parquet")).to_pylist()
    generated = made(2, "generate")["metrics"]
    assert 0 < generated["replayed"]["0"] == made(2, "mix-opponent")["metrics"]["replayed"]
    assert len(pairs) == 24 == generated["prompts"] + generated["replayed"]["0"]
    assert sum(p["round"] == 1 for p in pairs) == generated["replayed"]["0"]
    assert {(p["iterate"], p["geometric"]) for p in pairs} == {(0, False), (1, False), (1, True)}
    assert {p["pair_id"].count(":") for p in pairs} == {1, 2}
    assert f"average (slerp, weight 0.4) of {first['object_id']} and {base}" in text
    assert all(p["previous_generated"] is not None for p in pairs)
