"""How often a judge prefers an iterate's held-out samples to the base's, the previous iterate's or the human answers.

Decides: what is compared, that every pair is judged in both orders, and the metrics. Leaves out: asking the judge
(`judge.py`), the prompt and reading a preference (`judge_prompts.py`).

The samples are those that the evaluation has; nothing is sampled for this. Pairs of equal texts are ties, and nobody is
asked. A verdict counts 1, 1/2 (tie) or 0 for the iterate; the score of a prompt is the mean over both orders. A prompt
with a malformed verdict is left out of all but `malformed`. Metrics, intervals over prompts (both verdicts on a
prompt are drawn together):

    win_rate            mean score
    wins, ties, losses  shares of prompts whose score is above, at, below 1/2
    first_place         share of the verdicts that name a winner which name the answer shown first; 1/2 without bias
    consistent          share of prompts on which both orders came to the same verdict
    length_difference   characters of the iterate's answer minus the other's
    length_correlation  Pearson's, of score and length difference
    length_controlled_win_rate  win rate at equal lengths, by a logistic regression (`length_controlled`)
    malformed           share of verdicts that no answer of the judge held
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from spinreg_core.benchmarks.judge import JudgeQuestion, JudgeVerdicts, ask_judge, settings_of
from spinreg_core.benchmarks.judge_prompts import Preference, Prompts, load_prompts, parse_preference
from spinreg_core.benchmarks.results import write_part
from spinreg_core.config import RunConfig
from spinreg_core.errors import BadInput, Damaged, SpinregError
from spinreg_core.evaluation.intervals import (
    Estimate,
    Floats,
    bootstrap_correlation,
    bootstrap_mean,
    grouped_share,
    percentile_estimate,
    resampled_rows,
    wilson,
)
from spinreg_core.runs.fetch import fetch_file
from spinreg_core.runs.head import stage_object
from spinreg_core.runs.job import Job
from spinreg_core.runs.objects import publish, versions
from spinreg_core.runs.plans import StagePlan, policy_object
from spinreg_core.store.base import Store
from spinreg_core.store.open import open_store

Both = tuple[Preference | None, Preference | None]  # of a pair, in both orders; None where malformed
PROMPT = "pair-v2"
_RIDGE = 0.01  # keeps the regression finite where one side wins everything; far below the weight of one prompt


@dataclass(frozen=True)
class Pair:
    """One prompt: what was asked, the iterate's answer (`own`) and the one it is compared with."""

    prompt_id: str
    question: str
    own: str
    other: str


def require_judge(config: RunConfig) -> None:
    """Raise BadInput for prompts that cannot be used."""
    if config.benchmarks.win_rate:
        load_prompts(config.judge, [PROMPT])


def plans(config: RunConfig, head: dict[str, Any], iterate: int) -> list[StagePlan]:
    """One part for each of `benchmarks.win_rate`. The base has itself as base and no previous. Raises BadInput."""
    found = []
    for against in config.benchmarks.win_rate:
        if iterate == 0 and against != "human":
            continue
        other = {"base": 0, "previous": iterate - 1}.get(against)
        inputs = {
            "policy": policy_object(head, iterate), "data": head["data"], "evaluate": _evaluation(head, iterate),
            "against": None if other is None else _evaluation(head, other),
        }  # fmt: skip
        key = inputs | {
            "name": against, "judge": settings_of(config.judge),
            "prompts": load_prompts(config.judge, [PROMPT]).sha256, "limit": config.benchmarks.win_rate_prompts,
            "seed": config.seed, "bootstrap": config.evaluation.bootstrap,
        }  # fmt: skip
        found.append(StagePlan("win-rate", iterate, key, inputs, {}))
    return found


def _evaluation(head: dict[str, Any], iterate: int) -> str:
    found = stage_object(head, iterate, "evaluate")
    if found is None:
        raise SpinregError(f"run {head['run']!r}: round {iterate} has no committed evaluate")
    return found


