"""The fields of a comparison, as its `report.json` holds them.

Decides: the names and types that readers of a comparison rely on. Leaves out: where the values come from.
"""

from __future__ import annotations

from typing import Any, TypedDict

from spinreg_core.evaluation.metrics import Metric
from spinreg_core.evaluation.paired import CorrectedDifference, Difference, MeanEstimate
from spinreg_core.evaluation.schema import BenchmarkSetup
from spinreg_core.reports.schema import Alarm, MadeObject


class RunEntry(TypedDict):
    run: str
    variant: str
    seed: int
    data: str
    rounds: list[int]
    ended: str | None
    sampler: dict[str, float]


class VariantEntry(TypedDict):
    """Runs that differ in their seed alone. `differences` are those from the reference, as `field: old -> new`."""

    label: str
    runs: list[str]
    seeds: list[int]
    rounds: list[int]
    differences: list[str]


class Unpaired(TypedDict):
    variant: str
    why: str


class EntryPlace(TypedDict):
    variant: str
    round: int
    metric: str


class ValueEntry(MeanEstimate, EntryPlace):
    """A metric of a variant at a round, over the variant's runs."""


class ChangeEntry(Difference, EntryPlace):
    """A paired change from the round before."""


class DifferenceEntry(CorrectedDifference, EntryPlace):
    """A paired difference from the reference or the base, corrected by Holm's procedure within its family.

    `better` is 1, -1 or 0. `same`: both are one policy. `repeats`: the variant with the same policy that has this test
    already.
    """

    family: str
    against: str
    to_base: bool
    repeats: str | None
    better: int


class BenchmarkEntry(BenchmarkSetup):
    run: str
    round: int
    object_id: str


class SharedAlarm(Alarm):
    runs: list[str]


class Cost(TypedDict):
    """Means over a variant's runs: seconds by stage, tokens by stage (None if uncounted), payments to judges.

    `shared_seconds` are those of objects that other runs of the comparison use too; they were spent once.
    """

    variant: str
    runs: int
    rounds: int
    seconds: dict[str, float]
    total_seconds: float
    shared_seconds: float
    tokens: dict[str, float | None]
    paid: float


class Plane(TypedDict):
    """Variants by alpha (rows) and history (columns); None where there is no variant."""

    alpha: list[float]
    history: list[int | str]
    labels: list[list[str | None]]


class ComparedSample(TypedDict):
    messages: list[dict[str, str]]
    answer: str
    answers: list[dict[str, Any]]


class SharedObject(MadeObject):
    """An object with the runs that it is part of, and the payments to judges for it."""

    runs: list[str]
    created: str | None
    paid: float


class ComparisonVerdict(TypedDict):
    """`claims` are the supported differences, as [variant, against, lower | higher]."""

    headline: str
    sentences: list[str]
    claims: list[list[str]]
    round: int


class Numbers(TypedDict):
    """A comparison without its sentences. `families` counts the tests that are corrected together."""

    schema: int
    spinreg: str | None
    name: str
    store: str
    runs: list[RunEntry]
    variants: list[VariantEntry]
    reference: str
    against: str
    round: int
    primary: str
    metrics: dict[str, Metric]
    unpaired: list[Unpaired]
    repeats: dict[str, str]
    failed: dict[str, str]
    values: list[ValueEntry]
    comparisons: list[DifferenceEntry]
    benchmarks: list[BenchmarkEntry]
    no_items: list[str]
    alarms: list[SharedAlarm]
    families: dict[str, int]
    stability: list[ChangeEntry]
    cost: list[Cost]
    grid: dict[str, str]
    plane: Plane | None
    samples: list[ComparedSample]
    lineage: list[SharedObject]
    config: dict[str, Any]


class Comparison(Numbers):
    verdict: ComparisonVerdict
    notes: list[str]


class WrittenComparison(TypedDict):
    """Keys of the files in the store, and the comparison itself."""

    html: str
    json: str
    csv: str
    parquet: str
    data: Comparison
