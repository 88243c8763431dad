"""A repair that is killed, frozen or late, or meets another run, ends as an undisturbed one."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from flows.cli import main
from spinreg_core.errors import Damaged, LeaseHeld, LeaseLost
from spinreg_core.maintenance.repair import begin
from spinreg_core.maintenance.verify import format_verdict, verify
from spinreg_core.reports.status import format_status
from spinreg_core.runs.head import config_key, head_key
from spinreg_core.runs.lease import hold_lease
from spinreg_core.runs.plans import policy_object
from spinreg_core.runs.stages import complete_round
from spinreg_core.store.base import Store
from spinreg_core.store.folder import FolderStore
from tests.support.repairs import Dice, damage, expire_lease, repair, take_lease
from tests.support.toy_runs import (
    advance,
    config,
    content,
    outcome,
)
from tests.support.watched_store import CHANGES, Killed, Watched, gc, head_of, sound

pytestmark = pytest.mark.usefixtures("quick")
LONG = os.environ.get("SPINREG_CHAOS") == "long"


def manifests(store: Store) -> dict[str, bytes | None]:
    return {key.split("/")[1]: store.read(key) for key in store.list("objects/") if key.endswith("/manifest.json")}


def test_repair_with_a_late_verdict_changes_nothing(store: FolderStore) -> None:
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


def test_repair_frozen_before_it_is_recorded_changes_nothing(store: FolderStore) -> None:
    advance(store, config("a"), 2)
    damage(store, policy_object(head_of(store, "a"), 1))
    before = content(store)
    late = hold_lease(store, config("a"), "first")
    session = late.__enter__()
    take_lease(store, "a")
    with pytest.raises(LeaseLost):
        begin(store, session, verify(store, "a").damaged)
    late.__exit__(None, None, None)
    after = content(store)
    assert {key for key in before | after if before.get(key) != after.get(key)} == {
        head_key("a"), config_key("a")
    }  # fmt: skip


def test_repair_frozen_at_any_call_leaves_its_successors_objects(store: FolderStore) -> None:
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
                    expire_lease(place, "a")
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


def test_repair_while_a_sharing_run_is_advanced_is_refused(store: FolderStore) -> None:
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


def test_repair_with_a_sharing_run_at_any_call_leaves_both_whole(store: FolderStore) -> None:
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


@pytest.mark.parametrize("finish", ["a start", "a repair"])
def test_repair_killed_at_any_call_is_finished_by_the_next_start(store: FolderStore, dice: Dice, finish: str) -> None:
    """Stages come out otherwise each time: what is left after a kill must not pass for whole before it is."""
    advance(store, config("a"), 2, make=dice)
    head = head_of(store, "a")
    for number, stage in ((1, "generate"), (2, "mix-opponent")):
        damage(store, head.stage(number, stage))
    calls: list[int] = []
    whole = FolderStore(store.root.parent / "whole")
    shutil.copytree(store.root, whole.root)
    dice.thrown = 1
    repair(Watched(whole, lambda: calls.append(1), CHANGES), "a", make=dice)  # type: ignore[arg-type]
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
            repair(Watched(place, fall, CHANGES), "a", make=dice)  # type: ignore[arg-type]
        expire_lease(place, "a")
        found, text = verify(place, "a"), format_verdict(verify(place, "a"))
        assert found.problems or found.unfinished or dice.of_one_piece(place, "a"), number
        assert (
            bool(found.unfinished) == ("a repair was not finished" in text) == (head_of(place, "a").repair is not None)
        )
        assert ("unfinished repair: " in format_status(place, "a")[0]) == bool(found.unfinished)
        gc(place)
        dice.thrown += 1
        if finish == "a start" and found.unfinished:
            begun += 1
            advance(place, config("a"), 2, make=dice)
        elif found.problems or found.unfinished:
            repair(place, "a", make=dice)
        assert head_of(place, "a").repair is None, number
        assert sound(place), number
        assert dice.of_one_piece(place, "a"), number
        assert complete_round(head_of(place, "a")) == 2
        shutil.rmtree(place.root)
    assert begun > 2 or finish == "a repair"


def test_repair_with_an_unfinished_repair_includes_it(store: FolderStore, dice: Dice) -> None:
    advance(store, config("a"), 3, make=dice)
    damage(store, head_of(store, "a").stage(2, "train"))
    with hold_lease(store, config("a"), "killed") as session:
        begin(store, session, verify(store, "a").damaged)
    damage(store, head_of(store, "a").stage(1, "generate"))
    dice.thrown = 1
    repair(store, "a", make=dice)
    assert sound(store)
    assert dice.of_one_piece(store, "a")
    assert complete_round(head_of(store, "a")) == 3


def test_commands_with_an_unfinished_repair_report_it(
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
