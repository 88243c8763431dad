"""Requests to a judge behind an OpenAI-compatible endpoint, within budgets.

Decides: which failures are retried (rate limits, errors of the server, broken connections) and which are bad input (no
permission, no such model), how long to wait, and that concurrent requests never exceed a budget. Leaves out: the
questions and the stored verdicts (`judge`).

The highest possible cost of a request is reserved before it is sent, and its reply settles the actual cost. A request
that the endpoint refused or never received costs nothing. A request without a reply may have been billed, so it counts
with its full reservation.
"""

from __future__ import annotations

import email.utils
import os
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from spinreg_core.config import JudgeConfig
from spinreg_core.errors import BadInput, JudgeAway

Messages = list[dict[str, str]]
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 1.0, 60.0
# Tokens that the endpoint may add around messages: roles, and its own system prompt where there is none.
_AROUND_MESSAGES = 256
_RETRIED = (408, 409, 425, 429)
# A gateway gave up waiting for the judge, which may have billed the request.
_CUT_OFF = (408, 502, 504, 524)


@dataclass(frozen=True)
class Reply:
    """A judge's reply. Where the endpoint did not count tokens, `counted` is False and they are upper bounds."""

    content: str
    finish: str
    prompt_tokens: int
    answer_tokens: int
    counted: bool


class Stopped(Exception):
    """This request is not sent because another one failed for good."""


class Budget:
    """The budgets `judge.max_requests` and `judge.max_cost`, shared by the threads of one benchmark.

    requests, cost: spent by earlier attempts at the same benchmark.
    """

    def __init__(self, judge: JudgeConfig, requests: int, cost: float) -> None:
        self._judge, self._changed = judge, threading.Condition()
        self.requests, self.cost, self.unanswered = requests, cost, 0
        self._under_way = 0

    def reserve(self, cost: float, stop: threading.Event) -> None:
        """Reserve one request and its highest cost.

        Waits for requests under way if their actual cost decides whether it still fits. Raises BadInput, naming the
        budget, where it does not fit; Stopped.
        """
        with self._changed:
            while (over := self._exceeded(cost)) is not None:
                if not self._under_way:
                    raise over
                # With a timeout, because setting `stop` does not notify this condition.
                self._changed.wait(0.1)
                if stop.is_set():
                    raise Stopped
            self.requests, self.cost, self._under_way = self.requests + 1, self.cost + cost, self._under_way + 1

    def settle(self, reserved: float, *, cost: float | None = None, refused: bool = False) -> None:
        """Replace a reservation by the actual cost, by nothing (`refused`), or keep it (neither: no reply)."""
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
        kept = "to continue; verdicts so far are kept and not asked for again"
        if judge.max_requests is not None and self.requests + 1 > judge.max_requests:
            return BadInput("judge.max_requests", f"is used up: {self.requests} requests made, more are needed",
                            f"set it above {judge.max_requests} {kept}")  # fmt: skip
        if judge.max_cost is not None and self.cost + cost > judge.max_cost + 1e-9 * judge.max_cost:
            return BadInput(
                "judge.max_cost",
                f"is used up: {self.cost:.6g} spent, and the next of the missing verdicts may cost up to {cost:.6g}",
                f"set it above {judge.max_cost:g} {kept}",
            )
        return None


def price(judge: JudgeConfig, prompt_tokens: int, answer_tokens: int) -> float:
    """Return the cost of a request in the currency of the prices, which are per million tokens."""
    return (prompt_tokens * judge.price_prompt + answer_tokens * judge.price_answer) / 1e6


def most_prompt_tokens(messages: Messages) -> int:
    """Return an upper bound: no tokenizer makes more tokens of a text than it has bytes."""
    return _AROUND_MESSAGES + sum(len(message["content"].encode()) for message in messages)


def endpoint_identity(judge: JudgeConfig) -> str:
    """Return host and path of the endpoint. The port is left out: a restarted server is the same judge."""
    parts = urlsplit(str(judge.base_url))
    return f"{parts.hostname}{parts.path.rstrip('/')}"


