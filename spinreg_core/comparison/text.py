"""What a comparison's numbers say, in plain sentences and as a table for the terminal.

Decides: the words; a difference is claimed where `supported` says so and nowhere else. Leaves out: the numbers
(`compare.py`), and how a number and its interval are written (`reports/tables.py`).
"""

from __future__ import annotations

import math
import textwrap
from typing import Any

from spinreg_core.config import ObjectiveConfig, RunConfig, variant_fields
from spinreg_core.config.resolve import merge
from spinreg_core.evaluation.formatting import ARROWS, counts, format_estimate, format_number
from spinreg_core.evaluation.intervals import Estimate
from spinreg_core.evaluation.metrics import PRIMARY
from spinreg_core.formatting import format_duration
from spinreg_core.reports.run_report import HELDOUT_ANSWERS, sample_notes
from spinreg_core.reports.tables import link

_COLUMNS = 110  # of a terminal
_PER_BLOCK = 3  # variants side by side
MARKS = {1: "better", -1: "worse", 0: ""}


def verdict(data: dict[str, Any]) -> dict[str, Any]:
    """Sentences about the primary metric at the last common round, from the corrected paired intervals of the family
    `verdict`. claims: the supported differences, as [variant, against, lower | higher]."""
    number, reference, shown = data["round"], data["reference"], data["metrics"][data["primary"]]
    what = f"{shown['label']} at round {number}"
    family = [one for one in data["comparisons"] if one["family"] == "verdict"]
    claims = [one for one in family if one["supported"]]
    between = [one for one in family if not one["to_base"]]
    better = [one["variant"] for one in between if one["better"] > 0]
    worse = [one["variant"] for one in between if one["better"] < 0]
    parts = [f"{_listed(names)} {'is' if len(names) == 1 else 'are'} {word} than {reference}"
             for names, word in ((better, "better"), (worse, "worse")) if names]  # fmt: skip
    if parts:
        alone = all(len(one["values"]) == 1 for one in between if one["supported"])
        headline = f"In {what}, {', and '.join(parts)}{' (one seed each)' if alone else ''}."
    elif between:
        headline = f"In {what}, no difference between the variants and {reference} is supported."
    else:
        headline = f"One variant, {reference}: its seeds are averaged and compared with the base."
    sentences = [_sentence(one, data) for one in sorted(family, key=lambda one: (not one["supported"], one["to_base"]))]
    for one in data["unpaired"]:
        sentences.append(f"{one['variant']} is not compared with {reference} row by row: {one['why']}.")
    sentences.append(
        f"{_many(data['families']['verdict'])}, corrected together (Holm): the chance that any of the claims above is "
        "a false one is about 5 % at most, and more where a handful of rows carries a difference. "
        "No difference supported does not mean that there is none. " + _about_seeds(data)
    )
    told = [[one["variant"], one["against"], "higher" if one["supported"] > 0 else "lower"] for one in claims]
    return {"headline": headline, "sentences": sentences, "claims": told, "round": number}


def _many(comparisons: int) -> str:
    return "This is one comparison" if comparisons == 1 else f"These are {comparisons} comparisons"


def _sentence(one: dict[str, Any], data: dict[str, Any]) -> str:
    against = "its base model" if one["to_base"] else one["against"]
    if one["same"]:
        return f"{one['variant']} and {against} are the same policy up to round {one['round']}: nothing to compare."
    low, high = one["corrected_low"], one["corrected_high"]
    if low is None:
        return f"{one['variant']} against {against}: one row has no interval, and supports nothing."
    corrected: Estimate = {"value": one["value"], "low": low, "high": high, "n": one["n"], "unit": one["unit"]}

    def written(value: float) -> str:
        return format_number(value, corrected)

    tail = (
        f"(corrected interval of the difference [{written(low)}, {written(high)}], "
        f"p {_p(one['p_holm'])} after correction, {one['n']} rows"
        + (f", {_agreeing(one)} of {len(one['values'])} seeds of one sign" if len(one["values"]) > 1 else "")
        + ")"
    )
    if one["supported"]:
        word = "higher" if one["supported"] > 0 else "lower"
        judged = {1: ", which is better", -1: ", which is worse", 0: ""}[one["better"]]
        by = f"{written(abs(one['value']))} {one['unit']}"
        return f"{one['variant']} is {word} than {against}{judged}: by {by} {tail}."
    by = f"{written(one['value'])} {one['unit']}"
    return f"{one['variant']} against {against}: {by}, which these rows cannot tell from no difference {tail}."


def _agreeing(one: dict[str, Any]) -> int:
    """Seeds whose difference has the sign of the mean: one without a difference has neither."""
    return sum(value * one["value"] > 0 for value in one["values"])


