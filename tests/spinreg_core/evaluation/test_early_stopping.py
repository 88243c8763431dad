"""Early stopping: no gain, too far from the base, or neither."""

from __future__ import annotations

from typing import Any

import pytest

from spinreg_core.config import RunConfig, UntilConfig
from spinreg_core.errors import BadInput
from spinreg_core.evaluation.early_stopping import require_metric, why_ended
from tests.support.builders import make_config


def rounds(name: str, values: list[float | None], kl: float = 0.0) -> list[dict[str, Any]]:
    return [
        {"round": i, "benchmarks": [],
         "metrics": {"kl_base": {"value": kl * i}} | ({} if v is None else {name: {"value": v}})}
        for i, v in enumerate(values)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("values", "patience", "ended"),
    [
        ([3.0], 1, None),
        ([3.0, 2.9], 1, None),
        ([3.0, 3.1], 1, "no round after the base was better in heldout_nll, for 1 rounds"),
        ([3.0, 2.9, 3.0, 2.9], 2, "no round after 1 was better in heldout_nll, for 2 rounds"),
        ([3.0, 2.9, 3.0, 2.8], 2, None),
        ([3.0, 2.9, 3.0, 2.95, 3.5], 4, None),
        ([3.0, 3.0], 1, "no round after the base"),  # equal is no gain
        ([3.0, None], 1, None),  # not measured there: nothing is known
    ],
)
def test_why_ended_after_rounds_without_gain_names_the_best(
    values: list[float | None], patience: int, ended: str | None
) -> None:
    until = UntilConfig(metric="heldout_nll", rounds_without_gain=patience)
    found = why_ended(until, rounds("heldout_nll", values))
    assert (found or "").startswith(ended) if ended else found is None


def test_why_ended_metric_where_higher_is_better() -> None:
    until = UntilConfig(metric="exact_match", rounds_without_gain=1)
    assert why_ended(until, rounds("exact_match", [0.1, 0.2])) is None
    assert why_ended(until, rounds("exact_match", [0.2, 0.1])) is not None


def measured(part: dict[str, Any], *values: dict[str, float]) -> list[dict[str, Any]]:
    """Rounds with a benchmark's metrics by name."""
    found = rounds("heldout_nll", [3.0 - i for i in range(len(values))])
    for entry, named in zip(found, values, strict=True):
        entry["benchmarks"] = [part | {"metrics": {name: {"value": value} for name, value in named.items()}}]
    return found


GSM8K = {"name": "gsm8k", "primary": "exact_match", "better": "higher"}
LAMBADA = {"name": "lambada", "primary": "perplexity", "better": "lower",
           "directions": {"perplexity": "lower", "acc": "higher"}}  # fmt: skip
MT_BENCH = {"name": "mt-bench", "primary": "score", "better": "higher"}


@pytest.mark.parametrize(
    ("metric", "part", "before", "after", "ended"),
    [
        ("gsm8k/exact_match", GSM8K, {"exact_match": 0.3}, {"exact_match": 0.2}, True),
        ("gsm8k/exact_match", GSM8K, {"exact_match": 0.3}, {"exact_match": 0.4}, False),
        ("lambada/perplexity", LAMBADA, {"perplexity": 9.0, "acc": 0.1}, {"perplexity": 8.0, "acc": 0.1}, False),
        ("lambada/acc", LAMBADA, {"perplexity": 9.0, "acc": 0.1}, {"perplexity": 9.5, "acc": 0.2}, False),
        ("lambada/acc", LAMBADA, {"perplexity": 9.0, "acc": 0.2}, {"perplexity": 8.0, "acc": 0.1}, True),
        ("mt-bench/score/turn_2", MT_BENCH, {"score": 1, "score/turn_2": 2}, {"score": 3, "score/turn_2": 1}, True),
        ("mmlu/mmlu_law/acc", {"name": "mmlu", "primary": "acc", "better": "higher"}, {"mmlu_law/acc": 0.2},
         {"mmlu_law/acc": 0.1}, True),
    ],
)  # fmt: skip
def test_why_ended_benchmark_metric_uses_its_own_direction(
    metric: str, part: Any, before: Any, after: Any, ended: bool
) -> None:
    """Each of its metrics in the direction that is its own."""
    found = why_ended(UntilConfig(metric=metric, rounds_without_gain=1), measured(part, before, after))
    assert (f"better in {metric}" in (found or "")) is ended


@pytest.mark.parametrize(
    ("metric", "part", "has"),
    [
        ("gsm8k/exact_match,strict-match", GSM8K, "gsm8k/exact_match"),
        ("gsm8k/typo", GSM8K, "gsm8k/exact_match"),
        ("mt-bench/malformed", MT_BENCH, "mt-bench/score"),  # of which nobody knows which way it is better
    ],
)
def test_why_ended_unknown_benchmark_metric_is_bad_input(metric: str, part: dict[str, Any], has: str) -> None:
    until = UntilConfig(metric=metric, rounds_without_gain=1)
    values = {str(part["primary"]): 0.5, "malformed": 0.1}
    with pytest.raises(BadInput, match=f"until.metric: found {metric}; expected a metric .* has: {has}$"):
        why_ended(until, measured(part, values))
    assert why_ended(until, rounds("heldout_nll", [3.0, 2.0])) is None, "not measured yet: nothing is known"


def wanting(metric: str, **benchmarks: Any) -> RunConfig:
    until = {"metric": metric, "rounds_without_gain": 1}
    judge = {"base_url": "http://127.0.0.1:1/v1", "model": "judge"}
    return make_config(until=until, benchmarks=benchmarks, judge=judge)


def test_require_metric_benchmark_must_measure_every_round() -> None:
    wanted: dict[str, Any] = {"tasks": ["leaderboard", "piqa"], "mt_bench": "hub", "win_rate": ["human", "previous"]}
    for metric in ("gsm8k/exact_match", "piqa/acc", "mt-bench/score", "human/win_rate"):
        require_metric(wanting(metric, **wanted))
        with pytest.raises(BadInput, match=rf"until\.metric: found {metric}; expected a benchmark .*\(none is\)"):
            require_metric(wanting(metric, **wanted, rounds=[0, 1]))
    # The previous iterate is another one in every round.
    for metric in ("leaderboard/acc", "previous/win_rate", "base/win_rate", "ifeval/acc"):
        with pytest.raises(BadInput, match=r"against the same \(arc_challenge, .*, gsm8k, piqa, mt-bench, human\)"):
            require_metric(wanting(metric, **wanted))


def test_why_ended_kl_above_the_limit_ends() -> None:
    until = UntilConfig(kl_base_above=5.0)
    assert why_ended(until, rounds("heldout_nll", [3.0, 2.0], kl=5.0)) is None
    assert why_ended(until, rounds("heldout_nll", [3.0, 2.0, 2.0], kl=5.0)) == (
        "the KL to the base is 10 nats/answer after round 2, above until.kl_base_above (5)"
    )
    assert why_ended(until, []) is None
    assert why_ended(UntilConfig(), rounds("heldout_nll", [1.0, 9.0], kl=99)) is None


@pytest.mark.parametrize("metric", ["heldout_loss", "kl_base", "answer_length", "nll_vs_previous", "nll_vs_base"])
def test_require_metric_unusable_metric_is_bad_input(metric: str) -> None:
    with pytest.raises(BadInput, match="expected one of heldout_nll, reward_accuracy, exact_match, or NAME/METRIC"):
        require_metric(wanting(metric))
    require_metric(wanting("heldout_nll"))
    require_metric(RunConfig())
