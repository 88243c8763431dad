"""A store with a policy and scored pairs, jobs of the train stage on it, and what such a job leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from spinreg_core.config import RunConfig
from spinreg_core.logprobs.scoring import score
from spinreg_core.models.loading import load_policy
from spinreg_core.runs import fetch, objects
from spinreg_core.runs.job import Job
from spinreg_core.runs.manifest import Manifest
from spinreg_core.selfplay.pairs import PAIRS_SCHEMA
from spinreg_core.store.base import Store
from spinreg_core.store.open import open_store
from tests.support.tiny_models import random_pairs, write_policy

PAIRS = 22


SETTINGS = {
    "precision": "fp32",
    "learning_rate": 1e-3,
    "batch_size": 4,
    "epochs": 2,
    "checkpoint_every_steps": 5,
}


class Setting:
    """A store with a policy and scored pairs, and jobs on it; each job is its own object."""

    def __init__(self, root: Path, pairs: int = PAIRS) -> None:
        self.root, self.store = root, open_store(str(root / "store"))
        self.folder = write_policy(root / "base" / "policy")
        self.base = self.put("base", root / "base")
        rows, model = random_pairs(pairs, 5), load_policy(self.folder, "fp32", "cpu")
        for which in ("real", "generated"):
            prompts, answers = [p["prompt_ids"] for p in rows], [p[f"{which}_ids"] for p in rows]
            for pair, value in zip(
                rows, score(model, prompts, answers, precision="fp32", tokens_per_pass=200), strict=True
            ):
                pair[f"previous_{which}"] = pair[f"base_{which}"] = value
        (root / "pairs").mkdir()
        pq.write_table(pa.Table.from_pylist(rows, schema=PAIRS_SCHEMA), root / "pairs" / "pairs.parquet")
        self.pairs = self.put("mix-opponent", root / "pairs")

    def put(self, stage: str, folder: Path) -> str:
        key = {"from": folder.name}
        job = Job(stage, objects.fingerprint(stage, key), key, "", "e0001-aa", 0, {}, RunConfig(), folder)
        return str(objects.publish(self.store, job, folder, metrics={}).object_id)

    def job(self, name: str, writer: str = "e0001-aa", resources: dict[str, Any] | None = None, **training: Any) -> Job:
        config = RunConfig(
            seed=7,
            training=SETTINGS | training,
            objective={"alpha": 0.5},
            resources={"device": "cpu"} | (resources or {}),
        )  # type: ignore[arg-type]
        key, inputs = {"name": name}, {"pairs": self.pairs, "previous": self.base, "base": self.base}
        object_id = objects.fingerprint("train", key)
        return Job("train", object_id, key, str(self.root / "store"), writer, 1, inputs, config,
                   self.root / "work" / name / writer)  # fmt: skip


def sha_of_weights(manifest: Manifest | None) -> str:
    assert manifest is not None
    (found,) = [file.sha256 for file in manifest.files if file.name == "policy/model.safetensors"]
    return found


def lines(store: Store, manifest: Manifest | None) -> list[dict[str, Any]]:
    assert manifest is not None
    text = fetch.fetch_file(store, manifest.object_id, "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def without_time(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in m.items() if k not in ("seconds", "tokens_per_second")} for m in metrics]
