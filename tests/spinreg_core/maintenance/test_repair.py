"""`spinreg verify --repair` makes exactly what is damaged anew, whenever it is killed, and whoever comes in between."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import flows.repair
from flows.cli import main
from spinreg_core.errors import Damaged, LeaseHeld, LeaseLost, StoreRefused
from spinreg_core.maintenance.gc import find_removable
from spinreg_core.maintenance.repair import begin
from spinreg_core.maintenance.retention import store_needs
from spinreg_core.maintenance.verify import format_verdict, verify
from spinreg_core.reports.status import format_status
from spinreg_core.runs import head as heads
from spinreg_core.runs import lease, objects
from spinreg_core.runs import plans as rounds
from spinreg_core.runs.head import head_key, require_config
from spinreg_core.runs.lease import hold_lease, make_holder
from spinreg_core.runs.plans import objects_of, plan_heldout, policy_object
from spinreg_core.runs.stages import STAGES, complete_round, stages_of
from spinreg_core.store.base import Store
from spinreg_core.store.documents import plain
from spinreg_core.store.folder import FolderStore
from tests.support import toy_runs as retained
from tests.support.toy_runs import Interrupted, advance, config, content, outcome
from tests.support.unprivileged import as_nobody
from tests.support.watched_store import CHANGES, Killed, Watched, gc, head_of, sound

pytestmark = pytest.mark.usefixtures("quick")
LONG = os.environ.get("SPINREG_CHAOS") == "long"


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "store")


def damage(store: Store, object_id: str | None) -> str:
    """Other bytes in the first file of an object; returns its id."""
    assert object_id is not None
    entry = objects.require_manifest(store, object_id)["files"][0]
    path = store.local_path(entry["key"])
    assert path is not None
    path.unlink()  # it may be a link to that of another store
    path.write_bytes(b"X" * entry["size"])
    return object_id


def repair(store: Store, run: str, damaged: list[str] | None = None) -> None:
    """As the command does; the flow `spin` is toys."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            flows.repair,
            "spin",
            lambda run, store, until_round, place=store: advance(place, require_config(place, run), until_round),
        )
        flows.repair.repair(store, run, verify(store, run).damaged if damaged is None else damaged, say=lambda _: None)


def free(store: Store, run: str) -> None:
    """The lease of a process that was killed, run out."""
    raw, tag = store.read_tagged(head_key(run)) or (b"", "")
    head = json.loads(raw)
    head["lease"]["holder"] = None
    store.replace(head_key(run), json.dumps(head).encode(), tag)


class Dice:
    """Stages that do not repeat themselves, once `thrown`: the same stage comes out otherwise. What was made of what is
    remembered, so that a run can be told to be of one piece."""

    def __init__(self) -> None:
        self.thrown, self.read = 0, dict[bytes, list[bytes]]()

    def __call__(self, key: dict[str, Any], read: list[bytes]) -> bytes:
        made = real_made(key, [*read, str(self.thrown).encode()])
        self.read[made] = read
        return made

    def of_one_piece(self, store: Store, run: str) -> bool:
        """Whether all that a run is made of was made of what is there now."""
        there = set[bytes]()
        for object_id in objects_of(require_config(store, run), head_of(store, run)):
            record = objects.require_manifest(store, object_id)
            there |= {store.read(entry["key"]) or b"" for entry in record.files}
        return all(there.issuperset(self.read.get(made, ())) for made in there)


real_made = retained._made


@pytest.fixture
def dice(monkeypatch: pytest.MonkeyPatch) -> Dice:
    found = Dice()
    monkeypatch.setattr(retained, "_made", found)
    return found


def manifests(store: Store) -> dict[str, bytes | None]:
    return {key.split("/")[1]: store.read(key) for key in store.list("objects/") if key.endswith("/manifest.json")}


@pytest.mark.parametrize("stage", stages_of(2))
def test_what_is_damaged_is_made_anew_and_nothing_else(store: FolderStore, stage: str) -> None:
    advance(store, config("a"), 3)
    expected, before, files = outcome(store, "a"), manifests(store), content(store).keys()
    object_id = damage(store, head_of(store, "a").stage(2, stage))
    verdict = verify(store, "a")
    assert verdict.damaged == [object_id]
    repair(store, "a")
    assert sound(store)
    assert outcome(store, "a") == expected
    after = manifests(store)
    assert {o for o in after if after[o] != before[o]} == {object_id}
    assert content(store).keys() >= files, "no file is removed"
    assert head_of(store, "a").repair is None


