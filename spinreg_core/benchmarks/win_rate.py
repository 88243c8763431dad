"""Win rates: how often a judge prefers one policy's held-out samples to other answers to the same prompts.

Decides: which answers are compared (an iterate's with the base's, the previous iterate's or the human answers; or those
of two runs, `spinreg win-rate RUN OTHER`), that every pair is judged in both orders, and the metrics. Leaves out:
asking the judge (`judge`), and the prompt (`judge_prompts`).

The samples are those of the evaluations; nothing is sampled for this. Pairs of equal texts are ties and are not sent to
the judge. A verdict counts 1, 1/2 (tie) or 0 for the first policy; the score of a prompt is the mean over both orders.
A prompt with a malformed verdict counts only in `malformed`. Intervals are over prompts (both verdicts on a prompt are
drawn together):

    win_rate            mean score
    wins, ties, losses  shares of prompts with a score above, at, below 1/2
    first_place         share of verdicts for the answer shown first, among those that name a winner; 1/2 without bias
    consistent          share of prompts with the same verdict in both orders
    length_difference   characters of the first policy's answer minus the other's
    length_correlation  Pearson's, of score and length difference
    length_controlled_win_rate  win rate at equal lengths, by a logistic regression (`length_controlled`)
    malformed           share of verdicts that no answer of the judge held
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq

from spinreg_core.benchmarks.judge import (
    Both,
    JudgeQuestion,
    ask_both_orders,
    paid_text,
    require_judge,
    settings_of,
    shown_settings,
)
from spinreg_core.benchmarks.judge_prompts import Prompts, load_prompts
from spinreg_core.benchmarks.results import BenchmarkResults, Item, write_part
from spinreg_core.config import RunConfig
from spinreg_core.errors import BadInput, Damaged
from spinreg_core.evaluation.formatting import format_estimate
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
from spinreg_core.runs.head import Head, require_head
from spinreg_core.runs.job import Job
from spinreg_core.runs.manifest import Manifest
from spinreg_core.runs.objects import fingerprint, publish, versions
from spinreg_core.runs.plans import StagePlan, policy_object
from spinreg_core.store.base import Store
from spinreg_core.store.open import open_store

PROMPT = "pair-v2"
_RIDGE = 0.01  # keeps the regression finite where one side wins everything; far below the weight of one prompt


@dataclass(frozen=True)
class AnswerPair:
    """A prompt with two answers: the first policy's (`own`) and the one that it is compared with."""

    prompt_id: str
    question: str
    own: str
    other: str


def require_win_rate_files(config: RunConfig) -> None:
    """Raise BadInput for a file of prompts that cannot be used."""
    if config.benchmarks.win_rate:
        load_prompts(config.judge, [PROMPT])


def plans(config: RunConfig, head: Head, iterate: int) -> list[StagePlan]:
    """Return one part for each of `benchmarks.win_rate`. The base is compared only with human answers.

    Raises BadInput.
    """
    found = []
    for against in config.benchmarks.win_rate:
        if iterate == 0 and against != "human":
            continue
        other = {"base": 0, "previous": iterate - 1}.get(against)
        inputs = {
            "policy": policy_object(head, iterate), "data": head.data,
            "evaluate": head.require_stage(iterate, "evaluate"),
            "against": None if other is None else head.require_stage(other, "evaluate"),
        }  # fmt: skip
        key = inputs | {
            "name": against, "judge": settings_of(config.judge),
            "prompts": load_prompts(config.judge, [PROMPT]).sha256, "limit": config.benchmarks.win_rate_prompts,
            "seed": config.seed, "bootstrap": config.evaluation.bootstrap,
        }  # fmt: skip
        found.append(StagePlan("win-rate", iterate, key, inputs, {}))
    return found


