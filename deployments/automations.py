"""Make the server call a run crashed that has died together with its worker. Run it again whenever you like.

    python deployments/automations.py [--silent-seconds 150]        (PREFECT_API_URL says which server)

A flow run whose process is killed is reported by its worker; with both killed, or the machine gone, nobody reports it,
and it would be `Running` for ever. Runs of the deployments here send a heartbeat every 30 seconds
(PREFECT_FLOWS_HEARTBEAT_FREQUENCY in their job variables); one that has sent some, and then neither a heartbeat nor any
other event for so long, is marked `Crashed`, after which `prefect flow-run retry` and the Retry button of the UI take
it. A run that is alive after all (cut off from the server for longer than that) keeps the run's lease in the store, so
that a retry is refused until it has ended: nothing is lost by a wrong mark.
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
    """silent: how long a run may say nothing after a heartbeat."""
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
    """Create the automation, or make the one of this name like it. Returns `created` or `updated`."""
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
