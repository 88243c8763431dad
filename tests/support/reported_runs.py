"""Finished runs with chosen metrics, published and committed as stages do it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from spinreg_core.config import RunConfig
from spinreg_core.evaluation.heldout import ROWS_SCHEMA
from spinreg_core.runs.job import Job
from spinreg_core.runs.lease import hold_lease
from spinreg_core.runs.objects import fingerprint, publish
from spinreg_core.store.base import Store


def estimate(value: float, half: float, unit: str, n: int = 64) -> dict[str, Any]:
    return {"value": value, "low": value - half, "high": value + half, "n": n, "unit": unit}


def metrics(number: int, nll: list[float], half: float = 0.02) -> dict[str, Any]:
    """Plausible held-out metrics of iterate `number` when `nll` is the list of all iterates' NLL."""
    found = {
        "heldout_nll": estimate(nll[number], 0.08, "nats/token"),
        "kl_base": estimate(3.0 * number, 0.4 * number, "nats/answer"),
        "answer_length": estimate(70.0 - 9 * number, 5, "tokens"),
        "end_of_turn_rate": estimate(0.5 + 0.1 * number, 0.1, "share"),
        "distinct_2": estimate(0.9, 0.02, "share"),
    }
    if number == 0:
        found["human_answer_length"] = estimate(48.0, 4, "tokens")
        found["human_distinct_2"] = estimate(0.97, 0.01, "share")
    else:
        found["nll_vs_base"] = estimate(nll[number] - nll[0], half, "nats/token")
        found["nll_vs_previous"] = estimate(nll[number] - nll[number - 1], half, "nats/token")
        found["reward_accuracy"] = estimate(0.8, 0.08, "share")
        found["kl_previous"] = estimate(3.0, 0.4, "nats/answer")
        found["margin"] = estimate(6.0 * number, 0.5, "nats")
        found["separated"] = estimate(0.25, 0.1, "share")
        found["length_bias"] = estimate(0.31, 0.2, "correlation")
    return found


