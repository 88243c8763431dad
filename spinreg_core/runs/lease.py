"""Who holds a lease: the process, and whether it is known to be dead.

Decides: by what a process of this machine is told from a later one with its number. Leaves out: leases (`head.py`).
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from spinreg_core.config import MOST_ROUNDS, RunConfig, fixed_fields
from spinreg_core.errors import BadInput, Conflict, Damaged, LeaseHeld, LeaseLost, SpinregError
from spinreg_core.runs.head import (
    Advance,
    Configuration,
    Head,
    Holder,
    Lease,
    check_config,
    config_key,
    head_key,
    name_heldout_answers,
    read_config,
    read_config_with_tag,
)
from spinreg_core.runs.stages import complete_round
from spinreg_core.store import documents
from spinreg_core.store.base import Store
from spinreg_core.store.probe import require_conditional_writes


def is_held(head: Head) -> bool:
    """Whether somebody may be advancing the run: its lease was not given back, and no dead process of ours holds it."""
    holder = head.lease.holder
    return holder is not None and not is_dead(holder)


class RunLease:
    """The right to advance one run, renewed in the background until `close`. Made by `hold_lease`."""

    def __init__(self, store: Store, run: str, head: Head, tag: str, lease_seconds: float) -> None:
        self.store, self.run, self.head = store, run, head
        self.epoch = head.lease.epoch
        self._tag, self._lease_seconds = tag, lease_seconds
        self._lock, self._stop = threading.Lock(), threading.Event()
        self.lost: str | None = None
        self._beat = threading.Thread(target=self._renew, name=f"lease-{run}", daemon=True)
        self._beat.start()

    def writer(self) -> str:
        """A fresh name for one attempt's files."""
        return f"e{self.epoch:04d}-{secrets.token_hex(4)}"

    def check(self) -> None:
        """Raise LeaseLost if another process took the run over."""
        if self.lost:
            raise LeaseLost(self.lost)

    def update(self, change: Callable[[Head], None]) -> None:
        """Apply `change` to the head by compare-and-swap. Raises LeaseLost."""
        with self._lock:
            self.check()
            for _ in range(10):
                head = self.head.model_copy(deep=True)
                change(head)
                try:
                    self._tag = self.store.replace(head_key(self.run), documents.dump(head), self._tag)
                    self.head = head
                    return
                except Conflict:
                    # Either an acknowledgement of ours was lost, or somebody took over: the epoch tells.
                    found = self.store.read_tagged(head_key(self.run))
                    if found is None:
                        self.lost = f"run {self.run!r}: its head.json vanished from the store"
                        self.check()
                    assert found is not None
                    current = documents.parse(self.store, head_key(self.run), found[0], Head)
                    if current.lease.epoch != self.epoch or current.lease.holder is None:
                        holder = describe_lease(current.lease)
                        self.lost = f"run {self.run!r} was taken over by {holder}; nothing more is committed"
                        self.check()
                    self.head, self._tag = current, found[1]
            raise SpinregError(f"run {self.run!r}: head.json keeps changing under us; gave up after 10 tries")

    def commit(self, round_number: int, stage: str, object_id: str) -> None:
        """Record that a round's stage is this object. Raises SpinregError if it already is another one."""

        def change(head: Head) -> None:
            existing = head.stage(round_number, stage)
            if existing not in (None, object_id):
                raise SpinregError(f"round {round_number} {stage} is committed as {existing}; refusing {object_id}")
            head.enter(round_number, stage, object_id)

        self.update(change)

    def commit_inputs(self, base: str, data: str) -> None:
        """Record the base policy and the prepared rows of the run, once."""

        def change(head: Head) -> None:
            for name, value in (("base", base), ("data", data)):
                if getattr(head, name) not in (None, value):
                    raise BadInput(
                        f"run {self.run!r}, {name}", f"{value} (the model or the data set changed since the run began)",
                        f"{getattr(head, name)}",
                    )  # fmt: skip
                setattr(head, name, value)

        self.update(change)

    def begin_advance(self, by: str, rounds: int | None, until_round: int | None) -> tuple[int, int, str]:
        """Decide and record how far to go. Returns (round gone out from, round to reach, one sentence saying why).

        `by` names the flow run: the same one asking again (a retry) gets the same answer. An advance that was
        recorded and not finished is finished first, and `rounds` adds nothing to it.
        """
        done, pending = complete_round(self.head), self.head.pending_advance
        mine = next((a for a in reversed(self.head.advances) if a.by == by), None)
        if mine is not None:
            return mine.from_, mine.to, f"retry: going on to round {mine.to}, as recorded"
        if until_round is not None:
            target, why = until_round, f"until_round={until_round}; {done} complete"
            if target <= done:  # asks for nothing, so it says nothing about an advance of somebody else's either
                return done, target, why
        elif pending is not None:
            target = pending.to
            why = f"finishing the advance {pending.from_} -> {target} recorded by {pending.by}; nothing added"
        else:
            target = done + (rounds or 1)
            if target > MOST_ROUNDS:
                raise BadInput("rounds", f"{rounds or 1} after round {done}", f"at most {MOST_ROUNDS} rounds of a run")
            why = f"advancing by {rounds or 1} from round {done}"

        def change(head: Head) -> None:
            for advance in head.advances:
                advance.done = True  # superseded by the one being recorded
            head.advances.append(Advance(by=by, from_=done, to=target, done=False))

        self.update(change)
        return done, target, why

    def finish_advance(self, *, ended: str | None = None, ended_by: dict[str, Any] | None = None) -> None:
        """Record which advances have reached their round, or why they ended before, by which conditions (`until`)."""

        def change(head: Head) -> None:
            for advance in head.advances:
                if advance.to <= complete_round(head):
                    advance.done = True
                elif ended_by is not None and not advance.done:
                    advance.done, advance.ended, advance.ended_by = True, ended, ended_by

        if self.head.pending_advance is not None:
            self.update(change)

    def _renew(self) -> None:
        def change(head: Head) -> None:
            head.lease.beat += 1

        while not self._stop.wait(self._lease_seconds / 3):
            try:
                self.update(change)
            except LeaseLost:
                return
            except Exception as error:  # the store is away: keep asking, the compare-and-swap decides in the end
                print(f"lease of run {self.run!r} not renewed: {error}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Give the run back, so that the next process need not wait. Best effort: a lease runs out by itself."""
        self._stop.set()
        self._beat.join(timeout=self._lease_seconds)

        def change(head: Head) -> None:
            head.lease.holder = None

        try:
            self.update(change)
        except LeaseLost:
            pass
        except Exception as error:  # must not stand in for what ended the session
            print(f"lease of run {self.run!r} not given back: {error}", file=sys.stderr, flush=True)


def describe_lease(lease: Lease) -> str:
    """Whose it is, for messages."""
    return "nobody" if lease.holder is None else str(lease.holder)


def _acquire(store: Store, run: str, holder: Holder, lease_seconds: float) -> tuple[Head, str]:
    """Take the lease, after a holder has been silent for the longer of its own `lease_seconds` and ours.

    Raises LeaseHeld as soon as the holder renews it.
    """
    key = head_key(run)
    silent_since, last_tag = 0.0, None
    while True:
        found = store.read_tagged(key)
        if found is None:
            raise Damaged(f"{store.uri(key)}: found nothing; expected the head of run {run!r}")
        head, tag = documents.parse(store, key, found[0], Head), found[1]
        current = head.lease.holder
        silent = time.monotonic() - silent_since  # since `last_tag` was first seen
        patience = max(lease_seconds, head.lease.seconds or 0.0)
        if current is None or is_dead(current) or (tag == last_tag and silent >= patience):
            name_heldout_answers(store, head)
            head.lease = Lease(epoch=head.lease.epoch + 1, holder=holder, beat=0, seconds=lease_seconds)
            try:
                return head, store.replace(key, documents.dump(head), tag)
            except Conflict:
                last_tag = None
                continue
        if last_tag is None:  # now, not before the read: one that is tried again may take longer than a lease
            silent_since = time.monotonic()
        elif tag != last_tag:
            raise LeaseHeld(
                f"run {run!r} is being advanced by {describe_lease(head.lease)}, which renewed its lease just now. "
                "Wait for it, or cancel it; only one process advances a run at a time."
            )
        last_tag = tag
        time.sleep(min(1.0, lease_seconds / 10))


@contextlib.contextmanager
def hold_lease(store: Store, config: RunConfig, label: str) -> Iterator[RunLease]:
    """Create the run if there is none, check its configuration, and hold its lease inside the block.

    The configuration of a run that has committed nothing yet is replaced: a first start that failed on a wrong
    data set has not used the name up.

    Raises ConfigChanged, LeaseHeld (naming the holder), Damaged (one of the two documents of a run is gone) and
    BadInput (a store without conditional writes).
    """
    run, seconds = config.run, config.resources.lease_seconds
    if read_config(store, run) is None:
        require_conditional_writes(store)
        with contextlib.suppress(Conflict):  # another process created the run between our two looks
            store.create(config_key(run), _config_document(config))
    # Read before the head: an epoch is that of a head which was there (`_settle_config`), so none now is one lost.
    document = documents.read(store, config_key(run), Configuration)
    settled = document is not None and bool(document.epoch)
    head = documents.read(store, head_key(run), Head)
    if head is None and settled:
        raise Damaged(f"{store.uri(head_key(run))}: found nothing; expected the head of run {run!r}, which was started")
    if head is None:
        lease = Lease(epoch=0, holder=None, beat=0, seconds=seconds)
        empty = Head(run=run, lease=lease, advances=[], rounds=[])
        with contextlib.suppress(Conflict):
            store.create(head_key(run), documents.dump(empty))
    elif head.has_begun:
        check_config(read_config_with_tag(store, run)[0], config)  # before waiting for a lease
    head, tag = _acquire(store, run, make_holder(label), seconds)
    session = RunLease(store, run, head, tag, seconds)
    try:
        _settle_config(store, config, session)
        yield session
    finally:
        session.close()


def _settle_config(store: Store, config: RunConfig, session: RunLease) -> None:
    """Check the configuration of a run that has begun, and keep what it is to keep; make ours that of one that has not.

    The write is fenced: every holder writes its own document, with its epoch in it, also where it says nothing new, so
    one that was frozen before its write finds another tag when it wakes. Raises ConfigChanged, LeaseLost.
    """
    while True:
        stored, tag = read_config_with_tag(store, config.run)
        if session.head.has_begun:
            check_config(stored, config)
            # Read outside of runs too, and gone on with by `spinreg resume`.
            said = {name: getattr(config, name) for name in ("keep", "benchmarks", "judge", "until", "tracking")}
            config = stored.model_copy(update=said)
        another = fixed_fields(stored) != fixed_fields(config)

        def forget(head: Head, another: bool = another) -> None:
            for advance in head.advances:  # what the other configuration was to reach is nobody's wish now
                advance.done = advance.done or another

        session.update(forget)  # also shows that the lease was still ours after the tag was read
        try:
            store.replace(config_key(config.run), _config_document(config, session.epoch), tag)
            return
        except Conflict:  # a predecessor's late write; the next update tells whether we are the late one
            continue


def _config_document(config: RunConfig, epoch: int = 0) -> bytes:
    return documents.dump(Configuration(config=config.model_dump(mode="json"), epoch=epoch))


def _process_identity(pid: int) -> str | None:
    """Boot, pid namespace, pid and start time of a process of this machine; None where that cannot be read."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None
    return f"{boot} {namespace} {pid} {started}"


def make_holder(label: str, pid: int | None = None) -> Holder:
    """Return a process of this machine (default: this one) as a holder that can be seen to be dead."""
    pid = pid or os.getpid()
    return Holder(label=label, host=socket.gethostname(), pid=pid, identity=_process_identity(pid))


def is_dead(holder: Holder) -> bool:
    """True only if the holder was a process of this boot and pid namespace that lives no more.

    That its /proc/PID/stat cannot be read proves nothing: hidepid, or no file descriptor left.
    """
    identity, own = holder.identity, _process_identity(os.getpid())
    if not identity or not own or identity.split()[:2] != own.split()[:2]:
        return False
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # it lives and is somebody else's; or no process has such a number
        pass
    return _process_identity(holder.pid) not in (None, identity)