def run(job: Job) -> dict[str, Any]:
    """Have the pairs judged. Returns the manifest. Raises as `judge_pairs`."""
    start, store, config = time.monotonic(), open_store(job.store), job.config
    prompts = load_prompts(config.judge, [PROMPT])
    if job.key["prompts"] != prompts.sha256:
        raise BadInput("judge.prompts", "a file that changed since this was planned",
                       "the same; start again to have the new one used")  # fmt: skip
    pairs = pairs_of(store, job.inputs["data"], job.inputs["evaluate"], job.inputs["against"])
    pairs = pairs[: config.benchmarks.win_rate_prompts]
    metrics, items, cost = judge_pairs(store, config, pairs, prompts, payer=job.object_id)
    document = {
        "kind": "win-rate", "name": job.key["name"], "primary": "win_rate", "better": "higher", "metrics": metrics,
        "settings": pair_settings(config, pairs),
        "fingerprints": {
            "policy": job.inputs["policy"], "data": job.inputs["data"], "prompts": prompts.sha256,
            "evaluate": job.inputs["evaluate"], "against": job.inputs["against"],
        },
        "versions": versions(),
        "cost": cost,
    }  # fmt: skip
    folder = job.workdir / "out"
    flat = write_part(folder, document, items)
    return publish(store, job, folder, metrics=flat, seconds=time.monotonic() - start)


def pairs_of(store: Store, data_id: str, evaluate: str, against: str | None) -> list[Pair]:
    """The samples of two evaluations of the same held-out rows, in the order of the rows. against: None for the human
    answers."""
    columns = ["prompt_id", "messages", "answer"]
    data = pq.read_table(fetch_file(store, data_id, "heldout.parquet"), columns=columns).to_pydict()

    def samples(object_id: str) -> list[str]:
        path = fetch_file(store, object_id, "rows.parquet")
        rows = pq.read_table(path, columns=["prompt_id", "sample_text"]).to_pydict()
        if rows["prompt_id"] != data["prompt_id"]:
            raise Damaged(f"{object_id}: found other rows; expected those of {data_id}")
        texts: list[str] = rows["sample_text"]
        return texts

    others = data["answer"] if against is None else samples(against)
    rows = zip(data["prompt_id"], data["messages"], samples(evaluate), others, strict=True)
    return [Pair(name, shown(json.loads(messages)), own, other) for name, messages, own, other in rows]


def pair_settings(config: RunConfig, pairs: Sequence[Pair]) -> dict[str, Any]:
    """What a win rate depends on besides prompts and answers, for its document."""
    return {
        "judge": settings_of(config.judge), "prompts": len(pairs),
        "identical": sum(pair.own == pair.other for pair in pairs),
        "limit": config.benchmarks.win_rate_prompts, "bootstrap": config.evaluation.bootstrap, "seed": config.seed,
    }  # fmt: skip


def judge_pairs(
    store: Store, config: RunConfig, pairs: Sequence[Pair], prompts: Prompts, *, payer: str
) -> tuple[dict[str, Estimate], list[tuple[str, str, float]], dict[str, Any]]:
    """Have every pair of different texts judged in both orders. Returns metrics and items (`win_metrics`), and the
    cost. Raises as `ask_judge`; BadInput where the judge gave no verdict on any prompt in both orders."""
    different = [pair for pair in pairs if pair.own != pair.other]
    asked = []
    for pair in different:
        for order, a, b in (("own first", pair.own, pair.other), ("own second", pair.other, pair.own)):
            messages = prompts.messages(PROMPT, question=pair.question, answer_a=a, answer_b=b)
            asked.append(JudgeQuestion(f"prompt {pair.prompt_id}, {order}", messages))
    found: JudgeVerdicts[Preference] = ask_judge(store, config.judge, asked, parse_preference, payer=payer)
    in_order = iter(found.values)
    verdicts: list[Both | None] = [
        (next(in_order), next(in_order)) if pair.own != pair.other else None for pair in pairs
    ]
    metrics, items = win_metrics(pairs, verdicts, resamples=config.evaluation.bootstrap, seed=config.seed)
    if not items:
        raise BadInput("judge.model", f"{config.judge.model!r}, without a verdict in both orders on any prompt",
                       "a judge that writes one as its prompt asks, such as [[A]]")  # fmt: skip
    return metrics, items, found.cost


def shown(messages: Sequence[dict[str, Any]]) -> str:
    """A conversation as a judge reads it: the user's text alone where there is nothing else."""
    if len(messages) == 1 and messages[0]["role"] == "user":
        return str(messages[0]["content"])
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in messages)


