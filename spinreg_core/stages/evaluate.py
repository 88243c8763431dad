"""The stage `evaluate`: held-out metrics, diagnostics of the game, and shown samples of an iterate (round 0: the base).

Decides: the sequences that each policy scores, without any score that an earlier evaluation holds. Leaves out: sampling
(the stage `generate`), the metrics (`spinreg_core.evaluation`), scoring (`spinreg_core.logprobs`).

A job's `inputs`: {"data", "policy", "base", "heldout" (this policy's answers to the held-out prompts): object ids,
"previous", "evaluate_base", "evaluate_previous": object ids, null for the base}.

With y the human answer, y' this policy's sample and y'' the previous policy's, iterate n scores y, y', y'' under p_n,
and y' under p_{n-1} and p_0. The other scores are in the two earlier `rows.parquet`. One model is in memory at a time.

Writes `rows.parquet` (columns: `evaluation/heldout.py`), `metrics.json`, and `samples.json` with the first
`shown_samples` held-out prompts (`evaluation/samples.py`) and, after a round, the histogram "margins" of their margins.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from spinreg_core.config import of_round
from spinreg_core.errors import BadInput, Damaged
from spinreg_core.evaluation.diagnostics import Tokens, credit, histogram
from spinreg_core.evaluation.final_answers import require_final_answers
from spinreg_core.evaluation.formatting import counts, format_estimate, label
from spinreg_core.evaluation.heldout import ROWS_SCHEMA, margins, metrics_of_round
from spinreg_core.evaluation.intervals import Estimate
from spinreg_core.evaluation.metrics import distinct_bigrams
from spinreg_core.evaluation.samples import ShownSample
from spinreg_core.logprobs.policy import load_for
from spinreg_core.logprobs.scoring import score
from spinreg_core.models.chat_template import Renderer
from spinreg_core.runs.fetch import fetch_file, fetch_files, fetch_folder
from spinreg_core.runs.job import Job
from spinreg_core.runs.manifest import Manifest
from spinreg_core.runs.objects import publish
from spinreg_core.runtime.distributed import Ranks, init_ranks
from spinreg_core.runtime.main import main
from spinreg_core.runtime.progress import Progress
from spinreg_core.selfplay.opponent import effective_alpha
from spinreg_core.store.base import Store
from spinreg_core.store.open import open_store

Columns = dict[str, list[Any]]


def run(job: Job) -> Manifest | None:
    """Evaluate one iterate. Returns the manifest on the first rank, None on the others.

    The metrics of the manifest are {name: value, ..., "intervals": {name: [low, high]}}. Raises BadInput (a job without
    the earlier evaluations it needs, a policy with scores that are not finite) and Damaged.
    """
    start = time.monotonic()
    store, config = open_store(job.store), job.config
    data = pq.read_table(fetch_file(store, job.inputs["data"], "heldout.parquet")).to_pydict()
    require_final_answers(config.evaluation.final_answer, data["final_answer"])
    base, previous = (_earlier(store, job, name, data) for name in ("evaluate_base", "evaluate_previous"))

    rows: Columns = {
        "prompt_id": data["prompt_id"],
        "answer_tokens": [len(ids) for ids in data["answer_ids"]],
        "answer_distinct_2": [
            distinct_bigrams(_spoken(ids, finished=not truncated))
            for ids, truncated in zip(data["answer_ids"], data["answer_truncated"], strict=True)
        ],
        "final_answer": data["final_answer"],
    }
    rows |= _samples(store, job, data["prompt_id"])
    ranks = init_ranks(config.resources)
    shown = range(min(config.evaluation.shown_samples, len(data["prompt_id"])))
    tokens = Tokens([data["prompt_ids"][i] for i in shown] * 2,
                    [ids[i] for ids in (data["answer_ids"], rows["sample_ids"]) for i in shown])  # fmt: skip
    rows |= _scores(store, job, data, rows["sample_ids"], base, previous, ranks, tokens)
    if not ranks.first:
        return None
    table = pa.table({name: rows[name] for name in ROWS_SCHEMA.names}, schema=ROWS_SCHEMA)
    alpha = effective_alpha(config.objective.alpha, job.round)
    beta = of_round(config.objective.beta, max(job.round, 1))
    metrics = metrics_of_round(table, config, job.round)
    for name, estimate in metrics.items():
        print(f"{label(name, counts([estimate]))}: {format_estimate(estimate)}", flush=True)

    folder = job.workdir / "out"
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / "rows.parquet")
    _write_json(folder / "metrics.json", metrics)
    samples = _shown(data, rows, len(shown))
    document: dict[str, object] = {"samples": samples}
    if job.round:
        policy = fetch_folder(store, job.inputs["policy"], "policy")
        credits = credit(tokens, Renderer.from_folder(policy).text, job.inputs, alpha=alpha, beta=beta)
        for i, sample in enumerate(samples):
            sample["credit"] = {"answer": credits[i], "sample": credits[len(shown) + i]}
        document["margins"] = histogram(margins(table, alpha))
    _write_json(folder / "samples.json", document)
    metrics_ = _flat(metrics) | {"tokens_scored": _tokens_scored(job, table)}
    return publish(store, job, folder, metrics=metrics_, seconds=time.monotonic() - start)


def _earlier(store: Store, job: Job, name: str, data: Columns) -> Columns:
    """Return the rows of an earlier evaluation of the same held-out rows; empty for the base."""
    object_id = job.inputs[name]
    if (object_id is None) != (job.round == 0):
        raise BadInput(f"evaluate job of round {job.round}, inputs.{name}", object_id,
                       "null for round 0, an evaluate object for any other")  # fmt: skip
    if object_id is None:
        return {}
    rows = pq.read_table(fetch_file(store, object_id, "rows.parquet")).to_pydict()
    if rows["prompt_id"] != data["prompt_id"]:
        raise BadInput(f"evaluate job of round {job.round}, inputs.{name}", f"{object_id}, about other rows",
                       f"an evaluation of the held-out rows of {job.inputs['data']}")  # fmt: skip
    return rows


def _spoken(ids: list[int], *, finished: bool) -> list[int]:
    """Return answer tokens without the end-of-turn token of a finished answer."""
    return ids[:-1] if finished else ids


def _samples(store: Store, job: Job, prompt_ids: list[str]) -> Columns:
    """Return this policy's answers, in the order of the held-out rows."""
    object_id = job.inputs["heldout"]
    columns = ["prompt_id", "answer_ids", "text", "finish", "logprobs"]
    found: dict[str, dict[str, Any]] = {}
    for path in fetch_files(store, object_id, "shards").values():
        for answer in pq.read_table(path, columns=columns).to_pylist():
            found[answer["prompt_id"]] = answer
    if found.keys() != set(prompt_ids):
        raise Damaged(f"{object_id}: found answers to {len(found)} prompts; expected {len(prompt_ids)}")
    answers = [found[prompt_id] for prompt_id in prompt_ids]
    return {
        "sample_ids": [a["answer_ids"] for a in answers],
        "sample_text": [a["text"] for a in answers],
        "sample_finish": [a["finish"] for a in answers],
        "sample_engine_logp": [math.fsum(a["logprobs"]) for a in answers],
        "sample_distinct_2": [
            distinct_bigrams(_spoken(a["answer_ids"], finished=a["finish"] == "stop")) for a in answers
        ],
    }


