"""Held-out metrics: from an iterate's table of scored rows to one estimate with its interval per metric.

Decides: the columns of an evaluate object's `rows.parquet`, and the computation of each metric from them. The metrics
of an iterate depend only on its own table, so they can be computed again from it. Leaves out: sampling and scoring
(`stages`), and the estimators (`intervals`).

Each row is a held-out row. Log-probabilities are float64 sums over answer tokens, in nats. y is the human answer, y'
this policy's sample, and y'' the previous policy's sample for the same prompt. A value is null where there is no such
policy or number. The columns:

    prompt_id                       as in heldout.parquet
    answer_tokens                   tokens of y
    answer_distinct_2               distinct-2 of y
    final_answer                    reference of exact match, or null; as in heldout.parquet
    real_logp                       log p(y); under the base: real_base_logp, under the previous: real_previous_logp
    sample_ids, sample_text         y' as sampled
    sample_finish                   stop | length
    sample_distinct_2               distinct-2 of y'
    sample_logp                     log p(y'); likewise sample_base_logp, sample_previous_logp
    sample_engine_logp              log p(y') as reported by the engine that sampled it
    previous_sample_tokens          tokens of y''
    previous_sample_logp            log p(y''); likewise previous_sample_base_logp, previous_sample_previous_logp
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from spinreg_core.config import RunConfig, of_round
from spinreg_core.evaluation.final_answers import exact_match
from spinreg_core.evaluation.intervals import (
    Estimate,
    Floats,
    bootstrap_correlation,
    ratio_estimate,
    wilson,
)
from spinreg_core.evaluation.metrics import GAME, METRICS, SEPARATED
from spinreg_core.selfplay import win
from spinreg_core.selfplay.opponent import effective_alpha

ROWS_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("answer_tokens", pa.int32()),
        ("answer_distinct_2", pa.float64()),
        ("final_answer", pa.string()),
        ("real_logp", pa.float64()),
        ("real_base_logp", pa.float64()),
        ("real_previous_logp", pa.float64()),
        ("sample_ids", pa.list_(pa.int32())),
        ("sample_text", pa.string()),
        ("sample_finish", pa.string()),
        ("sample_distinct_2", pa.float64()),
        ("sample_logp", pa.float64()),
        ("sample_base_logp", pa.float64()),
        ("sample_engine_logp", pa.float64()),
        ("sample_previous_logp", pa.float64()),
        ("previous_sample_tokens", pa.int32()),
        ("previous_sample_logp", pa.float64()),
        ("previous_sample_base_logp", pa.float64()),
        ("previous_sample_previous_logp", pa.float64()),
    ]
)


def implicit_reward(policy: Floats, previous: Floats, base: Floats, alpha: float) -> Floats:
    """Return r = log p_theta - alpha log p_t - (1 - alpha) log p_0 [rows], in nats, up to a function of the prompt.

    As in arXiv 2404.04291, with alpha as the weight of the previous iterate (our convention, docs/concepts.md).
    """
    return policy - alpha * previous - (1 - alpha) * base


def margins(rows: pa.Table, alpha: float) -> Floats:
    """Return r(y) - r(y'') [rows], in nats: the human answer against the previous policy's sample."""

    def reward(own: str, previous: str, base: str) -> Floats:
        policy, reference, first = (rows[name].to_numpy().astype(np.float64) for name in (own, previous, base))
        return implicit_reward(policy, reference, first, alpha)

    return reward("real_logp", "real_previous_logp", "real_base_logp") - reward(
        "previous_sample_logp", "previous_sample_previous_logp", "previous_sample_base_logp"
    )


