"""A judge that is slow, away, refuses or answers nonsense: retries, budgets and stored verdicts."""

from __future__ import annotations

import email.utils
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from spinreg_core.benchmarks.judge import JudgeQuestion, JudgeRequest, JudgeVerdicts, ask_judge
from spinreg_core.benchmarks.judge_prompts import parse_rating
from spinreg_core.config import JudgeConfig
from spinreg_core.errors import BadInput, Damaged, StageFailed
from spinreg_core.store.base import Store
from spinreg_core.store.open import open_store
from tests.support.judge_server import Does, JudgeServer, judge_server

rating = partial(parse_rating, parsing="strict")


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


def ask(
    server: JudgeServer, store: Store, count: int = 6, payer: str = "mt-bench-a", **fields: Any
) -> JudgeVerdicts[float]:
    judge = JudgeConfig(base_url=server.url, model="judge", **{"at_once": 3, "patience_seconds": 20.0} | fields)
    questions = [JudgeQuestion(f"question {i}", [{"role": "user", "content": f"rate {i}"}]) for i in range(count)]
    return ask_judge(store, judge, questions, rating, payer=payer, first_wait=0.02)


def rated(body: dict[str, Any], _number: int) -> Does:
    return Does(f"Rating: [[{int(body['messages'][-1]['content'].split()[1]) + 1}]]")


def test_ask_judge_again_returns_stored_verdicts_in_order(store: Store) -> None:
    with judge_server(rated) as server:
        first = ask(server, store, price_prompt=1.0, price_answer=2.0)
        assert first.values == [1, 2, 3, 4, 5, 6]
        assert sorted(server.asked()) == [f"rate {i}" for i in range(6)]
        assert server.bodies[0].keys() == {"model", "messages", "temperature", "max_tokens"}
        assert (first.cost["requests"], first.cost["prompt_tokens"], first.cost["answer_tokens"]) == (6, 600, 60)
        assert first.cost["paid"] == pytest.approx((600 * 1.0 + 60 * 2.0) / 1e6)
        assert (first.cost["requests_before"], first.cost["paid_before"], first.cost["unanswered"]) == (0, 0, 0)
        again = ask(server, store, price_prompt=1.0, price_answer=2.0)
        assert (again.values, again.cost["requests"]) == (first.values, 6)  # its own, of an attempt before
        other = ask(server, store, count=8, payer="mt-bench-b", price_prompt=1.0, price_answer=2.0)
        assert (other.cost["requests"], other.cost["requests_before"]) == (2, 6)
        assert other.cost["paid_before"] == pytest.approx(first.cost["paid"])
        assert len(server.bodies) == 8
    with judge_server(rated) as server:  # on another port: the same judge
        assert ask(server, store, count=8).values == other.values
        assert server.bodies == []
        ask(server, store, count=1, temperature=0.5)
        ask(server, store, count=1, max_tokens=77)
        assert [(b["temperature"], b["max_tokens"]) for b in server.bodies] == [(0.5, 2048), (0.0, 77)]


def test_ask_judge_equal_questions_send_one_request(store: Store) -> None:
    with judge_server(rated) as server:
        judge = JudgeConfig(base_url=server.url, model="judge")
        same = [JudgeQuestion(name, [{"role": "user", "content": "rate 3"}]) for name in ("a", "b", "c")]
        assert ask_judge(store, judge, same, rating, payer="p").values == [4, 4, 4]
        assert len(server.bodies) == 1


def test_ask_judge_many_questions_send_at_most_at_once(store: Store) -> None:
    with judge_server(lambda _b, _n: Does(seconds=0.1)) as server:
        ask(server, store, count=9, at_once=3)
        assert server.most_at_once == 3


def test_ask_judge_malformed_verdict_is_retried_then_counted(store: Store) -> None:
    tries: Counter[str] = Counter()

    def script(body: dict[str, Any], _number: int) -> Does:
        text = body["messages"][-1]["content"]
        tries[text] += 1
        if text == "rate 0":
            return Does("no idea")
        if text == "rate 1" and tries[text] < 3:
            return Does("Rating: [[11]]" if tries[text] == 1 else None)
        return Does("Rating: [[8]]")

    with judge_server(script) as server:
        found = ask(server, store, count=3, tries=3)
        assert found.values == [None, 8, 8]
        assert tries == {"rate 0": 3, "rate 1": 3, "rate 2": 1}
        assert found.cost["requests"] == 7
        assert ask(server, store, count=3, tries=3).values == found.values
        assert len(server.bodies) == 7
        ask(server, store, count=3, tries=4)  # one more try, for the one that has none
        assert len(server.bodies) == 8


