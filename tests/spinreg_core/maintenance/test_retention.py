"""`spinreg gc` removes what its rules say and never what a run needs, whatever happens in between."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.cli import main
from spinreg_core.config import RunConfig
from spinreg_core.errors import Removed, StageFailed, StoreRefused
from spinreg_core.maintenance import gc as removal
from spinreg_core.maintenance.gc import find_removable, remove_items
from spinreg_core.maintenance.repair import begin
from spinreg_core.maintenance.retention import Needs, released_by_rules, store_needs
from spinreg_core.maintenance.verify import verify
from spinreg_core.reports.status import run_status
from spinreg_core.runs import fetch, objects
from spinreg_core.runs.job import Job
from spinreg_core.runs.lease import hold_lease
from spinreg_core.runs.plans import average_object, objects_of, plan_heldout, policy_object
from spinreg_core.store.base import Store
from spinreg_core.store.folder import FolderStore
from spinreg_core.store.open import open_store
from tests.support.servers import S3Server
from tests.support.toy_runs import Interrupted, advance, config, content, outcome
from tests.support.watched_store import CHANGES, Killed, Watched, gc, head_of, sound

pytestmark = pytest.mark.usefixtures("quick")
LEAN = {"policies": 1, "generations": "needed"}


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "store")


def test_everything_is_kept_unless_a_rule_says_otherwise(store: FolderStore) -> None:
    advance(store, config("a"), 3)
    before = content(store)
    gone = gc(store)
    assert {item.why for item in gone} == {"checkpoints of a finished stage"}
    after = content(store)
    assert {key.split("/")[1].partition("-")[0] for key in before.keys() - after.keys()} == {"train"}
    assert after == {key: before[key] for key in after}
    assert gc(store) == []


@pytest.mark.parametrize(
    ("groups", "keep", "expected"),
    [
        # By policies: of 5 iterates the newest K, and those that round 6 and later read.
        ({}, {"policies": 2}, "train 1,2,3"),
        ({}, {"policies": 5}, ""),
        ({}, {"policies": 9}, ""),
        ({"opponent": {"source": "regenerate"}}, {"policies": 1}, ""),  # fictitious play asks all of them again
        ({"opponent": {"source": "regenerate", "history": 2}}, {"policies": 1}, "train 1,2,3"),
        ({"opponent": {"source": "regenerate", "history": 3, "weighting": [1, 0, 1]}}, {"policies": 1}, "train 1,2"),
        ({"training": {"average": "ema"}}, {"policies": 2}, "train 1,2,3 average 1,2,3"),
        ({"training": {"average": "ema"}, "opponent": {"source": "regenerate", "history": 2}}, {"policies": 1},
         "train 1,2,3,4 average 1,2,3"),
        ({"training": {"average": "liti", "average_as": ["opponent"]}, "opponent": {"source": "regenerate"}},
         {"policies": 2}, "train 1,2,3"),
        ({"training": {"lora_rank": 4}}, {"policies": 1}, "train 1,2,3,4"),
        # By generations: replay reads those of earlier rounds again, together with the pairs.
        ({"opponent": {"history": 1}}, {"generations": "needed"}, "generate 1,2,3,4,5 heldout 0,1,2,3,4,5"),
        ({"opponent": {"history": 3}}, {"generations": "needed"}, "generate 1,2,3 heldout 0,1,2,3,4,5"),
        ({}, {"generations": "needed"}, "heldout 0,1,2,3,4,5"),
        ({"opponent": {"source": "regenerate"}}, {"generations": "needed"}, "generate 1,2,3,4,5 heldout 0,1,2,3,4,5"),
    ],
)  # fmt: skip
def test_what_rules_let_go(store: FolderStore, groups: dict[str, Any], keep: dict[str, Any], expected: str) -> None:
    wanted = config("a", keep=keep, **groups)
    advance(store, wanted, 5)
    head, words = head_of(store, "a"), iter(expected.split())
    ids: set[str | None] = set()
    for kind, numbers in zip(words, words, strict=True):
        for number in map(int, numbers.split(",")):
            if kind == "average":
                ids.add(average_object(wanted, head, number))
            elif kind == "heldout":
                ids.add(plan_heldout(wanted, head, number).object_id)
            else:
                ids.add(head.stage(number, kind))
    assert set(released_by_rules(wanted, head)) == ids
    gone = {item.object_id for item in gc(store) if item.kind == "object"}
    assert gone == ids
    for object_id in gone:
        record = objects.require_manifest(store, object_id)
        left = {e["name"] for e in record.files if store.size(e["key"]) is not None}
        assert left == ({"metrics.jsonl", "summary.json"} if object_id.startswith("train") else set())
    assert gc(store) == []


def test_what_was_removed_is_told_from_what_was_lost(store: FolderStore) -> None:
    advance(store, config("a", keep=LEAN), 3)
    gc(store)
    head = head_of(store, "a")
    old, new = policy_object(head, 1), policy_object(head, 3)
    states = {entry["round"]: entry["stages"]["train"]["state"] for entry in run_status(store, "a")["rounds"][1:]}
    assert states == {1: "done, removed by retention", 2: "done, removed by retention", 3: "done"}
    verdict = verify(store, "a")
    assert verdict.problems == []
    assert old in verdict.removed
    assert "removed by retention (keep.policies: 1, " in verdict.removed[old]
    with pytest.raises(Removed, match="weights: removed by retention"):
        fetch.fetch_folder(store, old, "policy")
    assert fetch.fetch_file(store, old, "metrics.jsonl").read_bytes() == b"{}\n"
    for object_id, name in ((old, "metrics.jsonl"), (new, "policy/weights")):
        (key,) = (e["key"] for e in objects.require_manifest(store, object_id)["files"] if e["name"] == name)
        store.delete(key)
    assert {problem.object_id for problem in verify(store, "a").problems} == {old, new}


def test_what_another_run_needs_stays(store: FolderStore) -> None:
    advance(store, config("a", keep=LEAN, opponent={"history": 1}), 3)
    taker = config("b", opponent={"history": 1})
    advance(store, taker, 2)  # the same rounds 1 and 2
    with hold_lease(store, taker, "about to take over round 3") as session:
        session.begin_advance("x", None, 3)
    assert [item for item in find_removable(store, store_needs(store)) if item.kind == "object"] == []
    with hold_lease(store, taker, "or not") as session:
        session.begin_advance("y", None, 2)
        session.update(lambda head: head.advances.clear())
    gone = {item.object_id for item in gc(store)}
    shared = set(objects_of(config("b"), head_of(store, "b")))
    assert {item for item in gone if not item.startswith("train")} == {
        head_of(store, "a").stage(3, "generate"),
        plan_heldout(config("a"), head_of(store, "a"), 3).object_id,
    }
    assert all(objects.read_manifest(store, object_id) is not None for object_id in shared)


def test_runs_that_are_not_finished_lose_nothing(store: FolderStore) -> None:
    lean = config("a", keep=LEAN, opponent={"history": 1})
    with pytest.raises(Interrupted):
        advance(store, lean, 3, killed_at=(3, "train"))
    before = content(store)
    needs = store_needs(store)
    assert needs.notes == ["run 'a' has an unfinished advance 0 -> 3: its rules wait for that"]
    assert {item.why for item in gc(store)} == {"checkpoints of a finished stage"}
    assert not {key for key in before.keys() - content(store).keys() if "/parts/step" not in key and "state" not in key}
    advance(store, lean, 3)
    with hold_lease(store, lean, "somebody"):
        assert store_needs(store).notes == [
            "run 'a' is being advanced (where its machine is gone: `spinreg run` of it with --until-round 0 ends "
            "that): its rules wait for that"
        ]
        assert {item.why for item in gc(store)} == {"checkpoints of a finished stage"}
    assert {item.why for item in gc(store)} == {"keep.policies: 1", "keep.generations: needed"}


def test_a_shard_of_a_killed_stage_stays_and_is_used(store: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when it is long ago: its run may go on at any time."""
    monkeypatch.setattr(removal, "GRACE_SECONDS", 0.0)
    with pytest.raises(Interrupted):
        advance(store, config("a"), 1, killed_at=(1, "generate"))
    (item,) = gc(store)
    assert item.why == "no manifest names it, for a week or more"
    assert [key.rpartition("/")[2] for key in item.keys] == ["torn"]
    shards = [key for key in store.list("objects/") if "/shards/00000" in key]
    advance(store, config("a"), 1)
    used = _paths(store, head_of(store, "a").stage(1, "generate"))
    assert len([key for key in shards if store.local_path(key) in used]) == 1
    assert sound(store)


