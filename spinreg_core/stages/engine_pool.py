"""Several engines, each a process with its own GPUs, on this machine or on others, share the shards of one source.

Decides: who gets which shards when, and that what a dead engine had open goes back to the list.
Leaves out: what an engine does (`answer.py`), its process (`engine_process.py`), how those of other machines come here
(`engine_guests.py`), how many there are (`generate.py`).
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
from typing import Any

from spinreg_core.errors import StageFailed
from spinreg_core.objects import read_part
from spinreg_core.shards import Shard, Source
from spinreg_core.stages.engine_guests import BEGIN, Guests, guests
from spinreg_core.stages.engine_process import EngineProcess, raise_verdict, start_engine
from spinreg_core.stages.job import Job
from spinreg_core.store import Store

# Engines that died over one shard before it is given up: its prompts may be what kills them.
_DEATHS = 3
# Answers in one wave: enough that its end, where the engine runs empty, does not count.
_WAVE = 4096
_LOOK_SECONDS = 0.5  # between looks for engines of other machines
_LINE = re.compile(r"^(?:answered (\d+)|committed (\d+) (\{.*\})|(idle)|ended (-?\d+) (\[.*\]))$")


@dataclass
class _Engine:
    line: socket.socket
    device: int | None  # which of the pool's; None for an engine of another machine
    own: EngineProcess | None
    machine: str = ""
    open: list[int] = field(default_factory=list)
    uncommitted: int = 0  # answers it told of, of shards that it has not committed
    status: int | None = None  # of its end, where it told of that
    last: list[str] = field(default_factory=list)  # what it printed last


def next_wave(shards: list[Shard], engines: int) -> list[Shard]:
    """The shards that an engine gets next of those left: fewer and fewer, so that all engines end together."""
    share = max(1, (len(shards) + 2 * engines - 1) // (2 * engines)) if engines > 1 else len(shards)
    found: list[Shard] = []
    size = 0
    for shard in shards[:share]:
        if found and size + len(shard.rows) > _WAVE:
            break
        found.append(shard)
        size += len(shard.rows)
    return found


def answer_in_processes(
    job: Job,
    store: Store,
    source: Source,
    shards: list[Shard],
    devices: list[dict[str, str]],
    *,
    on_answer: Callable[[int], None],
    on_commit: Callable[[int, dict[str, Any]], None],
) -> None:
    """Have all shards committed. devices: for each engine of this machine, what its environment says of its GPUs.

    Raises BadInput, Damaged; StageFailed where engines die over the same shard again and again.
    """
    with guests(job, store, source) as waiting:
        pool = _Pool(job, store, source, shards, devices, waiting, on_answer, on_commit)
        try:
            pool.run()
        finally:
            pool.end()


class _Pool:
    """The list of shards, and the engines that take from it."""

    def __init__(
        self,
        job: Job,
        store: Store,
        source: Source,
        shards: list[Shard],
        devices: list[dict[str, str]],
        waiting: Guests,
        on_answer: Callable[[int], None],
        on_commit: Callable[[int, dict[str, Any]], None],
    ) -> None:
        self.job, self.store, self.source, self.devices, self.waiting = job, store, source, devices, waiting
        self.on_answer, self.on_commit = on_answer, on_commit
        self.left, self.by_number = list(shards), {shard.number: shard for shard in shards}
        self.deaths: Counter[int] = Counter()  # of engines of this machine, by shard
        self.suspects: set[int] = set()  # shards that an engine of another machine died over: they are done here
        self.said: queue.Queue[tuple[_Engine, str | None]] = queue.Queue()
        self.engines: list[_Engine] = []
        self.writers = itertools.count()

    def run(self) -> None:
        self._fill()
        while self.engines:
            try:
                engine, line = self.said.get(timeout=_LOOK_SECONDS)
            except queue.Empty:
                self._fill()
                continue
            if line is not None:
                self._hear(engine, line)
                continue
            self.engines.remove(engine)
            engine.line.close()
            self._bury(engine)
            self._fill()

    def end(self) -> None:
        """Nobody works any longer."""
        for engine in self.engines:
            if engine.own is not None:
                engine.own.process.kill()
                engine.own.wait()
            with contextlib.suppress(OSError):
                engine.line.shutdown(socket.SHUT_RDWR)
            engine.line.close()

    def _fill(self) -> None:
        """Start engines while there is work for them: our own, and those that wait elsewhere."""
        for device in set(range(len(self.devices))) - {engine.device for engine in self.engines}:
            if not self.left:
                break
            ours, its = socket.socketpair()
            # A writer of its own: what another engine has committed must not be written over.
            job = replace(self.job, writer=f"{self.job.writer}-{next(self.writers)}")
            self._take_on(_Engine(ours, device, start_engine(job, self.source, self.devices[device], its)))
        while self._open_to_guests() and not self.waiting.empty():
            line, name = self.waiting.get()
            with contextlib.suppress(OSError):  # it left while it waited
                line.sendall(BEGIN)
                print(f"an engine of {name} takes part", flush=True)
                self._take_on(_Engine(line, None, None, name))

    def _take_on(self, engine: _Engine) -> None:
        self.engines.append(engine)
        threading.Thread(target=_listen, args=(engine, self.said), daemon=True).start()
        self._give(engine)

    def _open_to_guests(self) -> list[Shard]:
        return [shard for shard in self.left if shard.number not in self.suspects]

    def _give(self, engine: _Engine) -> None:
        found = self.left if engine.own is not None else self._open_to_guests()
        wave = next_wave(found, max(len(self.devices) * self.job.config.resources.nodes, len(self.engines)))
        engine.open = [shard.number for shard in wave]
        self.left = [shard for shard in self.left if shard.number not in engine.open]
        with contextlib.suppress(OSError):  # it died; its end is in the queue
            if wave:
                engine.line.sendall(f"{json.dumps(engine.open)}\n".encode())
            else:
                engine.line.shutdown(socket.SHUT_WR)

    def _hear(self, engine: _Engine, line: str) -> None:
        found = _LINE.match(line)
        if found is None:
            raise StageFailed(f"an engine said {line!r}")
        answers, number, meta, idle, status, last = found.groups()
        if answers:
            engine.uncommitted += int(answers)
            self.on_answer(int(answers))
        elif number:
            self._committed(engine, int(number), json.loads(meta))
        elif idle:
            self._give(engine)
        elif status:
            engine.status, engine.last = int(status), json.loads(last)

    def _committed(self, engine: _Engine, number: int, meta: dict[str, Any]) -> None:
        engine.open.remove(number)
        engine.uncommitted -= len(self.by_number[number].rows)
        self.on_commit(number, meta)

    def _bury(self, engine: _Engine) -> None:
        """An engine has ended: what it had open goes back to the list."""
        raise_verdict(engine.status, engine.last[-1] if engine.last else "")
        for number in list(engine.open):  # committed, and not told of any more
            part = read_part(self.store, self.job.object_id, self.by_number[number].name)
            if part is not None:
                self._committed(engine, number, part["meta"])
        how = "was lost" if engine.status is None else f"ended with status {engine.status}"
        who = f"an engine of {engine.machine}" if engine.machine else "an engine"
        if not engine.open:
            if engine.status:
                print(f"{who} {how}, all that it had begun committed: {engine.last}", flush=True)
            return
        # Which of them it was is not known: the first one it had not finished, most likely.
        first = engine.open[0]
        if engine.own is None:
            self.suspects.add(first)
        else:
            self.deaths[first] += 1
        if self.deaths[first] >= _DEATHS:
            raise StageFailed(f"{_DEATHS} engines died over {self.by_number[first].name} (the last with status "
                              f"{engine.status}): {' / '.join(engine.last[-3:])}")  # fmt: skip
        print(f"{who} {how}; its {len(engine.open)} open shards go back to the list", flush=True)
        self.on_answer(-engine.uncommitted)
        self.left[:0] = [self.by_number[number] for number in engine.open]


def _listen(engine: _Engine, said: queue.Queue[tuple[_Engine, str | None]]) -> None:
    """Hand on what an engine says, and at last, as None, that there is no more."""
    with contextlib.suppress(OSError), engine.line.makefile(encoding="utf-8", errors="replace") as lines:
        for text in lines:
            if text.endswith("\n") and text != "\n":
                said.put((engine, text[:-1]))
    said.put((engine, None))


def devices_of(count: int, each: int, gpus: list[str], cores: int) -> list[dict[str, str]]:
    """Environment of each of `count` engines: its own `each` GPUs, or its share of the cores where there are none."""
    if not gpus:
        return [{"OMP_NUM_THREADS": str(max(1, cores // count))} for _ in range(count)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[i * each : (i + 1) * each])} for i in range(count)]
