"""Checks of a flow's parameters before it starts: resolve them, and refuse what cannot work."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from spinreg_core.benchmarks.registry import require_benchmark_files as check_files
from spinreg_core.config import RunConfig
from spinreg_core.config.resolve import resolve
from spinreg_core.evaluation.early_stopping import require_metric
from spinreg_core.reports.trackers import require_trackers as check_trackers
from spinreg_core.runs.head import read_config
from spinreg_core.store.cache import require_cache
from spinreg_core.store.open import open_store

# Everything is committed when the flow ends; a long outage must not make it a failed run.
END_PATIENCE_SECONDS = 3600.0


def _given(parameters: dict[str, Any]) -> dict[str, Any]:
    """Only what was said: no None, and of a group only the fields that were filled in."""
    said = {
        name: value.model_dump(mode="json") if isinstance(value, BaseModel) else value
        for name, value in parameters.items()
    }
    return {name: value for name, value in said.items() if value is not None and value != {}}


def resolve_parameters(config: str | None, parameters: dict[str, Any]) -> RunConfig:
    """The configuration a call of `spin` stands for; an existing run fills in what was not said."""
    given = _given(parameters)
    wanted = resolve(given, config)
    store = open_store(wanted.store)
    store.check()
    return resolve(given, config, stored=read_config(store, wanted.run))


def require_usable(config: RunConfig) -> None:
    """Raise BadInput for what this process can see, and a stage would end with hours later: the cache, files of
    benchmarks, trackers, and the metric of `until`."""
    require_cache()
    check_files(config)
    check_trackers(config.tracking)
    require_metric(config)