def _paths(store: FolderStore, object_id: str | None) -> list[Path]:
    assert object_id is not None
    return list(fetch.fetch_files(store, object_id, "shards").values())


def test_what_no_run_knows_goes_after_a_week(store: FolderStore) -> None:
    advance(store, config("a"), 2)
    advance(store, config("b", objective={"alpha": 1.0}), 2)  # shares round 1
    with pytest.raises(Interrupted):
        advance(store, config("c", seed=5), 1, killed_at=(1, "generate"))
    for run in ("a", "c"):
        shutil.rmtree(store.root / "runs" / run)
    assert {item.why for item in find_removable(store, store_needs(store))} == {"checkpoints of a finished stage"}
    _aged(store.root, 8)
    expected = outcome(store, "b")
    gone = gc(store)
    assert {item.why for item in gone} == {
        "no run knows it", "unfinished, and no run goes on with it", "checkpoints of a finished stage",
        }  # fmt: skip
    left = {key.split("/")[1] for key in store.list("objects/") if not key.endswith("manifest.json")}
    assert left == set(objects_of(config("b"), head_of(store, "b")))
    assert outcome(store, "b") == expected
    assert sound(store)
    assert gc(store) == []
    advance(store, config("c", seed=5), 1)  # over what is left of it
    assert sound(store)


