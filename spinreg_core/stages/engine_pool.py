"""Several engines, each a process with its own GPUs, share the shards of one source.

Decides: who gets which shards when, and that what a dead engine had open goes back to the list.
Leaves out: what an engine does (`answer.py`), how many there are (`generate.py`).
"""

from __future__ import annotations

import itertools
import json
import os
import queue
import re
import subprocess
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from spinreg_core.errors import EXIT_BAD_INPUT, EXIT_DAMAGED, BadInput, Damaged, StageFailed
from spinreg_core.objects import read_part
from spinreg_core.shards import Shard, Source
from spinreg_core.stages.job import Job
from spinreg_core.store import open_store

# Engines that died over one shard before it is given up: its prompts may be what kills them.
_DEATHS = 3
# Answers in one wave: enough that its end, where the engine runs empty, does not count.
_WAVE = 4096
_LAST_WORDS_SECONDS = 5.0
COMMAND = [sys.executable, "-u", "-m", "spinreg_core.stages.answer"]
_LINE = re.compile(r"^(?:answered (\d+)|committed (\d+) (\{.*\})|(idle))$")


@dataclass
class _Engine:
    process: subprocess.Popen[str]
    devices: dict[str, str]
    open: list[int] = field(default_factory=list)
    uncommitted: int = 0  # answers it told of, of shards that it has not committed
    last: deque[str] = field(default_factory=lambda: deque(maxlen=20))


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
    source: Source,
    shards: list[Shard],
    devices: list[dict[str, str]],
    *,
    on_answer: Callable[[int], None],
    on_commit: Callable[[int, dict[str, Any]], None],
) -> None:
    """Have all shards committed. devices: for each engine, what its environment says of the GPUs it has.

    Raises BadInput, Damaged; StageFailed where engines die over the same shard again and again.
    """
    left, by_number = list(shards), {shard.number: shard for shard in shards}
    deaths: Counter[int] = Counter()
    said: queue.Queue[tuple[_Engine, str | None]] = queue.Queue()
    engines: list[_Engine] = []
    numbers = itertools.count()
    store = open_store(job.store)

    def give(engine: _Engine) -> None:
        wave = next_wave(left, len(devices))
        del left[: len(wave)]
        engine.open = [shard.number for shard in wave]
        assert engine.process.stdin is not None
        try:
            if wave:
                print(json.dumps(engine.open), file=engine.process.stdin, flush=True)
            else:
                engine.process.stdin.close()
        except BrokenPipeError:
            pass  # it died; its end is in the queue

    def start(own: dict[str, str]) -> None:
        # A writer of its own: what another engine has committed must not be written over.
        process, says = _start(replace(job, writer=f"{job.writer}-{next(numbers)}"), source, own)
        engine = _Engine(process, own)
        engines.append(engine)
        threading.Thread(target=_watch, args=(engine, says, said), daemon=True).start()
        give(engine)

    def committed(engine: _Engine, number: int, meta: dict[str, Any]) -> None:
        engine.open.remove(number)
        engine.uncommitted -= len(by_number[number].rows)
        on_commit(number, meta)

    try:
        for own in devices[: max(1, min(len(devices), len(shards)))]:
            start(own)
        while engines:
            engine, line = said.get()
            if line is not None:
                found = _LINE.match(line)
                if found is None:
                    raise StageFailed(f"an engine said {line!r}")
                if found[1]:
                    engine.uncommitted += int(found[1])
                    on_answer(int(found[1]))
                elif found[2]:
                    committed(engine, int(found[2]), json.loads(found[3]))
                else:
                    give(engine)
                continue
            engines.remove(engine)
            status = engine.process.wait()
            raise_verdict(status, engine.last[-1] if engine.last else "")
            for number in list(engine.open):  # committed, and not told of any more
                part = read_part(store, job.object_id, by_number[number].name)
                if part is not None:
                    committed(engine, number, part["meta"])
            if engine.open:
                # Which of them it was is not known: the first one it had not finished, most likely.
                first = engine.open[0]
                deaths[first] += 1
                end = " / ".join(list(engine.last)[-3:])
                if deaths[first] >= _DEATHS:
                    raise StageFailed(f"{_DEATHS} engines died over {by_number[first].name} (the last with status "
                                      f"{status}): {end}")  # fmt: skip
                print(f"an engine ended with status {status}; its {len(engine.open)} open shards go back to the list",
                      flush=True)  # fmt: skip
                on_answer(-engine.uncommitted)
                left[:0] = [by_number[number] for number in engine.open]
            elif status:
                print(
                    f"an engine ended with status {status}, all that it had begun committed: {engine.last}", flush=True
                )
            if left and len(engines) < len(devices):
                start(engine.devices)
    finally:
        for engine in engines:
            engine.process.kill()
            engine.process.wait()


def _start(job: Job, source: Source, own: dict[str, str]) -> tuple[subprocess.Popen[str], int]:
    """An engine's process, and the end of the pipe that it speaks to."""
    folder = job.workdir / job.writer
    folder.mkdir(parents=True, exist_ok=True)
    extra = job.extra | {"source": [source.iterate, source.geometric]}
    replace(job, workdir=folder, extra=extra).save(folder / "answer.json")
    hears, speaks = os.pipe()
    try:
        process = subprocess.Popen(
            [*COMMAND, str(folder / "answer.json")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            errors="replace", env=os.environ | own | {"SPINREG_SAY": str(speaks)}, pass_fds=[speaks],
        )  # fmt: skip
    finally:
        os.close(speaks)
    return process, hears


def _watch(engine: _Engine, hears: int, said: queue.Queue[tuple[_Engine, str | None]]) -> None:
    """Hand on what an engine says, and at last, as None, that it has ended: by its process, because a child of it may
    keep its pipes open."""

    def listen() -> None:
        with open(hears, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                said.put((engine, line.rstrip("\n")))

    def show() -> None:
        assert engine.process.stdout is not None
        for line in engine.process.stdout:
            engine.last.append(line.rstrip("\n"))
            print(line, end="", flush=True)

    threads = [threading.Thread(target=target, daemon=True) for target in (listen, show)]
    for thread in threads:
        thread.start()
    engine.process.wait()
    for thread in threads:
        thread.join(timeout=_LAST_WORDS_SECONDS)
    said.put((engine, None))


def raise_verdict(status: int, last: str) -> None:
    """Raise what a process said with its last line, where its exit status says that trying again is of no use."""
    if status == EXIT_BAD_INPUT:
        raise BadInput.from_message(last.removeprefix("bad input: "))
    if status == EXIT_DAMAGED:
        raise Damaged(last.removeprefix("damaged: "))


def devices_of(count: int, each: int, gpus: list[str], cores: int) -> list[dict[str, str]]:
    """Environment of each of `count` engines: its own `each` GPUs, or its share of the cores where there are none."""
    if not gpus:
        return [{"OMP_NUM_THREADS": str(max(1, cores // count))} for _ in range(count)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[i * each : (i + 1) * each])} for i in range(count)]