def _scores(
    store: Store,
    job: Job,
    data: Columns,
    sample_ids: list[list[int]],
    base: Columns,
    previous: Columns,
    ranks: Ranks,
    tokens: Tokens,
) -> Columns:
    """Return every log-probability column, from the earlier evaluations if they have it, otherwise scored now."""
    prompts, real = data["prompt_ids"], data["answer_ids"]
    nothing: list[Any] = [None] * len(prompts)
    own = {"real_logp": real, "sample_logp": sample_ids}
    if job.round == 0:
        found = _score(store, job, [(job.inputs["policy"], own)], prompts, ranks, None)
        found |= {"real_base_logp": found["real_logp"], "sample_base_logp": found["sample_logp"]}
        absent = [name for name in ROWS_SCHEMA.names if "previous" in name]
        return found | dict.fromkeys(absent, nothing)
    own["previous_sample_logp"] = previous["sample_ids"]
    work = [(job.inputs["policy"], own), (job.inputs["base"], {"sample_base_logp": sample_ids})]
    if job.inputs["previous"] != job.inputs["base"]:
        work.append((job.inputs["previous"], {"sample_previous_logp": sample_ids}))
    found = _score(store, job, work, prompts, ranks, tokens)
    found.setdefault("sample_previous_logp", found["sample_base_logp"])
    return found | {
        "real_base_logp": base["real_logp"],
        "real_previous_logp": previous["real_logp"],
        "previous_sample_tokens": [len(ids) for ids in previous["sample_ids"]],
        "previous_sample_base_logp": previous["sample_base_logp"],
        "previous_sample_previous_logp": previous["sample_logp"],
    }