def _aged(root: Path, days: float) -> None:
    for path in root.rglob("*"):
        then = time.time() - days * 86400
        os.utime(path, (then, then))


def test_a_lost_head_takes_nothing_with_it(store: FolderStore) -> None:
    advance(store, config("a"), 1)
    advance(store, config("b", seed=5, keep=LEAN, opponent={"history": 1}), 2)
    (store.root / "runs" / "a" / "head.json").unlink()
    _aged(store.root, 8)
    needs = store_needs(store)
    assert "runs/a has no head.json" in needs.notes[0]
    whys = {item.why for item in gc(store)}
    assert whys == {"checkpoints of a finished stage", "keep.policies: 1", "keep.generations: needed"}
    shutil.rmtree(store.root / "runs" / "a")
    assert {item.why for item in gc(store)} == {"no run knows it"}


def test_a_store_without_runs_is_left_alone(store: FolderStore, capsys: pytest.CaptureFixture[str]) -> None:
    """Its runs may lie elsewhere, or have been lost."""
    advance(store, config("a"), 1)
    shutil.rmtree(store.root / "runs")
    _aged(store.root, 8)
    before = content(store)
    assert main(["gc", "--delete", "--store", str(store.root)]) == 0
    assert "there is no run here" in capsys.readouterr().out
    assert content(store).keys() >= {key for key in before if "/parts/step" not in key and "step-" not in key}


def test_the_same_run_under_another_name_makes_anew_what_was_removed(store: FolderStore) -> None:
    advance(store, config("a", keep=LEAN), 3)
    expected = outcome(store, "a")
    assert gc(store) != []
    advance(store, config("b"), 3)
    assert outcome(store, "b") == expected
    head = head_of(store, "a")
    heldout = {plan_heldout(config("a"), head, number).object_id for number in range(4)}
    assert verify(store, "a").removed.keys() == heldout, "which nothing asks for once it is evaluated"
    assert sound(store)


