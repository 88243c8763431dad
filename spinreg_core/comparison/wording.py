"""A comparison in plain sentences, as a table for the terminal and as artifacts for Prefect.

Decides: the words. A difference is claimed if it is `supported`, and not otherwise. Leaves out: the numbers (`compare`)
and the form of a number with its interval (`evaluation`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spinreg_core.comparison.schema import Comparison, ComparisonVerdict, DifferenceEntry, Numbers, Plane, ValueEntry
from spinreg_core.config import ObjectiveConfig, RunConfig, variant_fields
from spinreg_core.config.resolve import merge
from spinreg_core.evaluation.formatting import ARROWS, counts, format_estimate, format_number
from spinreg_core.evaluation.intervals import Estimate
from spinreg_core.formatting import format_duration, markdown_table, text_table, wrap
from spinreg_core.reports.figures import Curves, curves_markdown
from spinreg_core.reports.run_report import FEW_ROWS, few_rows, sample_notes
from spinreg_core.reports.tables import link
from spinreg_core.runs.head import HELDOUT

MARKS = {1: "better", -1: "worse", 0: ""}


def comparison_verdict(data: Numbers) -> ComparisonVerdict:
    """Return sentences about the primary metric at the last common round.

    They rest on the corrected paired intervals of the family `verdict`.
    """
    number, reference, shown = data["round"], data["reference"], data["metrics"][data["primary"]]
    metric = f"{shown['label']} at round {number}"
    family = [one for one in data["comparisons"] if one["family"] == "verdict"]
    claims = [one for one in family if one["supported"]]
    between = [one for one in family if not one["to_base"]]
    better = [one["variant"] for one in between if one["better"] > 0]
    worse = [one["variant"] for one in between if one["better"] < 0]
    parts = [f"{_listed(names)} {'is' if len(names) == 1 else 'are'} {word} than {reference}"
             for names, word in ((better, "better"), (worse, "worse")) if names]  # fmt: skip
    if parts:
        alone = all(len(one["values"]) == 1 for one in between if one["supported"])
        headline = f"In {metric}, {', and '.join(parts)}{' (one seed each)' if alone else ''}."
    elif between:
        headline = f"In {metric}, no difference between the variants and {reference} is supported."
    else:
        headline = f"One variant, {reference}: its seeds are averaged and compared with the base."
    sentences = [_sentence(one) for one in sorted(family, key=lambda one: (not one["supported"], one["to_base"]))]
    for one in data["unpaired"]:
        sentences.append(f"{one['variant']} is not compared with {reference} row by row: {one['why']}.")
    sentences += few_rows(min((one["n"] for one in family), default=FEW_ROWS))
    sentences.append(
        f"{_many(data['families']['verdict'])}, corrected together (Holm): the chance that any of the claims above is "
        "false is about 5 % at most, and more if a few rows carry a difference. "
        "A difference that is not supported may still exist. " + _about_seeds(data)
    )
    told = [[one["variant"], one["against"], "higher" if one["supported"] > 0 else "lower"] for one in claims]
    return {"headline": headline, "sentences": sentences, "claims": told, "round": number}


def _many(comparisons: int) -> str:
    return "This is one comparison" if comparisons == 1 else f"These are {comparisons} comparisons"


def _sentence(one: DifferenceEntry) -> str:
    against = "its base model" if one["to_base"] else one["against"]
    if one["same"]:
        return f"{one['variant']} and {against} are the same policy up to round {one['round']}, nothing to compare."
    low, high, values = one["corrected_low"], one["corrected_high"], one["values"]
    if low is None or high is None:
        return f"{one['variant']} against {against}: one row has no interval, so nothing is supported."
    corrected: Estimate = {"value": one["value"], "low": low, "high": high, "n": one["n"], "unit": one["unit"]}

    def written(value: float) -> str:
        return format_number(value, corrected)

    seeds = f", {agreeing_seeds(one['value'], values)} of {len(values)} seeds with this sign" if len(values) > 1 else ""
    tail = (
        f"(corrected interval of the difference [{written(low)}, {written(high)}], "
        f"p {_p(one['p_holm'])} after correction, {one['n']} rows{seeds})"
    )
    if one["supported"]:
        word = "higher" if one["supported"] > 0 else "lower"
        judged = {1: ", which is better", -1: ", which is worse", 0: ""}[one["better"]]
        by = f"{written(abs(one['value']))} {one['unit']}"
        return f"{one['variant']} is {word} than {against}{judged}: by {by} {tail}."
    by = f"{written(one['value'])} {one['unit']}"
    return f"{one['variant']} against {against}: {by}, which these rows cannot distinguish from no difference {tail}."


def agreeing_seeds(value: float, values: Sequence[float]) -> int:
    """Return the number of seeds with a difference of the mean's sign; a difference of zero has no sign."""
    return sum(one * value > 0 for one in values)


