"""The lease of a run: at most one process advances a run, and changes its head by compare-and-swap.

Decides: when a lease may be taken over, and when its holder is known to be dead. Leaves out: the documents (`head.py`).
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
from typing import Protocol

from spinreg_core.config import MOST_ROUNDS, RunConfig, UntilConfig, fixed_fields
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


class Clock(Protocol):
    """The part of the module `time` that waiting for a lease needs."""

    def monotonic(self) -> float: ...

    def sleep(self, seconds: float, /) -> None: ...


def is_held(head: Head) -> bool:
    """Return whether a process may be advancing the run: its lease has a holder that is not known to be dead."""
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
        """Return a fresh name for the files of one attempt."""
        return f"e{self.epoch:04d}-{secrets.token_hex(4)}"

    def check(self) -> None:
        """Raise LeaseLost if another process has taken the run over."""
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
                    # The tag is another one. Either our own write succeeded and its reply was lost, or the heartbeat of
                    # an earlier try came through, or another process took the run over. Only the last one changes the
                    # epoch (or clears the holder), so with our epoch the change is applied again to what is there now.
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
        """Decide and record how far to advance. Returns (first complete round, round to reach, a sentence saying why).

        `by` names the flow run: the same flow run gets the same answer again (a retry). An advance that was recorded
        and not finished is finished first, and `rounds` adds nothing to it.
        """
        done, pending = complete_round(self.head), self.head.pending_advance
        mine = next((a for a in reversed(self.head.advances) if a.by == by), None)
        if mine is not None:
            return mine.from_, mine.to, f"retry: continuing to round {mine.to}, as recorded"
        if until_round is not None:
            target, why = until_round, f"until_round={until_round}; {done} complete"
            # Nothing to do, so leave a pending advance of another flow run untouched.
            if target <= done:
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
                advance.done = True
            head.advances.append(Advance(by=by, from_=done, to=target, done=False))

        self.update(change)
        return done, target, why

    def finish_advance(self, *, ended: str | None = None, ended_by: UntilConfig | None = None) -> None:
        """Record the advances that have reached their round; with `ended_by`, end the others for the reason `ended`.

        ended_by: the conditions (`until`) that ended the run.
        """

        def change(head: Head) -> None:
            for advance in head.advances:
                if advance.to <= complete_round(head):
                    advance.done = True
                elif ended_by is not None and not advance.done:
                    advance.done, advance.ended = True, ended
                    advance.ended_by = ended_by.model_dump(mode="json")

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
            # The store does not answer. Keep trying: if the lease was lost, the next compare-and-swap shows it.
            except Exception as error:
                print(f"lease of run {self.run!r} not renewed: {error}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Give the lease back, so that the next process need not wait. A failure is printed: a lease also runs out."""
        self._stop.set()
        self._beat.join(timeout=self._lease_seconds)

        def change(head: Head) -> None:
            head.lease.holder = None

        try:
            self.update(change)
        except LeaseLost:
            pass
        # Raised here, this error would hide the one that ended the block.
        except Exception as error:
            print(f"lease of run {self.run!r} not given back: {error}", file=sys.stderr, flush=True)


def describe_lease(lease: Lease) -> str:
    """Return the holder of a lease, for messages."""
    return "nobody" if lease.holder is None else str(lease.holder)


def _acquire(store: Store, run: str, holder: Holder, lease_seconds: float, clock: Clock) -> tuple[Head, str]:
    """Take the lease after its holder has been silent for the longer of its own `lease_seconds` and ours.

    Returns the head and its tag. Raises LeaseHeld as soon as the holder renews the lease.
    """
    # Silence is an unchanged tag over our own monotonic clock: every beat changes the head, and clocks of two machines
    # are never compared.
    key = head_key(run)
    silent_since, last_tag = 0.0, None
    while True:
        found = store.read_tagged(key)
        if found is None:
            raise Damaged(f"{store.uri(key)}: found nothing; expected the head of run {run!r}")
        head, tag = documents.parse(store, key, found[0], Head), found[1]
        current = head.lease.holder
        silent = clock.monotonic() - silent_since
        patience = max(lease_seconds, head.lease.seconds or 0.0)
        if current is None or is_dead(current) or (tag == last_tag and silent >= patience):
            name_heldout_answers(store, head)
            head.lease = Lease(epoch=head.lease.epoch + 1, holder=holder, beat=0, seconds=lease_seconds)
            try:
                return head, store.replace(key, documents.dump(head), tag)
            except Conflict:
                last_tag = None
                continue
        # Measured from after the read: a read that is retried may take longer than a lease.
        if last_tag is None:
            silent_since = clock.monotonic()
        elif tag != last_tag:
            raise LeaseHeld(
                f"run {run!r} is being advanced by {describe_lease(head.lease)}, which renewed its lease just now. "
                "Wait for it, or cancel it; only one process advances a run at a time."
            )
        last_tag = tag
        clock.sleep(min(1.0, lease_seconds / 10))


