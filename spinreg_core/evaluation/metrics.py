"""The held-out metrics: names, units, directions and definitions.

Decides: the definitions (`METRICS`, `GAME`) and the primary metric (`PRIMARY`). Leaves out: the log-probabilities
(`stages`), the metrics of given rows (`heldout`), and the estimators (`intervals`).

Intervals cover other held-out rows from the same source. They do not cover the spread between training seeds. Of rows
with the same opening, such as the turns of a conversation, one is held out.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TypedDict


class Metric(TypedDict):
    """A metric as people see it. `better` is lower, higher, or None where neither direction is better in itself."""

    label: str
    unit: str
    better: str | None
    definition: str


def _metric(label: str, unit: str, better: str | None, definition: str) -> Metric:
    return {"label": label, "unit": unit, "better": better, "definition": definition}


PRIMARY = "heldout_nll"
PRIMARY_REASON = (
    "It was fixed as the primary metric before any run, uses all held-out rows of the run, involves no sampling, and "
    "is computed the same way for the base and for every round; the verdict compares the last round with the base, "
    "not the best round."
)
# In the order of the report's columns.
METRICS: dict[str, Metric] = {
    "heldout_nll": _metric(
        "held-out NLL",
        "nats/token",
        "lower",
        "Negative log-likelihood of the held-out human answers: sum of -log p over all answer tokens "
        "(end-of-turn included, prompt excluded) divided by their number.",
    ),
    "nll_vs_base": _metric(
        "NLL change to base",
        "nats/token",
        "lower",
        "Held-out NLL minus the base model's, paired: both on the same rows, resampled together.",
    ),
    "nll_vs_previous": _metric(
        "NLL change to previous",
        "nats/token",
        "lower",
        "Held-out NLL minus the previous iterate's, paired in the same way.",
    ),
    "reward_accuracy": _metric(
        "reward accuracy",
        "share",
        "higher",
        "Share of held-out prompts with r(human answer) > r(the previous policy's sample), where r = log p - alpha "
        "log p_previous - (1 - alpha) log p_base is the round's implicit reward (p_previous: the last iterate, also "
        "where training.average_as has the loss use an average in its place); ties (within 0.001 nats, what sums in "
        "float32 are off by) count half. 0.5 is chance. "
        "Samples are cut at the length limit and human answers are not, whatever opponent.truncated says.",
    ),
    "exact_match": _metric(
        "exact match",
        "share",
        "higher",
        "Share of sampled answers with the final number of the reference (after ####, else the last number).",
    ),
    "kl_base": _metric(
        "KL to base",
        "nats/answer",
        None,
        "Mean of log p - log p_base over the policy's own sampled answers, as far as the length limit lets them go.",
    ),
    "kl_previous": _metric(
        "KL to previous",
        "nats/answer",
        None,
        "Mean of log p - log p_previous over the policy's own sampled answers.",
    ),
    "answer_length": _metric("answer length", "tokens", None, "Mean number of sampled tokens, end-of-turn included."),
    "end_of_turn_rate": _metric(
        "end-of-turn rate",
        "share",
        None,
        "Share of sampled answers that ended before the length limit.",
    ),
    "distinct_2": _metric(
        "distinct-2",
        "share",
        None,
        "Different token bigrams divided by all token bigrams of an answer, averaged over answers of at least two "
        "tokens (end-of-turn excluded). It measures repetition within an answer, not similarity between answers.",
    ),
}
# Diagnostics of a round, shown next to the metrics. Neither direction is better in itself.
GAME: dict[str, Metric] = {
    "margin": _metric(
        "margin",
        "nats",
        None,
        "Mean over held-out prompts of r(human answer) - r(the previous policy's sample), r as for reward accuracy.",
    ),
    "separated": _metric(
        "separated",
        "share",
        None,
        "Share of held-out prompts with beta times the margin at 2 or more: in the logistic loss such pairs have less "
        "than a quarter of the weight of a pair at 0.",
    ),
    "real_change": _metric(
        "log p of human answers",
        "nats/answer",
        None,
        "Mean change of log p of the held-out human answers against the previous policy. A fall is a known failure "
        "mode of such losses.",
    ),
    "generated_change": _metric(
        "log p of generated answers",
        "nats/answer",
        None,
        "Mean change of log p of the previous policy's samples against that policy.",
    ),
    "length_bias": _metric(
        "length bias",
        "correlation",
        None,
        "Pearson correlation over held-out prompts between the margin and by how many tokens the human answer is "
        "longer than the previous policy's sample. Near 1 or -1 the margin measures length.",
    ),
    "entropy": _metric(
        "entropy",
        "nats/token",
        None,
        "-log p of the policy's own samples per token: with a neutral sampler an estimate of its entropy.",
    ),
    "sampler_gap": _metric(
        "sampler - scorer",
        "nats/answer",
        None,
        "Mean of log p of the policy's samples as reported by the sampling engine, minus the scorer's. If it is not "
        "near 0, the sampled policy is not the scored one.",
    ),
}
SEPARATED = 2.0  # beta times margin


def distinct_bigrams(token_ids: Sequence[int]) -> float | None:
    """Return different bigrams / all bigrams of one answer without its end-of-turn; None below two tokens.

    Distinct-n (Li et al. 2016, arXiv 1510.03055) pools all answers. Here it is computed per answer and then averaged:
    the pooled value falls with the number of answers, and the repeated answers of a resample would bias it down.
    """
    bigrams = list(itertools.pairwise(token_ids))
    return len(set(bigrams)) / len(bigrams) if bigrams else None
