"""Wins and ties by margin."""

from __future__ import annotations

import pytest

from spinreg_core.selfplay import win


@pytest.mark.parametrize(
    ("margin", "share"),
    [(0.0, 0.5), (0.001, 0.5), (-0.001, 0.5), (0.0011, 1.0), (-0.0011, 0.0), (50.0, 1.0), (-50.0, 0.0)],
)
def test_win_of_a_margin_within_rounding_is_half(margin: float, share: float) -> None:
    assert win(margin) == share
