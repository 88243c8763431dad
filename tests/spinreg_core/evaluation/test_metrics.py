"""The table of metrics, and distinct-2."""

from __future__ import annotations

import pytest

from spinreg_core.evaluation import metrics


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [([], None), ([1], None), ([1, 2], 1.0), ([1, 1, 1, 1], 1 / 3), ([1, 2, 1, 2, 1], 0.5), ([1, 2, 3, 4], 1.0)],
)
def test_distinct_bigrams_of_tokens_is_their_share(tokens: list[int], expected: float | None) -> None:
    assert metrics.distinct_bigrams(tokens) == expected


def test_metrics_table_is_complete() -> None:
    assert metrics.METRICS[metrics.PRIMARY]["better"] == "lower"
    assert {m["better"] for m in metrics.METRICS.values()} <= {"lower", "higher", None}
    assert all(m["definition"].endswith(".") and m["unit"] for m in metrics.METRICS.values())
