"""Engines of the further machines of a run (`spinreg join`) take shards from the list of the machine of the flow.

Decides: how they find each other and what makes either let go. The machine of the flow listens at
`resources.rendezvous`, a port that no other stage uses at that time; a guest connects once for every engine it has and
shows the name of the attempt, which only readers of the run's store know. Machines come and go as they like: nobody
waits for them, and a connection that ends is an engine that died.
Leaves out: who gets which shards (`pool.py`), the engine's process (`worker_process.py`), orders (`runtime/nodes.py`).
"""

from __future__ import annotations

import contextlib
import hmac
import queue
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

from spinreg_core.errors import EXIT_BAD_INPUT, EXIT_DAMAGED, EXIT_PREEMPTED, StageFailed
from spinreg_core.generation.worker_process import start_engine
from spinreg_core.runs.job import Job
from spinreg_core.runtime.nodes import post_order, withdraw_order
from spinreg_core.store.base import Store

BEGIN = b"begin\n"  # from the flow's machine: there is work, load the policy
_HELLO_SECONDS = 10.0
_HELLO_BYTES = 512
_CONNECT_SECONDS = 5.0
_STARTS = 3  # engines of a guest that may die before it offers no more in their place
# A machine that is gone without a word is found gone after 20 + 4 * 10 s.
_KEEPALIVE = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 60_000}
Guests = queue.SimpleQueue[tuple[socket.socket, str]]  # (an engine that waits to begin, its machine's name)


@contextmanager
def remote_workers(job: Job, store: Store) -> Iterator[Guests]:
    """Within, the other machines of the run are asked for engines, which arrive in the queue.

    Empty for a run of one machine. Raises StageFailed where the port is taken.
    """
    waiting: Guests = queue.SimpleQueue()
    if job.config.resources.nodes == 1:
        yield waiting
        return
    with _listening(job) as server:
        attempt = post_order(store, job)
        threading.Thread(target=_accept, args=(server, attempt, waiting), daemon=True).start()
        try:
            yield waiting
        finally:
            with contextlib.suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)  # wakes the thread
            withdraw_order(store, job, attempt)
            while not waiting.empty():
                waiting.get()[0].close()


def offer_workers(job: Job, attempt: str, devices: list[dict[str, str]]) -> None:
    """The guest's side: offer one engine per entry of `devices` (their environments) until all is answered."""
    lines: dict[int, socket.socket] = {}  # by engine; none of them is waited for when this process is told to stop
    over = threading.Event()
    with ThreadPoolExecutor(len(devices)) as pool:
        try:
            for one in [pool.submit(_lend, job, attempt, own, i, lines, over) for i, own in enumerate(devices)]:
                one.result()
        finally:
            over.set()
            for line in list(lines.values()):
                with contextlib.suppress(OSError):
                    line.shutdown(socket.SHUT_RDWR)


def _lend(
    job: Job, attempt: str, environment: dict[str, str], number: int, lines: dict[int, socket.socket],
    over: threading.Event,
) -> None:  # fmt: skip
    deaths = 0
    while not over.is_set() and deaths < _STARTS and (line := _connected(job, attempt)) is not None:
        lines[number] = line
        try:  # `over` may have come before the line was known
            asked = not over.is_set() and line.recv(len(BEGIN), socket.MSG_WAITALL) == BEGIN
        except OSError:
            asked = False
        if not asked or over.is_set():
            line.close()
            return
        # A writer of its own: what another engine has committed must not be written over.
        own = replace(job, writer=f"{job.writer}-{socket.gethostname()}-{uuid.uuid4().hex[:8]}")
        status = start_engine(own, environment, line).wait()
        if status in (EXIT_BAD_INPUT, EXIT_DAMAGED, EXIT_PREEMPTED):
            return  # it will not go better the next time
        deaths += status != 0


def _address(job: Job) -> tuple[str, int]:
    assert job.config.resources.rendezvous is not None, "checked with the configuration: nodes need it"
    host, _, port = job.config.resources.rendezvous.rpartition(":")
    return host.strip("[]"), int(port)


def _listening(job: Job) -> socket.socket:
    """On all addresses, as torchrun's own rendezvous: HOST may be a name that only leads here (a service, a NAT)."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(("", _address(job)[1]), family=family, dualstack_ipv6=both, backlog=128)
    except OSError as error:
        raise StageFailed(f"resources.rendezvous: cannot listen at port {_address(job)[1]} for the engines of other "
                          f"machines: {error}") from error  # fmt: skip


def _accept(server: socket.socket, attempt: str, waiting: Guests) -> None:
    while True:
        try:
            line, peer = server.accept()
        except OSError:
            return  # closed: all is answered
        threading.Thread(target=_authenticate, args=(line, str(peer[0]), attempt, waiting), daemon=True).start()


def _authenticate(line: socket.socket, peer: str, attempt: str, waiting: Guests) -> None:
    """Admit a connection that names the attempt: `ATTEMPT NAME`, padded to a fixed length."""
    try:
        line.settimeout(_HELLO_SECONDS)
        shown, _, name = _received(line, _HELLO_BYTES).decode("utf-8", "replace").rstrip().partition(" ")
        if hmac.compare_digest(shown.encode(), attempt.encode()):
            line.settimeout(None)
            _keep_alive(line)
            waiting.put((line, f"{name} ({peer.removeprefix('::ffff:')})"))
            return
    except OSError:
        pass
    line.close()


def _received(line: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count and (more := line.recv(count - len(found))):
        found += more
    return found


def _connected(job: Job, attempt: str) -> socket.socket | None:
    """Return a connection to the machine of the flow, or None if it has stopped listening."""
    end = time.monotonic() + _CONNECT_SECONDS
    while True:
        try:
            line = socket.create_connection(_address(job), timeout=_CONNECT_SECONDS)
        except OSError as error:
            if time.monotonic() < end:
                time.sleep(0.5)
                continue
            print(f"nobody listens at {job.config.resources.rendezvous} ({error}): all is answered", flush=True)
            return None
        line.settimeout(None)
        _keep_alive(line)
        hello = f"{attempt} {socket.gethostname()}".encode()[:_HELLO_BYTES]
        line.sendall(hello.ljust(_HELLO_BYTES))
        return line


def _keep_alive(line: socket.socket) -> None:
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):  # Linux has all of them
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
