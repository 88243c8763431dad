"""Text and document of `spinreg data inspect`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spinreg_core.data.inspect import inspect
from spinreg_core.errors import BadInput
from tests.support.builders import make_config


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    rows = [{"prompt": f"Question {i}?", "answer": f"x\n#### {i}"} for i in range(20)]
    lines = [json.dumps(r) for r in [*rows, rows[0], {"prompt": "y" * 600, "answer": "a"}]] + ["{broken"]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    return str(tmp_path / "x.jsonl")


def test_inspect_with_a_tokenizer_counts_tokens(dataset: str) -> None:
    text, document = inspect(make_config(dataset=dataset, model="random:tiny"))
    found = document["train"]
    assert found["records"] == 23
    assert found["rows"] == found["final_answers"] == 20
    assert found["duplicates"]["exact"] == 1
    assert found["bad_rows"] == {"broken_json": 1, "prompt_too_long": 1}
    assert {bad["row"] for bad in found["rejected"]} == {22, 23}
    assert found["examples"][0]["answer"] == "x\n#### 0<|im_end|>"
    assert found["examples"][0]["prompt"].endswith("<|im_start|>assistant\n")
    for part in ("row 22: prompt_too_long", "ABOVE data.max_bad_share", "|x", "prompt in tokens: mean"):
        assert part in text
    assert json.loads(json.dumps(document)) == document


def test_inspect_without_a_tokenizer_counts_characters(dataset: str) -> None:
    text, document = inspect(make_config(dataset=dataset, model="./nowhere"))
    assert document["tokenizer"] is None
    assert "prompt_tokens" not in document["train"]["lengths"]
    assert document["train"]["lengths"]["prompt_characters"]["max"] == 600
    assert "no token counts: model: found no folder './nowhere'" in text


def test_inspect_of_the_demo_shows_its_heldout_rows() -> None:
    text, document = inspect(make_config(model="random:tiny"))
    assert not document["train"]["rejected"]
    assert not document["heldout"]["rejected"]
    assert "heldout: builtin:demo" in text


def test_inspect_of_a_mixture_shows_bad_rows(dataset: str, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{broken\n" * 5 + json.dumps({"prompt": "Why?", "answer": "So."}))
    _, document = inspect(
        make_config(dataset=dataset, model="random:tiny", data={"mixed_datasets": {str(tmp_path / "bad.jsonl"): 0.1}})
    )
    assert document["train"]["bad_rows"]["broken_json"] == 6


def test_inspect_of_a_missing_data_set_raises() -> None:
    with pytest.raises(BadInput, match="dataset"):
        inspect(make_config(dataset="./nowhere.jsonl", model="random:tiny"))
