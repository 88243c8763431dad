"""Assignment of answers: every answer once, by the source that the weights give, for any size of shards."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spinreg_core.generation.engine import Answer
from spinreg_core.generation.pool import _LEAST_WAVE, _WAVE, devices_of, next_wave
from spinreg_core.generation.shards import Rows, ShardMeta, Source, answer_seed, drawn_sources, make_shards, shard_meta

NAMES = [f"p{i}" for i in range(3000)]


@given(
    rows=st.lists(st.integers(0, 500), min_size=1, max_size=40, unique=True), answers=st.integers(1, 3),
    size=st.integers(1, 50), seed=st.integers(0, 5),
)  # fmt: skip
@settings(deadline=None)
def test_shards_hold_every_answer_once_and_one_source_each(rows: list[int], answers: int, size: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    iterates, mixed = draw.integers(0, 3, (len(rows), answers)), draw.integers(0, 2, (len(rows), answers)) > 0
    replayed = draw.integers(0, 2, (len(rows), answers)) > 0
    shards = make_shards(np.array(rows), iterates, mixed, size, replayed)
    asked = {(int(r), int(a)) for s in shards for r, a in zip(s.rows, s.answers, strict=True)}
    assert asked == {(row, k) for i, row in enumerate(rows) for k in range(answers) if not replayed[i, k]}
    shards = make_shards(np.array(rows), iterates, mixed, size)
    assert [s.number for s in shards] == list(range(len(shards)))
    seen = {(int(r), int(a)): s.source for s in shards for r, a in zip(s.rows, s.answers, strict=True)}
    assert sum(len(s.rows) for s in shards) == len(seen) == len(rows) * answers
    for i, row in enumerate(rows):
        for k in range(answers):
            assert seen[row, k].iterate == iterates[i, k]
            assert seen[row, k].geometric == mixed[i, k]
    assert all(0 < len(s.rows) <= size for s in shards)
    assert all((np.diff(s.rows) >= 0).all() for s in shards), "so that a shard reads few groups of the file"
    by_source = Counter(s.source for s in shards)
    for source, count in by_source.items():
        total = sum(len(s.rows) for s in shards if s.source == source)
        assert count == -(-total // size), "no shard but the last of a source is short"
    assert [s.source for s in shards] == sorted(s.source for s in shards), "each policy is loaded once"


def test_sources_follow_weights_and_share_and_reproduce() -> None:
    given = {"geometric_share": 0.4, "replay_share": 0.7, "round_number": 5, "seed": 3}
    iterates, mixed, replayed = drawn_sources(NAMES, 2, [0.5, 0.3, 0.2], **given)  # type: ignore[arg-type]
    again = drawn_sources(NAMES[::-1], 2, [0.5, 0.3, 0.2], **given)  # type: ignore[arg-type]
    assert (again[0][::-1] == iterates).all()
    assert (again[1][::-1] == mixed).all()
    assert (again[2][::-1] == replayed).all()
    share = {n: float((iterates == n).mean()) for n in (4, 3, 2)}
    assert share == pytest.approx({4: 0.5, 3: 0.3, 2: 0.2}, abs=0.03)
    assert float(mixed.mean()) == pytest.approx(0.4, abs=0.03)
    assert abs(np.corrcoef(iterates[:, 0], iterates[:, 1])[0, 1]) < 0.06, "answers to a prompt are drawn on their own"
    assert abs(np.corrcoef(iterates.ravel(), mixed.ravel())[0, 1]) < 0.06
    assert not replayed[iterates == 4].any(), "the newest iterate has no earlier pairs"
    assert float(replayed[iterates < 4].mean()) == pytest.approx(0.7, abs=0.03)
    assert abs(np.corrcoef(replayed[iterates < 4], mixed[iterates < 4])[0, 1]) < 0.06
    first, _, _ = drawn_sources(NAMES, 1, [0.5, 0.3, 0.2], **given)  # type: ignore[arg-type]
    assert (first[:, 0] == iterates[:, 0]).all(), "further answers change nothing of the first"


def test_the_base_has_no_mixture_with_itself() -> None:
    given = {"geometric_share": 1.0, "replay_share": 0.0, "round_number": 2, "seed": 0}
    iterates, mixed, replayed = drawn_sources(NAMES[:200], 1, [0.5, 0.5], **given)  # type: ignore[arg-type]
    assert not replayed.any()
    assert mixed[iterates == 1].all()
    assert not mixed[iterates == 0].any()


def test_seeds_depend_on_run_round_kind_prompt_and_answer() -> None:
    plain = {"seed": 1, "round_number": 2, "kind": "train", "prompt_id": "a", "answer": 0}
    changes = [{}, {"seed": 2}, {"round_number": 3}, {"kind": "heldout"}, {"prompt_id": "b"}, {"answer": 1}]
    seeds = [answer_seed(**plain | change) for change in changes]  # type: ignore[arg-type]
    assert len(set(seeds)) == len(changes)
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("group", [1, 7, 1000])
def test_rows_are_read_from_the_groups_that_hold_them(tmp_path: Path, group: int) -> None:
    table = pa.table({"prompt_id": NAMES[:50], "prompt_ids": [[i, i + 1] for i in range(50)], "answer": ["x"] * 50})
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=group)
    rows = Rows(tmp_path / "rows.parquet")
    assert len(rows) == 50
    wanted = np.array([0, 0, 3, 6, 7, 7, 30, 49])
    found = rows.take(wanted)
    assert found["prompt_id"].to_pylist() == [NAMES[i] for i in wanted]
    assert found["prompt_ids"].to_pylist() == [[i, i + 1] for i in wanted]
    assert rows.names(np.array([40, 2])) == [NAMES[40], NAMES[2]]


def test_waves_shrink_so_that_engines_end_together() -> None:
    def waves(count: int, size: int, engines: int) -> list[int]:
        """Answers in each of the waves that `engines` take in turn."""
        rows = np.zeros((count, 1), np.int64)
        left, taken = make_shards(np.arange(count), rows, rows.astype(bool), size), []
        while left:
            wave = next_wave(left, engines, count)
            del left[: len(wave)]
            taken.append(sum(len(shard.rows) for shard in wave))
        assert sum(taken) == count
        assert taken == sorted(taken, reverse=True)
        return taken

    few = waves(800, 8, 4)
    assert few == [200] * 4, "an even share: less than what keeps an engine busy"
    many = waves(32_000, 32, 8)
    assert 2000 - 32 < many[0] <= 2000
    assert min(many[:-1]) >= _LEAST_WAVE
    large = make_shards(np.arange(3 * _WAVE), np.zeros((3 * _WAVE, 1), np.int64), np.zeros((3 * _WAVE, 1), bool), 1000)
    assert sum(len(s.rows) for s in next_wave(large, 1, 0)) <= _WAVE
    assert len(next_wave(large[:1], 1, 0)) == 1


def test_a_wave_is_of_one_source() -> None:
    iterates = np.array([[0], [1], [1], [0], [1], [1]])
    mixed = np.array([[0], [1], [0], [0], [1], [0]], bool)
    left, waves = make_shards(np.arange(6), iterates, mixed, 1), []
    while left:
        waves.append(next_wave(left, 1, 0))
        del left[: len(waves[-1])]
    assert [[shard.rows.tolist() for shard in wave] for wave in waves] == [[[0], [3]], [[2], [5]], [[1], [4]]]


def test_engines_share_the_gpus_and_without_any_the_cores() -> None:
    assert devices_of(2, 2, ["0", "1", "4", "5"], 8) == [
        {"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "4,5"},
    ]  # fmt: skip
    assert [d["OMP_NUM_THREADS"] for d in devices_of(3, 1, [], 8)] == ["2"] * 3


def test_shard_counts_odd_answers() -> None:
    def meta(answers: list[Answer], texts: list[str]) -> ShardMeta:
        return shard_meta(Source(2, True), answers, texts, seconds=1.23456, startup_seconds=0.0)

    answers = [Answer([5, 1], "stop", [0.0, 0.0]), Answer([1], "stop", [0.0]), Answer([6, 7], "length", [0.0, 0.0])]
    found = meta(answers, ["\ufffdx", "", " \n"])
    assert found == {
        "drawn": found["drawn"], "prompts": 3, "tokens": 5, "truncated": 1, "empty": 2, "invalid_text": 1,
        "iterate": 2, "geometric": True, "seconds": 1.235, "startup_seconds": 0.0,
    }  # fmt: skip
    other = meta([*answers[:2], Answer([6, 8], "length", [0.0, 0.0])], ["", "", ""])
    assert other["drawn"] != found["drawn"] == meta(answers, ["", "", ""])["drawn"]