def _about_seeds(data: dict[str, Any]) -> str:
    most = max(len(variant["runs"]) for variant in data["variants"])
    if most == 1:
        return "Every variant has one seed: another training seed would move the numbers by an amount not known here."
    return (
        "Intervals are about other rows put to these same trained policies; the spread between seeds is shown beside "
        "them and is not inside them."
    )


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _listed(names: list[str]) -> str:
    quoted = [f"({name})" if "," in name else name for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"


def grid_of(objectives: list[tuple[str, ObjectiveConfig]]) -> dict[str, str]:
    """Which family of alpha the variants walk: alpha at fixed total beta, or KL of weight beta_0 to the base added to
    a fixed beta_prev = alpha beta (docs/concepts.md). Told from the values, whatever was meant."""
    alphas = sorted({objective.alpha for _, objective in objectives})
    betas = {str(objective.beta) for _, objective in objectives}
    if len(alphas) == 1:
        return {"family": "none", "text": f"All variants have alpha {alphas[0]:g}."}
    several = ", ".join(f"{alpha:g}" for alpha in alphas)
    if len(betas) == 1:
        text = f"alpha ({several}) at fixed total beta {betas.pop()}: the previous iterate's weight goes to the base."
        return {"family": "fixed total beta", "text": text}
    kept = [_times(objective.alpha, objective.beta) for _, objective in objectives]
    if all(_close(one, kept[0]) for one in kept):
        text = (
            f"KL to the base added to a fixed beta_prev = alpha * beta of {kept[0][0]:g}: alpha is {several}, and the "
            "total beta grows as alpha falls."
        )
        return {"family": "beta_0 added", "text": text}
    return {
        "family": "neither",
        "text": f"alpha ({several}) and beta both vary, with neither beta nor alpha * beta fixed: effects of the two "
        "cannot be told apart here.",
    }


def plane_of(variants: list[tuple[str, RunConfig]]) -> dict[str, Any] | None:
    """Where variants differ in alpha and history alone (beta may go with alpha) and in both: the values of the two, and
    `labels`, a row for each alpha with a variant or None for each history."""
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


def _times(alpha: float, beta: float | list[float]) -> list[float]:
    return [alpha * value for value in (beta if isinstance(beta, list) else [beta])]


def _close(a: list[float], b: list[float]) -> bool:
    return len(a) == len(b) and all(math.isclose(x, y, rel_tol=1e-6) for x, y in zip(a, b, strict=True))


def notes(data: dict[str, Any]) -> list[str]:
    """What limits the numbers of this comparison."""
    found = [data["grid"]["text"][0].upper() + data["grid"]["text"][1:]]
    rows = min((one["n"] for one in data["comparisons"] if one["metric"] == PRIMARY), default=0)
    found += sample_notes([one["sampler"] for one in data["runs"]], rows)
    found += [f"{name} is no mean over questions, and is not compared: it is in the runs' own reports."
              for name in data["no_items"]]  # fmt: skip
    known, number, reference = cells(data), data["round"], data["reference"]
    for metric in (name for name in data["metrics"] if (name, reference, number) in known):
        own = {v["label"]: cell for v in data["variants"] if (cell := known.get((metric, v["label"], number)))}
        apart = [name for name, cell in own.items() if name != reference and cell["reference"] is None]
        if "/" in metric and apart:
            found.append(
                f"{metric} of {_listed(apart)} is not compared with that of {data['reference']}: it has other "
                "questions, another judge or settings, or is a win rate against other answers."
            )
    further = [v["label"] for v in data["variants"] if v["rounds"] and v["rounds"][-1] > data["round"]]
    if further:
        found.append(
            f"Compared is round {data['round']}, the last that all have evaluated; {_listed(further)} went on."
        )
    found += [f"{one['run']} {one['ended']}." for one in data["runs"] if one["ended"]]
    found += [f"Alarm of {_listed(one['runs'])}, round {one['round']}, {one['where']}: {one['text']}"
              for one in data["alarms"]]  # fmt: skip
    found += [f"{run} is left out: it has the configuration and the seed of {of}, and is no further seed."
              for run, of in data["repeats"].items()]  # fmt: skip
    compared = {one["run"] for one in data["runs"]}
    for run, why in data["failed"].items():
        found.append(f"{'Failed, and compared as far as it came' if run in compared else 'Left out'}: {run} ({why}).")
    return found


def cells(data: dict[str, Any]) -> dict[tuple[str, str, int], dict[str, Any]]:
    """(metric, variant, round) -> `value`, its `text` with interval and the spread over seeds, and the differences
    from the reference and the base (`reference`, `base`; None where there is none)."""
    found = {}
    for value in data["values"]:
        text = format_estimate(value)
        if value["spread"] is not None:
            text += f", ± {format_number(value['spread'], value)} over {len(value['values'])} seeds"
        place = (value["metric"], value["variant"], value["round"])
        found[place] = {"value": value, "text": text, "reference": None, "base": None}
    for one in data["comparisons"]:
        place = (one["metric"], one["variant"], one["round"])
        found[place]["base" if one["to_base"] else "reference"] = one
    return found


def mark(one: dict[str, Any] | None) -> str:
    """`▲` supported higher, `▼` supported lower, with ` better` or ` worse` where a direction is; else nothing."""
    if one is None or not one["supported"]:
        return ""
    return f"{'▲' if one['supported'] > 0 else '▼'} {MARKS[one['better']]}".rstrip()


def comparison_table(data: dict[str, Any]) -> str:
    """Plain text: one line per metric, one column per variant at the last common round; then the verdict."""
    variants, number, known = [v["label"] for v in data["variants"]], data["round"], cells(data)
    lines = []
    for start in range(0, len(variants), _PER_BLOCK):
        block = variants[start : start + _PER_BLOCK]
        rows = [[f"round {number}", *(f"{name} (reference)" if name == data["reference"] else name for name in block)]]
        for metric, shown in data["metrics"].items():
            star = " *" if metric == data["primary"] else ""
            title = f"{shown['label']}{star} {ARROWS[shown['better']]}".rstrip()
            rows.append(
                [
                    f"{title} ({shown['unit']}, {counts_at(data, metric, number)})",
                    *(_cell_text(known.get((metric, name, number))) for name in block),
                ]
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.append("")
    texts = [
        "↓ lower is better, ↑ higher is better. [ ] 95 % interval over rows, not corrected. ▲ ▼ a paired difference "
        f"from {data['reference']} that is supported after Holm's correction over the table. * primary metric.",
        "", data["verdict"]["headline"], *data["verdict"]["sentences"], *data["notes"],
    ]  # fmt: skip
    return "\n".join([*lines, *(textwrap.fill(text, _COLUMNS) for text in texts)])


def counts_at(data: dict[str, Any], metric: str, number: int) -> str:
    """How many rows or questions a metric's numbers of a round are about."""
    return counts(one for one in data["values"] if (one["metric"], one["round"]) == (metric, number))


def _cell_text(cell: dict[str, Any] | None) -> str:
    return "-" if cell is None else f"{cell['text']} {mark(cell['reference'])[:1]}".rstrip()


def comparison_rows(data: dict[str, Any]) -> list[dict[str, str]]:
    """The same table as rows for an artifact: one per metric, a column per variant."""
    known, number, found = cells(data), data["round"], []
    for metric, shown in data["metrics"].items():
        title = f"{shown['label']}{' *' if metric == data['primary'] else ''} {ARROWS[shown['better']]}".rstrip()
        found.append(
            {"metric": f"{title} ({shown['unit']}, {counts_at(data, metric, number)})"}
            | {v["label"]: _cell_text(known.get((metric, v["label"], number))) for v in data["variants"]}
        )
    return found


def _count(*counts: float | None) -> str:
    """Their sum; a dash where nobody counted one of them."""
    return "-" if None in counts else f"{sum(one or 0.0 for one in counts):,.0f}"


def comparison_markdown(data: dict[str, Any], places: dict[str, str]) -> str:
    """The verdict, what limits it, what each variant cost, and where the page and its files lie. places: addresses by
    kind."""
    lines = [f"# {data['name']}", "", f"**{data['verdict']['headline']}**", ""]
    lines += [f"- {sentence}" for sentence in data["verdict"]["sentences"]]
    lines += ["", *(f"- {note}" for note in data["notes"]), ""]
    lines += ["| mean of its runs | took | of it shared | tokens sampled | tokens trained on | paid to judges |",
              "|---|---|---|---|---|---|"]  # fmt: skip
    for one in data["cost"]:
        sampled = _count(one["tokens"]["generate"], one["tokens"][HELDOUT_ANSWERS])
        trained = _count(one["tokens"]["train"])
        took = f"{format_duration(one['total_seconds'])} | {format_duration(one['shared_seconds'])}"
        name = one["variant"].replace("|", "\\|")
        lines.append(f"| {name} | {took} | {sampled} | {trained} | {one['paid']:.2f} |")
    lines.append("")
    lines += [f"- {kind}: {link(place)}" for kind, place in places.items()]
    return "\n".join(lines)