def find_notes(store: Store) -> list[str]:
    """What `spinreg gc` cannot read."""
    needs = store_needs(store)
    find_removable(store, needs)
    return needs.notes


@pytest.mark.parametrize("raw", [b"", b"{", b'{"schema": 1}', None])
def test_a_manifest_that_says_nothing(store: FolderStore, raw: bytes | None) -> None:
    advance(store, config("a"), 2)
    expected, object_id = outcome(store, "a"), policy_object(head_of(store, "a"), 1)
    store.delete(objects.manifest_key(object_id))
    if raw is not None:
        store.create(objects.manifest_key(object_id), raw)
    repair(store, "a")
    assert sound(store)
    assert outcome(store, "a") == expected
    assert find_notes(store) == []


def test_base_and_data(store: FolderStore) -> None:
    advance(store, config("a"), 1)
    expected, head = outcome(store, "a"), head_of(store, "a")
    damage(store, head.base)
    damage(store, head.data)
    repair(store, "a")
    assert sound(store)
    assert outcome(store, "a") == expected


@pytest.mark.parametrize("groups", [{}, {"training": {"average": "ema"}}])
def test_what_comes_out_otherwise_takes_with_it_what_was_made_of_it(
    store: FolderStore, dice: Dice, groups: dict[str, Any]
) -> None:
    """Also where that was damaged itself, and has been made anew of the old."""
    advance(store, config("a", **groups), 2)
    head = head_of(store, "a")
    assert dice.of_one_piece(store, "a")
    before = outcome(store, "a")
    for number, stage in ((1, "generate"), (2, "train")):
        damage(store, head.stage(number, stage))
    dice.thrown = 1
    repair(store, "a")
    assert sound(store)
    assert dice.of_one_piece(store, "a")
    after = outcome(store, "a")
    assert after["policy/weights 1"] != before["policy/weights 1"]
    assert after["rows.parquet 0"] == before["rows.parquet 0"]


def test_shards_of_an_open_stage_that_were_made_of_what_is_no_more(store: FolderStore, dice: Dice) -> None:
    with pytest.raises(Interrupted):
        advance(store, config("a"), 3, killed_at=(3, "generate"))
    damage(store, policy_object(head_of(store, "a"), 2))
    dice.thrown = 1
    repair(store, "a")
    advance(store, config("a"), 3)
    assert sound(store)
    assert dice.of_one_piece(store, "a")


def test_a_stage_of_a_round_that_was_not_complete_is_left_open(store: FolderStore, dice: Dice) -> None:
    with pytest.raises(Interrupted):
        advance(store, config("a"), 3, killed_at=(3, "evaluate"))
    damage(store, head_of(store, "a").stage(3, "generate"))
    dice.thrown = 1
    repair(store, "a")
    assert verify(store, "a").problems == []
    assert complete_round(head_of(store, "a")) == 2
    assert head_of(store, "a").stage(3, "train") is None, "which was made of it"
    advance(store, config("a"), 3)
    assert sound(store)
    assert dice.of_one_piece(store, "a")


# --- what the run was told to do -----------------------------------------------------------------------


def test_a_repair_leaves_the_recorded_advance_as_it_was(store: FolderStore) -> None:
    """Before, the same command went two rounds too far after it."""
    with hold_lease(store, config("a"), "flow 1") as session:
        assert session.begin_advance("flow 1", 4, None)[:2] == (0, 4)
    advances = head_of(store, "a").advances
    with pytest.raises(Interrupted):
        advance_recorded(store, killed_at=(3, "train"))
    damage(store, policy_object(head_of(store, "a"), 1))
    repair(store, "a")
    assert head_of(store, "a").advances == advances
    with hold_lease(store, config("a"), "flow 2") as session:
        assert session.begin_advance("flow 2", 4, None)[:2] == (2, 4)


