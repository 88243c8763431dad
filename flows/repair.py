"""Makes anew what `spinreg verify` found damaged, and what was made from it where it comes out otherwise.

Decides: in which order. Leaves out: what is damaged (`spinreg_core/verify.py`), making it (the flow `spin`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flows.spin import spin
from spinreg_core.head import complete_round, open_session, require_config, require_head
from spinreg_core.store import Store
from spinreg_core.verify import Verdict, changed, set_aside


def repair(store: Store, verdict: Verdict, *, say: Callable[[str], None]) -> list[str]:
    """Make the damaged objects of a run anew. Returns those whose content is now another one.

    Rounds that were not complete are left open: what is damaged there is made when the run goes on. Raises LeaseHeld
    while somebody advances the run, and what the flow raises.
    """
    target, config = complete_round(require_head(store, verdict.run)), require_config(store, verdict.run)

    def again(objects: Sequence[str], *, with_parts: bool) -> None:
        with open_session(store, config, "spinreg verify --repair") as session:
            stages = set_aside(store, session, verdict, objects, with_parts=with_parts)
        say(f"making anew: {', '.join(f'{stage} of round {number}' for number, stage in stages)}")
        spin(run=verdict.run, store=store.url, until_round=target)

    again(verdict.damaged, with_parts=False)
    others = changed(store, verdict, verdict.damaged)
    stages = {stage for object_id in others for stage in verdict.dependents[object_id]}
    after = [object_id for object_id, stage in verdict.objects.items() if stage in stages and object_id not in others]
    if after:
        say(f"{', '.join(others)}: not what it was")
        again(after, with_parts=True)
    return others
