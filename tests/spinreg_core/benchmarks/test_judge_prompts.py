"""Ratings and preferences are read as FastChat reads them; prompts show what they have to."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from spinreg_core.benchmarks import judge_prompts as prompts
from spinreg_core.benchmarks.judge_prompts import PLACEHOLDERS, load_prompts, parse_preference, parse_rating
from spinreg_core.config import JudgeConfig
from spinreg_core.errors import BadInput

OWN = Path(prompts.__file__).with_name("judge_prompts.yaml")


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("Good. Rating: [[7]]", 7.0),
        ("[[7]]", 7.0),
        ("Rating: [[8.5]]", 8.5),
        ("Rating: [[8.]]", 8.0),
        ("First [[3]], then [[9]]", 3.0),
        ("Rating: [6]", 6.0),
        ("See [1]. Rating: [[9]]", 9.0),  # double brackets come first wherever they stand
        ("[2] and [4]", 2.0),
        ("Rating: [[10]]", 10.0),
        ("Rating: [[1]]", 1.0),
        ("Rating: [[0]]", None),
        ("Rating: [[11]]", None),
        ("Rating: [[11]] or [[5]]", None),  # the first one is what was said
        ("Rating: [[-3]]", None),
        ("Rating: [[rating]]", None),
        ("Rating: 7", None),
        ("Rating: [[7/10]]", None),
        ("", None),
    ],
)
def test_parse_rating_by_fastchat_returns_the_first_rating(text: str, rating: float | None) -> None:
    assert parse_rating(text, "fastchat") == rating


@pytest.mark.parametrize(
    ("text", "preference"),
    [
        ("... so [[A]]", "A"),
        ("[[B]]", "B"),
        ("[[C]] it is", "tie"),
        ("[[B]], not [[A]]", "A"),  # FastChat looks for [[A]] first
        ("[[C]] or [[B]]", "B"),
        ("[A]", None),
        ("[[a]]", None),
        ("", None),
    ],
)
def test_parse_preference_by_fastchat_returns_the_winner(text: str, preference: str | None) -> None:
    assert parse_preference(text, "fastchat") == preference


def test_load_prompts_own_prompts_show_values_and_ask_for_a_verdict() -> None:
    found = load_prompts(JudgeConfig(), PLACEHOLDERS)
    assert found.sha256 == hashlib.sha256(OWN.read_bytes()).hexdigest()
    for name, wanted in PLACEHOLDERS.items():
        values = {field: f"the {{{field}}} itself" for field in wanted}  # braces in what is shown are text
        system, user = found.messages(name, **values)
        assert (system["role"], user["role"]) == ("system", "user")
        assert all(value in user["content"] for value in values.values())
        asked = system["content"] + user["content"].format_map(dict.fromkeys(wanted, ""))
        verdicts = ("[[A]]", "[[B]]", "[[C]]") if name.startswith("pair") else ("[[5]]",)
        assert all(verdict in asked for verdict in verdicts)


def test_load_prompts_yaml_and_json_lines_are_equal(tmp_path: Path) -> None:
    record = {"system_prompt": "", "prompt_template": 'Compare {answer_a}, {answer_b} on {question}: {{"json": 1}}'}
    (tmp_path / "own.yaml").write_text(json.dumps({"pair-v2": record, "another": 3}))
    (tmp_path / "own.jsonl").write_text(json.dumps(record | {"name": "pair-v2", "type": "pairwise"}) + "\n")
    for name in ("own.yaml", "own.jsonl"):
        found = load_prompts(JudgeConfig(prompts=str(tmp_path / name)), ["pair-v2"])
        messages = found.messages("pair-v2", question="q", answer_a="a", answer_b="b")
        assert messages == [{"role": "user", "content": 'Compare a, b on q: {"json": 1}'}]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{question} {answer_a}", r"no {answer_b}; expected the placeholders {answer_a}, {answer_b}, {question}"),
        ("{question} {answer_a} {answer_b} {model}", "{model}; exp"),
        ("{question} {answer_a} {answer_b.__class__}", r"no {answer_b}, {answer_b.__class__}"),
        ("{question} {answer_a} {answer_b!r}", "no {answer_b}"),
        ("{question} {answer_a} {answer_b} {", "Single"),
        ("{question} {answer_a} {answer_b} {}", "{}; exp"),
    ],
)
def test_load_prompts_bad_template_is_bad_input(tmp_path: Path, template: str, message: str) -> None:
    (tmp_path / "own.yaml").write_text(json.dumps({"pair-v2": {"prompt_template": template}}))
    with pytest.raises(BadInput, match=rf"judge.prompts, own.yaml, pair-v2.prompt_template: found .*{message}"):
        load_prompts(JudgeConfig(prompts=str(tmp_path / "own.yaml")), ["pair-v2"])


def test_load_prompts_of_the_home_folder_with_a_byte_order_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    own = Path(prompts.__file__).with_name("judge_prompts.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(own, encoding="utf-8-sig")
    assert (
        load_prompts(JudgeConfig(prompts="~/mine.yaml"), PLACEHOLDERS).by_name
        == load_prompts(JudgeConfig(), PLACEHOLDERS).by_name
    )


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("Good. Rating: [[7]]", 7.0),
        ("[[7]], so **[[7.0]]**", 7.0),
        ("<think>maybe [[9]]</think> Rating: [[3]]", 3.0),
        ("maybe [[9]]</think> Rating: [[3]]", 3.0),
        ("<Thinking>[[9]]\n</Thinking>\nRating: [[3]]", 3.0),
        ("<think>maybe [[9]]", None),
        ("First [[9]], no: [[3]]", None),
        ("The answer quotes [[10]] itself. Rating: [[2]]", None),
        ("It says '[[10]]'.", None),
        ("> Rating: [[10]]", None),
        ("```\n[[10]]\n```", None),
        ("As source [1] says, it is wrong. Rating: 2/10", None),
        ("Rating: [7]", None),
        ("Rating: [[11]]", None),
        ("", None),
    ],
)
def test_parse_rating_strictly_takes_one_plain_verdict(text: str, rating: float | None) -> None:
    assert parse_rating(text, "strict") == rating


@pytest.mark.parametrize(
    ("text", "preference"),
    [
        ("My final verdict is: [[B]]", "B"),
        ("[[C]]. Yes, [[C]].", "tie"),
        ("<think>[[A]]?</think>[[B]]", "B"),
        ("First I thought [[A]]. My final verdict is: [[B]]", None),
        ('The assistant wrote "[[A]]".', None),
        ("[A]", None),
    ],
)
def test_parse_preference_strictly_takes_one_plain_verdict(text: str, preference: str | None) -> None:
    assert parse_preference(text, "strict") == preference
