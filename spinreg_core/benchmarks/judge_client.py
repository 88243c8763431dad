"""One request to a judge behind an OpenAI-compatible endpoint, and what may be spent on it.

Decides: what is waited out (rate limits, errors of the server, connections that break) and what is bad input (no
right, no such model), how long is waited, and that neither budget is ever exceeded, also with requests under way
together. Leaves out: what is asked, and what is kept of it (`judge.py`).

What a request may cost at most is put aside before it is sent. A reply settles it. What the endpoint refused with an
error of its own, or never took, costs nothing. A request whose reply did not arrive may have been billed: it counts
with all that was put aside for it.
"""

from __future__ import annotations

import email.utils
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from spinreg_core.config import JudgeConfig
from spinreg_core.errors import BadInput, JudgeAway

Messages = list[dict[str, str]]
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 1.0, 60.0
# Tokens of the endpoint's own around messages: their roles, a system prompt that it puts first where there is none.
_AROUND_MESSAGES = 256
_RETRIED = (408, 409, 425, 429)
_CUT_OFF = (408, 502, 504, 524)  # of a gateway that waited for the judge no longer, which may have billed it


@dataclass(frozen=True)
class Reply:
    """`counted`: whether the endpoint said how many tokens there were; if not, they are the most there can be."""

    content: str
    finish: str
    prompt_tokens: int
    answer_tokens: int
    counted: bool


class Stopped(Exception):
    """Another request failed for good, and this one is not sent any more."""


class Budget:
    """What may still be spent of `judge.max_requests` and `judge.max_cost`, shared by the threads of one benchmark.

    `requests` and `cost`: spent by earlier attempts at the same benchmark.
    """

    def __init__(self, judge: JudgeConfig, requests: int, cost: float) -> None:
        self._judge, self._changed = judge, threading.Condition()
        self.requests, self.cost, self.unanswered = requests, cost, 0
        self._under_way = 0

    def reserve(self, cost: float, stop: threading.Event) -> None:
        """Put one request and its highest cost aside. Waits for requests under way where they decide whether it still
        fits. Raises BadInput, naming the budget, where it does not; Stopped."""
        with self._changed:
            while (over := self._exceeded(cost)) is not None:
                if not self._under_way:
                    raise over
                self._changed.wait(0.1)
                if stop.is_set():
                    raise Stopped
            self.requests, self.cost, self._under_way = self.requests + 1, self.cost + cost, self._under_way + 1

    def settle(self, reserved: float, *, cost: float | None = None, refused: bool = False) -> None:
        """A request is over: it cost `cost`, or was `refused`, or (neither) its reply did not arrive."""
        with self._changed:
            self._under_way -= 1
            if refused:
                self.requests, self.cost = self.requests - 1, self.cost - reserved
            elif cost is not None:
                self.cost += cost - reserved
            else:
                self.unanswered += 1
            self._changed.notify_all()

    def _exceeded(self, cost: float) -> BadInput | None:
        judge = self._judge
        kept = "; verdicts so far are kept and not asked for again"
        if judge.max_requests is not None and self.requests + 1 > judge.max_requests:
            return BadInput("judge.max_requests", f"{self.requests} requests made and verdicts that are missing",
                            f"more than {judge.max_requests}{kept}")  # fmt: skip
        if judge.max_cost is not None and self.cost + cost > judge.max_cost + 1e-9 * judge.max_cost:
            return BadInput(
                "judge.max_cost",
                f"{self.cost:.6g} spent and verdicts that are missing, the next of which may cost up to {cost:.6g}",
                f"more than {judge.max_cost:g}{kept}",
            )
        return None


def price(judge: JudgeConfig, prompt_tokens: int, answer_tokens: int) -> float:
    """Cost of a request, in the currency of the prices, which are per million tokens."""
    return (prompt_tokens * judge.price_prompt + answer_tokens * judge.price_answer) / 1e6


def most_prompt_tokens(messages: Messages) -> int:
    """No tokenizer makes more tokens of a text than it has bytes."""
    return _AROUND_MESSAGES + sum(len(message["content"].encode()) for message in messages)


def endpoint_identity(judge: JudgeConfig) -> str:
    """Host and path of the endpoint, without its port: who starts a server anew, or behind another port, asks the same
    judge."""
    parts = urlsplit(str(judge.base_url))
    return f"{parts.hostname}{parts.path.rstrip('/')}"