def test_ask_judge_rate_limits_and_errors_are_retried(store: Store) -> None:
    away = {
        0: Does(status=429, headers={"Retry-After": "1"}, body=b'{"error": {"message": "slow down"}}'),
        1: Does(status=503),
        2: Does(cut=True),
        3: Does(body=b"<html>a proxy</html>"),
        4: Does(status=429, headers={"Retry-After": email.utils.formatdate(time.time() + 1, usegmt=True)}),
    }
    with judge_server(lambda b, n: away.get(n, rated(b, n))) as server:
        start = time.monotonic()
        found = ask(server, store, at_once=1)
        assert found.values == [1, 2, 3, 4, 5, 6]
        assert time.monotonic() - start > 1.0  # Retry-After
        assert Counter(server.asked()) == {"rate 0": 6, **{f"rate {i}": 1 for i in range(1, 6)}}
        assert found.cost["unanswered"] == 2  # the cut one and the one that was no completion may have been billed


def test_ask_judge_retry_after_holds_for_all_requests(store: Store) -> None:
    times: list[float] = []

    def script(body: dict[str, Any], number: int) -> Does:
        times.append(time.monotonic())
        return Does(status=429, headers={"Retry-After": "1"}) if number == 0 else Does(seconds=0.05)

    with judge_server(script) as server:
        ask(server, store, count=12, at_once=2)
    assert len(times) == 13
    assert [t for t in times if 0.2 < t - times[0] < 0.95] == []  # but for what was under way already


def test_ask_judge_timeout_is_retried(store: Store) -> None:
    with judge_server(lambda b, n: Does(seconds=1.0) if n == 0 else rated(b, n)) as server:
        assert ask(server, store, count=1, timeout_seconds=0.2).values == [1]
        assert len(server.bodies) == 2


def test_ask_judge_end_of_patience_keeps_verdicts(store: Store) -> None:
    def script(body: dict[str, Any], number: int) -> Does:
        return Does(status=500, body=b'{"error": {"message": "broken"}}') if "5" in str(body) else rated(body, number)

    with judge_server(script) as server:
        with pytest.raises(StageFailed, match=r"127.0.0.1/v1: HTTP 500 \(broken\).*patience_seconds \(0.3\)"):
            ask(server, store, patience_seconds=0.3)
        server.script = rated
        server.bodies.clear()
        assert ask(server, store).values == [1, 2, 3, 4, 5, 6]
        assert server.asked() == ["rate 5"]


def test_ask_judge_retry_after_beyond_patience_fails_at_once(store: Store) -> None:
    with judge_server(lambda _b, _n: Does(status=429, headers={"Retry-After": "3600"})) as server:
        start = time.monotonic()
        with pytest.raises(StageFailed, match="HTTP 429"):
            ask(server, store, count=1, patience_seconds=5.0)
        assert time.monotonic() - start < 2
        assert len(server.bodies) == 1


def test_ask_judge_unreachable_endpoint_fails_after_patience(store: Store) -> None:
    with judge_server(rated) as server:
        pass
    with pytest.raises(StageFailed, match="no connection"):
        ask(server, store, count=1, patience_seconds=0.2)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, r"judge.key_variable, OPENAI_API_KEY holds no key, and 127.0.0.1/v1 answers HTTP 401 \(who\?\)"),
        (403, "judge.key_variable"),
        (404, r"judge.model: found 'judge', for which .*HTTP 404 \(who\?\); expected a model of that endpoint"),
        (400, r"judge, question 0: found HTTP 400 \(who\?\)"),
        (302, "judge.model.*base_url"),
    ],
)
def test_ask_judge_permanent_status_is_bad_input(store: Store, status: int, message: str) -> None:
    with judge_server(lambda _b, _n: Does(status=status, body=b'{"error": {"message": "who?"}}')) as server:
        with pytest.raises(BadInput, match=message):
            ask(server, store, count=40, at_once=1)
        assert len(server.bodies) == 1


@pytest.mark.parametrize("most", [1, 7, 19])
def test_ask_judge_max_requests_is_exact_over_attempts(store: Store, most: int) -> None:
    """Also over attempts: what an earlier one spent counts."""
    with judge_server(lambda b, n: Does(seconds=0.01)) as server:
        for _attempt in range(2):
            with pytest.raises(
                BadInput,
                match=rf"max_requests is used up: {most} requests .*; set it above {most} ",
            ):
                ask(server, store, count=20, at_once=8, max_requests=most)
            assert len(server.bodies) == most
        found = ask(server, store, count=20, at_once=8, max_requests=20)  # a higher budget goes on from there
        assert (len(server.bodies), found.cost["requests"]) == (20, 20)
        assert max(Counter(server.asked()).values()) == 1
        # What others paid for is no part of it.
        assert ask(server, store, count=21, payer="mt-bench-b", max_requests=1).cost["requests"] == 1


