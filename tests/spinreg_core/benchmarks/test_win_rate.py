"""Win rates of verdicts in both orders: by hand, as a part on a store, and as `spinreg win-rate` of two runs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows.cli import main
from spinreg_core.benchmarks import win_rate
from spinreg_core.benchmarks.win_rate import AnswerPair, conversation_text, length_controlled, win_metrics
from spinreg_core.config import RunConfig
from spinreg_core.errors import EXIT_BAD_INPUT, BadInput
from spinreg_core.evaluation.intervals import wilson
from spinreg_core.runs import fetch, objects
from spinreg_core.runs.lease import hold_lease
from spinreg_core.store.base import Store
from spinreg_core.store.open import open_store
from tests.support.builders import make_config, make_head, make_job
from tests.support.judge_server import Does, judge_server


def pair(name: str, own: int, other: int) -> AnswerPair:
    return AnswerPair(name, "q", "x" * own, "y" * other)


def test_win_metrics_of_few_pairs_equal_hand_computation() -> None:
    pairs = [pair("a", 9, 4), pair("b", 2, 8), pair("c", 5, 5), pair("d", 7, 3), pair("e", 1, 1), pair("f", 6, 6)]
    # As A and as B: wins both (1), first place twice (1/2), win and tie (3/4), loses both (0); malformed; equal texts.
    verdicts: list[Any] = [("A", "B"), ("A", "A"), ("A", "tie"), ("B", "A"), (None, "A"), None]
    metrics, items = win_metrics(pairs, verdicts, resamples=500, seed=1)
    values = {name: estimate["value"] for name, estimate in metrics.items()}
    n = {name: estimate["n"] for name, estimate in metrics.items()}
    assert items == [(name, "win_rate", score) for name, score in zip("abcdf", [1, 0.5, 0.75, 0, 0.5], strict=True)]
    assert values["win_rate"] == pytest.approx(2.75 / 5)
    assert (values["wins"], values["ties"], values["losses"], n["wins"]) == (0.4, 0.4, 0.2, 5)
    # Named winners: A, B | A, A | A | B, A: the first place in A, A, A, A, A of 7.
    assert (values["first_place"], n["first_place"]) == (pytest.approx(5 / 7), 7)
    assert (values["consistent"], n["consistent"]) == (0.5, 4)  # a and d
    assert (values["malformed"], n["malformed"]) == (0.1, 10)
    lengths, scores = [5, -6, 0, 4, 0], [1, 0.5, 0.75, 0, 0.5]
    assert values["length_difference"] == pytest.approx(np.mean(lengths))
    assert values["length_correlation"] == pytest.approx(np.corrcoef(lengths, scores)[0, 1])
    for estimate in metrics.values():
        assert estimate["low"] <= estimate["value"] <= estimate["high"]  # type: ignore[operator]


@pytest.mark.parametrize("won", [1.0, 0.5, 0.0])
def test_win_metrics_equal_prompts_have_wilsons_interval(won: float) -> None:
    """No resampling sees that another prompt might end otherwise."""
    pairs = [pair(str(i), 3 + i, 5) for i in range(20)]
    verdicts: list[Any] = [{1.0: ("A", "B"), 0.5: ("A", "A"), 0.0: ("B", "A")}[won]] * 20  # 0.5: always the first
    metrics, _ = win_metrics(pairs, verdicts, resamples=200, seed=0)
    whole = wilson(20.0 * won, 20)
    assert (metrics["win_rate"]["low"], metrics["win_rate"]["high"]) == (whole["low"], whole["high"])
    assert "length_controlled_win_rate" not in metrics
    assert "length_correlation" not in metrics


def test_win_metrics_intervals_are_over_prompts() -> None:
    """A judge that names the same place in both orders, either as often: 80 verdicts that say as much as 40."""
    pairs = [pair(str(i), 5, 3) for i in range(40)]
    metrics, _ = win_metrics(pairs, [("A", "A") if i % 2 else ("B", "B") for i in range(40)], resamples=2000, seed=1)
    first = metrics["first_place"]
    assert first["low"] is not None
    assert first["high"] is not None
    assert (first["value"], first["n"]) == (0.5, 80)
    assert first["high"] - first["low"] == pytest.approx(2 * 1.96 * 0.5 / np.sqrt(40), rel=0.1)
    verdicts: list[Any] = [("A", "B")] * 30 + [(None, None)] * 10
    failed = win_metrics(pairs, verdicts, resamples=2000, seed=1)[0]["malformed"]
    assert failed["low"] is not None
    assert failed["high"] is not None
    assert (failed["value"], failed["n"]) == (0.25, 80)
    assert failed["high"] - failed["low"] == pytest.approx(2 * 1.96 * np.sqrt(0.25 * 0.75 / 40), rel=0.1)
    none = win_metrics(pairs, [("A", "B")] * 40, resamples=100, seed=1)[0]["malformed"]
    assert (none["value"], none["high"], none["n"]) == (0.0, wilson(0, 40)["high"], 80)


def test_win_metrics_of_swapped_sides_are_mirrored() -> None:
    rng = np.random.default_rng(0)
    pairs = [pair(str(i), *rng.integers(1, 50, 2)) for i in range(40)]
    verdicts: list[Any] = [tuple(rng.choice(["A", "B", "tie"], 2)) for _ in pairs]
    turned = [AnswerPair(p.prompt_id, p.question, p.other, p.own) for p in pairs]
    one, _ = win_metrics(pairs, verdicts, resamples=200, seed=2)
    # What was shown first is the same text: the other order comes first now.
    two, _ = win_metrics(turned, [(b, a) for a, b in verdicts], resamples=200, seed=2)
    for name in ("win_rate", "length_controlled_win_rate"):
        assert one[name]["value"] + two[name]["value"] == pytest.approx(1)
    assert one["wins"]["value"] == two["losses"]["value"]
    for name in ("first_place", "consistent", "length_correlation"):
        assert one[name]["value"] == pytest.approx(two[name]["value"])


def test_length_controlled_removes_the_effect_of_length() -> None:
    rng = np.random.default_rng(3)
    lengths = rng.normal(300, 200, 20_000)  # longer by 300 characters, on average
    x = np.tanh(lengths / lengths.std())
    by_length = (rng.random(lengths.size) < 1 / (1 + np.exp(-1.5 * x))).astype(float)  # equal but for their lengths
    assert by_length.mean() > 0.65
    assert length_controlled(by_length[None], lengths[None])[0] == pytest.approx(0.5, abs=0.02)
    better = (rng.random(lengths.size) < 1 / (1 + np.exp(-(0.8 + 1.5 * x)))).astype(float)
    assert length_controlled(better[None], lengths[None])[0] == pytest.approx(1 / (1 + np.exp(-0.8)), abs=0.02)
    both = length_controlled(np.stack([by_length, better])[:, :500], np.stack([lengths, lengths])[:, :500])
    assert both[0] == pytest.approx(length_controlled(by_length[None, :500], lengths[None, :500])[0])


def test_length_controlled_equals_another_fit_and_stays_finite() -> None:
    from scipy.optimize import minimize

    rng = np.random.default_rng(4)
    lengths, scores = rng.normal(0, 100, 30), rng.choice([0, 0.25, 0.5, 0.75, 1], 30)
    x = np.tanh(lengths / lengths.std())

    def loss(c: Any) -> float:
        z = c[0] + c[1] * x
        return float(np.sum(np.logaddexp(0, z) - scores * z) + 0.01 / 2 * (c[0] ** 2 + c[1] ** 2))

    a = minimize(loss, [0, 0], method="BFGS", options={"gtol": 1e-9}).x[0]
    assert length_controlled(scores[None], lengths[None])[0] == pytest.approx(1 / (1 + np.exp(-a)), abs=1e-6)
    for end in (0.0, 1.0):
        found = length_controlled(np.full((1, 30), end), lengths[None])[0]
        assert 0 < found < 1
        assert found == pytest.approx(end, abs=0.01)
    # The longer one always wins: of two as long, neither. By symmetry exactly.
    even = np.concatenate([np.abs(lengths), -np.abs(lengths)])
    assert length_controlled((even > 0).astype(float)[None], even[None])[0] == pytest.approx(0.5, abs=1e-9)


def test_conversation_text_of_one_user_message_has_no_role() -> None:
    assert conversation_text([{"role": "user", "content": "Why?"}]) == "Why?"
    several = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Why?"}]
    assert (
        conversation_text([*several, {"role": "assistant", "content": "So."}])
        == "System: Be short.\n\nUser: Why?\n\nAssistant: So."
    )


NAMES = [f"p{i}" for i in range(5)]
SAMPLES = {"evaluate-0": ["base 0", "base 1", "same", "base 3", "base 4"],
           "evaluate-1": ["own 0!", "own 1", "same", "own 3", "own 4"]}  # fmt: skip
HEAD = make_head(
    base="policy-0",
    data="data",
    stages={0: {"evaluate": "evaluate-0"}, 1: {"train": "policy-1", "evaluate": "evaluate-1"}},
)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("SPINREG_CACHE", str(tmp_path / "cache"))
    store = open_store(str(tmp_path / "store"))
    messages = [json.dumps([{"role": "user", "content": f"question {i}"}]) for i in range(5)]
    tables = {"data": ("heldout.parquet", {"prompt_id": NAMES, "messages": messages,
                                           "answer": [f"human {i}" for i in range(5)]})}  # fmt: skip
    tables |= {name: ("rows.parquet", {"prompt_id": NAMES, "sample_text": texts}) for name, texts in SAMPLES.items()}
    for name, (file, columns) in tables.items():
        folder = tmp_path / name
        folder.mkdir()
        pq.write_table(pa.table(columns), folder / file)
        objects.publish(store, make_job("base", tmp_path, object_id=name), folder, metrics={})
    return store


def run(store: Store, url: str, iterate: int, tmp_path: Path, **benchmarks: Any) -> dict[str, dict[str, Any]]:
    """results.json by name."""
    judge = {"base_url": url, "model": "judge", "tries": 1, "patience_seconds": 5.0}
    config = make_config(store=store.url, benchmarks=benchmarks, judge=judge)
    found = {}
    for plan in win_rate.plans(config, HEAD, iterate):
        win_rate.run(plan.job(config, store.url, "e1-a", tmp_path / plan.object_id))
        document = json.loads(fetch.fetch_file(store, plan.object_id, "results.json").read_bytes())
        found[document["name"]] = document
    return found


def prefers_own(body: dict[str, Any], _number: int) -> Does:
    """The iterate's answers but for question 3, where the first one wins, and 4, where the second order fails."""
    said = body["messages"][-1]["content"]
    if "question 3" in said:
        return Does("[[A]]")
    if "question 4" in said and said.index("own 4") > said.index("base 4" if "base 4" in said else "human 4"):
        return Does("neither")
    first = min((said.index(word), word) for word in ("own", "base", "human") if word in said)[1]
    return Does("[[A]]" if first == "own" else "[[B]]")


