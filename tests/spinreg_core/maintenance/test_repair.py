"""`spinreg verify --repair` makes again exactly what is damaged, and what it is made from."""

from __future__ import annotations

import shutil
from typing import Any

import pytest

from spinreg_core.maintenance.gc import find_removable
from spinreg_core.maintenance.repair import begin
from spinreg_core.maintenance.retention import store_needs
from spinreg_core.maintenance.verify import verify
from spinreg_core.runs import objects
from spinreg_core.runs.lease import hold_lease
from spinreg_core.runs.plans import plan_heldout, policy_object
from spinreg_core.runs.stages import STAGES, complete_round, stages_of
from spinreg_core.store.base import Store
from spinreg_core.store.folder import FolderStore
from tests.support.repairs import Dice, damage, repair
from tests.support.toy_runs import (
    Interrupted,
    advance,
    config,
    content,
    install_engine,
    outcome,
)
from tests.support.watched_store import gc, head_of, sound

pytestmark = pytest.mark.usefixtures("quick")


def manifests(store: Store) -> dict[str, bytes | None]:
    return {key.split("/")[1]: store.read(key) for key in store.list("objects/") if key.endswith("/manifest.json")}


@pytest.mark.parametrize("stage", stages_of(2))
def test_repair_of_one_stage_replaces_no_other_object(store: FolderStore, stage: str) -> None:
    advance(store, config("a"), 3)
    expected, before, files = outcome(store, "a"), manifests(store), content(store).keys()
    object_id = damage(store, head_of(store, "a").stage(2, stage))
    result = verify(store, "a")
    assert result.damaged == [object_id]
    repair(store, "a")
    assert sound(store)
    assert outcome(store, "a") == expected
    after = manifests(store)
    assert {o for o in after if after[o] != before[o]} == {object_id}
    assert content(store).keys() >= files, "no file is removed"
    assert head_of(store, "a").repair is None


def find_notes(store: Store) -> list[str]:
    """Return the notes about what `spinreg gc` cannot read."""
    needs = store_needs(store)
    find_removable(store, needs)
    return needs.notes


@pytest.mark.parametrize("raw", [b"", b"{", b'{"schema": 1}', None])
def test_repair_of_an_unreadable_manifest_makes_its_object_again(store: FolderStore, raw: bytes | None) -> None:
    advance(store, config("a"), 2)
    expected, object_id = outcome(store, "a"), policy_object(head_of(store, "a"), 1)
    store.delete(objects.manifest_key(object_id))
    if raw is not None:
        store.create(objects.manifest_key(object_id), raw)
    repair(store, "a")
    assert sound(store)
    assert outcome(store, "a") == expected
    assert find_notes(store) == []


def test_repair_of_base_and_data_makes_both_again(store: FolderStore) -> None:
    advance(store, config("a"), 1)
    expected, head = outcome(store, "a"), head_of(store, "a")
    damage(store, head.base)
    damage(store, head.data)
    repair(store, "a")
    assert sound(store)
    assert outcome(store, "a") == expected


@pytest.mark.parametrize("groups", [{}, {"training": {"average": "ema"}}])
def test_repair_with_another_result_makes_its_dependents_again(
    store: FolderStore, dice: Dice, groups: dict[str, Any]
) -> None:
    """Its input may have been damaged too, and made again from the old one."""
    advance(store, config("a", **groups), 2, make=dice)
    head = head_of(store, "a")
    assert dice.of_one_piece(store, "a")
    before = outcome(store, "a")
    for number, stage in ((1, "generate"), (2, "train")):
        damage(store, head.stage(number, stage))
    dice.thrown = 1
    repair(store, "a", make=dice)
    assert sound(store)
    assert dice.of_one_piece(store, "a")
    after = outcome(store, "a")
    assert after["policy/weights 1"] != before["policy/weights 1"]
    assert after["rows.parquet 0"] == before["rows.parquet 0"]


def test_repair_with_another_result_voids_shards_of_an_open_stage(store: FolderStore, dice: Dice) -> None:
    with pytest.raises(Interrupted):
        advance(store, config("a"), 3, killed_at=(3, "generate"), make=dice)
    damage(store, policy_object(head_of(store, "a"), 2))
    dice.thrown = 1
    repair(store, "a", make=dice)
    advance(store, config("a"), 3, make=dice)
    assert sound(store)
    assert dice.of_one_piece(store, "a")


def test_repair_in_an_incomplete_round_leaves_its_stages_open(store: FolderStore, dice: Dice) -> None:
    with pytest.raises(Interrupted):
        advance(store, config("a"), 3, killed_at=(3, "evaluate"), make=dice)
    damage(store, head_of(store, "a").stage(3, "generate"))
    dice.thrown = 1
    repair(store, "a", make=dice)
    assert verify(store, "a").problems == []
    assert complete_round(head_of(store, "a")) == 2
    assert head_of(store, "a").stage(3, "train") is None, "which was made of it"
    advance(store, config("a"), 3, make=dice)
    assert sound(store)
    assert dice.of_one_piece(store, "a")


