"""Makes anew what `spinreg verify` found damaged, and what was made from it where it comes out otherwise.

Decides: that the flow `spin` does it, as any start of the run would. Leaves out: what is damaged
(`spinreg_core/maintenance/verify.py`), the steps of a repair and their order (`spinreg_core/maintenance/repair.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from flows.spin import spin
from spinreg_core.maintenance.repair import begin
from spinreg_core.runs.head import require_config
from spinreg_core.runs.lease import hold_lease
from spinreg_core.store.base import Store


def repair(store: Store, run: str, damaged: Collection[str], *, say: Callable[[str], object]) -> None:
    """Record that these objects of a run are to be made anew, and have that done. Rounds that were not complete are
    left open: what was damaged there is made when the run goes on.

    Raises LeaseHeld while somebody advances the run, or another one that has the objects; and what the flow raises: the
    repair stays recorded then.
    """
    with hold_lease(store, require_config(store, run), "spinreg verify --repair") as session:
        stages = begin(store, session, damaged, say)
    if stages:
        say(f"making anew: {', '.join(f'{stage} of round {number}' for number, stage in stages)}")
    spin(run=run, store=store.url, until_round=0)
