"""Register an automation that marks runs as crashed when they died together with their worker. Safe to run again.

    python deployments/automations.py [--silent-seconds 150]        (for the server at PREFECT_API_URL)

A worker reports a flow run whose process is killed. If the worker or the machine dies too, the flow run would stay
`Running` forever. Runs of the deployments here send a heartbeat every 30 seconds (PREFECT_FLOWS_HEARTBEAT_FREQUENCY in
their job variables). A run that has sent heartbeats, and then no event of any kind for this time, is marked `Crashed`;
`prefect flow-run retry` and the Retry button of the UI then accept it. A run that is still alive, but was cut off from
the server, keeps its lease in the store. A retry is refused until it has ended, so a wrong mark loses nothing.
"""

from __future__ import annotations

import argparse
import sys
from datetime import timedelta

from prefect.automations import AutomationCore
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification

from spinreg_core.errors import BadInput
from tasks.server import require_server

NAME = "spinreg: no heartbeat, crashed"
FLOWS = ["spin", "round", "compare"]
SILENT_SECONDS = 150  # five heartbeats


def crashed_without_heartbeats(silent: timedelta) -> AutomationCore:
    """Return the automation. silent: longest time without an event after a heartbeat."""
    return AutomationCore(
        name=NAME,
        description=f"Runs of spinreg that sent heartbeats and then nothing for {silent.total_seconds():g} s.",
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.*"},
            match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
            match_related=ResourceSpecification({"prefect.resource.role": ["flow"], "prefect.resource.name": FLOWS}),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=silent,
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED,
                message=f"no heartbeat for {silent.total_seconds():g} s: the flow and its worker are gone, or cut off",
            )
        ],
    )


def register(automation: AutomationCore) -> str:
    """Create the automation, or update the one of this name. Returns `created` or `updated`."""
    with get_client(sync_client=True) as client:
        same = client.read_automations_by_name(automation.name)
        if not same:
            client.create_automation(automation)
            return "created"
        client.update_automation(same[0].id, automation)
        for further in same[1:]:
            client.delete_automation(further.id)
        return "updated"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--silent-seconds", type=int, default=SILENT_SECONDS)
    given = parser.parse_args()
    if given.silent_seconds < 10:
        parser.error(
            f"--silent-seconds: found {given.silent_seconds}; expected at least 10 (150 for runs of 30 s beats)"
        )
    automation = crashed_without_heartbeats(timedelta(seconds=given.silent_seconds))
    try:
        require_server()
    except BadInput as error:
        sys.exit(f"automations.py: {error}")
    print(f"{register(automation)}: {automation.name}")


if __name__ == "__main__":
    main()
