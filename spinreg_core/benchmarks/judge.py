"""Verdicts of a judge: asked for once, stored, and found again by every run that would ask the same.

Decides: when two requests are the same, when the judge is asked again, and who paid for what. A verdict is stored
before it counts. Leaves out: the connection and the budgets (`judge_client`), and the meaning of a verdict.

    verdicts/<SHA-256 of the request>.json     create-only; a `Verdict` and the time
    verdicts/unanswered/<payer>/<random>.json  likewise: a request without a reply, which may have been billed

A request is the endpoint (host and path), the model, the messages, the sampling and the number of the try: everything
that the judge's answer depends on. Runs, rounds and benchmarks that ask the same share the verdict. `spinreg gc` keeps
verdicts. A killed process loses the replies it was waiting for, `judge.at_once` at most. A process stopped by SIGTERM
waits for them and stores them.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from spinreg_core.benchmarks.judge_client import (
    FIRST_WAIT_SECONDS,
    Budget,
    Endpoint,
    Messages,
    Reply,
    Stopped,
    endpoint_identity,
    most_prompt_tokens,
    price,
)
from spinreg_core.benchmarks.judge_prompts import Preference, parse_preference
from spinreg_core.config import JudgeConfig
from spinreg_core.errors import BadInput, Conflict, Damaged
from spinreg_core.runs.objects import now
from spinreg_core.runtime.progress import Progress
from spinreg_core.store import documents
from spinreg_core.store.base import Store
from spinreg_core.store.documents import SCHEMA, Count, Document

T = TypeVar("T")
Both = tuple[Preference | None, Preference | None]  # of a pair, in both orders; None where malformed


class Usage(Document):
    """The tokens of one request to a judge, counted by the server or estimated."""

    prompt_tokens: Count
    answer_tokens: Count
    counted: bool


class Verdict(Document):
    """The answer of a judge to one request, and the object that paid for it."""

    request: dict[str, Any]
    content: str
    finish: str
    usage: Usage
    payer: str


@dataclass(frozen=True)
class JudgeQuestion:
    """A question to a judge. `name` is for messages to people."""

    name: str
    messages: Messages


@dataclass(frozen=True)
class JudgeRequest:
    """The parts of a request on which the judge's answer depends; `attempt` counts the tries from 0."""

    endpoint: str
    model: str | None
    messages: Messages
    temperature: float
    max_tokens: int
    attempt: int

    @classmethod
    def to(cls, judge: JudgeConfig, messages: Messages, attempt: int) -> JudgeRequest:
        return cls(endpoint_identity(judge), judge.model, messages, judge.temperature, judge.max_tokens, attempt)

    @property
    def key(self) -> str:
        """Key of the verdict in the store."""
        text = json.dumps({"schema": SCHEMA, "request": asdict(self)}, sort_keys=True, separators=(",", ":"))
        return f"verdicts/{hashlib.sha256(text.encode()).hexdigest()}.json"


@dataclass(frozen=True)
class JudgeVerdicts(Generic[T]):
    """`values`: a verdict per question, in their order; None where none of `judge.tries` answers held one.

    `cost` has "seconds" of this attempt. "requests", "prompt_tokens", "answer_tokens" and "paid" count what this payer
    paid in all its attempts. The same four with `_before` count verdicts that others paid for. "unanswered" counts
    requests without a reply, in all attempts.
    """

    values: list[T | None]
    cost: dict[str, float]


@dataclass
class _State(Generic[T]):
    """One question: the verdict so far, the next try, and the stored verdicts of the tries so far."""

    question: JudgeQuestion
    value: T | None
    attempt: int
    found: list[Verdict]

    def add(self, verdict: Verdict, parse: Callable[[str], T | None]) -> None:
        self.found.append(verdict)
        self.attempt += 1
        self.value = parse(verdict.content)


def require_judge(judge: JudgeConfig) -> None:
    """Raise BadInput where no judge is configured."""
    for field, expected in (("base_url", "address of the judge's endpoint"), ("model", "name of the judge's model")):
        if getattr(judge, field) is None:
            raise BadInput(f"judge.{field}", "is not set", f"set it to the {expected}")


def settings_of(judge: JudgeConfig) -> dict[str, str | float | None]:
    """Return the settings of the judge that belong to the fingerprint of a result."""
    names = ["model", "temperature", "max_tokens", "tries"]
    # The rule of 0.1.0 is left out, so that its results keep their ids.
    names += ["parsing"] if judge.parsing != "fastchat" else []
    return {"endpoint": endpoint_identity(judge)} | {name: getattr(judge, name) for name in names}


def shown_settings(judge: JudgeConfig) -> dict[str, str | float | None]:
    """Return the settings of the judge that a result names."""
    return settings_of(judge) | {"parsing": judge.parsing}


def paid_text(cost: Mapping[str, float]) -> str:
    """Return `JudgeVerdicts.cost` as a line for people."""
    return f"requests: {cost['requests']} paid for by this ({cost['paid']:.4g}), {cost['requests_before']} before"


def ask_both_orders(
    store: Store, judge: JudgeConfig, pairs: Iterable[tuple[JudgeQuestion, JudgeQuestion]], *, payer: str
) -> tuple[list[Both], dict[str, float]]:
    """Have pairs of answers compared in both orders; returns a pair of preferences each, and `JudgeVerdicts.cost`.

    Raises as `ask_judge`.
    """
    found: JudgeVerdicts[Preference] = ask_judge(
        store, judge, [question for pair in pairs for question in pair],
        partial(parse_preference, parsing=judge.parsing), payer=payer,
    )  # fmt: skip
    return list(zip(found.values[::2], found.values[1::2], strict=True)), found.cost


