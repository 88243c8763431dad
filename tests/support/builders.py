"""Small configurations, heads and jobs, as tests of one unit need them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spinreg_core.config import RunConfig
from spinreg_core.config.resolve import merge, validate
from spinreg_core.runs.head import Entry, Head, Lease
from spinreg_core.runs.job import Job
from spinreg_core.runs.stages import stages_of


def make_config(**fields: Any) -> RunConfig:
    """Return a configuration: `objective={"alpha": 1}` sets a group's fields, `objective__alpha=1` one of them."""
    nested: dict[str, Any] = {}
    for path, value in fields.items():
        group, _, field = path.partition("__")
        nested = merge(nested, {group: {field: value}} if field else {group: value})
    return validate(nested)


def make_head(rounds: int = 0, *, stages: dict[int, dict[str, str]] | None = None, **fields: Any) -> Head:
    """Return the head of a run with so many complete rounds, the base evaluated; objects are named STAGE-ROUND.

    `stages={0: {...}, 1: {...}}` names the objects of rounds instead.
    """
    entries = [
        Entry(round=number, stages={stage: f"{stage}-{number}" for stage in stages_of(number)})
        for number in range(rounds + 1)
    ]
    if stages is not None:
        entries = [Entry(round=number, stages=named) for number, named in stages.items()]
    given = {"run": "demo", "lease": Lease(epoch=1, holder=None, beat=0), "advances": [], "rounds": entries}
    return Head(**given | {"base": "base-x", "data": "data-x"} | fields)


def make_job(stage: str, workdir: Path, *, config: RunConfig | None = None, **fields: Any) -> Job:
    """Return a job for a stage in round 1; `fields` are those of `Job`."""
    given = {"object_id": f"{stage}-x", "key": {}, "store": "", "writer": "e0001-test", "round": 1, "inputs": {}}
    return Job(stage=stage, config=config or RunConfig(), workdir=workdir, **given | {"extra": {}} | fields)
