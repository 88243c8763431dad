"""The task `prepare`: base model and checked rows go into the store, once per run."""

from __future__ import annotations

from typing import Any

from prefect.client.schemas.objects import State
from prefect.states import Completed

from spinreg_core.runs.job import Job
from spinreg_core.runs.objects import read_manifest
from tasks.context import Context, current_context
from tasks.results import PreparedResult
from tasks.run_stage import stage_task, watched_stage


@stage_task("prepare", run_name="")
def prepare(run: str) -> PreparedResult | State[PreparedResult]:
    """Put the base model and the checked rows into the store."""
    context = current_context()
    store, session = context.store, context.session
    base, data = session.head.get("base"), session.head.get("data")
    if base and data:
        manifest = read_manifest(store, data)
        if manifest is not None and read_manifest(store, base) is not None:
            result: PreparedResult = {"base": base, "data": data, "summary": manifest["metrics"], "reused": True}
            return Completed(name="Reused", message=f"committed before: {base}, {data}", data=result)
    # Once more where `spinreg gc` marked what is taken over here, before it could see our commit (`maintenance/gc.py`).
    while True:
        made = _prepared(context)
        session.commit_inputs(made["base"], made["data"])
        manifest = read_manifest(store, made["data"])
        if manifest is not None and read_manifest(store, made["base"]) is not None:
            return {"base": made["base"], "data": made["data"], "summary": manifest["metrics"], "reused": False}


def _prepared(context: Context) -> dict[str, Any]:
    store, config, writer = context.store, context.config, context.session.writer()
    with context.scratch("prepare", writer) as folder:
        # The fingerprints of what this stage makes depend on contents that only the stage itself sees.
        return watched_stage(Job("prepare", "", {}, store.url, writer, 0, {}, config, folder), "prepare")