def test_run_against_base_previous_and_human_equals_hand_computation(store: Store, tmp_path: Path) -> None:
    with judge_server(prefers_own) as server:
        found = run(store, server.url, 1, tmp_path, win_rate=["base", "previous", "human"])
        # In round 1 the base is the previous iterate: nothing is asked twice. Equal answers are not asked about.
        assert len(server.bodies) == 8 + 10
        base, previous, human = (found[name] for name in ("base", "previous", "human"))
        assert base["metrics"]["win_rate"]["value"] == pytest.approx((1 + 1 + 0.5 + 0.5) / 4)
        assert base["metrics"]["malformed"]["value"] == pytest.approx(1 / 8)
        assert base["settings"]["identical"] == 1
        assert base["fingerprints"] | {"prompts": None} == {
            "policy": "policy-1", "data": "data", "evaluate": "evaluate-1", "against": "evaluate-0", "prompts": None
        }  # fmt: skip
        assert (base["kind"], base["primary"], base["better"]) == ("win-rate", "win_rate", "higher")
        assert previous["metrics"] == base["metrics"]
        assert (base["cost"]["requests"], previous["cost"]["requests"]) == (8, 0)
        assert previous["cost"]["requests_before"] == 8
        assert human["metrics"]["wins"]["n"] == 4
        server.script = lambda _b, _n: Does("[[A]]")
        assert run(store, server.url, 0, tmp_path, win_rate=["base", "previous", "human"]).keys() == {"human"}
        first = run(store, server.url, 1, tmp_path, win_rate=["base"], win_rate_prompts=2)["base"]
        assert first["metrics"]["win_rate"]["n"] == 2


