"""Finished runs of one store against each other: every number of the comparison, as plain JSON values.

Decides: which differences are looked at, in which families they are corrected for being many, and what is said of
each variant besides (stability, cost, lineage, configuration). Leaves out: the statistics (`evaluation/paired.py`),
the reading (`runs.py`), the sentences (`text.py`), the page (`page.py`).

Three families, each corrected by Holm's procedure, so that in each the chance of any false claim is about 5 % at most
(`evaluation/paired.py` says how good the p-values are):

    verdict   the primary metric at the last round that all variants have: each variant against the reference, and each
              against its base. The sentences of the verdict speak about these alone.
    table     all other metrics at that round: the marks of the table.
    rounds    everything at all other rounds: the marks of the table by round.

A comparison is a view: it can be written again at any time.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from spinreg_core.comparison.runs import (
    Variant,
    alarms_of,
    costs_of,
    definitions_of,
    lineage_of,
    one_per_seed,
    read_evaluated,
    samples_of,
    variants_of,
    why_unpaired,
)
from spinreg_core.comparison.text import grid_of, notes, plane_of, verdict
from spinreg_core.config import RUN_NAME, variant_fields
from spinreg_core.config.resolve import differences
from spinreg_core.errors import BadInput
from spinreg_core.evaluation.early_stopping import ended_early
from spinreg_core.evaluation.metrics import PRIMARY
from spinreg_core.evaluation.paired import Resampled, Scores, apply_holm, difference, estimate
from spinreg_core.runs.head import stage_object
from spinreg_core.runs.objects import versions
from spinreg_core.store.base import Store
from spinreg_core.store.cache import pinned

SCHEMA = 1
FAMILIES = ("verdict", "table", "rounds")
BASE = "base"
STEADY = ("heldout_nll", "kl_base", "margin")  # whose change from round to round is the stability figure
_ZERO_FOR_BASE = "kl_base"  # by definition: its difference from the base is itself


def comparison_name(runs: Sequence[str], name: str | None = None) -> str:
    """`name`, or the runs' names joined; shortened with a hash where that is longer than a name may be.

    Raises BadInput for a name that could not be a run's.
    """
    if name is None:
        name = "-vs-".join(runs)
        if len(name) > 64:
            digest = hashlib.sha256("\n".join(runs).encode()).hexdigest()[:12]
            name = f"{runs[0][:32]}-and-{len(runs) - 1}-more-{digest}"
    if not re.fullmatch(RUN_NAME, name):
        raise BadInput("name of the comparison", repr(name), f"one that matches {RUN_NAME}")
    return name


def comparison_data(
    store: Store,
    runs: Sequence[str],
    against: str | None = None,
    name: str | None = None,
    failed: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Everything the comparison says. against: the run whose variant is the reference (default: the first); failed:
    runs of the comparison whose flow run failed, compared or not, and why.

    Raises BadInput for fewer than two runs or one named twice, a run that is not in the store, and where nothing can
    be compared: no round beyond the base is evaluated in all, or no two variants share held-out rows.
    """
    name = comparison_name(runs, name)
    if len(runs) < 2 or len(set(runs)) < len(runs):
        raise BadInput("runs to compare", ", ".join(map(repr, runs)) or "none", "at least two different runs")
    if against is not None and against not in runs:
        raise BadInput("--against", repr(against), f"one of the compared runs ({', '.join(runs)})")
    with pinned():
        members, repeats = one_per_seed([read_evaluated(store, run) for run in runs], against)
        if len(members) < 2:
            raise BadInput("runs to compare", f"{', '.join(runs)}, of one configuration and seed", "different runs")
        against = repeats.get(runs[0], runs[0]) if against is None else against
        variants = variants_of(members)
        samples, lineage = samples_of(store, variants), lineage_of(store, members)
        alarmed = alarms_of(store, members)
    reference = next(v for v in variants if against in [member.run for member in v.members])
    unpaired = _unpaired(variants, reference)
    if len(variants) > 1 and len(unpaired) == len(variants) - 1:
        found = "; ".join(f"{one['variant']}: {one['why']}" for one in unpaired)
        raise BadInput(
            "runs to compare", f"none that answered the questions of {reference.label!r} ({found})",
            "runs with the same held-out rows, to be compared row by row",
        )  # fmt: skip
    last = max(set.intersection(*(set(variant.rounds) for variant in variants)), default=0)
    if last == 0:
        found = ", ".join(f"{m.run}: {max(m.rounds, default='nothing')}" for m in members)
        raise BadInput("runs to compare", f"no round that all have evaluated (last evaluated: {found})",
                       "at least round 1 of every run")  # fmt: skip
    config = next(member for member in members if member.run == against).config
    resampled = _Resampled(variants, config.evaluation.bootstrap, config.seed)
    metrics = definitions_of(members)
    comparisons = _comparisons(variants, reference, metrics, last, resampled)
    own = variant_fields(reference.members[0].config)
    data: dict[str, Any] = {
        "schema": SCHEMA,
        "spinreg": versions().get("spinreg"),
        "name": name,
        "store": store.url,
        "runs": [
            {"run": m.run, "variant": v.label, "seed": m.config.seed, "data": m.head["data"], "rounds": m.rounds,
             "ended": ended_early(m.head),
             "sampler": m.config.generation.model_dump(include={"temperature", "top_p", "top_k"})}
            for v in variants for m in v.members
        ],
        "variants": [
            {
                "label": variant.label,
                "runs": [member.run for member in variant.members],
                "seeds": [member.config.seed for member in variant.members],
                "rounds": variant.rounds,
                "differences": differences(own, variant_fields(variant.members[0].config)),
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
        "values": _values(variants, metrics, resampled),
        "comparisons": comparisons,
        "benchmarks": [one for member in members for one in member.measured],
        "no_items": sorted(set().union(*(member.no_items for member in members))),
        "alarms": alarmed,
        "families": {
            family: sum(one["family"] == family and not one["same"] and one["repeats"] is None for one in comparisons)
            for family in FAMILIES
        },
        "stability": _stability(variants, metrics, resampled),
        "cost": costs_of(variants, lineage),
        "grid": grid_of([(v.label, v.members[0].config.objective) for v in variants]),
        "plane": plane_of([(v.label, v.members[0].config) for v in variants]),
        "samples": samples,
        "lineage": lineage,
        "config": config.model_dump(mode="json"),
    }  # fmt: skip
    data |= {"verdict": verdict(data), "notes": notes(data)}
    return data


class _Resampled:
    """The bootstrap draws of every score: questions of held-out rows together, those of each benchmark together."""

    def __init__(self, variants: list[Variant], resamples: int, seed: int) -> None:
        scores: dict[str, list[Scores]] = {}
        for variant in variants:
            for member in variant.members:
                for by_metric in member.scores.values():
                    for metric, one in by_metric.items():
                        scores.setdefault(metric if "/" in metric else "", []).append(one)
        self._of = {
            group: Resampled((i for s in all_ for i in s.ids), resamples, seed) for group, all_ in scores.items()
        }
        for group, all_ in scores.items():
            self._of[group].prepare(all_)

    def __getitem__(self, metric: str) -> Resampled:
        return self._of[metric if "/" in metric else ""]


def _unpaired(variants: list[Variant], reference: Variant) -> list[dict[str, str]]:
    ours = {str(member.head["data"]) for member in reference.members}
    return [
        {"variant": variant.label, "why": why_unpaired(variant, reference)}
        for variant in variants
        if not ours & {str(member.head["data"]) for member in variant.members}
    ]


def _values(variants: list[Variant], metrics: dict[str, Any], resampled: _Resampled) -> list[dict[str, Any]]:
    """Every metric of every variant and round, over its seeds."""
    return [
        {"variant": variant.label, "round": number, "metric": metric}
        | estimate(scores, resampled[metric], metrics[metric]["unit"])
        for variant in variants
        for number in variant.rounds
        for metric in metrics
        if (scores := variant.scores(metric, number))
    ]


def _comparisons(
    variants: list[Variant], reference: Variant, metrics: dict[str, Any], last: int, resampled: _Resampled
) -> list[dict[str, Any]]:
    """Every paired difference from the reference and from the base, corrected family by family.

    Variants that share a policy share its differences: one of them is a test, and the others (`repeats`: whose) are
    what it is.
    """
    found: list[Any] = []
    first: dict[tuple[Any, ...], dict[str, Any]] = {}
    repeated: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for metric in metrics:
        for variant in variants:
            for number in [n for n in variant.rounds if n]:
                ours = variant.scores(metric, number)
                pairs = [(BASE, variant.scores(metric, 0), False)] if metric != _ZERO_FOR_BASE else []
                if variant is not reference:
                    pairs.insert(0, (reference.label, reference.scores(metric, number),
                                     _objects(variant, number) == _objects(reference, number)))  # fmt: skip
                for against, theirs, same in pairs:
                    content = (metric, number, _content(ours), _content(theirs))
                    known = None if same else first.get(content)
                    one = known or difference(ours, theirs, resampled[metric], metrics[metric]["unit"])
                    if one is None:
                        continue
                    family = "rounds" if number != last else "verdict" if metric == PRIMARY else "table"
                    found.append({**one, "family": family, "metric": metric, "round": number, "variant": variant.label,
                                  "against": against, "to_base": against is BASE, "same": same,
                                  "repeats": known and known["variant"]})  # fmt: skip
                    if known is not None:
                        repeated.append((found[-1], known))
                    elif not same:
                        first[content] = found[-1]
    for family in FAMILIES:
        apply_holm([one for one in found if one["family"] == family and one["repeats"] is None])
    for one, original in repeated:
        one |= {name: original[name] for name in ("p_holm", "corrected_low", "corrected_high", "supported")}
    for one in found:
        better = {"lower": -1, "higher": 1, None: 0}[metrics[one["metric"]]["better"]]
        one["better"] = one["supported"] * better  # 1 better, -1 worse, 0: not supported, or neither
    return found


def _content(scores: list[Scores]) -> tuple[Any, ...]:
    return tuple(sorted((one.block, one.ids, one.num.tobytes(), one.den.tobytes()) for one in scores))


def _objects(variant: Variant, number: int) -> set[str | None]:
    return {stage_object(member.head, number, "evaluate") for member in variant.members}


def _stability(variants: list[Variant], metrics: dict[str, Any], resampled: _Resampled) -> list[dict[str, Any]]:
    """Paired change of NLL, KL to base and margin from each round to the next, over the variant's seeds."""
    found = []
    for variant, metric in itertools.product(variants, STEADY):
        if metric not in metrics:
            continue
        for before, after in itertools.pairwise(variant.rounds):
            one = difference(variant.scores(metric, after), variant.scores(metric, before), resampled[metric],
                             metrics[metric]["unit"])  # fmt: skip
            if one is not None and after == before + 1:
                found.append({"variant": variant.label, "metric": metric, "round": after} | one)
    return found
