"""Artifacts of a run in the Prefect UI (tables of metrics, summaries, links), and its trackers."""

from __future__ import annotations

from typing import TypedDict

from spinreg_core.config import RunConfig
from spinreg_core.reports.figures import run_figures
from spinreg_core.reports.run_report import report_data
from spinreg_core.reports.schema import Report
from spinreg_core.reports.tables import link, metrics_markdown, metrics_rows
from spinreg_core.reports.trackers import send
from spinreg_core.store.base import Store
from tasks.artifacts import artifact_key, show_markdown, show_table
from tasks.context import current_context
from tasks.log import run_log


class RunSummary(TypedDict):
    """Result of the flow `spin`. `ended`: why the run ended early; `report`, `report_json`: URIs."""

    run: str
    store: str
    complete_round: int
    new_rounds: int
    ended: str | None
    report: str
    report_json: str


def show_round(round_number: int) -> None:
    """Show the metrics so far as a table, and a summary with the addresses of the round's objects.

    Best effort: the round is committed, and a store that cannot be read at this moment must not end the run.
    """
    context = current_context()
    run, head = context.config.run, context.lease.head
    try:
        data = report_data(context.store, run)
        show_table(
            artifact_key(run, "round", round_number, "metrics"),
            metrics_rows(data),
            f"Held-out metrics of run {run}, base to round {round_number}",
        )
        lines = [f"# {run}, round {round_number}", "", metrics_markdown(data), "", run_figures(data), ""]
        lines += ["## In the store", ""]
        for entry in head.rounds:
            if entry.round == round_number:
                lines += [
                    f"- {stage}: {link(context.store.uri(f'objects/{object_id}'))}"
                    for stage, object_id in (entry.stages | entry.measured).items()
                ]
        show_markdown(artifact_key(run, "round", round_number), "\n".join(lines), f"Round {round_number} of run {run}")
    except Exception as error:
        run_log()(f"metrics of round {round_number} cannot be shown: {error}")


def show_end(summary: RunSummary, markdown: str) -> None:
    """Show the whole run's table, and the addresses of its report."""
    text = f"# {summary['run']}\n\n{markdown}\n\n"
    if summary["ended"]:
        text += f"Ended before its target round: {summary['ended']}.\n\n"
    text += f"Report: {link(summary['report'])}\n\nData: {link(summary['report_json'])}\n"
    show_markdown(artifact_key(summary["run"], "report"), text, f"Report of run {summary['run']}")


def track(store: Store, config: RunConfig) -> None:
    """Send all metrics of the run to the trackers of the configuration.

    Best effort, as `show_round`: a tracker that fails gets the same metrics again with the next round.
    """
    data: Report | None = None
    for tracker in config.tracking.to:
        try:
            data = data or report_data(store, config.run)
            send(tracker, data)
        except Exception as error:
            run_log()(f"run {config.run!r} is not shown in {tracker}: {error}")