def test_repair_leaves_the_recorded_advance_as_it_was(store: FolderStore) -> None:
    """Before, the same command went two rounds too far after it."""
    with hold_lease(store, config("a"), "flow 1") as session:
        assert session.begin_advance("flow 1", 4, None)[:2] == (0, 4)
    with pytest.raises(Interrupted):
        advance(store, config("a"), 4, killed_at=(3, "train"))
    advances = head_of(store, "a").advances
    damage(store, policy_object(head_of(store, "a"), 1))
    repair(store, "a")
    assert head_of(store, "a").advances == advances
    with hold_lease(store, config("a"), "flow 2") as session:
        assert session.begin_advance("flow 2", 4, None)[:2] == (2, 4)


def test_repair_of_an_interrupted_run_keeps_its_advance_pending(store: FolderStore) -> None:
    with pytest.raises(Interrupted):
        advance(store, config("a"), 3, killed_at=(3, "train"))
    damage(store, policy_object(head_of(store, "a"), 1))
    repair(store, "a")
    pending = head_of(store, "a").pending_advance
    assert pending is not None
    assert pending.to == 3


def test_repair_without_removed_inputs_leaves_the_stage_committed(store: FolderStore) -> None:
    """Before, its stage stayed open, and every start of the run failed."""
    lean = config("a", keep={"policies": 1}, opponent={"history": 1})
    advance(store, lean, 4)
    gc(store)
    head, before = head_of(store, "a"), outcome(store, "a")
    lost, once_more = head.stage(3, "evaluate"), head.stage(1, "evaluate")
    for object_id in (lost, once_more):
        damage(store, object_id)
    assert set(verify(store, "a").damaged) == {lost, once_more}
    said: list[str] = []
    with hold_lease(store, lean, "repair") as session:
        assert begin(store, session, verify(store, "a").damaged, said.append) == [(1, "evaluate")]
    assert f"made from {policy_object(head, 3)}, removed by retention" in said[0]
    advance(store, lean, 5)
    assert verify(store, "a").damaged == [lost]
    assert outcome(store, "a").items() >= before.items()


def test_verify_where_auto_is_another_engine_finds_no_damage(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, `verify` missed held-out answers that were never made, and `--repair` replaced sound evaluations."""
    auto = config("a", generation={"engine": "auto"})
    install_engine(monkeypatch, "vllm")
    advance(store, auto, 2)
    sure, head = verify(store, "a"), head_of(store, "a")
    install_engine(monkeypatch, "hf")
    found = verify(store, "a")
    assert found.problems == []
    assert found.objects == sure.objects
    assert found.checked == sure.checked
    install_engine(monkeypatch, "vllm")
    heldout = plan_heldout(auto, head, 1).object_id
    install_engine(monkeypatch, "hf")
    damage(store, heldout)
    assert verify(store, "a").damaged == [heldout], "and what is damaged is seen"
    repair(store, "a")
    assert sound(store)


def test_repair_of_an_open_stages_part_lets_the_run_continue(store: FolderStore) -> None:
    """Before, the run was stuck: every start ended in Damaged, and `verify` said that all was well."""
    with pytest.raises(Interrupted):
        advance(store, config("a"), 1, killed_at=(1, "generate"))
    object_id = STAGES["generate"].plan(config("a"), head_of(store, "a"), 1).object_id
    (key,) = store.list(f"objects/{object_id}/parts/")
    raw = store.read(key) or b""
    store.write(key, raw[:50])
    result = verify(store, "a")
    assert [problem.file for problem in result.problems] == [key]
    repair(store, "a")
    assert sound(store)
    assert objects.usable_parts(store, object_id) == {}
    store.write(key, raw[:50])
    advance(store, config("a"), 1)
    assert sound(store)
    alone = FolderStore(store.root.parent / "alone")
    advance(alone, config("a"), 1)
    assert outcome(store, "a") == outcome(alone, "a")


def test_repair_of_an_open_stages_shard_lets_the_run_continue(store: FolderStore) -> None:
    with pytest.raises(Interrupted):
        advance(store, config("a"), 2, killed_at=(2, "generate"))
    object_id = STAGES["generate"].plan(config("a"), head_of(store, "a"), 2).object_id
    (part,) = objects.usable_parts(store, object_id).values()
    (entry,) = part.files
    store.write(entry.key, b"X" * entry.size)
    assert [problem.file for problem in verify(store, "a").problems] == [entry.key]
    repair(store, "a")
    assert sound(store)
    advance(store, config("a"), 2)
    assert sound(store)


def test_gc_after_a_repair_applies_the_rules_again(store: FolderStore) -> None:
    """Before, `spinreg gc` could not read the manifest that lies aside, and left the object for good."""
    lean = config("a", keep={"policies": 1, "generations": "needed"}, opponent={"history": 1})
    advance(store, lean, 3)
    again = FolderStore(store.root.parent / "again")
    shutil.copytree(store.root, again.root)
    head = head_of(store, "a")
    for number, stage in ((1, "train"), (2, "generate")):
        damage(store, head.stage(number, stage))
    gone = gc(again)
    repair(store, "a")
    assert {item.object_id for item in gc(store) if item.kind == "object"} == {
        item.object_id for item in gone if item.kind == "object"
    }
    assert sound(store)
    assert gc(store) == []
    advance(store, lean, 4)
    advance(again, lean, 4)
    assert outcome(store, "a") == outcome(again, "a")