def rows(number: int, nll: list[float], n: int = 64) -> pa.Table:
    """Return held-out rows of iterate `number`, with a mean NLL of nll[number] nats/token on human answers."""
    i = np.arange(n)
    prompt = np.where(i % 2, 0.3, -0.3)

    def human(k: int) -> Any:
        """Return log p of the human answers under iterate k; differences between iterates vary by row."""
        return -48 * (nll[k] + prompt + k * np.where(i // 2 % 2, 0.05, -0.05))

    length = np.full(n, 70 - 9 * number) + np.where(i % 2, 5, -5)
    sample = -1.2 * length
    columns: dict[str, Any] = {name: [None] * n for name in ROWS_SCHEMA.names}
    columns |= {
        "prompt_id": [f"{k:016x}" for k in i],
        "answer_tokens": np.full(n, 48),
        "answer_distinct_2": 0.97 + prompt / 30,
        "real_logp": human(number),
        "real_base_logp": human(0),
        "sample_ids": [list(range(k)) for k in length],
        "sample_text": [f"answer {k}" for k in i],
        "sample_finish": ["stop" if k % 2 else "length" for k in i],
        "sample_distinct_2": 0.9 + prompt / 30,
        "sample_logp": sample,
        "sample_base_logp": sample - 3 * number * (1 + prompt),
    }
    if number:
        columns |= {
            "real_previous_logp": human(number - 1),
            "sample_previous_logp": sample - 3 * (1 + prompt),
            "previous_sample_tokens": 40 + i,
            "previous_sample_logp": np.where(i % 5, -60.0, -20.0),
            "previous_sample_base_logp": np.full(n, -50.0),
            "previous_sample_previous_logp": np.full(n, -50.0),
        }
    return pa.table(columns, schema=ROWS_SCHEMA)


def steps(number: int, count: int = 8) -> list[dict[str, Any]]:
    return [
        {
            "step": i + 1,
            "loss": 0.69 * math.exp(-i / 9),
            "margin": 2.0 * i,
            "accuracy": min(1.0, 0.5 + i / 10),
            "real_logp": -80.0 + i - 9 * (number - 1),
            "generated_logp": -70.0 - 4 * i,
            "log_ratio_previous_real": 1.0 * i,
            "log_ratio_previous_generated": -4.0 * i,
            "grad_norm": math.nan if i == 0 else 20.0 / i,
            "learning_rate": 5e-6 * (1 - i / count),
            "tokens_per_second": 900.0,
        }
        for i in range(count)
    ]


def summary(number: int, text: str) -> dict[str, Any]:
    """As `training.Round.summary` writes it; human answers lose in round 2."""
    change = -3.21 if number == 2 else 4.56
    return {
        "steps": 8, "pairs": 64, "first_loss": 0.693, "last_loss": 0.319, "loss": 0.5, "accuracy": 0.875,
        "margin": 6.0, "real_logprob_change": change, "real_logprob_change_error": 0.54, "watched_pairs": 32,
        "seconds": 61.0, "tokens_per_second": 900.4,
        "alarms": [f"log p of real answers fell {text}"] if change < 0 else [],
    }  # fmt: skip


def pairs(number: int) -> dict[str, Any]:
    """The metrics of the stage `mix-opponent`, in the second round with scores of the engine."""
    engine = {"engine_checked": 8, "engine_mean_difference": 0.0123, "engine_worst_difference": -0.0456,
              "engine_shards": 2, "engine_shards_refused": 1}  # fmt: skip
    return {
        "pairs": 64, "by_iterate": {str(k): 64 // number for k in range(number)}, "generated_truncated": 3,
        "clipped": 2, "dropped": 0, "empty_generated": 1, "scores_computed": 100, "scores_reused": 28,
        "scores_of_engine": 10 * (number - 1),
    } | (engine if number == 2 else {})  # fmt: skip


def make_run(
    store: Store,
    tmp_path: Path,
    nll: list[float],
    text: str = "fine",
    run: str = "demo",
    config: RunConfig | None = None,
) -> Store:
    """A run with len(nll) - 1 rounds, published and committed as stages do it."""
    config = config or RunConfig(run=run)

    def put(stage: str, number: int, files: dict[str, Any], found: dict[str, Any] | None = None) -> str:
        key = {"stage": stage, "round": number, "run": run, "text": text}
        folder = tmp_path / "out" / run / f"{stage}-{number}"
        folder.mkdir(parents=True)
        for name, content in files.items():
            if isinstance(content, pa.Table):
                pq.write_table(content, folder / name)
            else:
                (folder / name).write_text(content)
        job = Job(stage, fingerprint(stage, key), key, store.url, "e0001-aa", number, {"from": text}, config, tmp_path)
        return publish(store, job, folder, metrics=found or {}, seconds=12.5 + 60 * number).object_id

    with hold_lease(store, config, "test") as session:
        session.commit_inputs(put("base", 0, {"weights": "w" * 2000}), put("data", 0, {"train.parquet": "p"}))
        for number in range(len(nll)):
            if number:
                session.commit(number, "generate", put("generate", number, {"shard": "s"}))
                session.commit(number, "mix-opponent", put("mix-opponent", number, {"pairs": "p"}, pairs(number)))
                lines = "\n".join(json.dumps(step) for step in steps(number))
                files = {"metrics.jsonl": lines, "summary.json": json.dumps(summary(number, text))}
                session.commit(number, "train", put("train", number, files))
            samples = [
                {
                    "prompt_id": f"{i:016x}",
                    "messages": [{"role": "user", "content": f"question {i} {text}"}],
                    "answer": f"human answer {i} {text}",
                    "sample": f"iterate {number} answers {i} {text}",
                    "finish": "length" if i else "stop",
                }
                for i in range(3)
            ]
            shown: dict[str, Any] = {"samples": samples}
            if number:
                for sample in samples:
                    tokens = [[f"{text} ", 0.25], ["token", -0.5 * number], ["", 0.0]]
                    sample["credit"] = {"answer": tokens, "sample": tokens[:1]}
                shown["margins"] = {"edges": [-1.0, 0.0, 1.0], "counts": [20, 44], "quantiles": {"0.5": 0.3}}
            evaluated = {"rows.parquet": rows(number, nll), "samples.json": json.dumps(shown)}
            session.commit(number, "evaluate", put("evaluate", number, evaluated))
    return store
