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
from prefect.states import Cancelled

from flows.artifacts import RunSummary, show_end, show_round, track
from flows.checks import END_PATIENCE_SECONDS, require_usable, resolve_parameters
from flows.parameters import run_parameters
from flows.round import finish_repair, measure, round_
from flows.terminal import run_command, signals_ignored, stop_message
from spinreg_core.benchmarks.lm_eval import plan_check
from spinreg_core.config import RunConfig, UntilConfig
from spinreg_core.config.resolve import show
from spinreg_core.errors import SpinregError, StagePreempted
from spinreg_core.evaluation.early_stopping import why_ended
from spinreg_core.reports.figures import run_figures
from spinreg_core.reports.run_report import report_data, write_report
from spinreg_core.reports.tables import metrics_markdown, metrics_table
from spinreg_core.runs.head import complete_round, stage_object
from spinreg_core.runs.lease import hold_lease
from spinreg_core.store.base import Store
from spinreg_core.store.open import open_store
from tasks.artifacts import artifact_key, show_markdown
from tasks.benchmark import check_benchmarks
from tasks.cancellation import RunCancelled, cancellation
from tasks.context import Context, use_context
from tasks.evaluate import evaluate
from tasks.log import run_log
from tasks.prepare import prepare
from tasks.run_stage import preempted, run_task
from tasks.server import call_subflow, flush, server_answers, wait_for_server
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


def _why_ended(store: Store, config: RunConfig) -> str | None:
    """Return why the run's conditions (`until`) end it, or None."""
    return None if config.until == UntilConfig() else why_ended(config.until, report_data(store, config.run)["rounds"])


def _advance(config: str | None, parameters: Mapping[str, object]) -> RunSummary:
    log = run_log()
    resolved = resolve_parameters(config, parameters)
    require_usable(resolved)
    log(f"resolved configuration:\n{show(resolved)}")
    show_markdown(
        artifact_key(resolved.run, "configuration"),
        f"```yaml\n{show(resolved)}```",
        f"Resolved configuration of run {resolved.run}",
    )
    opened = open_store(resolved.store)
    label = f"flow run {flow_run.name} ({flow_run.id})"
    with hold_lease(opened, resolved, label) as session, cancellation(str(flow_run.id)) as check:
        if (unfinished := session.head.get("repair")) is not None:  # before anybody counts complete rounds
            with use_context(Context(resolved, opened, session, unfinished["to"], check)):
                finish_repair()
        start, target, why = session.begin_advance(str(flow_run.id), resolved.rounds, resolved.until_round)
        done = complete_round(session.head)
        log(
            f"run {resolved.run!r}: {why}"
            if target > done
            else f"run {resolved.run!r}: round {done} is complete; {why}"
        )
        with use_context(Context(resolved, opened, session, target, check)) as context:
            if plan_check(resolved) is not None:
                run_task(check_benchmarks, resolved.resources, resolved.run)
            run_task(prepare, resolved.resources, resolved.run)
            if stage_object(session.head, 0, "evaluate") is None:
                run_task(evaluate, resolved.resources, resolved.run, 0)
            for earlier in range(start + 1):  # what is measured may have been changed since
                if measure(earlier) or earlier == done == 0:
                    show_round(earlier)
            if complete_round(session.head) < target:  # else the end of the run is next
                track(opened, resolved)
            # From where the advance began, also on a retry: Prefect tells nested flow runs apart by the order of their
            # calls, and would hand round 2 the finished flow run of round 1. Finished rounds show as Reused.
            ended: str | None = None
            for round_number in range(start + 1, target + 1):
                if complete_round(session.head) < round_number:
                    ended = _why_ended(opened, resolved)
                if ended is not None:
                    log(f"run {resolved.run!r} ends before round {round_number}: {ended}")
                    break
                call_subflow(round_, resolved.run, round_number)
                if complete_round(session.head) < round_number:
                    raise SpinregError(f"round {round_number} of run {resolved.run!r} ended without its commits")
        if ended is not None:  # which the report says
            session.finish_advance(ended=ended, ended_by=resolved.until.model_dump(mode="json"))
        context.check()  # a writer that was frozen leaves the report to who took over
        report = write_report(opened, resolved.run)
        session.finish_advance()
        track(opened, resolved)
        summary: RunSummary = {
            "run": resolved.run,
            "store": opened.url,
            "complete_round": complete_round(session.head),
            "new_rounds": complete_round(session.head) - done,
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
