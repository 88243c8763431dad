"""When a run ends before its round: no gain, too far from the base, or neither."""

from __future__ import annotations

from typing import Any

import pytest

from spinreg_core.config import RunConfig, UntilConfig
from spinreg_core.errors import BadInput
from spinreg_core.until import require_metric, why_ended


def rounds(name: str, values: list[float | None], kl: float = 0.0) -> list[dict[str, Any]]:
    return [
        {"round": i, "metrics": {"kl_base": {"value": kl * i}} | ({} if v is None else {name: {"value": v}})}
        for i, v in enumerate(values)
    ]


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
def test_rounds_without_gain(values: list[float | None], patience: int, ended: str | None) -> None:
    until = UntilConfig(metric="heldout_nll", rounds_without_gain=patience)
    found = why_ended(until, rounds("heldout_nll", values))
    assert (found or "").startswith(ended) if ended else found is None


def test_higher_is_better_where_it_is() -> None:
    until = UntilConfig(metric="exact_match", rounds_without_gain=1)
    assert why_ended(until, rounds("exact_match", [0.1, 0.2])) is None
    assert why_ended(until, rounds("exact_match", [0.2, 0.1])) is not None


def test_a_benchmark() -> None:
    until = UntilConfig(metric="gsm8k/exact_match", rounds_without_gain=1)
    found = rounds("heldout_nll", [3.0, 2.0])
    for entry, value in zip(found, (0.3, 0.2), strict=True):
        entry["benchmarks"] = [{"name": "gsm8k", "better": "higher", "metrics": {"exact_match": {"value": value}}}]
    assert "better in gsm8k/exact_match" in (why_ended(until, found) or "")
    require_metric(until, ["gsm8k"])
    with pytest.raises(BadInput, match=r"until\.metric: found gsm8k/exact_match; expected .*\(arc_challenge\)"):
        require_metric(until, ["arc_challenge"])


def test_kl_to_the_base() -> None:
    until = UntilConfig(kl_base_above=5.0)
    assert why_ended(until, rounds("heldout_nll", [3.0, 2.0], kl=5.0)) is None
    assert why_ended(until, rounds("heldout_nll", [3.0, 2.0, 2.0], kl=5.0)) == (
        "the KL to the base is 10 nats/answer after round 2, above until.kl_base_above (5)"
    )
    assert why_ended(until, []) is None
    assert why_ended(UntilConfig(), rounds("heldout_nll", [1.0, 9.0], kl=99)) is None


@pytest.mark.parametrize("metric", ["heldout_loss", "kl_base", "answer_length"])
def test_metrics_of_which_nothing_is_better(metric: str) -> None:
    with pytest.raises(BadInput, match="expected one of heldout_nll, reward_accuracy, exact_match, or NAME/METRIC"):
        require_metric(UntilConfig(metric=metric, rounds_without_gain=1))
    require_metric(RunConfig().until)