@contextlib.contextmanager
def hold_lease(store: Store, config: RunConfig, label: str, *, clock: Clock = time) -> Iterator[RunLease]:
    """Create the run if it does not exist, check its configuration, and hold its lease inside the block.

    The configuration of a run that has committed nothing yet is replaced: a first start that failed on a wrong
    data set leaves the name free. `label` names the holder in messages.

    Raises ConfigChanged, LeaseHeld (naming the holder), Damaged (one of the two documents of a run is missing) and
    BadInput (a store without conditional writes).
    """
    run, seconds = config.run, config.resources.lease_seconds
    if read_config(store, run) is None:
        require_conditional_writes(store)
        # Another process may create the run between our two reads; its documents count then.
        with contextlib.suppress(Conflict):
            store.create(config_key(run), _config_document(config))
    # The order matters: a configuration with an epoch was written under a head (`_settle_config`). A head that is
    # missing now, after that was read, is therefore lost and not merely not created yet.
    document = documents.read(store, config_key(run), Configuration)
    settled = document is not None and bool(document.epoch)
    head = documents.read(store, head_key(run), Head)
    if head is None and settled:
        raise Damaged(f"{store.uri(head_key(run))}: found nothing; expected the head of run {run!r}, which was started")
    if head is None:
        free = Lease(epoch=0, holder=None, beat=0, seconds=seconds)
        empty = Head(run=run, lease=free, advances=[], rounds=[])
        with contextlib.suppress(Conflict):
            store.create(head_key(run), documents.dump(empty))
    elif head.has_begun:
        # Checked again under the lease; here it spares a wrong configuration the wait.
        check_config(read_config_with_tag(store, run)[0], config)
    head, tag = _acquire(store, run, make_holder(label), seconds, clock)
    lease = RunLease(store, run, head, tag, seconds)
    try:
        _settle_config(store, config, lease)
        yield lease
    finally:
        lease.close()


def _settle_config(store: Store, config: RunConfig, lease: RunLease) -> None:
    """Write the configuration of the run: a started run keeps its fixed fields, an unstarted one takes all of ours.

    The write is fenced. Every holder writes a document with its own epoch, even if nothing else changes, so a holder
    that was frozen before its write finds another tag when it wakes. Raises ConfigChanged, LeaseLost.
    """
    while True:
        stored, tag = read_config_with_tag(store, config.run)
        if lease.head.has_begun:
            check_config(stored, config)
            # These fields are read outside of runs too, and `spinreg resume` uses the stored ones.
            said = {name: getattr(config, name) for name in ("keep", "benchmarks", "judge", "until", "tracking")}
            alarm = {"alarm_real_drop": config.evaluation.alarm_real_drop}
            config = stored.model_copy(update=said | {"evaluation": stored.evaluation.model_copy(update=alarm)})
        another = fixed_fields(stored) != fixed_fields(config)

        def forget(head: Head, another: bool = another) -> None:
            # Pending advances of a configuration that was replaced no longer apply.
            for advance in head.advances:
                advance.done = advance.done or another

        # This update is needed also without a change: it proves that the lease was ours after the tag was read.
        lease.update(forget)
        try:
            store.replace(config_key(config.run), _config_document(config, lease.epoch), tag)
            return
        # A predecessor wrote late, or we are the late one; the next update tells.
        except Conflict:
            continue


def _config_document(config: RunConfig, epoch: int = 0) -> bytes:
    return documents.dump(Configuration(config=config.model_dump(mode="json"), epoch=epoch))


def _process_identity(pid: int) -> str | None:
    """Return boot, pid namespace, pid and start time of a process of this machine; None if they cannot be read."""
    # A pid alone is not enough: after a reboot, in another container or when numbers wrap, it is another process.
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None
    return f"{boot} {namespace} {pid} {started}"


def make_holder(label: str, pid: int | None = None) -> Holder:
    """Return a process of this machine (default: this one) as the holder of a lease."""
    pid = pid or os.getpid()
    return Holder(label=label, host=socket.gethostname(), pid=pid, identity=_process_identity(pid))


def is_dead(holder: Holder) -> bool:
    """Return True only if the holder was a process of this boot and pid namespace and has ended.

    An unreadable /proc/PID/stat proves nothing: the cause may be hidepid or a lack of file descriptors.
    """
    identity, own = holder.identity, _process_identity(os.getpid())
    if not identity or not own or identity.split()[:2] != own.split()[:2]:
        return False
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return True
    # The process lives and belongs to another user, or the number is out of range.
    except (OSError, OverflowError):
        pass
    return _process_identity(holder.pid) not in (None, identity)