def run(job: Job) -> Manifest:
    """Have the pairs judged. Returns the manifest. Raises as `judge_pairs`."""
    start, store, config = time.monotonic(), open_store(job.store), job.config
    prompts = load_prompts(config.judge, [PROMPT])
    if job.key["prompts"] != prompts.sha256:
        raise BadInput("judge.prompts", "names a file that changed after this job was planned",
                       "start again to use the new prompts")  # fmt: skip
    pairs = pairs_of(store, job.inputs["data"], job.inputs["evaluate"], job.inputs["against"])
    pairs = pairs[: config.benchmarks.win_rate_prompts]
    metrics, items, cost = judge_pairs(store, config, pairs, prompts, payer=job.object_id)
    document: BenchmarkResults = {
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


def win_rate_of_runs(
    store: Store, config: RunConfig, run: str, other: str, number: int | None = None
) -> tuple[str, Mapping[str, object]]:
    """Have the samples of the same iterate of two runs judged. Returns a text and the same as JSON.

    config: judge, `benchmarks.win_rate_prompts`, seed and resamples of the bootstrap. number: the iterate of both runs;
    None for the last that both have evaluated.

    Raises BadInput where a run lacks that iterate, where the held-out rows differ, or where the policies are the same;
    and as `judge_pairs`.
    """
    require_judge(config.judge)
    prompts, heads = load_prompts(config.judge, [PROMPT]), [require_head(store, name) for name in (run, other)]
    if heads[0].data != heads[1].data:
        raise BadInput(f"run {other!r}", f"has other held-out rows than {run!r}",
                       "choose runs of the same data set, model and seed")  # fmt: skip
    evaluated = [{entry.round for entry in head.rounds if "evaluate" in entry.stages} for head in heads]
    both = sorted(evaluated[0] & evaluated[1])
    number = max(both, default=0) if number is None else number
    if number not in both:
        raise BadInput(
            "--round", number, f"a round that both runs have evaluated ({', '.join(map(str, both)) or 'none'})"
        )
    policies = [policy_object(head, number) for head in heads]
    if policies[0] == policies[1]:
        raise BadInput(f"round {number}", f"has the same policy in {run!r} and {other!r}",
                       "choose a round in which they differ")  # fmt: skip
    evaluations = [head.require_stage(number, "evaluate") for head in heads]
    pairs = pairs_of(store, str(heads[0].data), *evaluations)[: config.benchmarks.win_rate_prompts]
    settings = pair_settings(config, pairs)
    fingerprints = {
        "policies": policies, "evaluations": evaluations, "data": heads[0].data, "prompts": prompts.sha256
    }  # fmt: skip
    payer = fingerprint("win-rate-of-runs", {"settings": settings, "fingerprints": fingerprints})
    metrics, _, cost = judge_pairs(store, config, pairs, prompts, payer=payer)
    lines = [
        f"{run} against {other}, round {number}, {len(pairs)} prompts, "
        f"judged by {config.judge.model} in both orders; 95 % intervals over prompts"
    ]
    lines += [f"{name}: {format_estimate(one)} {one['unit']}, n {one['n']}" for name, one in metrics.items()]
    return "\n".join([*lines, paid_text(cost)]), {
        "run": run, "other": other, "round": number, "metrics": metrics, "settings": settings,
        "fingerprints": fingerprints, "versions": versions(), "cost": cost,
    }  # fmt: skip


def pairs_of(store: Store, data_id: str, evaluate: str, against: str | None) -> list[AnswerPair]:
    """Return the samples of two evaluations of the same held-out rows, in the order of the rows.

    against: None for the human answers. Raises Damaged where an evaluation has other rows than the data.
    """
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
    return [AnswerPair(name, conversation_text(json.loads(asked)), own, other) for name, asked, own, other in rows]


def pair_settings(config: RunConfig, pairs: Sequence[AnswerPair]) -> Mapping[str, object]:
    return {
        "judge": shown_settings(config.judge), "prompts": len(pairs),
        "identical": sum(pair.own == pair.other for pair in pairs),
        "limit": config.benchmarks.win_rate_prompts, "bootstrap": config.evaluation.bootstrap, "seed": config.seed,
    }  # fmt: skip


def judge_pairs(
    store: Store, config: RunConfig, pairs: Sequence[AnswerPair], prompts: Prompts, *, payer: str
) -> tuple[dict[str, Estimate], list[Item], dict[str, float]]:
    """Have every pair of different texts judged in both orders. Returns `win_metrics` and the cost.

    Raises as `ask_judge`, and BadInput where the judge gave no verdict in both orders on any prompt.
    """

    def question(pair: AnswerPair, order: str, a: str, b: str) -> JudgeQuestion:
        messages = prompts.messages(PROMPT, question=pair.question, answer_a=a, answer_b=b)
        return JudgeQuestion(f"prompt {pair.prompt_id}, {order}", messages)

    asked = [
        (question(pair, "own first", pair.own, pair.other), question(pair, "own second", pair.other, pair.own))
        for pair in pairs if pair.own != pair.other
    ]  # fmt: skip
    found, cost = ask_both_orders(store, config.judge, asked, payer=payer)
    in_order = iter(found)
    verdicts = [next(in_order) if pair.own != pair.other else None for pair in pairs]
    metrics, items = win_metrics(pairs, verdicts, resamples=config.evaluation.bootstrap, seed=config.seed)
    if not items:
        raise BadInput("judge.model", f"names {config.judge.model!r}, which gave no prompt a verdict in both orders",
                       "use a judge that writes its verdict as the prompt asks, such as [[A]]")  # fmt: skip
    return metrics, items, cost


def conversation_text(messages: Sequence[Mapping[str, str]]) -> str:
    """Return a conversation as the judge reads it: one user message alone is shown without its role."""
    if len(messages) == 1 and messages[0]["role"] == "user":
        return str(messages[0]["content"])
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in messages)


