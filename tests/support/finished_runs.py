"""Small finished runs with held-out rows of their own, published and committed as stages do it."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from spinreg_core.config import ObjectiveConfig, OpponentConfig, RunConfig
from spinreg_core.evaluation.heldout import ROWS_SCHEMA
from spinreg_core.runs.job import Job
from spinreg_core.runs.lease import hold_lease
from spinreg_core.runs.objects import fingerprint, publish
from spinreg_core.store.base import Store

ROWS = 48


def rows_of(number: int, shift: float, noise: np.random.Generator, data: int, rows: int = ROWS) -> pa.Table:
    """Held-out rows of iterate `number`, whose human answers cost `shift` nats/token more than the base's on average.
    `data` seeds what belongs to the prompts, `noise` what belongs to the policy."""
    prompts = np.random.default_rng(data)
    tokens = prompts.integers(20, 60, rows)
    base = -tokens * prompts.uniform(0.8, 1.6, rows)
    real = base - tokens * (shift + noise.normal(0, 0.05, rows)) if number else base
    lengths = noise.integers(10, 40, rows)
    sample = -lengths * noise.uniform(0.5, 1.5, rows)
    columns: dict[str, Any] = {name: [None] * rows for name in ROWS_SCHEMA.names}
    columns |= {
        "prompt_id": [f"{data:04x}{i:012x}" for i in range(rows)],
        "answer_tokens": tokens,
        "answer_distinct_2": np.full(rows, 0.9),
        "real_logp": real,
        "real_base_logp": base,
        "sample_ids": [list(range(n)) for n in lengths],
        "sample_text": [f"answer {i}" for i in range(rows)],
        "sample_finish": ["stop" if n < 35 else "length" for n in lengths],
        "sample_distinct_2": noise.uniform(0.8, 1, rows),
        "sample_logp": sample,
        "sample_base_logp": sample - (noise.exponential(2.0 * number, rows) if number else 0),
    }
    if number:
        columns |= {
            "real_previous_logp": base,
            "sample_previous_logp": sample - noise.exponential(1.0, rows),
            "previous_sample_tokens": lengths,
            "previous_sample_logp": sample - 3,
            "previous_sample_base_logp": sample,
            "previous_sample_previous_logp": sample,
        }
    return pa.table(columns, schema=ROWS_SCHEMA)


def make_run(
    store: Store,
    folder: Path,
    run: str,
    shifts: Sequence[float],
    *,
    objective: dict[str, Any] | None = None,
    opponent: dict[str, Any] | None = None,
    seed: int = 0,
    data: int = 7,
    policy_seed: int | None = None,
    text: str = "fine",
) -> RunConfig:
    """A run with len(shifts) rounds after the base; `data` says which held-out rows, `policy_seed` the noise."""
    config = RunConfig(
        run=run, seed=seed, objective=ObjectiveConfig(**objective or {}), opponent=OpponentConfig(**opponent or {})
    )
    noise = np.random.default_rng(zlib.crc32(run.encode()) if policy_seed is None else policy_seed)

    def put(stage: str, number: int, files: dict[str, Any], key: Any, metrics: dict[str, Any] | None = None) -> str:
        identity = {"stage": stage, "round": number, "of": key}
        place = folder / "out" / run / f"{stage}-{number}"
        place.mkdir(parents=True)
        for name, content in files.items():
            if isinstance(content, pa.Table):
                pq.write_table(content, place / name)
            else:
                (place / name).write_text(content)
        job = Job(stage, fingerprint(stage, identity), identity, store.url, f"e0001-{run}", number, {}, config, folder)
        return publish(store, job, place, metrics=metrics or {}, seconds=10.0 + number).object_id

    with hold_lease(store, config, "test") as session:
        session.commit_inputs(put("base", 0, {"w": "w"}, "base"), put("data", 0, {"rows": "r"}, data))
        for number, shift in enumerate([0.0, *shifts]):
            if number:
                session.commit(number, "generate", put("generate", number, {"s": "s"}, run, {"tokens": 1000 * number}))
                session.commit(number, "mix-opponent", put("mix-opponent", number, {"p": "p"}, run))
                trained = {"tokens_per_second": 100.0, "seconds": 20.0}
                session.commit(number, "train", put("train", number, {"t": "t"}, run, trained))
            rows = rows_of(number, shift, noise if number else np.random.default_rng(data), data)
            samples = [
                {
                    "prompt_id": rows["prompt_id"][i].as_py(),
                    "messages": [{"role": "user", "content": f"question {i} {text}"}],
                    "answer": f"human {i} {text}",
                    "sample": f"{run} round {number} prompt {i} {text}",
                    "finish": "stop",
                }
                for i in range(3)
            ]
            files = {"samples.json": json.dumps({"samples": samples}), "rows.parquet": rows}
            key, counted = run if number else ["base", data, text], {"tokens_scored": 100 * (number + 1)}
            session.commit(number, "evaluate", put("evaluate", number, files, key, counted))
    return config
