"""`spinreg gc` loses nothing that a run needs: killed at any call, or with runs in between."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spinreg_core.errors import StageFailed
from spinreg_core.maintenance.gc import find_removable, remove_items
from spinreg_core.maintenance.retention import Needs, store_needs
from spinreg_core.runs import objects
from spinreg_core.store.base import Store
from spinreg_core.store.folder import FolderStore
from tests.support.toy_runs import (
    Interrupted,
    advance,
    config,
    content,
    littered,
    make_old,
    outcome,
)
from tests.support.watched_store import CHANGES, Killed, Watched, gc, sound

pytestmark = pytest.mark.usefixtures("quick")
LEAN = {"policies": 1, "generations": "needed"}
SHAPES: list[dict[str, Any]] = [
    {}, {"objective": {"alpha": 1.0}}, {"opponent": {"history": 1}}, {"opponent": {"source": "regenerate"}},
    {"opponent": {"source": "regenerate", "history": 2}}, {"training": {"average": "ema"}},
    {"opponent": {"history": 3, "weighting": [1, 0, 1], "source": "regenerate"}}, {"opponent": {"history": 2}},
    {"training": {"average": "liti", "average_as": ["reference"]}, "opponent": {"history": 2}}, {"seed": 1},
]  # fmt: skip
ROUNDS = 4


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, dict[str, str]]:
    """Outcomes of configurations, filled by `expected`."""
    return {}


def expected(known: dict[str, dict[str, str]], tmp_path: Path, shape: dict[str, Any]) -> dict[str, str]:
    name = json.dumps(shape)
    if name not in known:
        alone = FolderStore(tmp_path / uuid.uuid4().hex)
        advance(alone, config("alone", **shape), ROUNDS)
        known[name] = outcome(alone, "alone")
    return known[name]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2, 3))])
def test_runs_with_gc_in_between_come_to_the_same(
    seed: int,
    store: FolderStore,
    tmp_path: Path,
    undisturbed: dict[str, dict[str, str]],
) -> None:
    draw, removed = random.Random(seed), 0
    runs = {
        name: shape | {"keep": draw.choice([LEAN, {"policies": 2}, {"generations": "needed"}, {}])}
        for name, shape in zip("abcd", draw.sample(SHAPES, 4), strict=True)
    }
    runs["e"] = runs["a"]  # the very same
    done = dict.fromkeys(runs, 0)
    for _ in range(10):
        name = draw.choice(sorted(runs))
        done[name] = min(done[name] + draw.randint(0, 2), ROUNDS)
        stage = draw.choice(["generate", "mix-opponent", "train", "evaluate"])
        try:
            killed_at = (done[name], stage) if draw.random() < 0.4 else None
            advance(store, config(name, **runs[name]), done[name], killed_at=killed_at)
        except Interrupted:
            pass
        if draw.random() < 0.2 and name != "a" and len(runs) > 3:
            del runs[name], done[name]
            shutil.rmtree(store.root / "runs" / name)
        make_old(store.root)
        removed += len(gc(store))
        assert sound(store)
        assert gc(store) == []
    for name, groups in runs.items():
        advance(store, config(name, **groups), ROUNDS)
        shape = {group: value for group, value in groups.items() if group != "keep"}
        assert outcome(store, name) == expected(undisturbed, tmp_path, shape)
    assert sound(store)
    assert removed >= 10


def lasting(store: Store) -> dict[str, bytes | None]:
    """All there is, without times."""

    def timeless(value: bytes | None) -> bytes | None:
        document = json.loads(value) if value is not None and value.startswith(b"{") else None
        if isinstance(document, dict) and "removed" in document:
            del document["removed"]["at"]
            # Parts had gone already where the removal went on that was killed.
            document["removed"]["keys"] = sorted(key for key in document["removed"]["keys"] if "/parts/" not in key)
            return json.dumps(document, sort_keys=True).encode()
        return value

    return {key: timeless(value) for key, value in content(store).items()}


def test_gc_killed_at_any_call_is_finished_by_the_next(store: FolderStore, tmp_path: Path) -> None:
    littered(store)
    whole = FolderStore(tmp_path / "whole")
    shutil.copytree(store.root, whole.root)
    calls: list[int] = []
    gone = gc(Watched(whole, lambda: calls.append(1), CHANGES))  # type: ignore[arg-type]
    assert len(gone) > 8
    assert len(calls) > 30
    assert whole.unfinished() == []
    end = lasting(whole)
    for number in range(len(calls)):  # killed after one change is killed before the next
        left = iter(range(number))

        def fall(left: Any = left) -> None:
            if next(left, None) is None:
                raise Killed

        place = FolderStore(tmp_path / "place")
        shutil.copytree(store.root, place.root, copy_function=os.link)  # a store never changes a file in place
        with pytest.raises(Killed):
            gc(Watched(place, fall, CHANGES))  # type: ignore[arg-type]
        assert sound(place), number
        if number % 16 == 0:  # and who comes now need not wait for that
            for run, groups in (("b", {"opponent": {"history": 1}}), ("c", {"seed": 5})):
                advance(place, config(run, **groups), 2)
            assert sound(place), number
        else:
            gc(place)
            assert lasting(place) == end, number
        shutil.rmtree(place.root)


@pytest.mark.parametrize("gone", [False, True])
def test_gc_with_a_run_at_any_call_leaves_its_inputs(
    gone: bool, store: FolderStore, tmp_path: Path, undisturbed: dict[str, dict[str, str]]
) -> None:
    shape = {"opponent": {"history": 1}}
    taker = config("b", **shape)
    advance(store, config("a", keep=LEAN, **shape), 2)
    advance(store, taker, 0)
    if gone:
        shutil.rmtree(store.root / "runs" / "a")
        make_old(store.root)
    items, number, came = find_removable(store, store_needs(store)), 0, True
    assert len(items) > 2
    kept = set()
    while came:
        place, left, came = FolderStore(tmp_path / "place"), iter(range(number)), False
        shutil.copytree(store.root, place.root, copy_function=os.link)

        def come(left: Any = left, place: FolderStore = place) -> None:
            nonlocal came
            if next(left, None) is None and not came:
                came = True
                advance(place, taker, 2)

        watched: Any = Watched(place, come, (*CHANGES, "list"))
        said: list[str] = []
        remove_items(watched, items, lambda watched=watched: store_needs(watched), said.append)  # type: ignore[misc]
        kept.add(sum("is needed by now" in line for line in said))
        advance(place, taker, 2)
        assert outcome(place, "b").items() <= expected(undisturbed, tmp_path, shape).items()
        assert sound(place), number
        shutil.rmtree(place.root)
        number += 1
    assert len(kept) > 1, "some came just in time"


def came_back(store: FolderStore) -> None:
    """An object that was removed, that another run has begun to make again, and that run is gone too."""
    advance(store, config("other", seed=9), 0)
    advance(store, config("a"), 1)
    shutil.rmtree(store.root / "runs" / "a")
    make_old(store.root)
    gc(store)
    with pytest.raises(Interrupted):
        advance(store, config("b"), 1, killed_at=(1, "generate"))
    shutil.rmtree(store.root / "runs" / "b")
    make_old(store.root)


def test_gc_of_a_partly_remade_object_takes_nothing_from_a_run(
    store: FolderStore, tmp_path: Path, undisturbed: dict[str, dict[str, str]]
) -> None:
    """Before, a run that started when the heads had just been read committed shards that went a moment later."""
    came_back(store)
    items, asked = find_removable(store, store_needs(store)), 0

    def needs_now() -> Needs:
        nonlocal asked
        needs, asked = store_needs(store), asked + 1
        if asked == 2:
            with contextlib.suppress(StageFailed):  # a stage whose shards went is tried again
                advance(store, config("c"), 1)
        return needs

    remove_items(store, items, needs_now)
    assert sound(store)
    advance(store, config("c"), 1)
    assert sound(store)
    assert outcome(store, "c").items() <= expected(undisturbed, tmp_path, {}).items()


def test_gc_of_a_partly_remade_object_records_all_that_went(store: FolderStore) -> None:
    came_back(store)
    items = [item for item in find_removable(store, store_needs(store)) if item.record and item.record.removed]
    (item,) = (item for item in items if item.object_id.startswith("generate"))
    key = objects.manifest_key(item.object_id)
    before = store.read(key)
    needed = Needs(known={item.object_id: ["c"]}, kept={item.object_id})
    now = iter([store_needs(store), needed])
    remove_items(store, [item], lambda: next(now))
    assert store.read(key) == before, "what it had lost is told as before"

    once = iter([store_needs(store)])

    def killed() -> Needs:
        found = next(once, None)
        if found is None:
            raise Killed
        return found

    with pytest.raises(Killed):
        remove_items(store, [item], killed)
    assert store.read(key) != before
    remove_items(store, find_removable(store, needed), lambda: needed)
    assert store.read(key) == before
    make_old(store.root)
    gc(store)
    record = objects.read_record(store, item.object_id)
    assert record is not None
    assert item.record is not None
    assert item.record.removed is not None
    assert record.removed_keys >= {*item.keys, *item.record.removed.keys}
    assert [key for key in item.keys if store.size(key) is not None] == []


class Turns:
    """Threads that take turns, call by call of the store, in an order that is drawn."""

    def __init__(self, seed: int) -> None:
        self._draw, self._condition = random.Random(seed), threading.Condition()
        self._waiting: set[str] = set()
        self._alive: set[str] = set()
        self._granted: str | None = None
        self.failures: list[BaseException] = []

    def wait(self, name: str) -> None:
        with self._condition:
            self._waiting.add(name)
            self._condition.notify_all()
            self._condition.wait_for(lambda: self._granted == name)
            self._granted = None
            self._waiting.remove(name)

    def run(self, works: dict[str, Callable[[], object]]) -> None:
        def do(name: str, work: Callable[[], object]) -> None:
            try:
                work()
            except BaseException as error:
                self.failures.append(error)
            with self._condition:
                self._alive.remove(name)
                self._condition.notify_all()

        self._alive = set(works)
        for name, work in works.items():
            threading.Thread(target=do, args=(name, work), daemon=True).start()
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._granted is None and self._waiting == self._alive, timeout=60)
                if not self._alive:
                    return
                # Long stretches of one, or the other would hardly get far.
                self._granted = self._draw.choices(sorted(self._waiting), [1, self._draw.random()][: len(self._alive)])[
                    0
                ]
                self._condition.notify_all()


@pytest.mark.parametrize("seed", range(6))
def test_gc_and_a_run_in_a_drawn_order_of_calls_lose_nothing(
    seed: int, store: FolderStore, tmp_path: Path, undisturbed: dict[str, dict[str, str]]
) -> None:
    """Every call of both in a drawn order: the run comes to the same, and nothing of it is missing."""
    advance(store, config("a", keep=LEAN), 2)
    advance(store, config("other", seed=9), 0)  # a store without any run is left alone
    shutil.rmtree(store.root / "runs" / "a") if seed % 2 else None
    make_old(store.root)
    turns = Turns(seed)

    def watched(name: str) -> Any:
        return Watched(store, lambda: turns.wait(name))

    taker = config("b")
    begun = seed % 3 == 0
    if begun:
        advance(store, taker, 0)
    turns.run({"gc": lambda: gc(watched("gc")), "run": lambda: advance(watched("run"), taker, 2)})
    for failure in turns.failures:  # a stage whose shards went is tried again
        assert isinstance(failure, StageFailed), failure
    advance(store, taker, ROUNDS)
    assert outcome(store, "b") == expected(undisturbed, tmp_path, {})
    assert sound(store)
