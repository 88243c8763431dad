"""The flow `compare`, behind the deployment `compare/grid`: runs that differ in what is compared, and their comparison.

Decides: the parameters people see, and what the comparison is made of when members failed. Leaves out: who the members
are (`spinreg_core/comparison/grid.py`), running them (`flows/members.py`), the comparison itself
(`spinreg_core/comparison*.py`).

    prefect deployment run compare/grid -p config=deployments/configs/demo.yaml -p until_round=3
    spinreg grid --config deployments/configs/demo.yaml --until-round 3
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Cancelled, Completed
from pydantic import Field

from flows.checks import END_PATIENCE_SECONDS, require_usable
from flows.grid_runner import Progress, run_here, run_on_pool
from spinreg_core.comparison.grid import (
    Member,
    check_stored,
    members_of,
    reference_of,
    replaced_reference,
    require_two,
    rounds_open,
)
from spinreg_core.comparison.text import comparison_figures, comparison_markdown, comparison_rows, comparison_table
from spinreg_core.config import RUN_NAME
from spinreg_core.config.resolve import load_config_file, merge, show, validate
from spinreg_core.errors import BadInput
from spinreg_core.store.base import Store
from spinreg_core.store.open import open_store
from spinreg_core.store.probe import require_conditional_writes
from tasks.artifacts import artifact_key, show_markdown, show_table
from tasks.cancellation import RunCancelled, cancellation
from tasks.log import run_log
from tasks.server import flush, wait_for_server
from tasks.stage_process import end_embedded_server_with_us


def resolve_grid(given: dict[str, Any]) -> tuple[Store, list[Member], str]:
    """The store, the members and the run they are compared with, that a call of `compare` stands for. given: its
    parameters; those that are absent or None were not given. Raises BadInput, also where a member's run exists with
    another configuration."""
    name, config, said = given.get("name") or "grid", given.get("config"), given.get("fields") or {}
    file = {} if config is None else load_config_file(config)
    base = merge(file, said)
    base |= {field: given[field] for field in ("model", "dataset", "store") if given.get(field) is not None}
    # How far: the argument, else the fields, else the file; each by one of two names.
    how_far = next((g for g in (said, file) if g.get("rounds") is not None or g.get("until_round") is not None), {})
    if how_far.get("rounds") is not None and how_far.get("until_round") is not None:
        raise BadInput("rounds", "until_round besides", "either of the two")
    base.pop("rounds", None)
    asked = [given.get("until_round"), how_far.get("until_round"), how_far.get("rounds")]
    base["until_round"] = next((number for number in asked if number is not None), None)
    opened = open_store(validate(base | {"run": name}).store)
    base["store"] = opened.url  # a worker elsewhere has other defaults
    opened.check()
    walked = ("alpha", "beta_0", "history", "seeds", "variations")
    members = members_of(name, base, **{field: given.get(field) for field in walked})
    for member in members:
        try:
            require_usable(member.config)
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
    seeds: list[int] | None = None,
    variations: dict[str, dict[str, Any]] | None = None,
    against: str | None = None,
    model: str | None = None,
    dataset: str | None = None,
    store: str | None = None,
    fields: dict[str, Any] | None = None,
    deployment: str | None = "spin/iterate",
) -> dict[str, Any] | State[Any]:
    """Run a grid of variations over one configuration, and compare them on one page.

    What members have in common is made once. Started again, it goes on with what is missing; with further values, it
    runs the new members only.

    Args:
        name: Name of the comparison, with which the names of its runs begin.
        config: Path or URI of the configuration that all members share (YAML or JSON).
        until_round: How many rounds every member has. Default: as in the configuration.
        alpha: Weights of the previous policy in the reference, at the configured total beta. Default: 1, 0.5, 0.
        beta_0: Instead of alpha: weights of a KL to the base that is added to the configured beta.
        history: How many iterates the opponent averages, each a number or "all". Default: 1, "all".
        seeds: Seeds that every variation is run with. Default: the configuration's.
        variations: Instead of alpha and history: fields by name of the variation, nested as in a configuration.
        against: The run that the others are compared with. Default: the first of plain SPIN (alpha 1, history 1).
        model: Base model of all members. Default: the configuration's.
        dataset: Data set of all members. Default: the configuration's.
        store: Where everything is kept. Default: the configuration's.
        fields: Any other fields of all members, nested as in a configuration; they win over it.
        deployment: Deployment that runs the members; its work pool must be another than this flow's.
    """
    end_embedded_server_with_us()
    given = {
        "name": name, "config": config, "until_round": until_round, "alpha": alpha, "beta_0": beta_0,
        "history": history, "seeds": seeds, "variations": variations, "against": against, "model": model,
        "dataset": dataset, "store": store, "fields": fields,
    }  # fmt: skip
    opened, members, reference = resolve_grid(given)
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
                failures = run_on_pool(opened, members, deployment, progress, check)
    except RunCancelled:
        return Cancelled(
            message="cancelled, and with it its members (by the server); the next start goes on with what is missing"
        )
    return _end(opened, name, members, failures, reference)


def _end(
    opened: Store, name: str, members: Sequence[Member], failures: dict[str, str], reference: str
) -> dict[str, Any] | State[Any]:
    """Compare the members that came to their end, and show it. The others are named on the page."""
    from spinreg_core.comparison.page import write_comparison

    reasons = {member.run: rounds_open(opened, member) for member in members}
    told = failures | {run: failures.get(run, why) for run, why in reasons.items() if why is not None}
    complete = [member for member in members if reasons[member.run] is None]
    require_two(complete, told)
    runs = [member.run for member in complete]
    if reference not in runs:
        lost, reference = reference, replaced_reference(members, complete, reference)
        told[lost] += f"; the others are compared with {reference} instead"
    written = write_comparison(opened, runs, name, reference, told)
    data, places = written["data"], {kind: opened.uri(written[kind]) for kind in ("html", "json", "csv", "parquet")}
    show_table(artifact_key(name, "metrics"), comparison_rows(data), f"Comparison {name}, round {data['round']}")
    show_markdown(
        artifact_key(name, "comparison"),
        f"{comparison_markdown(data, places)}\n\n{comparison_figures(data)}",
        f"Comparison {name}",
    )
    run_log()(f"\n{comparison_table(data)}\ncomparison: {places['html']}")
    wait_for_server(END_PATIENCE_SECONDS)
    flush(30.0)
    summary = {"name": name, "store": opened.url, "runs": runs, "failed": told, "comparison": places}
    if told:
        return Completed(
            name="Incomplete", message=f"{len(runs)} of {len(members)} members compared; failed: {', '.join(told)}",
            data=summary,
        )  # fmt: skip
    return summary