def ask_judge(
    store: Store,
    judge: JudgeConfig,
    questions: Sequence[JudgeQuestion],
    parse: Callable[[str], T | None],
    *,
    payer: str,
    first_wait: float = FIRST_WAIT_SECONDS,
) -> JudgeVerdicts[T]:
    """Have questions judged; verdicts that the store already holds are not asked for again.

    parse: returns the verdict in an answer of the judge, or None where it holds none. The judge is then asked once
    more, up to `judge.tries` times in all. payer: pays for new verdicts. The budgets are the payer's, over all its
    attempts. first_wait: seconds of the first pause after a failure, which doubles with every further one.

    Raises BadInput (a used-up budget, or a refusal of the endpoint), JudgeAway (the endpoint does not reply), Damaged.
    """
    start, stop = time.monotonic(), threading.Event()
    unique = {JudgeRequest.to(judge, q.messages, 0).key: q for q in questions}
    progress = Progress("benchmark", len(unique), "verdicts")
    with ThreadPoolExecutor(judge.at_once, thread_name_prefix="judge") as pool:
        found = pool.map(lambda question: _stored(store, judge, question, parse), unique.values())
        states = dict(zip(unique, found, strict=True))
        keys = store.list(f"verdicts/unanswered/{payer}/")
        unanswered = [verdict for key in keys if (verdict := documents.read(store, key, Verdict)) is not None]
        own = [verdict for state in states.values() for verdict in state.found if verdict.payer == payer]
        spent = _sum(judge, unanswered + own)
        budget = Budget(judge, int(spent["requests"]), spent["paid"])
        # Stored verdicts may be malformed: such questions continue with their next try.
        open_ = [state for state in states.values() if state.value is None and state.attempt < judge.tries]
        progress.update(len(states) - len(open_))

        def record_unanswered(messages: Messages) -> None:
            # It counts in full in the payer's budgets, also after a restart.
            most = Reply("", "unanswered", most_prompt_tokens(messages), judge.max_tokens, counted=False)
            key = f"verdicts/unanswered/{payer}/{uuid.uuid4().hex}.json"
            store.create(key, documents.dump(_verdict(JudgeRequest.to(judge, messages, 0), most, payer)))

        endpoint = Endpoint(judge, budget, stop, record_unanswered, first_wait)
        try:
            futures = [pool.submit(_complete, store, judge, endpoint, state, parse, payer) for state in open_]
            for future in as_completed(futures):
                with suppress(Stopped):  # the request that stopped this one raises the reason
                    future.result()
                    progress.update(1)
        except BaseException:
            # Also SIGTERM: replies under way are waited for and stored, and nothing more is sent.
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
        finally:
            endpoint.close()
    verdicts = [verdict for state in states.values() for verdict in state.found]
    paid = _sum(judge, [verdict for verdict in verdicts if verdict.payer == payer])
    before = _sum(judge, [verdict for verdict in verdicts if verdict.payer != payer])
    cost = {"seconds": round(time.monotonic() - start, 3)} | paid | {f"{k}_before": v for k, v in before.items()}
    cost["unanswered"] = len(unanswered) + budget.unanswered
    return JudgeVerdicts([states[JudgeRequest.to(judge, q.messages, 0).key].value for q in questions], cost)


def _stored(store: Store, judge: JudgeConfig, question: JudgeQuestion, parse: Callable[[str], T | None]) -> _State[T]:
    state: _State[T] = _State(question, None, 0, [])
    while state.value is None and state.attempt < judge.tries:
        verdict = _verdict_on(store, JudgeRequest.to(judge, question.messages, state.attempt))
        if verdict is None:
            break
        state.add(verdict, parse)
    return state


def _complete(
    store: Store, judge: JudgeConfig, endpoint: Endpoint, state: _State[T], parse: Callable[[str], T | None], payer: str
) -> None:
    """Ask until a verdict is found or the tries are used up. A failure stops the other threads from sending."""
    while state.value is None and state.attempt < judge.tries:
        request = JudgeRequest.to(judge, state.question.messages, state.attempt)
        try:
            reply = endpoint.ask(state.question.name, state.question.messages)
        except Exception:
            endpoint.stop.set()
            raise
        verdict = _verdict(request, reply, payer)
        try:
            store.create(request.key, documents.dump(verdict))
        except Conflict:
            # Another run asked at the same time. The verdict that was stored first counts for both runs.
            verdict = _verdict_on(store, request) or verdict
        state.add(verdict, parse)


def _verdict(request: JudgeRequest, reply: Reply, payer: str) -> Verdict:
    usage = Usage(prompt_tokens=reply.prompt_tokens, answer_tokens=reply.answer_tokens, counted=reply.counted)
    return Verdict(request=asdict(request), content=reply.content, finish=reply.finish, usage=usage, payer=payer,
                   created=now())  # fmt: skip


def _verdict_on(store: Store, request: JudgeRequest) -> Verdict | None:
    verdict = documents.read(store, request.key, Verdict)
    if verdict is not None and verdict.request != asdict(request):
        raise Damaged(f"{store.uri(request.key)} holds the verdict on another request; expected the one it is named by")
    return verdict


def _sum(judge: JudgeConfig, verdicts: Sequence[Verdict]) -> dict[str, float]:
    prompt = sum(verdict.usage.prompt_tokens for verdict in verdicts)
    answer = sum(verdict.usage.answer_tokens for verdict in verdicts)
    return {"requests": len(verdicts), "prompt_tokens": prompt, "answer_tokens": answer,
            "paid": price(judge, prompt, answer)}  # fmt: skip
