"""The flow `spin`, behind the deployment `spin/iterate`: advance a run by some rounds of regularised self-play.

Decides: the parameters of the deployment, that an advance is recorded before it starts, and the steps between rounds.
Leaves out: the configuration, a round, and its stages.

    python -m flows.spin --config deployments/configs/demo.yaml
    prefect deployment run spin/iterate -p rounds=3

Importing this module loads none of torch, transformers, vllm and datasets, because a worker imports it for every run.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.exceptions import TerminationSignal
from prefect.runtime import flow_run
from prefect.states import Cancelled, Failed

from flows.artifacts import RunSummary, show_end, show_round, track
from flows.parameters import resolve_parameters, run_parameters
from flows.round import measure, round_, stage_calls
from flows.terminal import run_command, signals_ignored, stop_message
from spinreg_core.api import require_usable
from spinreg_core.benchmarks.lm_eval import plan_check
from spinreg_core.config import RunConfig
from spinreg_core.config.resolve import show
from spinreg_core.errors import LeaseHeld, StagePreempted
from spinreg_core.evaluation.early_stopping import why_ended
from spinreg_core.maintenance import repair
from spinreg_core.reports.figures import run_figures
from spinreg_core.reports.run_report import report_data, write_report
from spinreg_core.reports.tables import metrics_markdown, metrics_table
from spinreg_core.reports.trackers import require_trackers
from spinreg_core.runs.lease import hold_lease
from spinreg_core.runs.loop import Steps, advance
from spinreg_core.runs.stages import complete_round
from spinreg_core.store.base import Store
from spinreg_core.store.open import open_store
from tasks.artifacts import artifact_key, show_markdown
from tasks.benchmark import check_benchmarks
from tasks.cancellation import RunCancelled, cancellation
from tasks.context import Context, use_context
from tasks.log import run_log
from tasks.prepare import prepare
from tasks.run_stage import preempted, run_task
from tasks.server import END_PATIENCE_SECONDS, call_subflow, flush, server_answers, wait_for_server
from tasks.stage_process import end_embedded_server_with_us


def _flow_run_name() -> str:
    """Return `<run>/spin`. A configuration that does not resolve fails inside the flow, which shows the reason."""
    parameters = dict(flow_run.parameters)
    try:
        return f"{resolve_parameters(parameters.pop('config', None), parameters).run}/spin"
    except Exception:
        return "spin"


# Results are in the store. A retry would take a result that Prefect kept, and never look there.
@flow(name="spin", flow_run_name=_flow_run_name, persist_result=False)
@run_parameters
def spin(config: str | None = None, **parameters: Any) -> RunSummary | State[Any]:
    """Advance a run by rounds of regularised self-play (SPIN, alpha-SPIN, fictitious play).

    Everything left empty comes from `config`, from the existing run of that name, or from the defaults,
    which are the demo's. Running a killed run again finishes it and adds nothing.

    Args:
        config: Path or URI of a run configuration file (YAML or JSON). Single parameters win over it.
    """
    end_embedded_server_with_us()
    try:
        return _advance(config, parameters)
    except RunCancelled as error:
        return Cancelled(message=str(error))
    except (KeyboardInterrupt, TerminationSignal) as stop:
        with signals_ignored():
            # Prefect would try for minutes to report the end to a server that is away.
            if not server_answers():
                text, status = stop_message(stop)
                print(text, file=sys.stderr, flush=True)
                os._exit(status)
        raise
    except StagePreempted as error:
        return preempted(error)
    except LeaseHeld as error:
        # As a state, because Prefect would log the traceback of an exception. A caller gets the error itself.
        return Failed(message=str(error), data=error)


def _steps(config: RunConfig, store: Store) -> Steps:
    """Return the steps of an advance as Prefect tasks and nested flows."""

    def start() -> None:
        if plan_check(config) is not None:
            run_task(check_benchmarks, config.resources, config.run)
        run_task(prepare, config.resources, config.run)

    def show(round_number: int) -> None:
        show_round(round_number)
        track(store, config)

    return Steps(
        prepare=start,
        stages=stage_calls(config),
        run_round=lambda number: call_subflow(round_, config.run, number),
        measure=measure,
        why_ended=lambda: why_ended(config.until, report_data(store, config.run)["rounds"]),
        show=show,
    )


def _advance(config: str | None, parameters: Mapping[str, object]) -> RunSummary:
    log = run_log()
    resolved = resolve_parameters(config, parameters)
    require_usable(resolved)
    require_trackers(resolved.tracking)
    log(f"resolved configuration:\n{show(resolved)}")
    show_markdown(
        artifact_key(resolved.run, "configuration"),
        f"```yaml\n{show(resolved)}```",
        f"Resolved configuration of run {resolved.run}",
    )
    opened = open_store(resolved.store)
    label = f"flow run {flow_run.name} ({flow_run.id})"
    with (
        hold_lease(opened, resolved, label) as lease,
        cancellation(str(flow_run.id)) as check,
        use_context(Context(resolved, opened, lease, check)) as context,
    ):
        steps = _steps(resolved, opened)
        # First, because a repair opens stages and so changes the number of complete rounds. Not as nested flow runs:
        # on a retry, Prefect would take them for the rounds of the advance.
        repair.finish(opened, lease, resolved, steps.prepare, steps.stages, log)
        done = complete_round(lease.head)
        ended = advance(lease, resolved, str(flow_run.id), steps, log)
        context.check()  # a process that was frozen and lost the run leaves the report to its successor
        report = write_report(opened, resolved.run)
        lease.finish_advance()
        track(opened, resolved)
        summary: RunSummary = {
            "run": resolved.run,
            "store": opened.url,
            "complete_round": complete_round(lease.head),
            "new_rounds": complete_round(lease.head) - done,
            "ended": ended,
            "report": opened.uri(report["html"]),
            "report_json": opened.uri(report["json"]),
        }
    log(f"\n{metrics_table(report['data'])}\nreport: {summary['report']}")
    show_end(summary, f"{metrics_markdown(report['data'])}\n{run_figures(report['data'])}")
    wait_for_server(END_PATIENCE_SECONDS)
    flush(30.0)
    if context.failures:  # of benchmarks, whose numbers no round needs
        raise context.failures[0]
    return summary


if __name__ == "__main__":
    sys.exit(run_command(spin, sys.argv[1:]))