def _about_seeds(data: Numbers) -> str:
    most = max(len(variant["runs"]) for variant in data["variants"])
    if most == 1:
        return "Every variant has one seed; how much another training seed would change the numbers is unknown."
    return (
        "Intervals cover the choice of rows for these trained policies. The spread between seeds is shown next to them "
        "and is not part of them."
    )


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _listed(names: list[str]) -> str:
    quoted = [f"({name})" if "," in name else name for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"


def grid_of(objectives: list[tuple[str, ObjectiveConfig]]) -> dict[str, str]:
    """Return the family of alphas that the variants form, judged by their values alone.

    Either alpha varies at a fixed total beta, or a KL to the base of weight beta_0 is added to a fixed beta_prev =
    alpha * beta (docs/concepts.md).
    """
    alphas = sorted({objective.alpha for _, objective in objectives})
    betas = {str(objective.beta) for _, objective in objectives}
    if len(alphas) == 1:
        return {"family": "none", "text": f"All variants have alpha {alphas[0]:g}."}
    several = ", ".join(f"{alpha:g}" for alpha in alphas)
    if len(betas) == 1:
        text = f"alpha ({several}) at fixed total beta {betas.pop()}: the previous iterate's weight goes to the base."
        return {"family": "fixed total beta", "text": text}
    kept = [np.atleast_1d(objective.alpha * np.asarray(objective.beta)) for _, objective in objectives]
    # beta is a list with one value per round, or a single value.
    if all(one.shape == kept[0].shape and np.allclose(one, kept[0], rtol=1e-6, atol=0.0) for one in kept):
        text = (
            f"KL to the base added to a fixed beta_prev = alpha * beta of {kept[0][0]:g}: alpha is {several}, and the "
            "total beta grows as alpha falls."
        )
        return {"family": "beta_0 added", "text": text}
    return {
        "family": "neither",
        "text": f"alpha ({several}) and beta both vary, with neither beta nor alpha * beta fixed: their effects "
        "cannot be separated here.",
    }


def plane_of(variants: list[tuple[str, RunConfig]]) -> Plane | None:
    """Return the variants by alpha and history, or None unless they differ in these two alone and in both.

    Beta may differ too if each alpha has one beta.
    """
    found: dict[tuple[float, int | str], str] = {}
    for label, config in variants:
        found[config.objective.alpha, config.opponent.history] = label
    own = {"objective": {"alpha": 1.0, "beta": 0.1}, "opponent": {"history": 1}}
    rest = [merge(variant_fields(config), own) for _, config in variants]
    alphas = sorted({alpha for alpha, _ in found}, reverse=True)
    histories = sorted({history for _, history in found}, key=lambda one: math.inf if one == "all" else int(one))
    betas = {(config.objective.alpha, str(config.objective.beta)) for _, config in variants}
    if len(found) < len(variants) or any(one != rest[0] for one in rest) or len(betas) > len(alphas):
        return None
    if min(len(alphas), len(histories)) < 2:
        return None
    labels = [[found.get((alpha, history)) for history in histories] for alpha in alphas]
    return {"alpha": alphas, "history": histories, "labels": labels}


def comparison_notes(data: Numbers) -> list[str]:
    """Return the limits of a comparison's numbers, as sentences."""
    found = [data["grid"]["text"][0].upper() + data["grid"]["text"][1:]]
    found += sample_notes([one["sampler"] for one in data["runs"]])
    found += [f"{name} is not a mean over questions, so it is not compared; the runs' own reports show it."
              for name in data["no_items"]]  # fmt: skip
    known, number, reference = cells(data), data["round"], data["reference"]
    for metric in (name for name in data["metrics"] if (name, reference, number) in known):
        own = {v["label"]: cell for v in data["variants"] if (cell := known.get((metric, v["label"], number)))}
        apart = [name for name, cell in own.items() if name != reference and cell.reference is None]
        if "/" in metric and apart:
            found.append(
                f"{metric} of {_listed(apart)} is not compared with that of {data['reference']}: the questions, the "
                "judge or the settings differ, or it is a win rate against other answers."
            )
    further = [v["label"] for v in data["variants"] if v["rounds"] and v["rounds"][-1] > data["round"]]
    if further:
        found.append(
            f"The comparison is at round {data['round']}, the last that all have evaluated; "
            f"{_listed(further)} went further."
        )
    found += [f"{one['run']} {one['ended']}." for one in data["runs"] if one["ended"]]
    found += [f"Alarm of {_listed(one['runs'])}, round {one['round']}, {one['where']}: {one['text']}"
              for one in data["alarms"]]  # fmt: skip
    found += [f"{run} is left out: it has the configuration and the seed of {of}, so it is not another seed."
              for run, of in data["repeats"].items()]  # fmt: skip
    compared = {one["run"] for one in data["runs"]}
    for run, why in data["failed"].items():
        found.append(
            f"{'Failed, and compared up to its last round' if run in compared else 'Left out'}: {run} ({why})."
        )
    return found


@dataclass
class Cell:
    """A value with its text, and the differences from the reference and the base, or None.

    The text has the interval and the spread over seeds.
    """

    value: ValueEntry
    text: str
    reference: DifferenceEntry | None = None
    base: DifferenceEntry | None = None


def cells(data: Numbers) -> dict[tuple[str, str, int], Cell]:
    """Return the cells of all tables by (metric, variant, round)."""
    found = {}
    for value in data["values"]:
        text = format_estimate(value)
        if value["spread"] is not None:
            text += f", ± {format_number(value['spread'], value)} over {len(value['values'])} seeds"
        found[value["metric"], value["variant"], value["round"]] = Cell(value, text)
    for one in data["comparisons"]:
        cell = found[one["metric"], one["variant"], one["round"]]
        if one["to_base"]:
            cell.base = one
        else:
            cell.reference = one
    return found


def mark(one: DifferenceEntry | None) -> str:
    """Return `▲` or `▼` for a supported difference, with ` better` or ` worse` if the metric has a direction."""
    if one is None or not one["supported"]:
        return ""
    return f"{'▲' if one['supported'] > 0 else '▼'} {MARKS[one['better']]}".rstrip()


def counts_at(data: Numbers, metric: str, number: int) -> str:
    """Return the number of rows or questions of a metric at a round, as `n 64`."""
    return counts(one for one in data["values"] if (one["metric"], one["round"]) == (metric, number))


def comparison_rows(data: Numbers) -> list[dict[str, str]]:
    """Return the table as rows for an artifact: a row per metric, a column per variant, at the last common round."""
    known, number, found = cells(data), data["round"], []
    for metric, shown in data["metrics"].items():
        title = f"{shown['label']}{' *' if metric == data['primary'] else ''} {ARROWS[shown['better']]}".rstrip()
        row = {"metric": f"{title} ({shown['unit']}, {counts_at(data, metric, number)})"}
        for variant in data["variants"]:
            cell = known.get((metric, variant["label"], number))
            row[variant["label"]] = f"{cell.text} {mark(cell.reference)[:1]}".rstrip() if cell else "-"
        found.append(row)
    return found


def comparison_table(data: Comparison) -> str:
    """Return plain text: the table with a line per metric and a column per variant, then the verdict and the notes."""
    labels = [variant["label"] for variant in data["variants"]]
    head = [f"{label} (reference)" if label == data["reference"] else label for label in labels]
    rows = [[f"round {data['round']}", *head], *([*row.values()] for row in comparison_rows(data))]
    texts = [
        "↓ lower is better, ↑ higher is better. [ ] 95 % interval over rows, not corrected. ▲ ▼ paired difference "
        f"from {data['reference']} that is supported after Holm's correction over the table. * primary metric.",
        "", data["verdict"]["headline"], *data["verdict"]["sentences"], *data["notes"],
    ]  # fmt: skip
    return "\n".join([*text_table(rows), *wrap(texts)])


def comparison_markdown(data: Comparison, places: dict[str, str]) -> str:
    """Return the verdict, the notes, the cost of each variant, and links to the files. places: addresses by kind."""
    lines = [f"# {data['name']}", "", f"**{data['verdict']['headline']}**", ""]
    lines += [f"- {sentence}" for sentence in data["verdict"]["sentences"]]
    lines += ["", *(f"- {note}" for note in data["notes"]), ""]
    rows = [["mean of its runs", "took", "of it shared", "tokens sampled", "tokens trained on", "paid to judges"]]
    for one in data["cost"]:
        sampled = _total(one["tokens"]["generate"], one["tokens"][HELDOUT])
        took = [format_duration(one["total_seconds"]), format_duration(one["shared_seconds"])]
        rows.append([one["variant"], *took, sampled, _total(one["tokens"]["train"]), f"{one['paid']:.2f}"])
    lines += [*markdown_table(rows), "", *(f"- {kind}: {link(place)}" for kind, place in places.items())]
    return "\n".join(lines)


def comparison_figures(data: Comparison) -> str:
    """Return Markdown with the metrics, and their changes from the round before, a curve per variant."""
    drawn: Curves = {}
    for title, numbers in (("{}", data["values"]), ("change of {} from the round before", data["stability"])):
        for one in numbers:
            metric = data["metrics"][one["metric"]]
            curves = drawn.setdefault((title.format(metric["label"]), metric["unit"]), {})
            curves.setdefault(one["variant"], []).append((one["round"], one))
    return curves_markdown(drawn)


def _total(*counts: float | None) -> str:
    """Return the sum of counts, or a dash if one of them is unknown."""
    return "-" if None in counts else f"{sum(one or 0.0 for one in counts):,.0f}"