def win_metrics(
    pairs: Sequence[AnswerPair],
    verdicts: Sequence[Both | None],
    *,
    resamples: int,
    seed: int,
) -> tuple[dict[str, Estimate], list[Item]]:
    """Return metrics and items; both are empty where no prompt has a verdict in both orders.

    verdicts: of each pair, with the own answer shown as A and shown as B; None where the texts are equal.
    """
    usable = [(pair, v) for pair, v in zip(pairs, verdicts, strict=True) if v is None or None not in v]
    if not usable:
        return {}, []
    orders = [("tie", "tie") if v is None else v for _, v in usable]
    # The score of the own answer in each order.
    first = np.array([{"A": 1.0, "tie": 0.5, "B": 0.0}[v[0]] for v in orders])  # type: ignore[index]
    second = np.array([{"A": 0.0, "tie": 0.5, "B": 1.0}[v[1]] for v in orders])  # type: ignore[index]
    score = (first + second) / 2
    longer = np.array([float(len(pair.own) - len(pair.other)) for pair, _ in usable])
    judged = np.array([v is not None for _, v in usable])
    n = len(score)

    metrics = {
        "win_rate": grouped_share(score, np.ones(n), resamples=resamples, seed=seed),
        "wins": wilson(int((score > 0.5).sum()), n),
        "ties": wilson(int((score == 0.5).sum()), n),
        "losses": wilson(int((score < 0.5).sum()), n),
        "length_difference": bootstrap_mean(longer, "characters", resamples=resamples, seed=seed),
    }
    # Verdicts per prompt that name a winner; below, those of them that name the answer shown first.
    named = judged * ((first != 0.5).astype(np.float64) + (second != 0.5))
    if named.any():
        metrics["first_place"] = grouped_share(
            judged * ((first == 1).astype(np.float64) + (second == 0)), named, resamples=resamples, seed=seed
        )
    if judged.any():
        metrics["consistent"] = wilson(int((first == second)[judged].sum()), int(judged.sum()))
    if n > 2 and longer.std() > 0 and score.std() > 0:  # else resampling cannot vary
        correlation = bootstrap_correlation(score, longer, resamples=resamples, seed=seed)
        if correlation is not None:
            metrics["length_correlation"] = correlation
        metrics["length_controlled_win_rate"] = _length_controlled(score, longer, resamples=resamples, seed=seed)
    malformed = [float(v.count(None)) for v in verdicts if v is not None]
    if malformed:
        metrics["malformed"] = grouped_share(malformed, [2.0] * len(malformed), resamples=resamples, seed=seed)
    return metrics, [(pair.prompt_id, "win_rate", float(s)) for (pair, _), s in zip(usable, score, strict=True)]


def _length_controlled(score: Floats, longer: Floats, *, resamples: int, seed: int) -> Estimate:
    """Return `length_controlled` with its percentile interval over prompts. Both arguments have shape [prompts]."""
    # Small pieces: the regression keeps several tables of this size.
    pieces = resampled_rows(len(score), resamples=resamples, seed=seed, cells=1_000_000)
    draws = np.concatenate([length_controlled(score[rows], longer[rows]) for rows in pieces])
    return percentile_estimate(length_controlled(score[None], longer[None])[0], draws, len(score), "share")


def length_controlled(scores: Floats, lengths: Floats) -> Floats:
    """Return the win rate at equal lengths of each row; `scores` in [0, 1] and length differences [rows, prompts].

    It is sigma(a) of the logistic regression P = sigma(a + b tanh(d / s)), with s the standard deviation of the length
    differences d, as in length-controlled AlpacaEval (arXiv 2404.04475) without its terms for the instruction. It is
    fitted by Newton's method, with a ridge of `_RIDGE` on a and b.
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
        steps *= np.minimum(1.0, 2.0 / np.maximum(np.abs(steps).max(0), 1e-12))  # stay where the quadratic model holds
        a, b = a + steps[0][:, None], b + steps[1][:, None]
        if np.abs(steps).max() < 1e-10:
            break
    found: Floats = 1 / (1 + np.exp(-a[:, 0]))
    return found
