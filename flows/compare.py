"""The flow `compare`, behind the deployment `compare/grid`: a grid of runs, and their comparison.

Decides: the parameters of the deployment, and the comparison when members failed. Leaves out: choosing the members,
running them, and the comparison of finished runs.

    prefect deployment run compare/grid -p config=deployments/configs/demo.yaml -p until_round=3
    spinreg grid --config deployments/configs/demo.yaml --until-round 3
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypedDict

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Cancelled, Completed
from pydantic import Field

from flows.grid_runner import FlowRuns, Progress, run_here, run_on_pool
from spinreg_core.api import require_usable
from spinreg_core.comparison.grid import (
    Member,
    check_stored,
    members_of,
    reference_of,
    replaced_reference,
    require_two,
    rounds_open,
)
from spinreg_core.comparison.schema import WrittenComparison
from spinreg_core.comparison.wording import comparison_figures, comparison_markdown, comparison_rows, comparison_table
from spinreg_core.config import RUN_NAME
from spinreg_core.config.resolve import load_config_file, merge, show, validate
from spinreg_core.errors import BadInput
from spinreg_core.reports.trackers import require_trackers
from spinreg_core.store.base import Store
from spinreg_core.store.open import open_store
from spinreg_core.store.probe import require_conditional_writes
from tasks.artifacts import artifact_key, show_markdown, show_table
from tasks.cancellation import RunCancelled, cancellation
from tasks.log import run_log
from tasks.server import END_PATIENCE_SECONDS, flush, wait_for_server
from tasks.stage_process import end_embedded_server_with_us


class GridSummary(TypedDict):
    """Result of the flow `compare`. `failed`: reasons by run; `comparison`: URIs by kind (html, json, csv, parquet)."""

    name: str
    store: str
    runs: list[str]
    failed: dict[str, str]
    comparison: dict[str, str]


def resolve_grid(given: Mapping[str, Any]) -> tuple[Store, list[Member], str]:
    """Return the store, the members and the reference run of a call of `compare`.

    given: the parameters of the call; absent ones and None were not given.

    Raises BadInput, also if a member's run exists with another configuration.
    """
    name, config, fields = given.get("name") or "grid", given.get("config"), given.get("fields") or {}
    file = {} if config is None else load_config_file(config)
    base = merge(file, fields)
    base |= {field: given[field] for field in ("model", "dataset", "store") if given.get(field) is not None}
    # The target comes from the argument, else from the fields, else from the file; each may use either of two names.
    how_far = next((g for g in (fields, file) if g.get("rounds") is not None or g.get("until_round") is not None), {})
    if how_far.get("rounds") is not None and how_far.get("until_round") is not None:
        raise BadInput("rounds", "is given together with until_round", "give one of them")
    base.pop("rounds", None)
    asked = [given.get("until_round"), how_far.get("until_round"), how_far.get("rounds")]
    base["until_round"] = next((number for number in asked if number is not None), None)
    opened = open_store(validate(base | {"run": name}).store)
    base["store"] = opened.url  # a worker on another machine resolves a relative path otherwise
    opened.check()
    axes = ("alpha", "beta_0", "history", "reference", "seeds", "variations")
    members = members_of(name, base, **{axis: given.get(axis) for axis in axes})
    for member in members:
        try:
            require_usable(member.config)
            require_trackers(member.config.tracking)
        except BadInput as error:
            raise BadInput.from_message(f"member {member.run!r}: {error}") from None
    check_stored(opened, members)
    return opened, members, reference_of(members, given.get("against"))


@flow(name="compare", flow_run_name="{name}/compare", persist_result=False)
def compare(
    name: Annotated[str, Field(pattern=RUN_NAME)] = "grid",
    config: str | None = None,
    until_round: Annotated[int | None, Field(ge=1)] = None,
    alpha: list[float] | None = None,
    beta_0: list[float] | None = None,
    history: list[int | Literal["all"]] | None = None,
    reference: list[Literal["previous", "iterate"]] | None = None,
    seeds: list[int] | None = None,
    variations: dict[str, dict[str, Any]] | None = None,
    against: str | None = None,
    model: str | None = None,
    dataset: str | None = None,
    store: str | None = None,
    fields: dict[str, Any] | None = None,
    deployment: str | None = "spin/iterate",
) -> GridSummary | State[Any]:
    """Run a grid of variations of one configuration, and compare them on one page.

    Objects that members have in common are made once. A second start makes only the missing ones; with further values,
    it runs the new members only.

    Args:
        name: Name of the comparison, and prefix of the names of its runs.
        config: Path or URI of the configuration that all members share (YAML or JSON).
        until_round: Last round of every member. Default: as in the configuration.
        alpha: Weights of the previous policy in the reference, at the configured total beta. Default: 1, 0.5, 0.
        beta_0: Instead of alpha: weights of a KL to the base, added to the configured beta.
        history: Numbers of iterates that the opponent averages, or "all". Default: 1, "all".
        reference: Values of objective.reference, "previous" or "iterate". Default: the configuration's.
        seeds: Seeds of every variation. Default: the configuration's.
        variations: Instead of alpha, history and reference: fields by variation name, nested as in a configuration.
        against: Reference run of the comparison. Default: the first of plain SPIN (alpha 1, history 1).
        model: Base model of all members. Default: the configuration's.
        dataset: Data set of all members. Default: the configuration's.
        store: Local folder or s3://bucket/prefix. Default: the configuration's.
        fields: Any other fields of all members, nested as in a configuration; they win over `config`.
        deployment: Deployment that runs the members, in another work pool than this flow.
    """
    end_embedded_server_with_us()
    given = {
        "name": name, "config": config, "until_round": until_round, "alpha": alpha, "beta_0": beta_0,
        "history": history, "reference": reference, "seeds": seeds, "variations": variations,
        "against": against, "model": model, "dataset": dataset, "store": store, "fields": fields,
    }  # fmt: skip
    opened, members, compared_with = resolve_grid(given)
    require_conditional_writes(opened)
    run_log()(f"{len(members)} members, each until round {members[0].target}, in {opened.url}:\n"
              + "\n".join(f"  {member.run}" for member in members))  # fmt: skip
    show_markdown(
        artifact_key(name, "configuration"),
        f"```yaml\n{show(members[0].config)}```",
        "Configuration of its first member",
    )
    progress = Progress(opened, name, members)
    try:
        with cancellation(str(flow_run.id)) as check:
            if deployment is None:
                failures = run_here(opened, members, progress, check)
            else:
                failures = run_on_pool(opened, members, FlowRuns(deployment, opened), progress, check)
    except RunCancelled:
        return Cancelled(
            message="cancelled; the server cancels its members too, and the next start makes what is missing"
        )
    written, summary = compare_complete(opened, name, members, failures, compared_with)
    data, places = written["data"], summary["comparison"]
    show_table(artifact_key(name, "metrics"), comparison_rows(data), f"Comparison {name}, round {data['round']}")
    show_markdown(
        artifact_key(name, "comparison"),
        f"{comparison_markdown(data, places)}\n\n{comparison_figures(data)}",
        f"Comparison {name}",
    )
    run_log()(f"\n{comparison_table(data)}\ncomparison: {places['html']}")
    wait_for_server(END_PATIENCE_SECONDS)
    flush(30.0)
    return end_state(summary, len(members))


def compare_complete(
    store: Store, name: str, members: Sequence[Member], failures: Mapping[str, str], reference: str
) -> tuple[WrittenComparison, GridSummary]:
    """Compare the members that are complete, and name the others on the page. Returns what was written, and a summary.

    Raises SpinregError for fewer than two complete members.
    """
    from spinreg_core.comparison.files import write_comparison

    reasons = {member.run: rounds_open(store, member) for member in members}
    failed = dict(failures) | {run: failures.get(run, why) for run, why in reasons.items() if why is not None}
    complete = [member for member in members if reasons[member.run] is None]
    require_two(complete, failed)
    runs = [member.run for member in complete]
    if reference not in runs:
        lost, reference = reference, replaced_reference(members, complete, reference)
        failed[lost] += f"; the others are compared with {reference} instead"
    written = write_comparison(store, runs, name, reference, failed)
    places = {kind: store.uri(written[kind]) for kind in ("html", "json", "csv", "parquet")}
    return written, {"name": name, "store": store.url, "runs": runs, "failed": failed, "comparison": places}


def end_state(summary: GridSummary, members: int) -> GridSummary | State[GridSummary]:
    """Return the result of the flow: its summary, in a state of its own name if not all members were compared."""
    if not summary["failed"]:
        return summary
    text = f"{len(summary['runs'])} of {members} members compared; failed: {', '.join(summary['failed'])}"
    return Completed(name="Incomplete", message=text, data=summary)
