"""Curves by round as pictures inside Markdown, for artifacts in the Prefect UI, which show nothing else.

Decides: how they are drawn. Leaves out: the figures of the pages, which can be moved about in (`report.html.jinja`,
`comparison.html.jinja`) and show the same numbers.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

from spinreg_core.reports.tables import benchmark_of, benchmarks

Points = Sequence[tuple[int, Mapping[str, Any]]]  # round and its estimate: value, low, high


def run_figures(data: dict[str, Any]) -> str:
    """Markdown with the metrics and benchmarks of a report (`report.report_data`) by round; empty before there are two
    rounds."""
    rounds = [entry for entry in data["rounds"] if entry["metrics"]]
    drawn: dict[tuple[str, str], dict[str, Points]] = {}
    for name, metric in (data["definitions"] | data["game"]).items():
        points = [(entry["round"], found) for entry in rounds if (found := entry["metrics"].get(name))]
        drawn[metric["label"], metric["unit"]] = {data["run"]: points}
    for kind, name in benchmarks(data):
        parts = [(entry["round"], part) for entry in rounds if (part := benchmark_of(entry, kind, name))]
        primary = parts[-1][1]["primary"] if parts else ""
        points = [(number, part["metrics"][primary]) for number, part in parts if primary in part["metrics"]]
        if points:
            drawn[f"{name} {primary}", points[-1][1]["unit"]] = {data["run"]: points}
    return _markdown(drawn)


def comparison_figures(data: dict[str, Any]) -> str:
    """Markdown with the metrics of a comparison (`comparison.comparison_data`) by round, a curve for each variant, and
    how far they move from round to round (`stability`)."""
    drawn: dict[tuple[str, str], dict[str, list[tuple[int, Any]]]] = {}
    for title, numbers in (("{}", data["values"]), ("change of {} from the round before", data["stability"])):
        for one in numbers:
            metric = data["metrics"][one["metric"]]
            curves = drawn.setdefault((title.format(metric["label"]), metric["unit"]), {})
            curves.setdefault(one["variant"], []).append((one["round"], one))
    return _markdown(drawn)


def _markdown(drawn: Mapping[tuple[str, str], Mapping[str, Points]]) -> str:
    pictures = [
        f"![{label} by round]({_picture(label, unit, curves)})"
        for (label, unit), curves in drawn.items()
        if any(len(points) > 1 for points in curves.values())
    ]
    return "\n\n".join(pictures)


def _picture(label: str, unit: str, curves: Mapping[str, Points]) -> str:
    """An SVG as a data: address: a curve and its 95 % band for each name."""
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
            banded = [(number, one) for number, one in points if one["low"] is not None]
            axes.fill_between(
                [number for number, _ in banded], [one["low"] for _, one in banded], [one["high"] for _, one in banded],
                alpha=0.15, color=line.get_color(), linewidth=0,
            )  # fmt: skip
        axes.set(xlabel="round", ylabel=unit, title=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        if len(curves) > 1:
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=7, frameon=False)
        content = io.BytesIO()
        figure.savefig(content, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(content.getvalue()).decode()}"
