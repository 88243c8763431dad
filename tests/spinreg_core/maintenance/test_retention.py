"""Rules release what no later round reads, and nothing of a run that is not finished."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from spinreg_core.config import RunConfig
from spinreg_core.errors import Removed, StageFailed
from spinreg_core.maintenance.gc import find_removable
from spinreg_core.maintenance.repair import begin
from spinreg_core.maintenance.retention import released_by_rules, store_needs
from spinreg_core.maintenance.verify import verify
from spinreg_core.reports.status import run_status
from spinreg_core.runs import fetch, objects
from spinreg_core.runs.job import Job
from spinreg_core.runs.lease import hold_lease
from spinreg_core.runs.plans import average_object, plan_heldout, policy_object
from spinreg_core.runs.stages import objects_of
from spinreg_core.store.folder import FolderStore
from tests.support.toy_runs import (
    Interrupted,
    advance,
    config,
    content,
    install_engine,
    make_old,
    outcome,
)
from tests.support.watched_store import gc, head_of, sound

pytestmark = pytest.mark.usefixtures("quick")
LEAN = {"policies": 1, "generations": "needed"}


def test_gc_without_rules_removes_checkpoints_alone(store: FolderStore) -> None:
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
def test_gc_with_rules_removes_objects_unread_by_later_rounds(
    store: FolderStore, groups: dict[str, Any], keep: dict[str, Any], expected: str
) -> None:
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
        left = {e.name for e in record.files if store.size(e.key) is not None}
        assert left == ({"metrics.jsonl", "summary.json"} if object_id.startswith("train") else set())
    assert gc(store) == []


def test_verify_after_gc_distinguishes_removed_and_lost_files(store: FolderStore) -> None:
    advance(store, config("a", keep=LEAN), 3)
    gc(store)
    head = head_of(store, "a")
    old, new = policy_object(head, 1), policy_object(head, 3)
    states = {entry["round"]: entry["stages"]["train"]["state"] for entry in run_status(store, "a")["rounds"][1:]}
    assert states == {1: "done, removed by retention", 2: "done, removed by retention", 3: "done"}
    result = verify(store, "a")
    assert result.problems == []
    assert old in result.removed
    assert "removed by retention (keep.policies: 1, " in result.removed[old]
    with pytest.raises(Removed, match="weights: removed by retention"):
        fetch.fetch_folder(store, old, "policy")
    assert fetch.fetch_file(store, old, "metrics.jsonl").read_bytes() == b"{}\n"
    for object_id, name in ((old, "metrics.jsonl"), (new, "policy/weights")):
        (key,) = (e.key for e in objects.require_manifest(store, object_id).files if e.name == name)
        store.delete(key)
    assert {problem.object_id for problem in verify(store, "a").problems} == {old, new}


def test_gc_keeps_objects_of_another_run(store: FolderStore) -> None:
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


def test_gc_takes_nothing_from_unfinished_runs(store: FolderStore) -> None:
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


def test_gc_keeps_the_shards_of_a_killed_stage(store: FolderStore) -> None:
    """Also after a long time: its run may continue at any time."""
    with pytest.raises(Interrupted):
        advance(store, config("a"), 1, killed_at=(1, "generate"))
    make_old(store.root)
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


def test_gc_removes_objects_of_no_run_after_a_week(store: FolderStore) -> None:
    advance(store, config("a"), 2)
    advance(store, config("b", objective={"alpha": 1.0}), 2)  # shares round 1
    with pytest.raises(Interrupted):
        advance(store, config("c", seed=5), 1, killed_at=(1, "generate"))
    for run in ("a", "c"):
        shutil.rmtree(store.root / "runs" / run)
    assert {item.why for item in find_removable(store, store_needs(store))} == {"checkpoints of a finished stage"}
    make_old(store.root)
    expected = outcome(store, "b")
    gone = gc(store)
    assert {item.why for item in gone} == {
        "no run knows it", "unfinished, and no run continues it", "checkpoints of a finished stage",
        }  # fmt: skip
    left = {key.split("/")[1] for key in store.list("objects/") if not key.endswith("manifest.json")}
    assert left == set(objects_of(config("b"), head_of(store, "b")))
    assert outcome(store, "b") == expected
    assert sound(store)
    assert gc(store) == []
    advance(store, config("c", seed=5), 1)  # over what is left of it
    assert sound(store)


def test_gc_with_a_lost_head_keeps_objects_of_unknown_runs(store: FolderStore) -> None:
    advance(store, config("a"), 1)
    advance(store, config("b", seed=5, keep=LEAN, opponent={"history": 1}), 2)
    (store.root / "runs" / "a" / "head.json").unlink()
    make_old(store.root)
    needs = store_needs(store)
    assert "runs/a has no head.json" in needs.notes[0]
    whys = {item.why for item in gc(store)}
    assert whys == {"checkpoints of a finished stage", "keep.policies: 1", "keep.generations: needed"}
    shutil.rmtree(store.root / "runs" / "a")
    assert {item.why for item in gc(store)} == {"no run knows it"}


def test_run_under_another_name_makes_removed_objects_again(store: FolderStore) -> None:
    advance(store, config("a", keep=LEAN), 3)
    expected = outcome(store, "a")
    assert gc(store) != []
    advance(store, config("b"), 3)
    assert outcome(store, "b") == expected
    head = head_of(store, "a")
    heldout = {plan_heldout(config("a"), head, number).object_id for number in range(4)}
    assert verify(store, "a").removed.keys() == heldout, "which nothing asks for once it is evaluated"
    assert sound(store)


def test_publish_after_gc_removed_its_parts_fails_the_stage(store: FolderStore, tmp_path: Path) -> None:
    advance(store, config("other", seed=9), 0)
    job = Job("generate", "generate-x", {}, "", "w1", 1, {}, RunConfig(), tmp_path)
    folder = tmp_path / "made"
    (folder / "shards").mkdir(parents=True)
    (folder / "shards" / "00000.parquet").write_bytes(b"answers")
    objects.commit_part(store, job, "shard-00000", objects.upload(store, job, folder), {})
    make_old(store.root)
    assert [item.why for item in gc(store)] == ["unfinished, and no run continues it"]
    with pytest.raises(StageFailed, match="spinreg gc removed it"):
        objects.publish(store, job, tmp_path / "nothing", metrics={}, parts=["shard-00000"])
    objects.commit_part(store, job, "shard-00000", objects.upload(store, job, folder), {})
    objects.publish(store, job, tmp_path / "nothing", metrics={}, parts=["shard-00000"])
    assert fetch.fetch_file(store, "generate-x", "shards/00000.parquet").read_bytes() == b"answers"


def test_repair_makes_removed_inputs_again(store: FolderStore) -> None:
    """As far as what that is made from is there."""
    advance(store, config("a", keep={"generations": "needed"}, opponent={"history": 1}), 3)
    before, head = outcome(store, "a"), head_of(store, "a")
    gc(store)
    result = verify(store, "a")
    record = objects.require_manifest(store, str(head.stage(2, "mix-opponent")))
    (pairs,) = (e.key for e in record.files if e.name == "pairs.parquet")
    store.delete(pairs)
    with hold_lease(store, config("a", keep={"generations": "needed"}, opponent={"history": 1}), "repair") as session:
        assert begin(store, session, verify(store, "a").damaged) == [(2, "mix-opponent")]
    advance(store, config("a", keep={"generations": "needed"}, opponent={"history": 1}), 3)
    assert outcome(store, "a") == before
    assert sound(store)
    assert set(verify(store, "a").removed) == set(result.removed) - {head.stage(2, "generate")}


def test_gc_keeps_objects_of_a_run_on_another_machine(store: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    install_engine(monkeypatch, "hf")
    advance(store, config("a", generation={"engine": "auto"}), 1)
    advance(store, config("b", keep={"generations": "needed"}), 1)  # hf as well, so that they share all
    install_engine(monkeypatch, "vllm")
    assert [item for item in gc(store) if item.kind == "object"] == []
