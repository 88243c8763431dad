"""Repair of damaged objects, and of everything made from them if their content changes.

Decides: that the flow `spin` repairs a run, as any start of the run would. Leaves out: finding damage, and the steps of
a repair.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from flows.spin import spin
from spinreg_core.maintenance.repair import begin
from spinreg_core.runs.head import require_config
from spinreg_core.runs.lease import hold_lease
from spinreg_core.store.base import Store


def repair(store: Store, run: str, damaged: Collection[str], *, say: Callable[[str], object]) -> None:
    """Record that these objects of a run need repair, and repair them.

    Incomplete rounds stay open; the next advance of the run makes their damaged objects again. If the flow raises an
    error, the repair stays recorded.

    Raises:
        LeaseHeld: another process advances the run, or another run that has the objects.
    """
    with hold_lease(store, require_config(store, run), "spinreg verify --repair") as lease:
        stages = begin(store, lease, damaged, say)
    if stages:
        say(f"making again: {', '.join(f'{stage} of round {number}' for number, stage in stages)}")
    spin(run=run, store=store.url, until_round=0)