def advance_recorded(store: Store, killed_at: tuple[int, str]) -> None:
    """Go on with the advance that is recorded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease.RunLease, "begin_advance", lambda *_: None)
        advance(store, config("a"), 4, killed_at=killed_at)


# --- late, and together with others --------------------------------------------------------------------


def test_a_verdict_that_is_late_changes_nothing(store: FolderStore) -> None:
    """Two operators look, and both repair, one after the other."""
    advance(store, config("a"), 2)
    damage(store, policy_object(head_of(store, "a"), 1))
    late = verify(store, "a").damaged
    repair(store, "a")
    before = content(store)
    repair(store, "a", late)
    after = content(store)
    assert {key: value for key, value in after.items() if key.startswith("objects/")} == {
        key: value for key, value in before.items() if key.startswith("objects/")
    }
    assert sound(store)


def taken_over(store: Store, run: str) -> None:
    """Somebody else has the lease."""
    raw, tag = store.read_tagged(head_key(run)) or (b"", "")
    head = json.loads(raw)
    epoch = head["lease"]["epoch"] + 1
    head["lease"] = {"epoch": epoch, "holder": plain(make_holder("second")), "beat": 0}
    store.replace(head_key(run), json.dumps(head).encode(), tag)


def test_frozen_before_it_is_recorded_it_changes_nothing(store: FolderStore) -> None:
    advance(store, config("a"), 2)
    damage(store, policy_object(head_of(store, "a"), 1))
    before = content(store)
    late = hold_lease(store, config("a"), "first")
    session = late.__enter__()
    taken_over(store, "a")
    with pytest.raises(LeaseLost):
        begin(store, session, verify(store, "a").damaged)
    late.__exit__(None, None, None)
    after = content(store)
    assert {key for key in before | after if before.get(key) != after.get(key)} == {
        head_key("a"), heads.config_key("a")
    }  # fmt: skip


def test_frozen_while_it_sets_aside_it_does_not_touch_what_its_successor_made(store: FolderStore) -> None:
    """At every call: it wakes after the run was repaired by another process, and ends without a trace."""
    advance(store, config("a"), 1)
    head = head_of(store, "a")
    damage(store, head.stage(1, "generate"))
    damage(store, head.stage(1, "train"))
    number, woke = 0, 0
    for number in range(0, 200, 1 if LONG else 3):
        place = FolderStore(store.root.parent / "place")
        shutil.copytree(store.root, place.root, copy_function=os.link)
        calls, after = iter(range(number)), dict[str, bytes | None]()

        def freeze(calls: Iterator[int] = calls, place: FolderStore = place, after: dict[str, Any] = after) -> None:
            if next(calls, None) is None and not after:
                after["begun"] = None
                with pytest.MonkeyPatch.context() as patch:
                    patch.setenv("SPINREG_CACHE", str(place.root.parent / "another machine's"))
                    free(place, "a")
                    repair(place, "a")
                after.update(content(place))

        try:
            repair(Watched(place, freeze, CHANGES), "a")  # type: ignore[arg-type]
        except (LeaseLost, LeaseHeld):
            woke += 1
        if not after:
            break
        assert sound(place), number
        left = content(place)
        changed = {key for key in after if left.get(key) != after[key]}
        assert {key for key in changed if key.startswith("objects/")} == set(), number
        shutil.rmtree(place.root)
    assert 20 < number < 190
    assert woke > 3


def test_while_another_run_that_has_the_object_is_advanced_it_is_refused(store: FolderStore) -> None:
    advance(store, config("a"), 1)
    other = config("b", objective={"alpha": 1.0})  # its round 1 is the same
    advance(store, other, 0)
    damage(store, head_of(store, "a").stage(1, "generate"))
    before = manifests(store)
    with hold_lease(store, other, "b's flow"):
        with pytest.raises(LeaseHeld, match=r"run 'b' is being advanced by b's flow .* and has \w+-"):
            repair(store, "a")
        assert manifests(store) == before
        assert head_of(store, "a").repair is None
    advance(store, config("c", seed=5), 0)
    with hold_lease(store, config("c", seed=5), "has nothing of it"):
        repair(store, "a")
    assert sound(store)


def test_a_run_that_shares_goes_on_while_it_is_repaired(store: FolderStore) -> None:
    """It starts between any two calls of the repair."""
    advance(store, config("a"), 2)
    other = config("b", objective={"alpha": 1.0})
    advance(store, other, 1)
    expected = outcome(store, "a")
    damage(store, head_of(store, "a").stage(1, "generate"))
    damage(store, head_of(store, "a").stage(2, "train"))
    alone = FolderStore(store.root.parent / "alone")
    advance(alone, other, 2)
    came, number = True, 0
    while came:
        place, came = FolderStore(store.root.parent / "place"), False
        shutil.copytree(store.root, place.root, copy_function=os.link)
        left = iter(range(number))

        def come(left: Iterator[int] = left, place: FolderStore = place) -> None:
            nonlocal came
            if next(left, None) is None and not came:
                came = True
                with contextlib.suppress(Damaged):  # it may still read what is damaged, and would without a repair
                    advance(place, other, 2)

        repair(Watched(place, come, CHANGES), "a")  # type: ignore[arg-type]
        advance(place, other, 2)
        assert sound(place), number
        assert (outcome(place, "a"), outcome(place, "b")) == (expected, outcome(alone, "b")), number
        shutil.rmtree(place.root)
        number += 1 if LONG else 9
    assert number > 10


# --- kills ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("finish", ["a start", "a repair"])
def test_killed_at_any_call_it_is_not_forgotten(store: FolderStore, dice: Dice, finish: str) -> None:
    """Stages come out otherwise each time: what is left after a kill must not pass for whole before it is."""
    advance(store, config("a"), 2)
    head = head_of(store, "a")
    for number, stage in ((1, "generate"), (2, "mix-opponent")):
        damage(store, head.stage(number, stage))
    calls: list[int] = []
    whole = FolderStore(store.root.parent / "whole")
    shutil.copytree(store.root, whole.root)
    dice.thrown = 1
    repair(Watched(whole, lambda: calls.append(1), CHANGES), "a")  # type: ignore[arg-type]
    assert dice.of_one_piece(whole, "a")
    assert len(calls) > 60
    begun = 0
    for number in range(0 if finish == "a start" else 1, len(calls), 1 if LONG else 15):
        place, left = FolderStore(store.root.parent / "place"), iter(range(number))
        shutil.copytree(store.root, place.root, copy_function=os.link)

        def fall(left: Any = left) -> None:
            if next(left, None) is None:
                raise Killed

        dice.thrown += 1
        with pytest.raises(Killed):
            repair(Watched(place, fall, CHANGES), "a")  # type: ignore[arg-type]
        free(place, "a")
        found, text = verify(place, "a"), format_verdict(verify(place, "a"))
        assert found.problems or found.unfinished or dice.of_one_piece(place, "a"), number
        assert bool(found.unfinished) == ("a repair was not finished" in text) == ("repair" in head_of(place, "a"))
        assert ("unfinished repair: " in format_status(place, "a")[0]) == bool(found.unfinished)
        gc(place)
        dice.thrown += 1
        if finish == "a start" and found.unfinished:
            begun += 1
            advance(place, config("a"), 2)
        elif found.problems or found.unfinished:
            repair(place, "a")
        assert head_of(store, "a").repair is None  # (place, "a"), number
        assert sound(place), number
        assert dice.of_one_piece(place, "a"), number
        assert complete_round(head_of(place, "a")) == 2
        shutil.rmtree(place.root)
    assert begun > 2 or finish == "a repair"


def test_damage_found_while_a_repair_is_unfinished_is_part_of_it(store: FolderStore, dice: Dice) -> None:
    advance(store, config("a"), 3)
    damage(store, head_of(store, "a").stage(2, "train"))
    with hold_lease(store, config("a"), "killed") as session:
        begin(store, session, verify(store, "a").damaged)
    damage(store, head_of(store, "a").stage(1, "generate"))
    dice.thrown = 1
    repair(store, "a")
    assert sound(store)
    assert dice.of_one_piece(store, "a")
    assert complete_round(head_of(store, "a")) == 3


def test_the_commands_tell_of_an_unfinished_repair(
    store: FolderStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    advance(store, config("a"), 1)
    damage(store, head_of(store, "a").stage(1, "evaluate"))
    with hold_lease(store, config("a"), "killed") as session:
        begin(store, session, verify(store, "a").damaged)
    place = ["a", "--store", str(store.root)]
    assert main(["verify", *place]) == 74
    assert "a repair was not finished (of evaluate of round 1)" in capsys.readouterr().out
    assert main(["status", *place]) == 0
    assert "unfinished repair: evaluate of round 1, up to round 1" in capsys.readouterr().out
    started: list[dict[str, Any]] = []
    monkeypatch.setattr("flows.cli.advance", lambda flow, parameters, config: started.append(parameters) or 0)
    assert main(["resume", *place]) == 0
    assert started == [{"run": "a", "store": str(store.root), "until_round": 0}]
    notes = {item.why for item in gc(store)}
    assert notes == {"checkpoints of a finished stage"}
    repair(store, "a")
    assert main(["verify", *place]) == 0


def test_what_rules_have_taken_the_inputs_of_is_left_and_the_run_goes_on(store: FolderStore) -> None:
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


# --- engines, parts, gc --------------------------------------------------------------------------------


def test_where_auto_stands_for_another_engine_nothing_is_damaged(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, `verify` missed held-out answers that were never made, and `--repair` replaced sound evaluations."""

    def machine(engine: str) -> None:
        monkeypatch.setattr(rounds, "resolve_engine", lambda name: engine if name == "auto" else name)

    auto = config("a", generation={"engine": "auto"})
    machine("vllm")
    advance(store, auto, 2)
    sure, head = verify(store, "a"), head_of(store, "a")
    machine("hf")
    found = verify(store, "a")
    assert found.problems == []
    assert found.objects == sure.objects
    assert found.checked == sure.checked
    machine("vllm")
    heldout = plan_heldout(auto, head, 1).object_id
    machine("hf")
    damage(store, heldout)
    assert verify(store, "a").damaged == [heldout], "and what is damaged is seen"
    repair(store, "a")
    assert sound(store)