def test_parts_that_were_removed_under_a_stage_make_it_start_again(store: FolderStore, tmp_path: Path) -> None:
    advance(store, config("other", seed=9), 0)
    job = Job("generate", "generate-x", {}, "", "w1", 1, {}, RunConfig(), tmp_path)
    folder = tmp_path / "made"
    (folder / "shards").mkdir(parents=True)
    (folder / "shards" / "00000.parquet").write_bytes(b"answers")
    objects.commit_part(store, job, "shard-00000", objects.upload(store, job, folder), {})
    _aged(store.root, 8)
    assert [item.why for item in gc(store)] == ["unfinished, and no run goes on with it"]
    with pytest.raises(StageFailed, match="spinreg gc removed it"):
        objects.publish(store, job, tmp_path / "nothing", metrics={}, parts=["shard-00000"])
    objects.commit_part(store, job, "shard-00000", objects.upload(store, job, folder), {})
    objects.publish(store, job, tmp_path / "nothing", metrics={}, parts=["shard-00000"])
    assert fetch.fetch_file(store, "generate-x", "shards/00000.parquet").read_bytes() == b"answers"


# --- random lineages -----------------------------------------------------------------------------------

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
def test_every_run_comes_to_the_same_whatever_is_removed_in_between(
    seed: int,
    store: FolderStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: dict[str, dict[str, str]],
) -> None:
    monkeypatch.setattr(removal, "GRACE_SECONDS", 0.0)  # whatever is left over is old enough
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
        removed += len(gc(store))
        assert sound(store)
        assert gc(store) == []
    for name, groups in runs.items():
        advance(store, config(name, **groups), ROUNDS)
        shape = {group: value for group, value in groups.items() if group != "keep"}
        assert outcome(store, name) == expected(undisturbed, tmp_path, shape)
    assert sound(store)
    assert removed >= 10


# --- kills and races -----------------------------------------------------------------------------------


def littered(store: FolderStore) -> None:
    """Two runs that share, rules, a run that is gone, a stage that was killed, a write that was."""
    advance(store, config("a", keep=LEAN, opponent={"history": 1}), 2)
    advance(store, config("b", opponent={"history": 1}), 1)
    with pytest.raises(Interrupted):
        advance(store, config("c", seed=5), 1, killed_at=(1, "generate"))
    with pytest.raises(Interrupted):
        advance(store, config("d", seed=6), 1, killed_at=(1, "generate"))
    shutil.rmtree(store.root / "runs" / "c")
    (store.root / "objects" / ".tmp-x").write_bytes(b"half")
    _aged(store.root, 8)


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


def test_killed_at_any_call_it_loses_nothing_and_the_next_one_finishes_it(store: FolderStore, tmp_path: Path) -> None:
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
def test_a_run_that_comes_at_any_call_finds_what_it_takes_over(
    gone: bool, store: FolderStore, tmp_path: Path, undisturbed: dict[str, dict[str, str]]
) -> None:
    shape = {"opponent": {"history": 1}}
    taker = config("b", **shape)
    advance(store, config("a", keep=LEAN, **shape), 2)
    advance(store, taker, 0)
    if gone:
        shutil.rmtree(store.root / "runs" / "a")
        _aged(store.root, 8)
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


def test_what_a_repair_needs_is_made_anew(store: FolderStore) -> None:
    """As far as what that is made from is there."""
    advance(store, config("a", keep={"generations": "needed"}, opponent={"history": 1}), 3)
    before, head = outcome(store, "a"), head_of(store, "a")
    gc(store)
    verdict = verify(store, "a")
    record = objects.require_manifest(store, str(head.stage(2, "mix-opponent")))
    (pairs,) = (e["key"] for e in record.files if e["name"] == "pairs.parquet")
    store.delete(pairs)
    with hold_lease(store, config("a", keep={"generations": "needed"}, opponent={"history": 1}), "repair") as session:
        assert begin(store, session, verify(store, "a").damaged) == [(2, "mix-opponent")]
    advance(store, config("a", keep={"generations": "needed"}, opponent={"history": 1}), 3)
    assert outcome(store, "a") == before
    assert sound(store)
    assert set(verify(store, "a").removed) == set(verdict.removed) - {head.stage(2, "generate")}