def test_ask_judge_refused_requests_are_not_spent_lost_ones_are(store: Store) -> None:
    with judge_server(lambda b, n: Does(status=503) if n % 2 == 0 else rated(b, n)) as server:
        assert ask(server, store, count=6, max_requests=6, at_once=4).cost["requests"] == 6
    with judge_server(lambda b, n: Does(cut=True) if n == 0 else rated(b, n)) as server:
        with pytest.raises(BadInput, match="is used up: 2 requests made"):
            ask(server, store, count=2, payer="mt-bench-c", temperature=1.0, max_requests=2, at_once=1)
        assert len(server.bodies) == 2


@pytest.mark.parametrize("status", [408, 502, 504, 524])
def test_ask_judge_gateway_timeout_counts_as_spent(store: Store, status: int) -> None:
    with judge_server(lambda b, n: Does(status=status)) as server:
        with pytest.raises(BadInput, match="is used up: 3 requests made"):
            ask(server, store, count=2, max_requests=3, at_once=1)
        assert len(server.bodies) == 3
    assert len(store.list("verdicts/unanswered/")) == 3


def test_ask_judge_lost_requests_count_after_a_restart(store: Store) -> None:
    """Without this, every restart would have a new budget, and a slow endpoint would be billed without end."""
    with judge_server(lambda b, n: Does(seconds=1.0)) as server:
        for _ in range(2):
            with pytest.raises(BadInput, match="is used up: 3 requests made"):
                ask(server, store, count=2, max_requests=3, timeout_seconds=0.2, at_once=1)
            assert len(server.bodies) == 3
        with pytest.raises(BadInput, match="is used up: 1 requests made"):
            ask(server, store, count=2, payer="mt-bench-b", max_requests=1, timeout_seconds=0.2, at_once=1)
    with judge_server(rated) as server:
        found = ask(server, store, count=2, max_requests=5)
        assert (found.cost["requests"], found.cost["unanswered"]) == (2, 3)


@pytest.mark.parametrize("at_once", [1, 8])
def test_ask_judge_max_cost_is_used_up_and_never_exceeded(store: Store, at_once: int) -> None:
    """A request is sent only where its highest possible cost still fits: 100 answer tokens each, of which 10 are used;
    prompts are free here."""
    with judge_server(lambda b, n: Does(seconds=0.01)) as server:
        fields: dict[str, Any] = {"at_once": at_once, "max_tokens": 100, "price_answer": 1e4}  # 0.01 a token
        with pytest.raises(BadInput, match=r"judge.max_cost is used up: 2.1 spent, .*up to 1; set it above 3 to "):
            ask(server, store, count=60, max_cost=3.0, **fields)
        assert len(server.bodies) == 21  # after 2.1 another one might have cost 3.1
        assert ask(server, store, count=60, max_cost=7.0, **fields).cost["paid"] == pytest.approx(6.0)
        assert len(server.bodies) == 60


def test_ask_judge_endpoint_without_usage_counts_upper_bounds(store: Store) -> None:
    with judge_server(lambda _b, _n: Does(usage=None)) as server:
        found = ask(server, store, count=1, max_tokens=50, price_answer=1.0)
        assert (found.cost["answer_tokens"], found.cost["prompt_tokens"]) == (50, 256 + len("rate 0"))


SCRIPT = """
import sys
from spinreg_core.benchmarks.judge import JudgeQuestion, ask_judge
from spinreg_core.benchmarks.judge_prompts import parse_rating
from spinreg_core.config import JudgeConfig
from spinreg_core.runtime.supervision import on_sigterm
from spinreg_core.store.open import open_store
import signal
signal.signal(signal.SIGTERM, on_sigterm)
questions = [JudgeQuestion(str(i), [{"role": "user", "content": f"rate {i}"}]) for i in range(30)]
judge = JudgeConfig(base_url=sys.argv[1], model="judge", at_once=3)
rating = lambda text: parse_rating(text, "strict")
print(ask_judge(open_store(sys.argv[2]), judge, questions, rating, payer="p").cost["requests"])
"""


def test_ask_judge_after_a_kill_asks_only_missing_verdicts(store: Store) -> None:
    with judge_server(lambda b, n: Does("[[5]]", seconds=0.1)) as server:
        command = [sys.executable, "-c", SCRIPT, server.url, store.url]
        for how, replies in ((signal.SIGTERM, 6), (signal.SIGKILL, 15)):
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            while len(server.done) < replies:
                assert process.poll() is None
                time.sleep(0.01)
            process.send_signal(how)
            assert process.wait(20) == {signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}[how]
            asked, stored = Counter(server.asked()), len(store.list("verdicts/"))
            assert replies - 3 <= stored <= len(asked) < 30
            if how == signal.SIGTERM:  # what was under way was waited for and kept
                assert stored == len(asked) == sum(asked.values())
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        assert done.stdout.split()[-1] == "30"
        times = Counter(server.asked())
        assert set(times) == {f"rate {i}" for i in range(30)}
        assert sum(times.values()) - sum(asked.values()) == 30 - stored  # no more than what was missing
        assert sum(times.values()) - 30 <= 3  # those under way at the kill


