"""Curves by round as pictures inside Markdown, for artifacts in the Prefect UI, which show nothing else.

Decides: which metrics are drawn there and how. Leaves out: the figures of the pages, which can be moved about in
(`report.html.jinja`, `comparison.html.jinja`).
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

from spinreg_core.metrics import PRIMARY

DRAWN = (PRIMARY, "kl_base", "margin")
Points = Sequence[tuple[int, Mapping[str, Any]]]  # round and its estimate: value, low, high


def run_figures(data: dict[str, Any]) -> str:
    """Markdown with the metrics of a report (`report.report_data`) by round; empty before there are two rounds."""
    rounds = [entry for entry in data["rounds"] if entry["metrics"]]
    definitions = data["definitions"] | data["game"]
    return _markdown(
        {
            name: {data["run"]: [(e["round"], e["metrics"][name]) for e in rounds if e["metrics"].get(name)]}
            for name in DRAWN
        },
        {name: (definitions[name]["label"], definitions[name]["unit"]) for name in DRAWN},
    )


def comparison_figures(data: dict[str, Any]) -> str:
    """Markdown with the metrics of a comparison (`comparison.comparison_data`) by round, a curve for each variant."""
    drawn = [name for name in DRAWN if name in data["metrics"]]
    series: dict[str, dict[str, list[tuple[int, Any]]]] = {name: {} for name in drawn}
    for one in data["values"]:
        if one["metric"] in series:
            series[one["metric"]].setdefault(one["variant"], []).append((one["round"], one))
    return _markdown(series, {name: (data["metrics"][name]["label"], data["metrics"][name]["unit"]) for name in drawn})


def _markdown(series: Mapping[str, Mapping[str, Points]], named: Mapping[str, tuple[str, str]]) -> str:
    pictures = [
        f"![{named[metric][0]} by round]({_picture(*named[metric], curves)})"
        for metric, curves in series.items()
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