class Endpoint:
    """A connection to the judge for several threads.

    stop: set it to send nothing more. unanswered: called with each request without a reply, which may have been billed.
    """

    def __init__(
        self,
        judge: JudgeConfig,
        budget: Budget,
        stop: threading.Event,
        unanswered: Callable[[Messages], None],
        first_wait: float = FIRST_WAIT_SECONDS,
    ) -> None:
        self._judge, self._budget, self.stop, self._unanswered = judge, budget, stop, unanswered
        self._first_wait = first_wait
        self._key = os.environ.get(judge.key_variable, "").strip()
        if not self._key.isascii() or not self._key.isprintable():
            raise BadInput(f"judge.key_variable, {judge.key_variable}", "has characters that no key has (not shown)",
                           "use printable ASCII")  # fmt: skip
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        limits = httpx.Limits(max_connections=judge.at_once, max_keepalive_connections=judge.at_once)
        self._client = httpx.Client(headers=headers, timeout=judge.timeout_seconds, limits=limits)
        self._url = f"{str(judge.base_url).rstrip('/')}/chat/completions"
        self._quiet_until, self._lock = 0.0, threading.Lock()

    def close(self) -> None:
        self._client.close()

    def ask(self, where: str, messages: Messages) -> Reply:
        """Return the judge's reply. where: the request's name in error messages.

        Raises BadInput (a budget is used up, or the endpoint refuses the key, the model or the request), JudgeAway (no
        reply for `judge.patience_seconds`), Stopped.
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
                wait = min(LONGEST_WAIT_SECONDS, self._first_wait * 2.0**failures) * random.uniform(0.5, 1.0)
            else:
                with self._lock:  # Retry-After holds for the requests of all threads
                    self._quiet_until = max(self._quiet_until, time.monotonic() + wait)
                wait += random.uniform(0.0, self._first_wait)
            failures += 1
            if time.monotonic() + wait > first_failure + judge.patience_seconds:
                raise JudgeAway(
                    f"judge.base_url, {endpoint_identity(judge)}: {problem}, {failures} times; gave up after "
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

    def _send(self, where: str, body: Mapping[str, Any]) -> tuple[Reply | None, str, bool, float | None]:
        """Return (reply or None, the problem, True if the endpoint refused it, seconds that it asks to wait)."""
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
            return None, f"the reply is no chat completion ({self._said(response)})", False, None

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
            held = "holds a key, and" if self._key else "holds no key, and"
            return BadInput(f"judge.key_variable, {judge.key_variable}",
                            f"{held} {endpoint_identity(judge)} answers {said}",
                            "name an environment variable with a key of that endpoint")  # fmt: skip
        if status in (404, 405) or 300 <= status < 400:
            return BadInput("judge.model", f"{judge.model!r}, for which {endpoint_identity(judge)} answers {said}",
                            "a model of that endpoint, and a base_url that ends before /chat/completions")  # fmt: skip
        return BadInput(f"judge, {where}", said,
                        f"a request that {judge.model!r} at {endpoint_identity(judge)} accepts")  # fmt: skip

    def _said(self, response: httpx.Response) -> str:
        try:
            error = response.json().get("error") or response.json()
            text = str(error.get("message") or error)
        except (ValueError, AttributeError):
            text = response.text
        return self._clean(" ".join(text.split())[:300]) or "nothing more"

    def _clean(self, text: str) -> str:
        """Remove the key, which some endpoints repeat in their messages, and unpaired surrogates."""
        text = text.encode(errors="replace").decode()
        return text.replace(self._key, "***") if self._key else text


def _retry_after(response: httpx.Response) -> float | None:
    """Return the seconds of a Retry-After header, a number or a date (RFC 9110, 10.2.3); None where unusable."""
    value = response.headers.get("Retry-After", "").strip()
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return max(0.0, seconds) if seconds < 1e6 else 1e6