def test_run_judge_without_a_verdict_is_bad_input(store: Store, tmp_path: Path) -> None:
    with (
        judge_server(lambda _b, _n: Does("both are fine")) as server,
        pytest.raises(BadInput, match="which gave no prompt a verdict in both orders; use a judge"),
    ):
        run(store, server.url, 0, tmp_path, win_rate=["human"])


ROUND = ("generate", "mix-opponent", "train")


@pytest.fixture
def runs(store: Store) -> Store:
    """`ours` and `theirs` differ in round 1 and share round 0; the rows of `elsewhere` are others."""
    for run, data, answers in (
        ("ours", "data", "evaluate-1"),
        ("theirs", "data", "evaluate-0"),
        ("elsewhere", "x", "y"),
    ):
        with hold_lease(store, RunConfig(run=run, store=store.url), "test") as session:
            session.commit_inputs("base", data)
            session.commit(0, "evaluate", "evaluate-0")
            for stage in ROUND:
                session.commit(1, stage, f"{stage}-of-{run}")
            session.commit(1, "evaluate", answers)
    return store


def test_win_rate_command_compares_two_runs_and_reuses_verdicts(
    runs: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    with judge_server(prefers_own) as server:
        judge = ["-p", f"judge.base_url={server.url}", "-p", "judge.model=judge", "-p", "judge.tries=1"]
        command = ["win-rate", "ours", "theirs", "--store", runs.url, *judge]
        assert main([*command, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        # As in test_win_rate: two wins, a tie of places, equal texts; one prompt has no verdict in both orders.
        assert found["metrics"]["win_rate"]["value"] == pytest.approx((1 + 1 + 0.5 + 0.5) / 4)
        assert found["metrics"]["first_place"]["n"] == 6
        assert found["fingerprints"]["policies"] == ["train-of-ours", "train-of-theirs"]
        assert (found["round"], found["cost"]["requests"], len(server.bodies)) == (1, 8, 8)
        assert main(command) == 0
        assert "ours against theirs, round 1, 5 prompts, judged by judge" in (text := capsys.readouterr().out)
        assert "win_rate: 0.75 [" in text
        assert len(server.bodies) == 8, "what was paid for is found again"


def test_win_rate_command_on_sigterm_keeps_verdicts(runs: Store) -> None:
    with judge_server(lambda b, n: Does("[[A]]", seconds=2.0)) as server:
        judge = ["-p", f"judge.base_url={server.url}", "-p", "judge.model=judge", "-p", "judge.at_once=3"]
        command = [sys.executable, "-m", "flows.cli", "win-rate", "ours", "theirs", "--store", runs.url, *judge]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        while len(server.bodies) < 3:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "Traceback" not in error
    assert len(runs.list("verdicts/")) == len(server.bodies) == 3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["ours", "theirs", "--round", "2"], "--round: found 2; expected a round that both runs have evaluated (0, 1)"),
        (
            ["ours", "theirs", "--round", "0"],
            "round 0 has the same policy in 'ours' and 'theirs'; choose a round",
        ),
        (["ours", "elsewhere"], "run 'elsewhere' has other held-out rows than 'ours'; choose runs"),
        (["ours", "nobody"], "nobody"),
    ],
)
def test_win_rate_command_incomparable_runs_are_bad_input(
    runs: Store, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    judge = ["-p", "judge.base_url=http://127.0.0.1:9/v1", "-p", "judge.model=judge"]
    assert main(["win-rate", *more, "--store", runs.url, *judge]) == EXIT_BAD_INPUT
    assert message in capsys.readouterr().err
