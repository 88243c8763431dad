"""MT-Bench (arXiv 2306.05685): two turns, graded 1 to 10 by a judge."""

from __future__ import annotations

from typing import Any

from spinreg_core.config import RunConfig
from spinreg_core.rounds import Plan
from spinreg_core.stages.job import Job


def plans(config: RunConfig, head: dict[str, Any], iterate: int) -> list[Plan]:
    return []


def run(job: Job) -> dict[str, Any]:
    raise NotImplementedError
