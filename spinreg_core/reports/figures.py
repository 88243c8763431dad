"""Curves by round as pictures inside Markdown, the only kind of figure that an artifact in the Prefect UI can show.

Decides: how curves are drawn. Leaves out: the interactive figures of the pages, which show the same numbers.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence

from spinreg_core.evaluation.intervals import Estimate
from spinreg_core.reports.schema import Report
from spinreg_core.reports.tables import benchmark_of, benchmarks

# By title and unit, then by name: rounds with their estimates.
Curves = dict[tuple[str, str], dict[str, list[tuple[int, Estimate]]]]


def run_figures(data: Report) -> str:
    """Return Markdown with a run's metrics and benchmarks by round; empty before there are two rounds."""
    rounds = [entry for entry in data["rounds"] if entry["metrics"]]
    drawn: Curves = {}
    for name, metric in (data["definitions"] | data["game"]).items():
        points = [(entry["round"], found) for entry in rounds if (found := (entry["metrics"] or {}).get(name))]
        drawn[metric["label"], metric["unit"]] = {data["run"]: points}
    for kind, name in benchmarks(data):
        for entry in rounds:
            if part := benchmark_of(entry, kind, name):
                found = part["metrics"][part["primary"]]
                curve = drawn.setdefault((f"{name} {part['primary']}", found["unit"]), {})
                curve.setdefault(data["run"], []).append((entry["round"], found))
    return curves_markdown(drawn)


def curves_markdown(drawn: Curves) -> str:
    """Return Markdown with a picture per title and unit; a title without two points in any curve gets none."""
    pictures = [
        f"![{label} by round]({_picture(label, unit, curves)})"
        for (label, unit), curves in drawn.items()
        if any(len(points) > 1 for points in curves.values())
    ]
    return "\n\n".join(pictures)


def _picture(label: str, unit: str, curves: Mapping[str, Sequence[tuple[int, Estimate]]]) -> str:
    """Return an SVG as a data: address, with a curve and its 95 % band for each name."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "spinreg", "font.size": 9, "text.parse_math": False}
    ):
        figure = Figure(figsize=(6.4, 3.0), layout="constrained")
        axes = figure.add_subplot()
        for name, points in curves.items():
            rounds = [number for number, _ in points]
            (line,) = axes.plot(rounds, [one["value"] for _, one in points], marker="o", markersize=3, label=name)
            banded = [number for number, one in points if one["low"] is not None]
            lows = [low for _, one in points if (low := one["low"]) is not None]
            highs = [high for _, one in points if (high := one["high"]) is not None]
            axes.fill_between(banded, lows, highs, alpha=0.15, color=line.get_color(), linewidth=0)
        axes.set(xlabel="round", ylabel=unit, title=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        if len(curves) > 1:
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=7, frameon=False)
        content = io.BytesIO()
        figure.savefig(content, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(content.getvalue()).decode()}"
