"""Several data sets as one: the shares are kept, no row is taken twice, every row can be told from its number."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spinreg_core.config import DataConfig
from spinreg_core.data.filters import load_training
from spinreg_core.data.formats import Row
from spinreg_core.data.mixing import load_mixture, take_shares
from spinreg_core.errors import BadInput
from tests.support.files import write_jsonl


def pairs(name: str, n: int) -> list[object]:
    return [{"prompt": f"{name} {i}", "response": f"answer {i}"} for i in range(n)]


def rows(name: str, n: int, first: int) -> list[Row]:
    return [Row(first + i + 1, ({"role": "user", "content": f"{name} {i}"},), "answer") for i in range(n)]


@given(st.lists(st.tuples(st.integers(1, 40), st.floats(0.1, 10)), min_size=2, max_size=4))
def test_take_shares_keeps_every_share_within_one_row(sources: list[tuple[int, float]]) -> None:
    """No data set is off its share by more than a row; one at least is taken whole; nothing is lost."""
    shares = {f"set {i}": weight for i, (_, weight) in enumerate(sources)}
    ends = [sum(n for n, _ in sources[: i + 1]) for i in range(len(sources))]
    given_rows = [row for i, (n, _) in enumerate(sources) for row in rows(f"set {i}", n, ends[i] - n)]
    taken, beyond = take_shares(given_rows, dict(zip(shares, ends, strict=True)), shares)
    assert [r.source_row for r in taken] == sorted(r.source_row for r in taken)
    assert len(taken) + sum(beyond.values()) == ends[-1]
    counts = Counter(str(row.messages[0]["content"]).rpartition(" ")[0] for row in taken)
    scale = min(n / weight for n, weight in sources)
    for i, (n, weight) in enumerate(sources):
        assert counts[f"set {i}"] == pytest.approx(max(scale * weight, 1), abs=0.5 + 1e-9)
        assert counts[f"set {i}"] <= n
    assert any(counts[f"set {i}"] == n for i, (n, _) in enumerate(sources))
    assert all(beyond.get(f"set {i}", 0) == n - counts[f"set {i}"] for i, (n, _) in enumerate(sources))


def test_take_shares_of_a_larger_share_contains_the_smaller() -> None:
    both = rows("a", 4, 0) + rows("b", 40, 4)
    found = [{id(r) for r in take_shares(both, {"a": 4, "b": 44}, {"a": 1.0, "b": w})[0]} for w in (1.0, 3.0, 10.0)]
    assert [len(ids) for ids in found] == [8, 16, 44]
    assert found[0] < found[1] < found[2]
    again, _ = take_shares(both[::-1], {"a": 4, "b": 44}, {"a": 1.0, "b": 3.0})
    assert {id(r) for r in again} == found[1]


def test_load_mixture_numbers_records_on_and_drops_duplicates(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", [*pairs("a", 2), "", "{broken", *pairs("a", 1)])  # line 5 is a duplicate
    second = write_jsonl(tmp_path / "b.jsonl", [*pairs("a", 1), *pairs("b", 2), {"prompt": "", "response": "x"}])
    third = write_jsonl(tmp_path / "c.jsonl", [{"instruction": "c", "output": "answer"}])
    loaded = load_mixture(first, DataConfig(mixed_datasets={second: 1, third: 1}, max_bad_share=0.5))
    assert loaded.last == {first: 5, second: 9, third: 10}
    assert [row.source_row for row in loaded.rows] == [1, 2, 7, 8, 10]
    assert [bad.row for bad in loaded.rejected] == [4, 9]
    assert (loaded.records, loaded.duplicates.exact) == (4 + 4 + 1, 2)
    assert loaded.dataset == f"{first} + {second} + {third}"
    assert loaded.format == "prompt_response, instruction"


def test_load_training_applies_filters_before_shares(tmp_path: Path) -> None:
    """Filters come first: the shares are those of what they leave."""
    first = write_jsonl(tmp_path / "a.jsonl", pairs("a", 10))
    second = write_jsonl(tmp_path / "b.jsonl", pairs("b", 100))
    config = DataConfig(mixed_datasets={second: 2.0}, drop_patterns=["^a [0-4]$"])
    found = load_training(first, config)
    counts = Counter(str(row.messages[0]["content"])[0] for row in found.loaded.rows)
    assert counts == {"a": 5, "b": 10}
    assert found.counts == {"pattern ^a [0-4]$": 5, f"beyond_share {second}": 90}
    assert len(found.left_out) == 5, "rows beyond a share are not listed"


def test_load_mixture_that_cannot_be_mixed_raises(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", pairs("a", 3))
    with pytest.raises(BadInput, match="which is the dataset itself"):
        load_mixture(first, DataConfig(mixed_datasets={first: 1}))
    copy = write_jsonl(tmp_path / "b.jsonl", pairs("a", 3))
    with pytest.raises(BadInput, match=r"b\.jsonl, which has no row that is new and not left out"):
        load_training(first, DataConfig(mixed_datasets={copy: 1}))
    with pytest.raises(BadInput, match=r"no file or folder .*none\.jsonl"):
        load_training(first, DataConfig(mixed_datasets={str(tmp_path / "none.jsonl"): 1}))
    broken = write_jsonl(tmp_path / "c.jsonl", [*pairs("c", 2), "{broken"])
    with pytest.raises(BadInput, match=r"dataset \S+c\.jsonl has 33\.3% bad rows"):
        load_mixture(first, DataConfig(mixed_datasets={broken: 1}))
    for weight in (0, -1, float("inf"), "x"):
        with pytest.raises(ValueError, match="mixed_datasets"):
            DataConfig(mixed_datasets={copy: weight})  # type: ignore[dict-item]