def test_rules_of_one_run_leave_what_another_machines_run_needs(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "resolve_engine", lambda name: "hf" if name == "auto" else name)
    advance(store, config("a", generation={"engine": "auto"}), 1)
    advance(store, config("b", keep={"generations": "needed"}), 1)  # hf as well, so that they share all
    monkeypatch.setattr(rounds, "resolve_engine", lambda name: "vllm" if name == "auto" else name)
    assert [item for item in gc(store) if item.kind == "object"] == []


def test_a_damaged_shard_of_an_open_stage_is_made_anew(store: FolderStore) -> None:
    """Before, the run was stuck: every start ended in Damaged, and `verify` said that all was well."""
    with pytest.raises(Interrupted):
        advance(store, config("a"), 1, killed_at=(1, "generate"))
    object_id = STAGES["generate"].plan(config("a"), head_of(store, "a"), 1).object_id
    (key,) = store.list(f"objects/{object_id}/parts/")
    raw = store.read(key) or b""
    store.write(key, raw[:50])
    verdict = verify(store, "a")
    assert [problem.file for problem in verdict.problems] == [key]
    repair(store, "a")
    assert sound(store)
    assert objects.list_parts(store, object_id) == {}
    store.write(key, raw[:50])
    advance(store, config("a"), 1)
    assert sound(store)
    alone = FolderStore(store.root.parent / "alone")
    advance(alone, config("a"), 1)
    assert outcome(store, "a") == outcome(alone, "a")


