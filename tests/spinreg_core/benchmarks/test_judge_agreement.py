"""A judge against votes written here, in the format of the published ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows.cli import main
from spinreg_core.benchmarks.judge_agreement import Winner, combined
from tests.support.judge_server import Does, JudgeServer, judge_server


def row(question: int, winner: str, turn: int = 1, a: str = "good", b: str = "bad", judge: str = "expert_0") -> Any:
    def talk(answer: str) -> list[dict[str, str]]:
        said = [f"ask {question}", f"{answer} one", f"ask {question} more", f"{answer} two"]
        return [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, said, strict=True)]

    return {"question_id": question, "model_a": "m", "model_b": "n", "winner": winner, "judge": judge, "turn": turn,
            "conversation_a": talk(a), "conversation_b": talk(b)}  # fmt: skip


VOTES = [
    row(81, "model_a"),
    row(81, "model_a", judge="expert_1"),  # another vote on the same pair
    row(81, "tie", judge="expert_2"),
    row(82, "model_b"),
    row(82, "model_b", a="bad", b="good"),  # model_b is the good one
    row(83, "model_a", turn=2),
    row(84, "tie (inconsistent)", a="biased", b="biased too"),  # the judge names the first one, in both orders
    row(85, "model_a", a="odd", b="odder"),  # no verdict
]


def judge(body: dict[str, Any], _number: int) -> Does:
    said = body["messages"][-1]["content"]
    if "odd" in said:
        return Does("hm")
    return Does("[[A]]" if "biased" in said or said.index("good one") < said.index("bad one") else "[[B]]")


def command(server: JudgeServer, tmp_path: Path, file: Path | str, *more: str) -> list[str]:
    fields = {"base_url": server.url, "model": "judge", "tries": 1, "patience_seconds": 5}
    settings = [text for name, value in fields.items() for text in ("-p", f"judge.{name}={value}")]
    return ["judge-agreement", str(file), "--store", str(tmp_path / "store"), *settings, *more]


def test_judge_agreement_of_votes_equals_hand_computation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jsonl, parquet = tmp_path / "votes.jsonl", tmp_path / "votes.parquet"
    jsonl.write_text("".join(json.dumps(vote) + "\n" for vote in VOTES))
    pq.write_table(pa.Table.from_pylist(VOTES), parquet)
    with judge_server(judge) as server:
        assert main(command(server, tmp_path, jsonl, "--json")) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["votes"], found["pairs"]) == (8, 6)
        assert len(server.bodies) == 10  # twice six, but 82 turned round and swapped is 82 as it was
        metrics = found["metrics"]
        # Verdicts: 81 a, 82 a, 82 turned b, 83 a, 84 tie, 85 none. Agreed: 81 twice of three, 82 once of two, 83, 84.
        assert (metrics["with_ties"]["value"], metrics["with_ties"]["n"]) == (pytest.approx(5 / 7), 7)
        assert (metrics["without_ties"]["value"], metrics["without_ties"]["n"]) == (pytest.approx(4 / 5), 5)
        assert metrics["with_ties"]["low"] < 5 / 7 < metrics["with_ties"]["high"]
        assert metrics["malformed"]["value"] == pytest.approx(2 / 12)
        assert (metrics["malformed"]["low"], metrics["malformed"]["n"]) == (0.0, 12), "both are of question 85"
        assert (found["cost"]["requests"], found["cost"]["requests_before"]) == (10, 0)
        assert {"python", "spinreg"} <= found["versions"].keys()
        assert found["fingerprint"].startswith("votes-")
        second = [b for b in server.bodies if "ask 83" in b["messages"][-1]["content"]]
        assert all("ask 83 more" in b["messages"][-1]["content"] for b in second)
        first = [b for b in server.bodies if "ask 81" in b["messages"][-1]["content"]]
        assert not any("more" in b["messages"][-1]["content"] for b in first)
        assert main(command(server, tmp_path, parquet)) == 0
        text = capsys.readouterr().out
        assert len(server.bodies) == 10  # paid for before
        assert "agreement, ties included: 0.714 [" in text
        assert "n = 7" in text
        assert main(command(server, tmp_path, parquet, "--limit", "1")) == 0
        assert "1 votes about 1 pairs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("as_given", "swapped", "verdict"),
    [
        ("A", "B", "model_a"), ("B", "A", "model_b"), ("tie", "tie", "tie"), ("A", "A", "tie"), ("B", "B", "tie"),
        ("A", "tie", "tie"), ("tie", "A", "tie"), (None, "A", None), ("A", None, None),
    ],
)  # fmt: skip
def test_combined_of_two_orders_is_one_verdict(as_given: Any, swapped: Any, verdict: Winner | None) -> None:
    assert combined(as_given, swapped) == verdict


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"turn": 3}, "row 1, turn: found 3; expected 1 or 2"),
        ({"winner": "nobody"}, "row 1, winner: found 'nobody'"),
        ({"conversation_a": VOTES[0]["conversation_a"][1:]}, "row 1, conversation_a: found 2 messages"),
        ({"conversation_b": row(99, "tie")["conversation_b"]}, "row 1, conversation_b has other questions"),
        ({"question_id": None}, "row 1, question_id: found None"),
    ],
)
def test_judge_agreement_bad_votes_are_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: dict[str, Any], message: str
) -> None:
    (tmp_path / "votes.jsonl").write_text(json.dumps(VOTES[0] | bad))
    with judge_server(judge) as server:
        assert main(command(server, tmp_path, tmp_path / "votes.jsonl")) == 65
        assert message in capsys.readouterr().err
        assert main(command(server, tmp_path, tmp_path / "nowhere.jsonl")) == 65
        assert main(["judge-agreement", "human", "--store", str(tmp_path / "store")]) == 65
        assert "judge.base_url is not set; set it to the address of the judge's endpoint" in capsys.readouterr().err
        assert server.bodies == []
