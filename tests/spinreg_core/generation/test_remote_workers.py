"""Engines of other machines share the work whenever they come, and nothing they do or fail to do harms the run."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import pytest

from spinreg_core.errors import LeaseLost, StageFailed
from spinreg_core.generation import remote_workers as engine_guests
from spinreg_core.generation import worker as answer_stage
from spinreg_core.generation import worker_process as engine_process
from spinreg_core.generation.remote_workers import offer_workers
from spinreg_core.runs import fetch, objects
from spinreg_core.runs.job import Job
from spinreg_core.runtime import nodes as orders
from spinreg_core.stages import generate
from spinreg_core.stages.generate import run
from spinreg_core.store.base import Store
from tests.support.generation_fixtures import LOADS, House, by_answer, drawn

# Engines of this machine do something before each wave: GATE, an expression, is waited for.
PATCHED = (
    LOADS
    + """
import os, sys, time
from pathlib import Path
from spinreg_core.generation import worker
from spinreg_core.generation.hf import HfEngine
from spinreg_core.runs import objects
from spinreg_core.store.open import open_store
store = open_store({store!r})
original = HfEngine._decode
def patched(self, prompts, seeds, sampling, note):
    while not ({gate}):
        time.sleep(0.05)
    def slowly(index, answer):
        Path({root!r}, "answering").touch()
        time.sleep({pause})
        note(index, answer)
    return original(self, prompts, seeds, sampling, slowly)
HfEngine._decode = patched
worker.main(worker.run)
"""
)
OTHERS_HAVE_COMMITTED = "objects.part_names(store, {object_id!r})"
ROOT = str(Path(__file__).resolve().parents[3])


def two_machines(
    house: House, monkeypatch: pytest.MonkeyPatch, name: str, *, gate: str = "True", pause: float = 0.0, **settings: Any
) -> Job:  # fmt: skip
    """A job of two machines. gate: what the engines of this one wait for. pause: seconds they take per answer."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    job = house.job(name, resources={"nodes": 2, "rendezvous": f"localhost:{port}"}, **settings)
    script = house.root / f"{name}.py"
    gate = gate.format(object_id=job.object_id)
    script.write_text(PATCHED.format(store=house.store.url, gate=gate, root=str(house.root), pause=pause))
    monkeypatch.setattr(engine_process, "COMMAND", [sys.executable, "-u", str(script)])
    return job


def whole(house: House, **settings: Any) -> Any:
    return drawn(by_answer(house.answers(run(house.job("whole", **settings)))))