def row_scores(rows: pa.Table, alpha: float) -> dict[str, tuple[Floats, Floats]]:
    """Return (numerator, denominator) [rows] of every metric that is the ratio of their sums.

    rows: a table with `ROWS_SCHEMA`. Both are 0 where a row does not define the metric; a mean has denominator 1. A
    metric that no row defines is left out: comparisons with a previous policy for the base, and exact match where no
    row has a final number.
    """
    found: dict[str, tuple[Floats, Floats]] = {}

    def column(name: str) -> Floats:
        return rows[name].to_numpy().astype(np.float64)

    def put(name: str, numerator: Floats, denominator: Floats | None = None) -> None:
        defined = np.isfinite(numerator)
        denominator = defined.astype(np.float64) if denominator is None else denominator
        if denominator.any():
            found[name] = np.where(defined, numerator, 0.0), denominator

    tokens, real, sample = column("answer_tokens"), column("real_logp"), column("sample_logp")
    put("heldout_nll", -real, tokens)
    is_base = rows["real_previous_logp"].null_count > 0
    if not is_base:
        previous, margin = column("real_previous_logp"), margins(rows, alpha)
        put("nll_vs_base", column("real_base_logp") - real, tokens)
        put("nll_vs_previous", previous - real, tokens)
        put("reward_accuracy", np.array([win(m) for m in margin]))
        put("kl_previous", sample - column("sample_previous_logp"))
    put("kl_base", sample - column("sample_base_logp"))
    lengths = pc.list_value_length(rows["sample_ids"]).to_numpy().astype(np.float64)
    put("answer_length", lengths)
    put("end_of_turn_rate", np.array([finish == "stop" for finish in rows["sample_finish"].to_pylist()], np.float64))
    put("distinct_2", column("sample_distinct_2"))
    answers = zip(rows["final_answer"].to_pylist(), rows["sample_text"].to_pylist(), strict=True)
    # None becomes NaN, a row that does not define the metric.
    put("exact_match", np.array([exact_match(*pair) for pair in answers], np.float64))
    put("entropy", -sample, lengths)
    if rows["sample_engine_logp"].null_count == 0:
        put("sampler_gap", column("sample_engine_logp") - sample)
    if not is_base:
        put("margin", margin)
        put("real_change", real - previous)
        put("generated_change", column("previous_sample_logp") - column("previous_sample_previous_logp"))
    return found


def metrics_of_round(rows: pa.Table, config: RunConfig, number: int) -> dict[str, Estimate]:
    """Return `heldout_metrics` of a round of a run (0: the base), with the run's objective."""
    alpha, beta = effective_alpha(config.objective.alpha, number), of_round(config.objective.beta, max(number, 1))
    return heldout_metrics(rows, alpha=alpha, beta=beta, resamples=config.evaluation.bootstrap, seed=config.seed)


_SHARES = ("reward_accuracy", "end_of_turn_rate", "exact_match")  # shares of rows: each row counts 0 or 1


def heldout_metrics(rows: pa.Table, *, alpha: float, beta: float, resamples: int, seed: int) -> dict[str, Estimate]:
    """Return every metric and diagnostic that is defined for this iterate, with its 95 % interval.

    rows: a table with `ROWS_SCHEMA` and at least one row. Undefined metrics are left out (`row_scores`). For the base
    (`real_previous_logp` null), `human_answer_length` and `human_distinct_2` are added, which no round changes.
    resamples, seed: of the bootstrap that gives `length_bias` its interval.
    """
    found: dict[str, Estimate] = {}
    for name, (numerator, denominator) in row_scores(rows, alpha).items():
        defined, unit = denominator > 0, (METRICS.get(name) or GAME[name])["unit"]
        if name in _SHARES:
            found[name] = wilson(numerator.sum(), int(defined.sum()))
        else:
            found[name] = ratio_estimate(numerator[defined], denominator[defined], unit)
    tokens = rows["answer_tokens"].to_numpy().astype(np.float64)
    if rows["real_previous_logp"].null_count > 0:
        found["human_answer_length"] = ratio_estimate(tokens, np.ones_like(tokens), "tokens")
        human = rows["answer_distinct_2"].drop_null().to_numpy()
        if len(human):
            found["human_distinct_2"] = ratio_estimate(human, np.ones_like(human), "share")
        return found
    margin = margins(rows, alpha)
    found["separated"] = wilson(int((beta * margin >= SEPARATED).sum()), len(margin))
    longer = tokens - rows["previous_sample_tokens"].to_numpy().astype(np.float64)
    bias = bootstrap_correlation(margin, longer, resamples=resamples, seed=seed)
    if bias is not None:
        found["length_bias"] = bias
    return found
