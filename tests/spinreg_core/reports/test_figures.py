"""Curves in Markdown: what is drawn is what the report says."""

from __future__ import annotations

import base64
import re
from typing import Any
from xml.etree import ElementTree

import pytest

from spinreg_core.comparison.wording import comparison_figures
from spinreg_core.reports.figures import run_figures


def estimate(value: float, half: float | None = 0.1) -> dict[str, Any]:
    return {
        "value": value,
        "low": None if half is None else value - half,
        "high": None if half is None else value + half,
    }


def pictures(markdown: str) -> list[tuple[str, str]]:
    """Titles and the text of each picture, which is well-formed."""
    found = []
    for title, content in re.findall(r"!\[(.*?)\]\(data:image/svg\+xml;base64,(.*?)\)", markdown):
        svg = base64.b64decode(content).decode()
        ElementTree.fromstring(svg)
        found.append((title, svg))
    return found


def path_of(svg: str, color: str) -> list[tuple[float, float]]:
    """The points of the curve of a colour, which comes before its line in the legend."""
    path, *_ = re.findall(rf'<path d="([^"]*)"[^>]*style="fill: none; stroke: {color}; stroke-width: 1.5', svg)
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] ([\d.]+) ([\d.]+)", path)]


DEFINITIONS = {
    "heldout_nll": {"label": "held-out NLL", "unit": "nats/token"},
    "kl_base": {"label": "KL to base", "unit": "nats/answer"},
    "margin": {"label": "margin", "unit": "nats"},
}


def test_run_figures_draw_a_curve_per_metric() -> None:
    rounds: list[dict[str, Any]] = [
        {"round": 0, "metrics": {"heldout_nll": estimate(3.0), "kl_base": estimate(0.0, None), "margin": None}},
        {"round": 1, "metrics": {"heldout_nll": estimate(2.0), "kl_base": estimate(4.0), "margin": estimate(1.0)}},
        {"round": 2, "metrics": {"heldout_nll": estimate(2.5), "kl_base": estimate(2.0), "margin": None}},
        {"round": 3, "metrics": None},
    ]
    for entry in rounds:
        entry["benchmarks"] = []
    data = {"run": "r", "rounds": rounds, "definitions": DEFINITIONS, "game": {}}
    found = pictures(run_figures(data))
    assert [title for title, _ in found] == ["held-out NLL by round", "KL to base by round"], "one point is no curve"
    (a, b, c) = path_of(found[0][1], "#1f77b4")
    assert a[0] < b[0] < c[0]
    assert (b[1] - a[1]) / (b[1] - c[1]) == pytest.approx((3.0 - 2.0) / (2.5 - 2.0)), "y grows downwards, in proportion"
    assert run_figures(data | {"rounds": rounds[:1]}) == ""
    for entry, share in zip(rounds, (0.3, 0.4, 0.5), strict=False):
        part = {
            "kind": "lm-eval",
            "name": "gsm8k",
            "primary": "acc",
            "metrics": {"acc": estimate(share) | {"unit": "share"}},
        }
        entry["benchmarks"] = [part]
    assert [title for title, _ in pictures(run_figures(data))][2:] == ["gsm8k acc by round"]
    assert run_figures(data) == run_figures(data), "the same picture for the same figures"


def test_comparison_figures_draw_a_curve_per_variant() -> None:
    values = [
        {"metric": "heldout_nll", "variant": f"<alpha & $x_{v}$ ${v}>", "round": n, **estimate(v + n)}
        for v in range(3) for n in range(3)
    ]  # fmt: skip
    stability = [one for one in values if one["round"]]
    data = {"metrics": {"heldout_nll": DEFINITIONS["heldout_nll"]}, "values": values, "stability": stability}
    ((title, svg), (change, _)) = pictures(comparison_figures(data))
    assert title == "held-out NLL by round"
    assert change == "change of held-out NLL from the round before by round"
    assert all(f"&lt;alpha &amp; $x_{v}$ ${v}&gt;" in svg for v in range(3))
    heights = [path_of(svg, color)[0][1] for color in ("#1f77b4", "#ff7f0e", "#2ca02c")]
    assert heights == sorted(heights, reverse=True)