def joined(job: Job) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "join", job.config.run, "--store", job.store],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env=os.environ | {"PYTHONPATH": ROOT, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip


def test_another_machine_takes_shards(
    house: House,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two processes with nothing in common but the store and the rendezvous; two sources, one attempt."""
    expected = whole(house, iterates=[2, 1])
    job = two_machines(house, monkeypatch, "shared", gate=OTHERS_HAVE_COMMITTED, iterates=[2, 1], shard_size=1)
    with joined(job) as second:
        try:
            found = run(job)
            time.sleep(3)  # the other machine hears that all is over
        finally:
            os.killpg(second.pid, signal.SIGKILL)
        assert second.stdout is not None
        heard = second.stdout.read()
    assert drawn(by_answer(house.answers(found))) == expected
    assert re.search(r"an engine of \S+ \(127\.0\.0\.1|::1\) takes part", capsys.readouterr().out)
    writers = {part.writer for part in objects.usable_parts(house.store, job.object_id).values()}
    assert {w for w in writers if socket.gethostname() in w}, writers
    assert len(writers) > 1, "both machines answered"
    assert "taking part in generate of round 3" in heard
    assert "Traceback" not in heard, heard
    order = orders.read_order(house.store, job.config.run)
    assert order is not None
    assert order.attempt is None


@pytest.mark.long
def test_an_engine_elsewhere_goes_from_source_to_source(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine of the flow waits over the first source until the other one has answered all the rest."""
    settings: dict[str, Any] = {"iterates": [2, 1], "answers_per_prompt": 2, "shard_size": 1,
                                "geometric": {"share": 0.5, "alpha": 0.3}}  # fmt: skip
    expected = whole(house, **settings)
    rest = sum(1 for iterate, mixed, *_ in expected.values() if (iterate, mixed) != (1, False))
    gate = (f"os.environ.get('GUEST') or len(objects.part_names(store, {{object_id!r}})) >= {rest} "
            f"or time.time() > {time.time() + 120}")  # fmt: skip
    job = two_machines(house, monkeypatch, "on", gate=gate, **settings)

    def lend() -> None:
        while (order := orders.read_order(house.store, job.config.run)) is None:
            time.sleep(0.05)
        given = replace(Job.from_fields(order.job), workdir=house.root / "lent")
        offer_workers(given, order.attempt, [{"GUEST": "1"}])

    lender = threading.Thread(target=lend, daemon=True)
    lender.start()
    found = run(job)
    lender.join(timeout=15)
    assert not lender.is_alive()
    assert drawn(by_answer(house.answers(found))) == expected
    assert sorted(house.loads().values()) == [["policy-1"], ["policy-1", "policy-0", "policy-2"]]


Wire = Callable[[socket.socket, IO[str], list[int]], bool]


class Guest(threading.Thread):
    """Speaks to the machine of the flow as an engine elsewhere does. `wire(line, its lines, wave)` says what it does
    with a wave, and whether it comes again."""

    def __init__(self, job: Job, store: Store, wire: Wire, *, when: Callable[[], bool] = lambda: True) -> None:
        super().__init__(daemon=True)
        self.job, self.store, self.wire, self.when = job, store, wire, when
        self.waves: list[list[int]] = []
        self.refused = False
        self.start()

    def run(self) -> None:
        while not (order := orders.read_order(self.store, self.job.config.run)) or not order.attempt:
            time.sleep(0.05)
        while not self.when():
            time.sleep(0.05)
        address = ("localhost", int(self.job.config.resources.rendezvous.rpartition(":")[2]))  # type: ignore[union-attr]
        with socket.create_connection(address) as stranger:
            stranger.sendall(b"x" * 512)
            self.refused = stranger.recv(1) == b""
        again = True
        while again:
            with socket.create_connection(address) as line, line.makefile() as lines:
                line.sendall(f"{order.attempt} guest".encode().ljust(512))
                if lines.readline() != "begin\n" or not (wave := lines.readline()):
                    return
                self.waves.append(json.loads(wave))
                again = self.wire(line, lines, self.waves[-1])


@pytest.mark.long
def test_shard_that_ended_a_remote_engine_is_sampled_here(
    house: House,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = whole(house, iterates=[2])
    job = two_machines(house, monkeypatch, "dies", gate=OTHERS_HAVE_COMMITTED, iterates=[2], shard_size=2)
    met: list[int] = []

    def dies(line: socket.socket, lines: IO[str], wave: list[int]) -> bool:
        line.sendall(b'answered 1;\ncommitted 3 {"pro\nended -9 ["out of luck"];\n')
        met.append(wave[0])
        if len(met) == 2:
            commit_last_shard(job, house.store)
        return len(met) < 2

    guest = Guest(job, house.store, dies)
    found = run(job)
    guest.join(timeout=10)
    assert guest.refused, "who does not know the attempt is not let in"
    assert met[0] not in guest.waves[1]
    assert drawn(by_answer(house.answers(found))) == expected
    output = capsys.readouterr().out
    assert re.search(r"an engine of guest \(\S+\) ended with status -9; its \d open shards go back", output)
    assert "list: out of luck" in output
    assert "13/13 answers (100 %)" in output


def commit_last_shard(job: Job, store: Store) -> None:
    """Commit the shard for which the engines of this machine wait."""
    rows = generate.Rows(fetch.fetch_file(store, "data", "train.parquet"))
    shard = answer_stage.planned(job, rows)[0][-1]
    answer_stage.answer_shards(replace(job, writer="by-hand"), store, rows, [shard.source], [[shard]],
                               on_answer=lambda n: None, on_commit=lambda number, meta: None)  # fmt: skip


@pytest.mark.parametrize("status", [*(pytest.param(code, marks=pytest.mark.long) for code in (65, 74)), None])
def test_machine_without_an_engine_does_not_end_the_run(
    house: House,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    status: int | None,
) -> None:
    expected = whole(house, iterates=[2])
    job = two_machines(house, monkeypatch, "lacks", iterates=[2], shard_size=2)

    def leaves(line: socket.socket, lines: IO[str], wave: list[int]) -> bool:
        if status is not None:
            line.sendall(f'ended {status} ["bad input: found vllm, which is not installed here"];\n'.encode())
        return False

    guest = Guest(job, house.store, leaves)
    found = run(job)
    assert guest.waves
    assert drawn(by_answer(house.answers(found))) == expected
    how = "was lost" if status is None else f"ended with status {status}"
    assert re.search(rf"an engine of guest \(\S+\) {how}; its \d open shards go back", capsys.readouterr().out)


def test_a_machine_that_hangs_holds_nothing_up(
    house: House,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = whole(house, iterates=[2])
    job = two_machines(house, monkeypatch, "hangs", iterates=[2], shard_size=2)
    over = threading.Event()

    def hangs(line: socket.socket, lines: IO[str], wave: list[int]) -> bool:
        line.sendall(b"answered 1;\n")
        over.wait(120)
        return False

    guest = Guest(job, house.store, hangs)
    try:
        found = run(job)
    finally:
        over.set()
    assert guest.waves
    assert drawn(by_answer(house.answers(found))) == expected
    assert "13/13 answers (100 %)" in capsys.readouterr().out


@pytest.mark.long
def test_a_machine_is_let_in_while_others_are_busy(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    job = two_machines(house, monkeypatch, "busy", iterates=[2], shard_size=1, pause=0.3)
    guest = Guest(job, house.store, lambda line, lines, wave: False,
                  when=lambda: (house.root / "answering").exists())  # fmt: skip
    run(job)
    assert guest.waves, "it knocked while answers came in, three a second"


def test_a_taken_rendezvous_is_said(house: House) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        job = house.job("taken", iterates=[2], resources={"nodes": 2, "rendezvous": f"localhost:{port}"})
        with pytest.raises(StageFailed, match=rf"resources.rendezvous: cannot listen at port {port} for the engines"):
            run(job)


def test_joined_machine_stops_at_sigterm(house: House) -> None:
    """Its engine waits for work that never comes."""
    with socket.create_server(("localhost", 0)) as server:
        job = house.job("lent", iterates=[2],
                        resources={"nodes": 2, "rendezvous": f"localhost:{server.getsockname()[1]}"})  # fmt: skip
        job = replace(job, extra=job.extra | {"sources": [[2, False]]})
        job.save(house.root / "job.json")
        with subprocess.Popen(
            [sys.executable, "-m", "spinreg_core.stages.generate", str(house.root / "job.json")],
            env=os.environ | {"PYTHONPATH": ROOT, orders.ATTEMPT_VARIABLE: "a"},
        ) as lending:
            line, _ = server.accept()
            with line:
                lending.terminate()
                assert lending.wait(timeout=15) == 143


# Orders


def test_a_holder_that_lost_its_lease_takes_nobodys_machines_away(house: House) -> None:
    job = house.job("x", iterates=[2])
    old, new = replace(job, writer="e0001-aa"), replace(job, writer="e0002-bb")
    first = orders.post_order(house.store, old)
    second = orders.post_order(house.store, new)
    orders.withdraw_order(house.store, old, first)
    with pytest.raises(LeaseLost):
        orders.post_order(house.store, old)
    order = orders.read_order(house.store, job.config.run)
    assert order is not None
    assert order.attempt == second
    orders.withdraw_order(house.store, new, second)
    order = orders.read_order(house.store, job.config.run)
    assert order is not None
    assert order.attempt is None
    with pytest.raises(LeaseLost):
        orders.post_order(house.store, old)


@pytest.mark.parametrize("torn", [b"torn", b'{"schema": 1, "attempt": 3}'])
def test_an_order_that_cannot_be_read_is_replaced_by_the_next(house: House, torn: bytes) -> None:
    job = replace(house.job("x", iterates=[2]), writer="e0002-bb")
    key = f"runs/{job.config.run}/order.json"
    first = orders.post_order(house.store, job)
    house.store.write(key, torn)
    orders.withdraw_order(house.store, job, first)  # at the end of a stage, however that was
    assert house.store.read(key) == torn
    second = orders.post_order(house.store, job)
    order = orders.read_order(house.store, job.config.run)
    assert order is not None
    assert order.attempt == second


@pytest.mark.parametrize("shown", ["", "other", "the-attempt2", "the-attempt"])
def test_connection_without_the_attempts_name_is_refused(shown: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = socket.create_connection(server.getsockname())
        ours = server.accept()[0]
    waiting: engine_guests.Guests = queue.SimpleQueue()
    theirs.sendall(f"{shown} somebody".encode().ljust(engine_guests._HELLO_BYTES))
    engine_guests._authenticate(ours, "peer", "the-attempt", waiting)
    assert waiting.empty() == (shown != "the-attempt")
    assert (ours.fileno() == -1) == (shown != "the-attempt")  # closed
    theirs.close()
    ours.close()