class Endpoint:
    """Sends requests from several threads. `stop`: set when nothing more is to be sent. `unanswered`: told of each
    request whose reply did not arrive, which may have been billed."""

    def __init__(
        self, judge: JudgeConfig, budget: Budget, stop: threading.Event, unanswered: Callable[[Messages], None]
    ) -> None:
        self._judge, self._budget, self.stop, self._unanswered = judge, budget, stop, unanswered
        self._key = os.environ.get(judge.key_variable, "").strip()
        if not self._key.isascii() or not self._key.isprintable():
            raise BadInput(f"judge.key_variable, {judge.key_variable}", "characters that no key has (not shown)",
                           "printable ASCII")  # fmt: skip
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        limits = httpx.Limits(max_connections=judge.at_once, max_keepalive_connections=judge.at_once)
        self._client = httpx.Client(headers=headers, timeout=judge.timeout_seconds, limits=limits)
        self._url = f"{str(judge.base_url).rstrip('/')}/chat/completions"
        self._quiet_until, self._lock = 0.0, threading.Lock()

    def close(self) -> None:
        self._client.close()

    def ask(self, where: str, messages: Messages) -> Reply:
        """The judge's reply. `where`: what messages of errors call the request.

        Raises BadInput (a budget is used up, the endpoint refuses the key, the model or the request), JudgeAway
        (no reply for `judge.patience_seconds`), Stopped.
        """
        judge, reserved = self._judge, price(self._judge, most_prompt_tokens(messages), self._judge.max_tokens)
        body = {"model": judge.model, "messages": messages, "temperature": judge.temperature,
                "max_tokens": judge.max_tokens}  # fmt: skip
        first_failure, failures = None, 0
        while True:
            self._pause(0.0)
            self._budget.reserve(reserved, self.stop)
            sent = time.monotonic()
            try:
                reply, problem, refused, wait = self._send(where, body)
            except BadInput:
                self._budget.settle(reserved, refused=True)
                raise
            cost = None if reply is None else price(judge, reply.prompt_tokens, reply.answer_tokens)
            self._budget.settle(reserved, cost=cost, refused=refused)
            if reply is not None:
                return reply
            if not refused:
                self._unanswered(messages)
            first_failure = sent if first_failure is None else first_failure
            if wait is None:
                wait = min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2.0**failures) * random.uniform(0.5, 1.0)
            else:
                with self._lock:  # what was said to one holds for all
                    self._quiet_until = max(self._quiet_until, time.monotonic() + wait)
                wait += random.uniform(0.0, FIRST_WAIT_SECONDS)
            failures += 1
            if time.monotonic() + wait > first_failure + judge.patience_seconds:
                raise JudgeAway(
                    f"judge.base_url, {endpoint_identity(judge)}: {problem}, {failures} times; not waiting longer than "
                    f"judge.patience_seconds ({judge.patience_seconds:g}). Verdicts so far are kept"
                )
            self._pause(wait)

    def _pause(self, wait: float) -> None:
        until = time.monotonic() + wait
        while (left := max(until, self._quiet_until) - time.monotonic()) > 0:
            if self.stop.wait(left):
                break
        if self.stop.is_set():
            raise Stopped

    def _send(self, where: str, body: dict[str, Any]) -> tuple[Reply | None, str, bool, float | None]:
        """(reply or None, what went wrong, whether the endpoint refused it, seconds that it asks to wait)."""
        try:
            response = self._client.post(self._url, json=body)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            return None, f"no connection ({self._clean(str(error))})", True, None
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise BadInput(
                "judge.base_url", f"{self._judge.base_url} ({error})", "the address of an endpoint"
            ) from None
        except httpx.TimeoutException:
            return None, f"no reply within judge.timeout_seconds ({self._judge.timeout_seconds:g})", False, None
        except httpx.HTTPError as error:
            return None, f"the connection broke ({type(error).__name__}: {self._clean(str(error))})", False, None
        if response.status_code != 200:
            said = f"HTTP {response.status_code} ({self._said(response)})"
            if response.status_code in _RETRIED or response.status_code >= 500:
                return None, said, response.status_code not in _CUT_OFF, _retry_after(response)
            raise self._refusal(where, response.status_code, said)
        try:
            return self._reply(response.json(), body["messages"]), "", False, None
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            return None, f"a reply that is no chat completion ({self._said(response)})", False, None

    def _reply(self, document: Any, messages: Messages) -> Reply:
        choice = document["choices"][0]
        content = self._clean(choice["message"].get("content") or "")
        finish, usage = str(choice.get("finish_reason")), document.get("usage") or {}
        prompt, answer = usage.get("prompt_tokens"), usage.get("completion_tokens")
        if isinstance(prompt, int) and isinstance(answer, int) and min(prompt, answer) >= 0:
            return Reply(content, finish, prompt, answer, counted=True)
        return Reply(content, finish, most_prompt_tokens(messages), self._judge.max_tokens, counted=False)

    def _refusal(self, where: str, status: int, said: str) -> BadInput:
        judge = self._judge
        if status in (401, 403):
            held, where_ = "a key" if self._key else "no key", endpoint_identity(judge)
            return BadInput(f"judge.key_variable, {judge.key_variable}", f"{held}, and {where_} answers {said}",
                            "the name of an environment variable with a key of that endpoint")  # fmt: skip
        if status in (404, 405) or 300 <= status < 400:
            return BadInput("judge.model", f"{judge.model!r}, and {endpoint_identity(judge)} answers {said}",
                            "a model of that endpoint, and a base_url that ends before /chat/completions")  # fmt: skip
        return BadInput(f"judge, {where}", said, f"a request that {judge.model!r} at {endpoint_identity(judge)} takes")

    def _said(self, response: httpx.Response) -> str:
        try:
            error = response.json().get("error") or response.json()
            text = str(error.get("message") or error)
        except (ValueError, AttributeError):
            text = response.text
        return self._clean(" ".join(text.split())[:300]) or "nothing more"

    def _clean(self, text: str) -> str:
        """Without the key, which some endpoints repeat in what they say, and without halves of characters."""
        text = text.encode(errors="replace").decode()
        return text.replace(self._key, "***") if self._key else text


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds, of a number or a date (RFC 9110, 10.2.3); None where nothing usable is said."""
    value = response.headers.get("Retry-After", "").strip()
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return max(0.0, seconds) if seconds < 1e6 else 1e6
