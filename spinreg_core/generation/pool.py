"""Several engines, each a process with its own GPUs, on this machine or on others, share a list of shards.

Decides: who gets which shards when, each time of one source, and that what a dead engine had open goes back to the
list.
Leaves out: what an engine does (`worker.py`), its process (`worker_process.py`), how those of other machines come here
(`remote_workers.py`), how many there are (`generate.py`).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import queue
import re
import socket
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import cast

from spinreg_core.errors import EXIT_BAD_INPUT, EXIT_DAMAGED, StageFailed
from spinreg_core.generation.remote_workers import BEGIN, Guests, remote_workers
from spinreg_core.generation.shards import Shard, ShardMeta, Source
from spinreg_core.generation.worker_process import EngineProcess, start_engine
from spinreg_core.runs.job import Job
from spinreg_core.runs.objects import read_part
from spinreg_core.runtime.failures import process_error
from spinreg_core.store.base import Store

# Engines that died over one shard before it is given up: its prompts may be what kills them.
_DEATHS = 3
# Answers in one wave: enough that its end, where the engine runs empty, does not count.
_WAVE = 4096
_LEAST_WAVE = 256
# The interval at which the pool looks for engines of other machines.
_LOOK_SECONDS = 0.5
_LINE = re.compile(r"^(?:answered (\d+);|committed (\d+) (\{.*\});|(idle);|ended (-?\d+) (\[.*\]);)$")


@dataclass
class _Engine:
    line: socket.socket
    device: int | None  # which of the pool's; None for an engine of another machine
    own: EngineProcess | None
    machine: str = ""
    source: Source | None = None  # of what it was given last
    open: list[int] = field(default_factory=list)
    again: bool = False  # they are open elsewhere too
    uncommitted: int = 0  # answers it told of, of shards that it has not committed
    status: int | None = None  # of its end, where it told of that
    last: list[str] = field(default_factory=list)  # what it printed last


def next_wave(shards: list[Shard], engines: int, total: int) -> list[Shard]:
    """Return the shards that an engine gets next of those left, all of the first one's source.

    Waves become smaller, so that all engines end together. They never have fewer answers than keep an engine busy, or
    than an even share of all that there were (`total`).
    """
    left = sum(len(shard.rows) for shard in shards)
    least = min(_LEAST_WAVE, -(-total // engines))
    most = _WAVE if engines == 1 else min(_WAVE, max(-(-left // (2 * engines)), least))
    found: list[Shard] = []
    size = 0
    for shard in shards:
        if found and (shard.source != found[0].source or size + len(shard.rows) > most):
            break
        found.append(shard)
        size += len(shard.rows)
    return found


@dataclass
class Pool:
    """The list of shards, and the engines of one kind that take from it.

    devices: for each engine of this machine, the part of its environment that names its GPUs.
    """

    job: Job
    store: Store
    shards: list[Shard]
    devices: list[dict[str, str]]
    on_answer: Callable[[int], None]
    on_commit: Callable[[int, ShardMeta], None]

    def __post_init__(self) -> None:
        sources = sorted({shard.source for shard in self.shards})
        extra = {"sources": [[source.iterate, source.geometric] for source in sources]}
        self.job = replace(self.job, extra=self.job.extra | extra)
        self.left, self.by_number = list(self.shards), {shard.number: shard for shard in self.shards}
        self.done: set[int] = set()
        # Deaths of engines of this machine, by shard.
        self.deaths: Counter[int] = Counter()
        # Shards that an engine of another machine died over, which only engines of this machine get again.
        self.suspects: set[int] = set()
        self.said: queue.Queue[tuple[_Engine, str | None]] = queue.Queue()
        self.engines: list[_Engine] = []
        self.writers = itertools.count()
        self.total = sum(len(shard.rows) for shard in self.shards)
        # Answers reported to `on_answer`.
        self.counted = 0

    def run(self) -> None:
        """Have all shards committed.

        Raises:
            BadInput, Damaged: an engine of this machine ended with that error.
            StageFailed: engines died over the same shard again and again.
        """
        with remote_workers(self.job, self.store) as waiting:
            try:
                self._serve(waiting)
            finally:
                self._end()

    def _serve(self, waiting: Guests) -> None:
        self._start_own()
        while self.engines and not self._nothing_to_wait_for():
            self._admit_guests(waiting)
            try:
                engine, line = self.said.get(timeout=_LOOK_SECONDS)
            except queue.Empty:
                continue
            if line is not None:
                self._on_message(engine, line)
                continue
            self.engines.remove(engine)
            engine.line.close()
            self._on_worker_exit(engine)
            self._start_own()
        self._count(self.total - self.counted)

    def _end(self) -> None:
        for engine in self.engines:
            if engine.own is not None:
                engine.own.process.kill()
            with contextlib.suppress(OSError):
                engine.line.shutdown(socket.SHUT_RDWR)
        for engine in self.engines:
            if engine.own is not None:
                engine.own.wait()
            engine.line.close()

    def _nothing_to_wait_for(self) -> bool:
        """Return True once all is committed and no engine of this machine is about to end.

        An engine without open shards is at the end of its input. It ends in order, and so gives its memory back.
        """
        done = len(self.done) == len(self.by_number)
        return done and not any(engine.own is not None and not engine.open for engine in self.engines)

    def _start_own(self) -> None:
        """Start engines of this machine while there is work for them."""
        for device in set(range(len(self.devices))) - {engine.device for engine in self.engines}:
            if not self.left:
                break
            ours, its = socket.socketpair()
            # Each engine is a writer of its own, so that it never overwrites a file that another one has committed.
            job = replace(self.job, writer=f"{self.job.writer}-{next(self.writers)}")
            self._take_on(_Engine(ours, device, start_engine(job, self.devices[device], its)))

    def _admit_guests(self, waiting: Guests) -> None:
        while not waiting.empty() and self._open_to_guests():
            line, name = waiting.get()
            with contextlib.suppress(OSError):  # it left while it waited
                line.sendall(BEGIN)
                print(f"an engine of {name} takes part", flush=True)
                self._take_on(_Engine(line, None, None, name))

    def _take_on(self, engine: _Engine) -> None:
        self.engines.append(engine)
        threading.Thread(target=_listen, args=(engine, self.said), daemon=True).start()
        self._assign(engine)

    def _open_to_guests(self) -> list[Shard]:
        return [shard for shard in self.left if shard.number not in self.suspects]

    def _steal_from_remote(self) -> list[Shard]:
        """Return the shards that only guests have open, for idle engines of this machine.

        They come from the end, because the guests began at the other. So a machine that is slow or hangs holds nothing
        up; the first commit of a shard counts.
        """
        ours = {number for engine in self.engines if engine.own is not None for number in engine.open}
        theirs = {number for engine in self.engines if engine.own is None for number in engine.open}
        return [self.by_number[number] for number in sorted(theirs - ours - self.done, reverse=True)]

    def _assign(self, engine: _Engine) -> None:
        found = self.left if engine.own is not None else self._open_to_guests()
        engine.again = engine.own is not None and not found
        if engine.again:
            found = self._steal_from_remote()
        # What comes back to the list may be of a source that the engine has left: its own are finished before.
        found = sorted(found, key=lambda shard: shard.source != engine.source)
        engines = max(len(self.devices) * self.job.config.resources.nodes, len(self.engines))
        wave = next_wave(found, engines, self.total)
        engine.open = [shard.number for shard in wave]
        self.left = [shard for shard in self.left if shard.number not in engine.open]
        # An engine that died raises here, and its end is in the queue.
        with contextlib.suppress(OSError):
            if wave:
                engine.source = wave[0].source
                engine.line.sendall(f"{json.dumps(engine.open)}\n".encode())
            else:
                engine.line.shutdown(socket.SHUT_WR)

    def _count(self, answers: int) -> None:
        self.counted += answers
        self.on_answer(answers)

    def _on_message(self, engine: _Engine, line: str) -> None:
        found = _LINE.match(line)
        # An engine that is killed may leave half a line.
        if found is None:
            engine.last.append(f"it said {line!r}")
            with contextlib.suppress(OSError):
                engine.line.shutdown(socket.SHUT_WR)
            return
        answers, number, meta, idle, status, last = found.groups()
        if answers and not engine.again:
            engine.uncommitted += int(answers)
            self._count(int(answers))
        elif number:
            self._committed(engine, int(number), json.loads(meta))
        elif idle:
            self._assign(engine)
        elif status:
            engine.status, engine.last = int(status), json.loads(last)

    def _committed(self, engine: _Engine, number: int, meta: ShardMeta) -> None:
        engine.open.remove(number)
        if not engine.again:
            engine.uncommitted -= len(self.by_number[number].rows)
        if number not in self.done:
            self.done.add(number)
            self.on_commit(number, meta)

    def _on_worker_exit(self, engine: _Engine) -> None:
        """An engine has ended: what it had open goes back to the list."""
        # Another engine of this machine would meet the same; what another machine lacks does not end the run.
        if engine.own is not None and engine.status in (EXIT_BAD_INPUT, EXIT_DAMAGED):
            raise process_error("generate", engine.status, engine.last)
        # The engine may have committed a shard and died before it reported that.
        for number in list(engine.open):
            part = read_part(self.store, self.job.object_id, self.by_number[number].name)
            if part is not None:
                self._committed(engine, number, cast(ShardMeta, part.meta))
        self._count(-engine.uncommitted)
        if engine.status == 0 and not engine.open:
            return
        others = {number for other in self.engines for number in other.open}
        back = [number for number in engine.open if number not in self.done | others]
        who = f"an engine of {engine.machine}" if engine.machine else "an engine"
        how = "was lost" if engine.status is None else f"ended with status {engine.status}"
        said = " / ".join(engine.last[-3:])
        print(f"{who} {how}; its {len(back)} open shards go back to the list: {said}", flush=True)
        self.left[:0] = [self.by_number[number] for number in back]
        if not back:
            return
        # An engine finishes its shards in order, so the first open one is the likely cause.
        if engine.own is None:
            if engine.status is not None:  # else the machine is gone, or out of reach
                self.suspects.add(back[0])
            return
        self.deaths[back[0]] += 1
        if self.deaths[back[0]] >= _DEATHS:
            raise StageFailed(f"{_DEATHS} engines died over {self.by_number[back[0]].name} (the last with status "
                              f"{engine.status}): {said}")  # fmt: skip


def _listen(engine: _Engine, said: queue.Queue[tuple[_Engine, str | None]]) -> None:
    """Put an engine's lines into the queue, then None for their end."""
    with contextlib.suppress(OSError), engine.line.makefile(encoding="utf-8", errors="replace") as lines:
        for text in lines:
            if text.endswith("\n") and text != "\n":
                said.put((engine, text[:-1]))
    said.put((engine, None))


def devices_of(count: int, each: int, gpus: list[str], cores: int) -> list[dict[str, str]]:
    """Return the environment of each of `count` engines: its own `each` GPUs, or its share of the cores without any."""
    if not gpus:
        return [{"OMP_NUM_THREADS": str(max(1, cores // count))} for _ in range(count)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[i * each : (i + 1) * each])} for i in range(count)]
