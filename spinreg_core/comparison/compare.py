"""The comparison of finished runs: every number of it, as plain JSON values.

Decides: the differences that are tested, the families in which they are corrected for multiple testing, and the other
content (stability, cost, lineage, configuration). Leaves out: the statistics (`evaluation`), reading runs (`runs`),
sentences (`wording`) and the files (`files`).

Holm's procedure (Holm 1979) corrects each of three families, so that in each the chance of any false claim is about 5 %
at most (`evaluation/paired.py` says how good the p-values are):

    verdict   the primary metric at the last round that all variants have: each variant against the reference, and each
              against its base. The sentences of the verdict are about these alone.
    table     all other metrics at that round: the marks of the table.
    rounds    everything at all other rounds: the marks of the tables by round.

A comparison is a view. It can be written again at any time.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from spinreg_core.comparison.runs import (
    Evaluated,
    Variant,
    alarms_of,
    cost_of,
    definitions_of,
    lineage_of,
    one_per_seed,
    read_evaluated,
    samples_of,
    variants_of,
    why_unpaired,
)
from spinreg_core.comparison.schema import (
    ChangeEntry,
    Comparison,
    DifferenceEntry,
    Numbers,
    RunEntry,
    Unpaired,
    ValueEntry,
)
from spinreg_core.comparison.wording import comparison_notes, comparison_verdict, grid_of, plane_of
from spinreg_core.config import RUN_NAME
from spinreg_core.config.resolve import differences
from spinreg_core.errors import BadInput
from spinreg_core.evaluation.metrics import PRIMARY, Metric
from spinreg_core.evaluation.paired import Difference, Scores, apply_holm, difference, estimate
from spinreg_core.runs.objects import versions
from spinreg_core.store.base import Store
from spinreg_core.store.cache import pinned

SCHEMA = 1
FAMILIES = ("verdict", "table", "rounds")
BASE = "base"
# Metrics of the stability figure, which shows their change from round to round.
STEADY = ("heldout_nll", "kl_base", "margin")
# It is zero for the base by definition, so its difference from the base is the metric itself.
_ZERO_FOR_BASE = "kl_base"


def comparison_name(runs: Sequence[str], name: str | None = None) -> str:
    """Return `name`, or the runs' names joined and, if that is too long for a name, shortened with a hash.

    Raises BadInput for a name that a run could not have.
    """
    if name is None:
        name = "-vs-".join(runs)
        if len(name) > 64:
            digest = hashlib.sha256("\n".join(runs).encode()).hexdigest()[:12]
            name = f"{runs[0][:32]}-and-{len(runs) - 1}-more-{digest}"
    if not re.fullmatch(RUN_NAME, name):
        raise BadInput("name of the comparison", repr(name), f"a name that matches {RUN_NAME}")
    return name


def compare(
    store: Store,
    runs: Sequence[str],
    against: str | None = None,
    name: str | None = None,
    failed: Mapping[str, str] | None = None,
) -> Comparison:
    """Compare finished runs of one store and return every number and sentence of the comparison.

    runs: names of at least two runs. Runs that differ in their seed alone form one variant.
    against: the run with the reference variant; default the first.
    name: name of the comparison; default the runs' names joined.
    failed: runs of the comparison with a failed flow run, and the reason.

    Estimates carry their unit and 95 % interval; `seconds` are wall-clock seconds. NaN and infinities stay as they are.

    Raises:
        BadInput: fewer than two runs, a run named twice or missing, or nothing to compare: no round beyond the base is
            evaluated in all runs, or no two variants share held-out rows.
        Removed: `spinreg gc` removed a file that the comparison needs.
        Damaged: a file or document of a run is missing or altered.
    """
    name = comparison_name(runs, name)
    if len(runs) < 2 or len(set(runs)) < len(runs):
        raise BadInput("runs to compare", ", ".join(map(repr, runs)) or "none", "at least two different runs")
    if against is not None and against not in runs:
        raise BadInput("--against", repr(against), f"one of the compared runs ({', '.join(runs)})")
    with pinned():
        members, repeats = one_per_seed([read_evaluated(store, run) for run in runs], against)
        if len(members) < 2:
            raise BadInput("runs to compare", f"{', '.join(runs)}, all of one configuration and seed", "different runs")
        against = repeats.get(runs[0], runs[0]) if against is None else against
        variants = variants_of(members)
        samples, lineage = samples_of(store, variants), lineage_of(store, members)
        alarmed = alarms_of(members)
    reference = next(v for v in variants if against in [member.run for member in v.members])
    unpaired: list[Unpaired] = [
        {"variant": variant.label, "why": why_unpaired(variant, reference)}
        for variant in variants
        if not reference.data & variant.data
    ]
    if len(variants) > 1 and len(unpaired) == len(variants) - 1:
        found = "; ".join(f"{one['variant']}: {one['why']}" for one in unpaired)
        raise BadInput(
            "runs to compare", f"none with the held-out rows of {reference.label!r} ({found})",
            "runs with the same held-out rows, which are compared row by row",
        )  # fmt: skip
    last = max(set.intersection(*(set(variant.rounds) for variant in variants)), default=0)
    if last == 0:
        found = ", ".join(f"{m.run}: {max(m.rounds, default='nothing')}" for m in members)
        raise BadInput("runs to compare", f"no round beyond the base that all have evaluated (last evaluated: {found})",
                       "at least round 1 of every run")  # fmt: skip
    config = next(member for member in members if member.run == against).config
    metrics = definitions_of(members)
    comparisons = _comparisons(variants, reference, metrics, last)
    tests = [one["family"] for one in comparisons if not one["same"] and one["repeats"] is None]
    numbers: Numbers = {
        "schema": SCHEMA,
        "spinreg": versions().get("spinreg"),
        "name": name,
        "store": store.url,
        "runs": [_run_entry(member, variant) for variant in variants for member in variant.members],
        "variants": [
            {
                "label": variant.label,
                "runs": [member.run for member in variant.members],
                "seeds": [member.config.seed for member in variant.members],
                "rounds": variant.rounds,
                "differences": differences(reference.fields, variant.fields),
            }
            for variant in variants
        ],
        "reference": reference.label,
        "against": against,
        "round": last,
        "primary": PRIMARY,
        "metrics": metrics,
        "unpaired": unpaired,
        "repeats": repeats,
        "failed": dict(failed or {}),
        "values": _values(variants, metrics),
        "comparisons": comparisons,
        "benchmarks": [one for member in members for one in member.measured],
        "no_items": sorted(set().union(*(member.no_items for member in members))),
        "alarms": alarmed,
        "families": {family: tests.count(family) for family in FAMILIES},
        "stability": _stability(variants, metrics),
        "cost": [cost_of(variant, lineage) for variant in variants],
        "grid": grid_of([(v.label, v.members[0].config.objective) for v in variants]),
        "plane": plane_of([(v.label, v.members[0].config) for v in variants]),
        "samples": samples,
        "lineage": lineage,
        "config": config.model_dump(mode="json"),
    }
    return {**numbers, "verdict": comparison_verdict(numbers), "notes": comparison_notes(numbers)}


def _run_entry(member: Evaluated, variant: Variant) -> RunEntry:
    return {
        "run": member.run, "variant": variant.label, "seed": member.config.seed, "data": member.data,
        "rounds": member.rounds, "ended": member.head.ended_early,
        "sampler": member.config.generation.model_dump(include={"temperature", "top_p", "top_k"}),
    }  # fmt: skip


def _values(variants: list[Variant], metrics: dict[str, Metric]) -> list[ValueEntry]:
    return [
        {"variant": variant.label, "round": number, "metric": metric, **estimate(scores, metrics[metric]["unit"])}
        for variant in variants
        for number in variant.rounds
        for metric in metrics
        if (scores := variant.scores(metric, number))
    ]


def _comparisons(
    variants: list[Variant], reference: Variant, metrics: dict[str, Metric], last: int
) -> list[DifferenceEntry]:
    """Return every paired difference from the reference and from the base, corrected family by family.

    Variants that share a policy share its differences. One of them is a test, and the others copy its results.
    """
    found: list[DifferenceEntry] = []
    first: dict[tuple[Any, ...], DifferenceEntry] = {}
    repeated: list[tuple[DifferenceEntry, DifferenceEntry]] = []
    for metric, variant in itertools.product(metrics, variants):
        for number in [n for n in variant.rounds if n]:
            ours = variant.scores(metric, number)
            pairs = [(BASE, variant.scores(metric, 0), False)] if metric != _ZERO_FOR_BASE else []
            if variant is not reference:
                same = variant.evaluations(number) == reference.evaluations(number)
                pairs.insert(0, (reference.label, reference.scores(metric, number), same))
            for against, theirs, same in pairs:
                content = (metric, number, _content(ours), _content(theirs))
                known = None if same else first.get(content)
                one: Difference | None = known or difference(ours, theirs, metrics[metric]["unit"])
                if one is None:
                    continue
                family = "rounds" if number != last else "verdict" if metric == PRIMARY else "table"
                found.append({**one, "family": family, "metric": metric, "round": number, "variant": variant.label,
                              "against": against, "to_base": against is BASE, "same": same,
                              "repeats": known["variant"] if known else None, "p_holm": 1.0, "corrected_low": None,
                              "corrected_high": None, "supported": 0, "better": 0})  # fmt: skip
                if known is not None:
                    repeated.append((found[-1], known))
                elif not same:
                    first[content] = found[-1]
    for family in FAMILIES:
        apply_holm([one for one in found if one["family"] == family and one["repeats"] is None])
    for again, original in repeated:
        again |= {"p_holm": original["p_holm"], "corrected_low": original["corrected_low"],
                  "corrected_high": original["corrected_high"], "supported": original["supported"]}  # fmt: skip
    for tested in found:
        better = {"lower": -1, "higher": 1, None: 0}[metrics[tested["metric"]]["better"]]
        tested["better"] = tested["supported"] * better
    return found


def _content(scores: list[Scores]) -> tuple[Any, ...]:
    return tuple(sorted((one.block, one.ids, one.num.tobytes(), one.den.tobytes()) for one in scores))


def _stability(variants: list[Variant], metrics: dict[str, Metric]) -> list[ChangeEntry]:
    """Return the paired change of each `STEADY` metric from every round to the next, over the variant's seeds."""
    found: list[ChangeEntry] = []
    for variant, metric in itertools.product(variants, [name for name in STEADY if name in metrics]):
        for before, after in itertools.pairwise(variant.rounds):
            ours, theirs = variant.scores(metric, after), variant.scores(metric, before)
            one = difference(ours, theirs, metrics[metric]["unit"])
            if one is not None and after == before + 1:
                found.append({"variant": variant.label, "metric": metric, "round": after, **one})
    return found