def test_a_damaged_file_of_an_open_stage_is_found(store: FolderStore) -> None:
    with pytest.raises(Interrupted):
        advance(store, config("a"), 2, killed_at=(2, "generate"))
    object_id = STAGES["generate"].plan(config("a"), head_of(store, "a"), 2).object_id
    (part,) = objects.list_parts(store, object_id).values()
    (entry,) = part.files
    store.write(entry["key"], b"X" * entry["size"])
    assert [problem.file for problem in verify(store, "a").problems] == [entry["key"]]
    repair(store, "a")
    assert sound(store)
    advance(store, config("a"), 2)
    assert sound(store)


def test_what_was_repaired_goes_by_the_rules_again(store: FolderStore) -> None:
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


def test_pending_is_still_pending(store: FolderStore) -> None:
    with pytest.raises(Interrupted):
        advance(store, config("a"), 3, killed_at=(3, "train"))
    damage(store, policy_object(head_of(store, "a"), 1))
    repair(store, "a")
    pending = head_of(store, "a").pending_advance
    assert pending is not None
    assert pending["to"] == 3


def test_a_manifest_edited_by_hand_and_a_file_that_nobody_committed_are_found_and_repaired(store: FolderStore) -> None:
    """Both would be read: an input that is gone hides what depends on it, a strange file is loaded with a policy."""
    advance(store, config("a"), 2)
    before = outcome(store, "a")
    train = policy_object(head_of(store, "a"), 1)
    key = objects.manifest_key(train)
    record = json.loads(store.read(key) or b"")
    record.inputs = {}
    store.write(key, json.dumps(record).encode())
    policy = next(e.key for e in record.files if "/policy/" in e.key).rpartition("/")[0]
    store.write(f"{policy}/.DS_Store", b"strange")
    found = verify(store, "a")
    assert found.damaged == [train]
    assert {(problem.file, problem.found) for problem in found.problems} == {
        (key, "other content than its sum is of"), (f"{policy}/.DS_Store", "a file that no manifest lists"),
    }  # fmt: skip
    repair(store, "a")
    assert verify(store, "a").problems == []
    assert outcome(store, "a") == before


