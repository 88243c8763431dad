"""Agreement of a judge with published preferences: `spinreg judge-agreement`.

Decides: the format of the preferences (that of lmsys/mt_bench_human_judgments), how two orders become one verdict, and
the definition of agreement. Leaves out: asking the judge (`judge`).

As in MT-Bench's own study (arXiv 2306.05685, section 4), each pair is judged in both orders. The same winner twice is
the verdict; anything else is a tie. `with_ties` is the share of votes that equal the verdict. `without_ties` is the
same share among votes and verdicts that both name a winner. A pair without a verdict in both orders is left out and
counted. The judge sees no reference answers. Intervals are over questions: votes and verdicts on one question are drawn
together.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from spinreg_core.benchmarks.judge import (
    JudgeQuestion,
    ask_both_orders,
    paid_text,
    require_judge,
    settings_of,
    shown_settings,
)
from spinreg_core.benchmarks.judge_client import Messages
from spinreg_core.benchmarks.judge_prompts import PAIR, Preference, Prompts, load_prompts
from spinreg_core.config import RunConfig
from spinreg_core.errors import BadInput
from spinreg_core.evaluation.intervals import Estimate, grouped_share
from spinreg_core.input_limits import require_small_file
from spinreg_core.runs.objects import fingerprint, versions
from spinreg_core.store.base import Store

HUB = "lmsys/mt_bench_human_judgments"
Winner = Literal["model_a", "model_b", "tie"]
VotedPair = tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]  # questions, answers of a, answers of b


@dataclass(frozen=True)
class Vote:
    """One annotator's preference, with the conversation up to the turn that it is about."""

    question_id: str
    winner: Winner
    questions: tuple[str, ...]
    answers_a: tuple[str, ...]
    answers_b: tuple[str, ...]

    @property
    def pair(self) -> VotedPair:
        return self.questions, self.answers_a, self.answers_b


def agreement(
    store: Store, config: RunConfig, source: str, limit: int | None = None
) -> tuple[str, Mapping[str, object]]:
    """Have the pairs of `source` judged and compare. Returns a text and the same as JSON.

    source: `human` or `gpt4_pair`, splits of the published data on the hub, or a file (Parquet, JSON lines). limit: use
    only the first votes. Raises BadInput, and as `ask_judge`.
    """
    require_judge(config.judge)
    if limit is not None and limit < 1:
        raise BadInput("--limit", limit, "at least one vote")
    prompts, votes = load_prompts(config.judge, PAIR), load_votes(source)[:limit]
    pairs = {vote.pair: vote for vote in votes}

    def question(vote: Vote, order: str) -> JudgeQuestion:
        return JudgeQuestion(
            f"question {vote.question_id}, {order}", _messages(prompts, vote, swapped=order == "swapped")
        )

    asked = [(question(vote, "as given"), question(vote, "swapped")) for vote in pairs.values()]
    asked_about = {"pairs": sorted(map(repr, pairs))}
    payer = fingerprint("agreement", {"judge": settings_of(config.judge), "prompts": prompts.sha256} | asked_about)
    both, cost = ask_both_orders(store, config.judge, asked, payer=payer)
    verdicts = {pair: combined(*orders) for pair, orders in zip(pairs, both, strict=True)}
    metrics = agreement_metrics(votes, verdicts, resamples=config.evaluation.bootstrap, seed=config.seed)
    failed: dict[str, list[bool]] = defaultdict(list)
    for vote, orders in zip(pairs.values(), both, strict=True):
        failed[vote.question_id] += [value is None for value in orders]
    metrics["malformed"] = _share(failed, resamples=config.evaluation.bootstrap, seed=config.seed)
    lines = [f"{config.judge.model} on {len(votes)} votes about {len(pairs)} pairs of answers"]
    for name, what in (("with_ties", "agreement, ties included"), ("without_ties", "agreement where neither is a tie"),
                       ("malformed", "malformed verdicts")):  # fmt: skip
        if (found := metrics.get(name)) is not None:
            interval = "" if found["low"] is None else f" [{found['low']:.3f}, {found['high']:.3f}]"
            lines.append(f"{what}: {found['value']:.3f}{interval}, n = {found['n']}")
    return "\n".join([*lines, paid_text(cost)]), {
        "source": source, "votes": len(votes), "pairs": len(pairs), "judge": shown_settings(config.judge),
        "prompts": prompts.sha256, "fingerprint": fingerprint("votes", {"votes": [repr(vote) for vote in votes]}),
        "bootstrap": config.evaluation.bootstrap, "seed": config.seed, "versions": versions(),
        "metrics": metrics, "cost": cost,
    }  # fmt: skip


def combined(as_given: Preference | None, swapped: Preference | None) -> Winner | None:
    """Return one verdict from both orders: `as_given` shows model_a as A, `swapped` as B. None if one is malformed."""
    if as_given is None or swapped is None:
        return None
    one: Winner = {"A": "model_a", "B": "model_b", "tie": "tie"}[as_given]  # type: ignore[assignment]
    two: Winner = {"A": "model_b", "B": "model_a", "tie": "tie"}[swapped]  # type: ignore[assignment]
    return one if one == two else "tie"


