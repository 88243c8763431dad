"""The commit protocol of `runs/head.py` against a model of a few lines, by hypothesis: any order of starts, commits,
advances, leases that run out, replies that are lost and requests that are refused.

The model knows one writer at most, and that what is committed stays. `test_two_writers.py` walks the requests within
each of these steps; here they are whole, and there are many.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from spinreg_core.config import KeepConfig, ResourcesConfig, RunConfig
from spinreg_core.errors import BadInput, Conflict, LeaseLost, SpinregError, StoreFailed
from spinreg_core.runs.head import HELDOUT, read_head, require_config
from spinreg_core.runs.lease import RunLease, hold_lease
from spinreg_core.runs.stages import stages_of
from tests.support.memory_store import Clock, Memory

LONG = os.environ.get("SPINREG_CHAOS") == "long"
NEEDED = [stage for stage in stages_of(1) if stage != HELDOUT]  # a round is complete without its held-out answers
STAGES = [(number, stage) for number in (1, 2) for stage in stages_of(number)]


class Faulty(Memory):
    """`fault`: what happens to the next write that is a compare-and-swap."""

    fault: str | None = None

    def replace(self, key: str, data: bytes, expected: str) -> str:
        fault, self.fault = self.fault, None
        if fault == "refused":
            raise StoreFailed("the store is away")
        tag = super().replace(key, data, expected)
        if fault == "lost":
            raise Conflict(key)
        return tag


class Commits(RuleBasedStateMachine):
    sessions = Bundle("sessions")

    def __init__(self) -> None:
        super().__init__()
        self.store: Any = Faulty(None, {})
        self._opened = contextlib.ExitStack()
        # The model.
        self.holder: RunLease | None = None
        self.epoch = 0
        self.committed: dict[tuple[int, str], str] = {}
        self.inputs: tuple[str, str] | None = None
        self.pending: int | None = None
        self.asked: dict[str, tuple[int, int]] = {}  # of who recorded an advance, from where to where
        self.keep: int | str = "all"

    def teardown(self) -> None:
        self.store.fault = None
        self._opened.close()

    def done(self) -> int:
        return next(n - 1 for n in (1, 2, 3) if not all((n, stage) in self.committed for stage in NEEDED))

    @rule(target=sessions, keep=st.sampled_from(["all", 1, 2]))
    def start(self, keep: Any) -> Any:
        """Another process, after the holder of the lease has been silent for long enough."""
        config = RunConfig(run="r", resources=ResourcesConfig(lease_seconds=3600), keep=KeepConfig(policies=keep))
        self.store.fault = None
        self.holder = self._opened.enter_context(hold_lease(self.store, config, "a", clock=Clock(self.store)))
        assert self.holder.epoch > self.epoch
        self.epoch, self.keep = self.holder.epoch, keep
        return multiple(self.holder)

    @rule(fault=st.sampled_from(["lost", "refused"]))
    def disturb(self, fault: str) -> None:
        self.store.fault = fault

    def _change(self, session: RunLease, change: Any, refusal: type[SpinregError] | None = None) -> Any:
        """The result of a change that took place; None where it must not have, and did not."""
        before, refused = dict(self.store.data), self.store.fault == "refused"
        try:
            result = change()
        except LeaseLost:
            assert session is not self.holder
        except StoreFailed:
            assert refused
        except SpinregError as error:
            if refusal is None or not isinstance(error, refusal):
                raise
        else:
            assert refusal is None or self.store.data == before
            if self.store.data != before:
                assert session is self.holder
            return result
        assert self.store.data == before
        return None

    @rule(session=sessions, made=st.sampled_from(STAGES), which=st.sampled_from("xy"))
    def commit(self, session: RunLease, made: tuple[int, str], which: str) -> None:
        object_id = f"{made[1]}-{which}"
        other = self.committed.get(made, object_id) != object_id
        done = self._change(session, lambda: session.commit(*made, object_id) or True, SpinregError if other else None)
        if done:
            assert not other
            self.committed[made] = object_id

    @rule(session=sessions, which=st.sampled_from("xy"))
    def commit_inputs(self, session: RunLease, which: str) -> None:
        given = (f"base-{which}", f"data-{which}")
        other = self.inputs not in (None, given)
        if self._change(session, lambda: session.commit_inputs(*given) or True, BadInput if other else None):
            assert not other
            self.inputs = given

    @rule(session=sessions, rounds=st.integers(1, 2), by=st.sampled_from("pqr"))
    def advance_by(self, session: RunLease, rounds: int, by: str) -> None:
        self._advance(session, by, rounds, None, self.pending or self.done() + rounds)

    @rule(session=sessions, until=st.integers(0, 3), by=st.sampled_from("pqr"))
    def advance_until(self, session: RunLease, until: int, by: str) -> None:
        self._advance(session, by, None, until, until)

    def _advance(self, session: RunLease, by: str, rounds: int | None, until: int | None, target: int) -> None:
        expected = self.asked.get(by, (self.done(), target))
        found = self._change(session, lambda: session.begin_advance(by, rounds, until))
        if found is None or session is not self.holder:  # a late one may read what it knew, and change nothing
            return
        assert found[:2] == expected
        if by not in self.asked and (until is None or until > self.done()):
            self.asked[by], self.pending = expected, target

    @rule(session=sessions)
    def finish(self, session: RunLease) -> None:
        done = self._change(session, lambda: session.finish_advance() or True)
        if done and session is self.holder and self.pending is not None and self.pending <= self.done():
            self.pending = None

    @rule(session=consumes(sessions))
    def end(self, session: RunLease) -> None:
        """It gives the lease back, if it has it; one that cannot is like one that was killed."""
        before = dict(self.store.data)
        session.close()
        if session is self.holder:
            self.holder = None
        else:
            assert self.store.data == before

    @invariant()
    def the_store_says_what_the_model_says(self) -> None:
        head = read_head(self.store, "r")
        if head is None:
            assert self.epoch == 0
            return
        assert {(e.round, s): o for e in head.rounds for s, o in e.stages.items()} == self.committed
        assert (head.base, head.data) == (self.inputs or (None, None))
        pending = head.pending_advance
        assert (pending and pending.to) == self.pending
        assert {a.by: (a.from_, a.to) for a in head.advances} == self.asked
        assert head.lease.epoch == self.epoch
        if self.holder is not None:
            assert head.lease.holder is not None
        assert require_config(self.store, "r").keep.policies == self.keep


Commits.TestCase.settings = settings(max_examples=1000 if LONG else 40, stateful_step_count=30, deadline=None)
test_any_order_of_steps = Commits.TestCase