def test_a_file_that_cannot_be_read_is_damage(store: FolderStore) -> None:
    advance(store, config("a"), 2)
    before = outcome(store, "a")
    train = policy_object(head_of(store, "a"), 1)
    keys = [entry["key"] for entry in objects.require_manifest(store, train)["files"]]
    policy = next(key for key in keys if "/policy/" in key)
    other = next(key for key in keys if "/policy/" not in key)
    for key in (policy, other):
        (store.root / key).unlink()
        (store.root / key).symlink_to(store.root / key)  # root may read anything but this
    found = {problem.file: problem.found for problem in verify(store, "a").problems}
    assert found.keys() == {policy, other, policy.rpartition("/")[0]}, "its folder cannot be listed either"
    assert found[policy].startswith("what cannot be read ([Errno")
    repair(store, "a")
    assert verify(store, "a").problems == []
    assert outcome(store, "a") == before


def test_a_manifest_that_cannot_be_read_is_named_with_what_depends_on_it(store: FolderStore) -> None:
    advance(store, config("a"), 2)
    before = outcome(store, "a")
    train = policy_object(head_of(store, "a"), 1)
    path = store.root / objects.manifest_key(train)
    path.unlink()
    path.mkdir()
    verdict = verify(store, "a")
    (problem,) = verdict.problems
    assert (problem.file, problem.expected) == (
        objects.manifest_key(train), "what spinreg wrote there; remove it before --repair",
    )  # fmt: skip
    assert verdict.dependents[train]
    path.rmdir()
    repair(store, "a")
    assert verify(store, "a").problems == []
    assert outcome(store, "a") == before


def test_what_one_may_not_read_is_no_damage() -> None:
    """Another user's repair would make anew what is sound."""

    def fill(folder: Path) -> None:
        store = FolderStore(folder)
        advance(store, config("a"), 1)
        for path in folder.rglob("policy/*"):
            path.chmod(0)

    with as_nobody(fill) as folder, pytest.raises(StoreRefused, match="Permission denied"):
        verify(FolderStore(folder), "a")


def test_a_checkpoint_that_goes_while_it_is_read_is_no_error(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the checkpoints of a training do, which are removed when there are newer ones."""
    advance(store, config("a"), 1)
    key = objects.require_manifest(store, policy_object(head_of(store, "a"), 1))["files"][0]["key"]
    real = FolderStore.size

    def gone(self: FolderStore, asked: str) -> int | None:
        size = real(self, asked)
        if asked == key:
            (self.root / key).unlink(missing_ok=True)
        return size

    monkeypatch.setattr(FolderStore, "size", gone)
    (problem,) = verify(store, "a").problems
    assert (problem.file, problem.found) == (key, "no file")