def _score(
    store: Store,
    job: Job,
    work: list[tuple[str, dict[str, list[list[int]]]]],
    prompts: list[list[int]],
    ranks: Ranks,
    tokens: Tokens | None,
) -> Columns:
    """Return the log-probabilities of answers to `prompts` by column.

    work: (policy object, {column: answers}), each policy loaded once.
    tokens: shown answers, which each policy also scores token by token.
    """
    config = job.config
    progress = Progress("evaluate", sum(len(columns) for _, columns in work) * len(prompts), "sequences")
    found: Columns = {}
    for policy, columns in work:
        folder = ranks.local_main_first(lambda policy=policy: fetch_folder(store, policy, "policy"))  # type: ignore[misc]
        model = load_for(ranks, folder, config.training.precision)
        values = score(
            model,
            prompts * len(columns),
            [answer for answers in columns.values() for answer in answers],
            precision=config.training.precision,
            tokens_per_pass=config.resources.tokens_per_pass,
            ranks=ranks,
            progress=progress,
        )
        if not np.isfinite(values).all():
            bad = int((~np.isfinite(values)).sum())
            raise BadInput(
                f"policy {policy}", f"{bad} log-probabilities that are not finite", "a policy in working order"
            )
        for i, name in enumerate(columns):
            found[name] = values[i * len(prompts) : (i + 1) * len(prompts)]
        if tokens is not None:
            tokens.score(policy, model, config.training.precision)
        # Before the next one is loaded: the GPU may hold one model only.
        del model
    return found


def _tokens_scored(job: Job, table: pa.Table) -> int:
    """Return the number of answer tokens that `_scores` puts through policies, counted once per policy.

    The few shown rows, scored token by token, are not counted again.
    """
    real, samples = pc.sum(table["answer_tokens"]).as_py(), pc.sum(pc.list_value_length(table["sample_ids"])).as_py()
    if job.round == 0:
        return int(real + samples)
    policies = len({job.inputs[name] for name in ("policy", "base", "previous")})
    return int(real + policies * samples + pc.sum(table["previous_sample_tokens"]).as_py())


def _shown(data: Columns, rows: Columns, count: int) -> list[ShownSample]:
    """Return the first held-out prompts in the order of the data, so that no answer decides what is shown."""
    return [
        {
            "prompt_id": data["prompt_id"][i],
            "messages": json.loads(data["messages"][i]),
            "answer": data["answer"][i],
            "sample": rows["sample_text"][i],
            "finish": rows["sample_finish"][i],
        }
        for i in range(count)
    ]


def _flat(metrics: dict[str, Estimate]) -> dict[str, Any]:
    values: dict[str, Any] = {name: estimate["value"] for name, estimate in metrics.items()}
    return values | {"intervals": {name: [e["low"], e["high"]] for name, e in metrics.items()}}


def _write_json(path: Path, document: object) -> None:
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False), encoding="utf-8")


if __name__ == "__main__":
    main(run, ranked=True)