def agreement_metrics(
    votes: list[Vote], verdicts: Mapping[VotedPair, Winner | None], *, resamples: int, seed: int
) -> dict[str, Estimate]:
    """Return `with_ties` and `without_ties`; n counts votes. verdicts: the judge's, by `Vote.pair`."""
    usable = [(vote, verdict) for vote in votes if (verdict := verdicts[vote.pair]) is not None]
    decided = [(vote, verdict) for vote, verdict in usable if "tie" not in (vote.winner, verdict)]
    found = {}
    for name, chosen in (("with_ties", usable), ("without_ties", decided)):
        by_question: dict[str, list[bool]] = defaultdict(list)
        for vote, verdict in chosen:
            by_question[vote.question_id].append(vote.winner == verdict)
        if by_question:
            found[name] = _share(by_question, resamples=resamples, seed=seed)
    return found


def _share(by_question: dict[str, list[bool]], *, resamples: int, seed: int) -> Estimate:
    return grouped_share(
        [float(sum(own)) for own in by_question.values()], [float(len(own)) for own in by_question.values()],
        resamples=resamples, seed=seed,
    )  # fmt: skip


def load_votes(source: str) -> list[Vote]:
    """Read the votes of a split on the hub or of a file. Raises BadInput, naming the row."""
    rows = _from_hub(source) if source in ("human", "gpt4_pair") else _from_file(Path(source))
    votes = [_vote(f"{source}, row {number}", row) for number, row in enumerate(rows, 1)]
    if not votes:
        raise BadInput(source, "has no rows", "one row per preference")
    return votes


def _from_hub(split: str) -> list[Any]:
    from datasets import load_dataset

    try:
        return list(load_dataset(HUB, split=split))
    except Exception as error:  # `datasets` and the hub's client raise many classes of errors
        raise BadInput(split, f"cannot be loaded from {HUB} ({error})"[:500],
                       "check the connection to the hub, or give a file") from None  # fmt: skip


def _from_file(path: Path) -> list[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    require_small_file("votes", path)
    try:
        if path.suffix == ".parquet":
            return pq.read_table(path).to_pylist()
        return [json.loads(line) for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except (OSError, ValueError, RecursionError, pa.ArrowException) as error:
        found = f"cannot be read ({' '.join(str(error).split())[:200]})"
        raise BadInput(str(path), found, "give a file of Parquet or JSON lines, or `human` or `gpt4_pair`") from None


def _vote(where: str, row: Any) -> Vote:
    if not isinstance(row, dict):
        raise BadInput(where, type(row).__name__, "an object")
    turn, winner, question_id = row.get("turn"), row.get("winner"), row.get("question_id")
    if turn not in (1, 2):
        raise BadInput(f"{where}, turn", repr(turn), "1 or 2")
    if not isinstance(winner, str) or (winner not in ("model_a", "model_b") and not winner.startswith("tie")):
        raise BadInput(f"{where}, winner", repr(winner), "model_a, model_b, or tie")
    if not isinstance(question_id, int | str):
        raise BadInput(f"{where}, question_id", repr(question_id), "a number or name")
    own = [_turns(f"{where}, {name}", row.get(name), turn) for name in ("conversation_a", "conversation_b")]
    if own[0][0] != own[1][0]:
        raise BadInput(
            f"{where}, conversation_b", "has other questions than conversation_a", "use the same questions in both"
        )
    named: Winner = "tie" if winner.startswith("tie") else winner  # type: ignore[assignment]
    return Vote(str(question_id), named, own[0][0], own[0][1], own[1][1])


def _turns(where: str, conversation: Any, turn: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the questions and the answers of a conversation, up to a turn."""
    messages = list(conversation)[: 2 * turn] if isinstance(conversation, list) else []
    texts = [message.get("content") if isinstance(message, dict) else None for message in messages]
    roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
    if roles != ["user", "assistant"] * turn or not all(isinstance(text, str) for text in texts):
        raise BadInput(
            where, f"{len(texts)} messages with roles {roles}", f"user and assistant, {turn} times, with texts"
        )
    return tuple(texts[::2]), tuple(texts[1::2])  # type: ignore[arg-type]


def _messages(prompts: Prompts, vote: Vote, *, swapped: bool) -> Messages:
    a, b = (vote.answers_b, vote.answers_a) if swapped else (vote.answers_a, vote.answers_b)
    if len(vote.questions) == 1:
        return prompts.messages("pair-v2", question=vote.questions[0], answer_a=a[0], answer_b=b[0])
    return prompts.messages(
        "pair-v2-multi-turn", question_1=vote.questions[0], question_2=vote.questions[1],
        answer_a_1=a[0], answer_a_2=a[1], answer_b_1=b[0], answer_b_2=b[1],
    )  # fmt: skip