def win_metrics(
    pairs: Sequence[Pair],
    verdicts: Sequence[Both | None],
    *,
    resamples: int,
    seed: int,
) -> tuple[dict[str, Estimate], list[tuple[str, str, float]]]:
    """Metrics and items. verdicts: of each pair with its own answer shown as A, and with it shown as B; None where the
    texts are equal. Without a prompt that has both, there are none."""
    usable = [(pair, v) for pair, v in zip(pairs, verdicts, strict=True) if v is None or None not in v]
    if not usable:
        return {}, []
    orders = [("tie", "tie") if v is None else v for _, v in usable]
    # What each order says of the iterate's own answer.
    first = np.array([{"A": 1.0, "tie": 0.5, "B": 0.0}[v[0]] for v in orders])  # type: ignore[index]
    second = np.array([{"A": 0.0, "tie": 0.5, "B": 1.0}[v[1]] for v in orders])  # type: ignore[index]
    score = (first + second) / 2
    longer = np.array([float(len(pair.own) - len(pair.other)) for pair, _ in usable])
    judged_ = np.array([v is not None for _, v in usable])
    n = len(score)

    metrics = {
        "win_rate": grouped_share(score, np.ones(n), resamples=resamples, seed=seed),
        "wins": wilson(int((score > 0.5).sum()), n),
        "ties": wilson(int((score == 0.5).sum()), n),
        "losses": wilson(int((score < 0.5).sum()), n),
        "length_difference": bootstrap_mean(longer, "characters", resamples=resamples, seed=seed),
    }
    # Of each prompt, how many verdicts name a winner, and in how many it is the answer shown first.
    named = judged_ * ((first != 0.5).astype(np.float64) + (second != 0.5))
    if named.any():
        metrics["first_place"] = grouped_share(
            judged_ * ((first == 1).astype(np.float64) + (second == 0)), named, resamples=resamples, seed=seed
        )
    if judged_.any():
        metrics["consistent"] = wilson(int((first == second)[judged_].sum()), int(judged_.sum()))
    if n > 2 and longer.std() > 0 and score.std() > 0:  # else no resampling tells of other prompts
        correlation = bootstrap_correlation(score, longer, resamples=resamples, seed=seed)
        if correlation is not None:
            metrics["length_correlation"] = correlation
        metrics["length_controlled_win_rate"] = _length_controlled(score, longer, resamples=resamples, seed=seed)
    malformed = [float(v.count(None)) for v in verdicts if v is not None]
    if malformed:
        metrics["malformed"] = grouped_share(malformed, [2.0] * len(malformed), resamples=resamples, seed=seed)
    return metrics, [(pair.prompt_id, "win_rate", float(s)) for (pair, _), s in zip(usable, score, strict=True)]


def _length_controlled(score: Floats, longer: Floats, *, resamples: int, seed: int) -> Estimate:
    """With the percentile interval over prompts. Both arguments: [prompts]."""
    pieces = resampled_rows(len(score), resamples=resamples, seed=seed, cells=1_000_000)
    draws = np.concatenate([length_controlled(score[rows], longer[rows]) for rows in pieces])
    return percentile_estimate(length_controlled(score[None], longer[None])[0], draws, len(score), "share")


def length_controlled(scores: Floats, lengths: Floats) -> Floats:
    """Win rate at equal lengths, row by row; scores in [0, 1] and lengths (differences) are [rows, prompts].

    sigma(a) of the logistic regression P = sigma(a + b tanh(d / s)) with s the standard deviation of the differences d,
    as in length-controlled AlpacaEval (arXiv 2404.04475), without its terms for the instruction. By Newton's method,
    with a ridge of `_RIDGE` on both.
    """
    spread = lengths.std(1, keepdims=True)
    x = np.tanh(np.divide(lengths, spread, out=np.zeros_like(lengths), where=spread > 0))
    a, b = np.zeros((2, len(scores), 1))
    for _ in range(50):
        p = 1 / (1 + np.exp(-(a + b * x)))
        w, left = p * (1 - p), scores - p
        ga, gb = left.sum(1) - _RIDGE * a[:, 0], (left * x).sum(1) - _RIDGE * b[:, 0]
        haa, hab, hbb = w.sum(1) + _RIDGE, (w * x).sum(1), (w * x * x).sum(1) + _RIDGE
        determinant = haa * hbb - hab * hab
        steps = np.stack([hbb * ga - hab * gb, haa * gb - hab * ga]) / determinant
        steps *= np.minimum(1.0, 2.0 / np.maximum(np.abs(steps).max(0), 1e-12))  # no leap out of the region it holds in
        a, b = a + steps[0][:, None], b + steps[1][:, None]
        if np.abs(steps).max() < 1e-10:
            break
    found: Floats = 1 / (1 + np.exp(-a[:, 0]))
    return found