def test_ask_judge_key_is_sent_and_stored_nowhere(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    key = "sk-the-secret-of-this-test"
    monkeypatch.setenv("MY_JUDGE", key)

    def echoes(_body: dict[str, Any], number: int) -> Does:
        return Does(f"{key} Rating: [[5]]") if number else Does(status=429, body=f"{key}?".encode())

    with judge_server(echoes) as server:
        ask(server, store, key_variable="MY_JUDGE")
        assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {key}"}
        server.script = lambda _b, _n: Does(status=401, body=json.dumps({"error": {"message": f"bad {key}"}}).encode())
        with pytest.raises(BadInput) as refused:
            ask(server, store, key_variable="MY_JUDGE", temperature=1.0)
        assert "bad ***" in str(refused.value)
        monkeypatch.delenv("MY_JUDGE")
        server.script, server.headers = rated, []
        ask(server, store, key_variable="MY_JUDGE", temperature=2.0)
        assert not any("Authorization" in headers for headers in server.headers)
        monkeypatch.setenv("MY_JUDGE", "sk-\u00e9")
        with pytest.raises(BadInput, match="MY_JUDGE has characters that no key has") as odd:
            ask(server, store, key_variable="MY_JUDGE", temperature=3.0)
    said = capsys.readouterr()
    everything = [str(refused.value), str(odd.value), said.out, said.err]
    everything += [p.read_text() for p in Path(store.url).rglob("*") if p.is_file()]
    assert len(everything) == 4 + 6 + 6  # said, and verdicts
    assert not any(key in text or "sk-\u00e9" in text for text in everything)


def test_ask_judge_damaged_verdict_is_refused(store: Store) -> None:
    with judge_server(rated) as server:
        judge = JudgeConfig(base_url=server.url, model="judge")
        ask(server, store, count=2)
        keys = [JudgeRequest.to(judge, [{"role": "user", "content": f"rate {i}"}], 0).key for i in (0, 1)]
        assert store.list("verdicts/") == sorted(keys)
        paths = [Path(store.url, key) for key in keys]
        paths[0].write_bytes(paths[1].read_bytes())
        with pytest.raises(Damaged, match="holds the verdict on another request"):
            ask(server, store, count=2)
        paths[0].write_bytes(paths[1].read_bytes()[:-20])
        with pytest.raises(Damaged, match="expected JSON"):
            ask(server, store, count=2)
        document = json.loads(paths[1].read_bytes())
        paths[0].write_text(json.dumps(document | {"content": 7}))
        with pytest.raises(Damaged, match="found 7 as content"):
            ask(server, store, count=2)


def test_ask_judge_two_runs_at_once_keep_the_first_verdict(store: Store) -> None:
    """The slower run counts the stored verdict as paid by the other one; its own request is not counted."""
    with judge_server(lambda _b, n: Does(f"[[{n + 1}]]", seconds=0.3)) as server, ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(ask, server, store, count=1, payer=payer, price_answer=1e6) for payer in "pq"]
        first, second = (one.result() for one in asked)
        assert len(server.bodies) == 2
        assert first.values == second.values
        assert len(store.list("verdicts/")) == 1
        assert sorted(one.cost["requests"] for one in (first, second)) == [0, 1]
        assert sorted(one.cost["requests_before"] for one in (first, second)) == [0, 1]
        for payer, found in zip("pq", (first, second), strict=True):
            again = ask(server, store, count=1, payer=payer, price_answer=1e6)
            assert (again.values, again.cost["requests"]) == (first.values, found.cost["requests"])
        assert len(server.bodies) == 2


def test_ask_judge_store_with_paid_twice_documents_ignores_them(store: Store) -> None:
    """0.1.0 kept what the slower of two runs paid under verdicts/twice/PAYER/; nothing counts it any more."""
    with judge_server(rated) as server:
        ask(server, store, count=1)
        (key,) = store.list("verdicts/")
        store.create(f"verdicts/twice/mt-bench-a/{key.removeprefix('verdicts/')}", store.read(key) or b"")
        found = ask(server, store, count=2, max_requests=2)
        assert (found.values, found.cost["requests"], len(server.bodies)) == ([1, 2], 2, 2)
