"""Verdicts of a judge: asked for once, kept in the store, and found there by whoever would ask the same again.

Decides: what makes two requests the same, that a verdict is stored before it counts, when a judge is asked again, and
who paid for what. Leaves out: the connection and the budgets (`judge_client.py`), what a verdict says (`mt_bench.py`,
`win_rate.py`, `judge_agreement.py`).

    verdicts/<SHA-256 of the request>.json   create-only: {"request", "content", "finish", "usage", "payer", "created"}
    verdicts/unanswered/<payer>/<random>.json  a request whose reply did not arrive, which may have been billed

A request is the endpoint (host and path), the model, the messages, the sampling, and which try it is: all that the
judge's answer depends on. Runs, rounds and benchmarks that ask the same share the verdict. `spinreg gc` leaves them.
A process that is killed loses the replies that it waited for, `judge.at_once` at most; one that is stopped by SIGTERM
waits for them and keeps them.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from spinreg_core.benchmarks.judge_client import (
    Budget,
    Endpoint,
    Messages,
    Stopped,
    endpoint_identity,
    most_prompt_tokens,
    price,
)
from spinreg_core.config import JudgeConfig
from spinreg_core.errors import BadInput, Conflict, Damaged
from spinreg_core.runs.objects import now
from spinreg_core.runtime.progress import Progress
from spinreg_core.store import documents
from spinreg_core.store.base import Store
from spinreg_core.store.documents import SCHEMA

T = TypeVar("T")


@dataclass(frozen=True)
class JudgeQuestion:
    """What a judge is asked. `name`: for messages to people."""

    name: str
    messages: Messages


@dataclass(frozen=True)
class JudgeVerdicts(Generic[T]):
    """`values`: a verdict per question, in their order; None where none of `judge.tries` answers held one.

    `cost`: {"seconds"} of this attempt, {"requests", "prompt_tokens", "answer_tokens", "paid"} of this payer, all its
    attempts together, the same four with `_before` for verdicts that others paid for, and "unanswered": requests
    whose replies did not arrive, of all its attempts.
    """

    values: list[T | None]
    cost: dict[str, float]

    @property
    def malformed(self) -> int:
        return sum(value is None for value in self.values)


@dataclass
class _State(Generic[T]):
    """Of one question: the verdict so far, the next try, and the documents that were read or written for it."""

    question: JudgeQuestion
    value: T | None
    attempt: int
    found: list[dict[str, Any]]


def request_of(judge: JudgeConfig, messages: Messages, attempt: int) -> dict[str, Any]:
    """What a verdict is kept under."""
    return {"endpoint": endpoint_identity(judge), "model": judge.model, "messages": messages, "temperature":
    judge.temperature,
            "max_tokens": judge.max_tokens, "attempt": attempt}  # fmt: skip


def verdict_key(request: dict[str, Any]) -> str:
    text = json.dumps({"schema": SCHEMA, "request": request}, sort_keys=True, separators=(",", ":"))
    return f"verdicts/{hashlib.sha256(text.encode()).hexdigest()}.json"


def _unanswered_key(payer: str) -> str:
    """Where a request is kept whose reply did not arrive: it may have been billed, and counts in full in the budgets of
    who sent it, also after another start."""
    return f"verdicts/unanswered/{payer}/{uuid.uuid4().hex}.json"


def require_judge(judge: JudgeConfig) -> None:
    """Raise BadInput where no judge is named."""
    for field in ("base_url", "model"):
        if getattr(judge, field) is None:
            raise BadInput(f"judge.{field}", "nothing", "the judge that is to be asked")


def settings_of(judge: JudgeConfig) -> dict[str, Any]:
    """What of the judge can change its verdicts: part of the fingerprint of what is made of them."""
    names = ("model", "temperature", "max_tokens", "tries")
    return {"endpoint": endpoint_identity(judge)} | {name: getattr(judge, name) for name in names}


def paid_text(cost: dict[str, Any]) -> str:
    """What `Judged.cost` says, in a line for people."""
    return f"requests: {cost['requests']} paid for by this ({cost['paid']:.4g}), {cost['requests_before']} before"


def ask_judge(
    store: Store,
    judge: JudgeConfig,
    questions: Sequence[JudgeQuestion],
    parse: Callable[[str], T | None],
    *,
    payer: str,
) -> JudgeVerdicts[T]:
    """Have questions judged; what the store holds already is not asked for again.

    parse: the verdict in an answer of the judge, or None where it holds none; then the judge is asked once more, up to
    `judge.tries` times in all. payer: who pays for new verdicts; the budgets are its own, over all its attempts.
    Raises BadInput (a budget, or what the endpoint refuses), StageFailed (the endpoint is away), Damaged.
    """
    start, stop = time.monotonic(), threading.Event()
    unique = {verdict_key(request_of(judge, q.messages, 0)): q for q in questions}
    progress = Progress("benchmark", len(unique), "verdicts")
    with ThreadPoolExecutor(judge.at_once, thread_name_prefix="judge") as pool:
        found = pool.map(lambda question: _stored(store, judge, question, parse), unique.values())
        states = dict(zip(unique, found, strict=True))
        keys = store.list(f"verdicts/unanswered/{payer}/")
        lost = [d for key in keys if (d := documents.read(store, key)) is not None]
        spent = _sum(judge, lost + [d for s in states.values() for d in s.found if d["payer"] == payer])
        budget = Budget(judge, int(spent["requests"]), spent["paid"])
        open_ = [state for state in states.values() if state.value is None and state.attempt < judge.tries]
        progress.update(len(states) - len(open_))

        def unanswered(messages: Messages) -> None:
            usage = {"prompt_tokens": most_prompt_tokens(messages), "answer_tokens": judge.max_tokens, "counted": False}
            document = {"schema": SCHEMA, "request": request_of(judge, messages, 0), "content": "", "payer": payer,
                        "finish": "unanswered", "usage": usage, "created": now()}  # fmt: skip
            store.create(_unanswered_key(payer), documents.dump(document))

        endpoint = Endpoint(judge, budget, stop, unanswered)
        try:
            futures = [pool.submit(_complete, store, judge, endpoint, state, parse, payer) for state in open_]
            for future in as_completed(futures):
                with suppress(Stopped):  # the one that stopped it says why
                    future.result()
                    progress.update(1)
        except BaseException:  # also SIGTERM: what is under way is waited for and kept, nothing more is sent
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
        finally:
            endpoint.close()
    documents_ = [d for state in states.values() for d in state.found]
    own = _sum(judge, [d for d in documents_ if d["payer"] == payer])
    before = _sum(judge, [d for d in documents_ if d["payer"] != payer])
    cost = {"seconds": round(time.monotonic() - start, 3)} | own | {f"{k}_before": v for k, v in before.items()}
    cost["unanswered"] = len(lost) + budget.unanswered
    values = [states[verdict_key(request_of(judge, q.messages, 0))].value for q in questions]
    return JudgeVerdicts(values, cost)


def _stored(store: Store, judge: JudgeConfig, question: JudgeQuestion, parse: Callable[[str], T | None]) -> _State[T]:
    state: _State[T] = _State(question, None, 0, [])
    while state.value is None and state.attempt < judge.tries:
        document = _read(store, request_of(judge, question.messages, state.attempt))
        if document is None:
            break
        _note(state, document, parse)
    return state


def _complete(
    store: Store, judge: JudgeConfig, endpoint: Endpoint, state: _State[T], parse: Callable[[str], T | None], payer: str
) -> None:
    """Ask until a verdict is found or the tries are used up. Each answer is stored before it counts. What fails stops
    the others from sending."""
    while state.value is None and state.attempt < judge.tries:
        request = request_of(judge, state.question.messages, state.attempt)
        try:
            reply = endpoint.ask(state.question.name, state.question.messages)
        except Exception:
            endpoint.stop.set()
            raise
        usage = {"prompt_tokens": reply.prompt_tokens, "answer_tokens": reply.answer_tokens, "counted": reply.counted}
        document = {"schema": SCHEMA, "request": request, "content": reply.content, "finish": reply.finish,
                    "usage": usage, "payer": payer, "created": now()}  # fmt: skip
        try:
            store.create(verdict_key(request), documents.dump(document))
        except Conflict:  # another run asked at the same time; the first one to be stored counts, for both
            document = _read(store, request) or document
        _note(state, document, parse)


def _note(state: _State[T], document: dict[str, Any], parse: Callable[[str], T | None]) -> None:
    state.found.append(document)
    state.attempt += 1
    state.value = parse(document["content"])


def _read(store: Store, request: dict[str, Any]) -> dict[str, Any] | None:
    key = verdict_key(request)
    document = documents.read(store, key)
    if document is not None and document["request"] != request:
        raise Damaged(f"{store.uri(key)}: found the verdict on another request; expected the one it is named by")
    return document


def _sum(judge: JudgeConfig, found: Sequence[dict[str, Any]]) -> dict[str, float]:
    prompt, answer = (sum(d["usage"][name] for d in found) for name in ("prompt_tokens", "answer_tokens"))
    return {"requests": len(found), "prompt_tokens": prompt, "answer_tokens": answer,
            "paid": price(judge, prompt, answer)}  # fmt: skip
