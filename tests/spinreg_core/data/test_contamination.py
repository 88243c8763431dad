"""Contamination guard: the guarded prompts of evaluation sets, in any script, never none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spinreg_core.config import DataConfig
from spinreg_core.data.contamination import Guard, evaluation_prompts, guarded
from spinreg_core.data.filters import load_training
from spinreg_core.errors import BadInput
from tests.support.files import write_jsonl
from tests.support.hub import keep_datasets_in

PROMPT = "How many ducks does Anna feed on a Tuesday morning in March at the pond?"


@pytest.mark.parametrize(
    "record",
    [
        {"question": PROMPT, "answer": "12"},
        {"question": PROMPT, "answer": None},
        {"question": PROMPT, "answer": ""},
        {"question": PROMPT, "hidden": 1},
        {"prompt": PROMPT},
        {"instruction": PROMPT, "input": ""},
        {"messages": [{"role": "user", "content": PROMPT}]},
        {"messages": [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": None}]},
        {"conversations": json.dumps([{"from": "human", "value": PROMPT}])},
    ],
)
def test_evaluation_prompts_without_answers_are_guarded(tmp_path: Path, record: dict[str, Any]) -> None:
    bench = write_jsonl(tmp_path / "bench.jsonl", [record])
    assert evaluation_prompts(bench) == [PROMPT]
    train = write_jsonl(tmp_path / "train.jsonl", [{"prompt": f"Well. {PROMPT}", "response": "x"},
                                               {"prompt": "Something else?", "response": "y"}])  # fmt: skip
    found = load_training(train, DataConfig(evaluation_sets=[bench]))
    loaded, left_out = found.loaded, found.left_out
    assert [row.source_row for row in loaded.rows] == [2]
    assert [one.reason for one in left_out] == ["contaminated"]
    assert loaded.guards == {bench: {"prompts": 1, "too_short": 0}}


def test_guarded_of_a_set_without_usable_prompts_raises(tmp_path: Path) -> None:
    short = write_jsonl(tmp_path / "short.jsonl", [{"question": "What is it?", "answer": "x"}] * 3)
    with pytest.raises(BadInput, match=r"short\.jsonl has 3 prompts, all of fewer than 5 words"):
        guarded(short, evaluation_prompts(short))
    empty = write_jsonl(tmp_path / "empty.jsonl", [{"question": None, "answer": "x"}])
    with pytest.raises(BadInput, match=r"empty\.jsonl has 1 records and no prompt"):
        evaluation_prompts(empty)
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": "x"}])
    with pytest.raises(BadInput, match=r"evaluation set \S+other\.jsonl has the columns text"):
        evaluation_prompts(other)


def test_evaluation_prompts_of_a_subset_reads_that_subset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clone of a hub data set names its subsets in its card, and is read as the hub itself."""
    keep_datasets_in(tmp_path / "cache", monkeypatch)
    clone = tmp_path / "clone"
    clone.mkdir()
    card = ["---", "configs:"]
    for name in ("main", "other"):
        write_jsonl(clone / f"{name}.jsonl", [{"prompt": f"What is in {name}, and why?"}])
        card += [f"- config_name: {name}", "  data_files:", "  - split: test", f"    path: {name}.jsonl"]
    (clone / "README.md").write_text("\n".join([*card, "---", ""]))
    assert evaluation_prompts(f"{clone}:other") == ["What is in other, and why?"]


@pytest.mark.parametrize(("splits", "read"), [
    (["train", "validation"], "validation"), (["validation"], "validation"), (["train"], "train"),
    (["train", "validation", "test"], "test"),
])  # fmt: skip
def test_evaluation_prompts_reads_the_first_split_in_order(tmp_path: Path, splits: list[str], read: str) -> None:
    for split in splits:
        write_jsonl(tmp_path / f"{split}.jsonl", [{"prompt": f"What is in {split}, and why?"}])
    assert evaluation_prompts(str(tmp_path)) == [f"What is in {read}, and why?"]


@pytest.mark.parametrize(
    ("known", "contaminated", "clean"),
    [
        ("小明有五个苹果、吃了两个、还剩几个。", "请问、小明有五个苹果吃了两个、还剩几个", "小红有五个橘子"),
        ("แมวกี่ตัวอยู่ในบ้านของแอนนา", "ถาม: แมวกี่ตัวอยู่ในบ้านของแอนนา?", "หมากี่ตัวอยู่ในสวนของบ็อบบี้"),
        ("Сколько уток кормит Анна утром?", "Итак: сколько уток кормит Анна утром", "Сколько кошек кормит Анна утром?"),
        ("안나는 화요일 아침에 오리 몇", "그런데 안나는 화요일 아침에 오리 몇", "안나는 수요일 아침에 고양이 몇"),
    ],
)  # fmt: skip
def test_guard_finds_overlap_in_any_script(known: str, contaminated: str, clean: str) -> None:
    assert guarded("bench", [known]) == {"prompts": 1, "too_short": 0}
    guard = Guard({"bench": [known]}, 13)
    assert (guard.shared(contaminated) or "").startswith("bench: ")
    assert guard.shared(clean) is None
