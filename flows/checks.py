"""Checks of a flow's parameters before it starts: resolve them, and refuse a run that cannot work."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel

from spinreg_core.benchmarks.registry import require_benchmark_files
from spinreg_core.config import RunConfig
from spinreg_core.evaluation.early_stopping import require_metric
from spinreg_core.reports.trackers import require_trackers
from spinreg_core.runs.head import resolve_run
from spinreg_core.store.cache import require_cache


def resolve_parameters(config: str | None, parameters: Mapping[str, object]) -> RunConfig:
    """Return the configuration of a call of `spin`; an existing run gives the fields that the call does not.

    Raises BadInput.
    """
    filled = {
        name: value.model_dump(mode="json") if isinstance(value, BaseModel) else value
        for name, value in parameters.items()
    }
    given = {name: value for name, value in filled.items() if value is not None and value != {}}
    return resolve_run(given, config)


def require_usable(config: RunConfig) -> None:
    """Raise BadInput for problems that would end a stage hours later, as far as this process can see them.

    It looks at the cache, the files of benchmarks, the trackers, and the metric of `until`.
    """
    require_cache()
    require_benchmark_files(config)
    require_trackers(config.tracking)
    require_metric(config)