def came_back(store: FolderStore) -> None:
    """An object that was removed, that another run has begun to make anew, and that run is gone too."""
    advance(store, config("other", seed=9), 0)
    advance(store, config("a"), 1)
    shutil.rmtree(store.root / "runs" / "a")
    _aged(store.root, 8)
    gc(store)
    with pytest.raises(Interrupted):
        advance(store, config("b"), 1, killed_at=(1, "generate"))
    shutil.rmtree(store.root / "runs" / "b")
    _aged(store.root, 8)


def test_what_came_back_in_part_is_not_taken_from_under_a_run(
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


def test_what_came_back_in_part_goes_and_is_told_or_stays_as_it_was(store: FolderStore) -> None:
    came_back(store)
    items = [item for item in find_removable(store, store_needs(store)) if item.record and "removed" in item.record]
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
    _aged(store.root, 8)
    gc(store)
    record = objects.read_record(store, item.object_id)
    assert record is not None
    assert item.record is not None
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
def test_a_run_that_takes_over_what_is_being_removed(
    seed: int, store: FolderStore, tmp_path: Path, undisturbed: dict[str, dict[str, str]]
) -> None:
    """Every call of both in a drawn order: the run comes to the same, and nothing of it is missing."""
    advance(store, config("a", keep=LEAN), 2)
    advance(store, config("other", seed=9), 0)  # a store without any run is left alone
    shutil.rmtree(store.root / "runs" / "a") if seed % 2 else None
    _aged(store.root, 8)
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


# --- the command ---------------------------------------------------------------------------------------


def test_the_command_lists_first_and_removes_what_it_listed(
    store: FolderStore, capsys: pytest.CaptureFixture[str]
) -> None:
    littered(store)
    before = content(store)
    place = ["--store", str(store.root)]
    assert main(["gc", *place]) == 0
    listed = capsys.readouterr().out
    assert main(["gc", "--json", *place]) == 0
    document = json.loads(capsys.readouterr().out)
    assert content(store) == before
    assert len(store.unfinished()) == 1
    for words in ("train of round 1 of a, b: checkpoints of a finished stage", "train of round 1", "no run knows it",
                  "generate of round 2 of a: keep.generations: needed", "a write that never ended, 8 days old",
                  "would be removed", "--delete removes it"):  # fmt: skip
        assert words in listed, words
    assert document["removed"] is False
    keys = {key for item in document["items"] for key in item["keys"]}
    assert document["bytes"] == sum(store.size(key) or 0 for key in keys)
    assert main(["gc", "--delete", *place]) == 0
    assert "removed from" in capsys.readouterr().out
    assert keys == (before.keys() | {"objects/.tmp-x"}) - content(store).keys()
    assert main(["gc", *place]) == 0
    assert "nothing to remove" in capsys.readouterr().out


def test_the_command_goes_by_rules_that_are_given(store: FolderStore, capsys: pytest.CaptureFixture[str]) -> None:
    for run, seed in (("a", 1), ("b", 2)):
        advance(store, config(run, seed=seed), 3)
    place = ["--store", str(store.root), "--json"]
    assert main(["gc", "--run", "a", "-p", "keep.policies=2", *place]) == 0
    (item,) = json.loads(capsys.readouterr().out)["items"]
    assert item["object"] == policy_object(head_of(store, "a"), 1)
    assert main(["gc", "--run", "nope", *place]) == 65
    assert "one of the runs of" in capsys.readouterr().err
    assert main(["gc", "-p", "keep.policies=0", *place]) == 65
    assert "keep.policies: found 0" in capsys.readouterr().err
    assert main(["gc", "-p", "seed=0", *place]) == 65
    assert "fields of the group keep" in capsys.readouterr().err


@pytest.mark.slow
def test_the_same_on_s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(s3_server.url(uuid.uuid4().hex))
    advance(store, config("a", keep=LEAN), 2)
    expected = outcome(store, "a")
    for key in ("objects/x/data/w/f", "of-another/program"):
        store._run(lambda key=key: store._call("create_multipart_upload", Key=store._key(key)), "")  # type: ignore
    before = content(store)
    needs = store_needs(store)
    items = find_removable(store, needs)
    assert content(store) == before
    assert not [item for item in items if item.kind == "upload"], "it may still be under way"
    monkeypatch.setattr(removal, "GRACE_SECONDS", -60.0)
    gone = gc(store)
    assert [item.what.partition("?")[0] for item in gone if item.kind == "upload"] == ["objects/x/data/w/f"]
    assert [entry.key.partition("?")[0] for entry in store.unfinished()] == ["of-another/program"]
    assert "keep.policies: 1" in {item.why for item in gone}
    assert sound(store)
    assert gc(store) == []
    advance(store, config("b"), 2)
    assert outcome(store, "b") == expected
    advance(store, config("a", keep=LEAN), 3)
    assert sound(store)


def test_a_run_that_was_moved_behind_a_link_keeps_what_it_needs(store: FolderStore, tmp_path: Path) -> None:
    """Before, it was not seen, and `spinreg gc --delete` removed its objects."""
    advance(store, config("a"), 2)
    advance(store, config("b", seed=7), 1)
    gc(store)
    before = content(store)
    (store.root / "runs/a").rename(tmp_path / "elsewhere")
    (store.root / "runs/a").symlink_to(tmp_path / "elsewhere")
    _aged(store.root, 8)
    assert gc(store) == []
    assert content(store).keys() == before.keys()
    assert sound(store)
    (tmp_path / "elsewhere").rename(tmp_path / "unmounted")
    with pytest.raises(StoreRefused, match="links that lead somewhere"):
        gc(store)
    (tmp_path / "elsewhere").mkdir()  # a place where no file system is mounted
    with pytest.raises(StoreRefused, match="a link to an empty folder"):
        gc(store)
    (tmp_path / "elsewhere").rmdir()
    (tmp_path / "unmounted").rename(tmp_path / "elsewhere")
    assert content(store).keys() == before.keys()


def test_what_lies_behind_a_link_is_left_alone(store: FolderStore, tmp_path: Path) -> None:
    """It may be another store's, or this one's own by another name."""
    advance(store, config("a"), 2)
    gc(store)
    before = content(store)
    other = FolderStore(tmp_path / "other")
    shutil.copytree(store.root / "runs", other.root / "runs")
    (other.root / "objects").mkdir()
    for folder in (store.root / "objects").iterdir():
        (other.root / "objects" / folder.name).symlink_to(folder)
    needs = store_needs(other, None, LEAN)
    assert [item for item in find_removable(other, needs) if item.kind != "upload"] == []
    assert sum("lies behind a link" in note for note in needs.notes) == len(list((store.root / "objects").iterdir()))
    data = next((store.root / "objects").glob("train-*/data"))
    (data / "e0000-copy").symlink_to(next(data.iterdir()))
    _aged(store.root, 8)
    gc(store)
    (data / "e0000-copy").unlink()
    assert content(store) == before


def test_an_empty_folder_of_a_run_may_be_a_place_to_mount(store: FolderStore, tmp_path: Path) -> None:
    advance(store, config("a"), 1)
    advance(store, config("b", seed=7), 1)
    gc(store)
    before = content(store).keys()
    shutil.move(store.root / "runs/a", tmp_path / "elsewhere")
    (store.root / "runs/a").mkdir()
    _aged(store.root, 8)
    assert gc(store) == []
    assert "runs/a has no head.json" in store_needs(store).notes[0]
    shutil.rmtree(store.root / "runs/a")
    shutil.move(tmp_path / "elsewhere", store.root / "runs/a")
    assert content(store).keys() == before
