"""The table of an iterate against a row-by-row loop, and what is left out where it is not defined."""

from __future__ import annotations

import math
import statistics
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from spinreg_core.evaluation.final_answers import exact_match
from spinreg_core.evaluation.heldout import ROWS_SCHEMA, heldout_metrics, implicit_reward
from spinreg_core.evaluation.metrics import GAME, METRICS, distinct_bigrams

BASE_ONLY = {"human_answer_length", "human_distinct_2"}
AFTER_BASE = {"nll_vs_base", "nll_vs_previous", "reward_accuracy", "kl_previous"}
GAME_AFTER_BASE = {"margin", "separated", "real_change", "generated_change", "length_bias"}
ALL = {**METRICS, **GAME}
BETA = 0.2


def table(n: int = 40, *, base: bool = False, seed: int = 0) -> pa.Table:
    """Random rows of the schema; for the base, everything about a previous policy is null."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        ids = rng.integers(0, 5, size=int(rng.integers(1, 12))).tolist()
        finish = "stop" if rng.random() < 0.7 else "length"
        row: dict[str, Any] = {
            "prompt_id": f"{i:016x}",
            "answer_tokens": int(rng.integers(1, 60)),
            "answer_distinct_2": float(rng.random()),
            "final_answer": str(i) if i % 2 else None,
            "sample_ids": ids,
            "sample_text": f"it is {i if rng.random() < 0.5 else -1}",
            "sample_finish": finish,
            "sample_distinct_2": distinct_bigrams(ids[:-1] if finish == "stop" else ids),
        }
        for name in ROWS_SCHEMA.names:
            if name.endswith("_logp"):
                row[name] = None if base and "previous" in name else float(-rng.gamma(5, 8))
        row["previous_sample_tokens"] = None if base else int(rng.integers(1, 60))
        if base:
            row["real_base_logp"], row["sample_base_logp"] = row["real_logp"], row["sample_logp"]
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=ROWS_SCHEMA)


def test_heldout_metrics_equal_a_plain_loop() -> None:
    alpha, rows = 0.3, table()
    found = heldout_metrics(rows, alpha=alpha, beta=BETA, resamples=100, seed=0)
    margins, longer, separated, real_change, generated_change, gap, entropy = [], [], 0, 0.0, 0.0, 0.0, 0.0
    tokens = nll = base_nll = previous_nll = wins = kl_base = kl_previous = length = stops = matched = asked = 0.0
    repetition = []
    for row in rows.to_pylist():
        tokens += row["answer_tokens"]
        nll -= row["real_logp"]
        base_nll -= row["real_base_logp"]
        previous_nll -= row["real_previous_logp"]
        reward_real = row["real_logp"] - alpha * row["real_previous_logp"] - (1 - alpha) * row["real_base_logp"]
        reward_sample = (
            row["previous_sample_logp"]
            - alpha * row["previous_sample_previous_logp"]
            - (1 - alpha) * row["previous_sample_base_logp"]
        )
        wins += 1.0 if reward_real > reward_sample else 0.0
        margins.append(reward_real - reward_sample)
        longer.append(row["answer_tokens"] - row["previous_sample_tokens"])
        separated += BETA * margins[-1] >= 2
        real_change += row["real_logp"] - row["real_previous_logp"]
        generated_change += row["previous_sample_logp"] - row["previous_sample_previous_logp"]
        gap += row["sample_engine_logp"] - row["sample_logp"]
        entropy -= row["sample_logp"]
        kl_base += row["sample_logp"] - row["sample_base_logp"]
        kl_previous += row["sample_logp"] - row["sample_previous_logp"]
        length += len(row["sample_ids"])
        stops += row["sample_finish"] == "stop"
        if row["sample_distinct_2"] is not None:
            repetition.append(row["sample_distinct_2"])
        if row["final_answer"] is not None:
            asked += 1
            matched += row["sample_text"] == f"it is {row['final_answer']}"
    n = rows.num_rows
    expected = {
        "heldout_nll": nll / tokens,
        "nll_vs_base": (nll - base_nll) / tokens,
        "nll_vs_previous": (nll - previous_nll) / tokens,
        "reward_accuracy": wins / n,
        "exact_match": matched / asked,
        "kl_base": kl_base / n,
        "kl_previous": kl_previous / n,
        "answer_length": length / n,
        "end_of_turn_rate": stops / n,
        "distinct_2": sum(repetition) / len(repetition),
        "margin": sum(margins) / n,
        "separated": separated / n,
        "real_change": real_change / n,
        "generated_change": generated_change / n,
        "length_bias": statistics.correlation(margins, longer),
        "entropy": entropy / length,
        "sampler_gap": gap / n,
    }
    assert 0 < separated < n
    assert {name: e["value"] for name, e in found.items()} == pytest.approx(expected)
    assert {name: e["n"] for name, e in found.items()} == dict.fromkeys(found, n) | {
        "exact_match": asked,
        "distinct_2": len(repetition),
    }
    assert all(e["low"] <= e["value"] <= e["high"] for e in found.values())
    assert {name: e["unit"] for name, e in found.items()} == {name: ALL[name]["unit"] for name in found}


def test_heldout_metrics_of_the_base_leave_out_comparisons() -> None:
    found = heldout_metrics(table(base=True), alpha=0.5, beta=BETA, resamples=100, seed=0)
    assert set(found) == set(ALL) - AFTER_BASE - GAME_AFTER_BASE | BASE_ONLY
    assert (found["kl_base"]["value"], found["kl_base"]["low"], found["kl_base"]["high"]) == (0, 0, 0)
    later = heldout_metrics(table(), alpha=0.5, beta=BETA, resamples=100, seed=0)
    assert set(later) == set(ALL)


def test_heldout_metrics_undefined_ones_are_absent() -> None:
    rows = table(3)
    rows = rows.set_column(rows.schema.get_field_index("final_answer"), "final_answer", pa.nulls(3, pa.string()))
    rows = rows.set_column(
        rows.schema.get_field_index("sample_distinct_2"), "sample_distinct_2", pa.nulls(3, pa.float64())
    )
    found = heldout_metrics(rows, alpha=0.5, beta=BETA, resamples=100, seed=0)
    assert set(found) == set(ALL) - {"exact_match", "distinct_2"}
    for name in ("previous_sample_tokens", "answer_tokens"):
        same = pa.array([7] * 3, pa.int32())
        rows = rows.set_column(rows.schema.get_field_index(name), name, same)
    rows = rows.set_column(
        rows.schema.get_field_index("sample_engine_logp"), "sample_engine_logp", pa.nulls(3, pa.float64())
    )
    found = heldout_metrics(rows, alpha=0.5, beta=BETA, resamples=100, seed=0)
    assert set(found) == set(ALL) - {"exact_match", "distinct_2", "length_bias", "sampler_gap"}


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_reward_accuracy_of_the_reference_itself_is_half(alpha: float) -> None:
    """With p = p_previous = p_base every reward is 0, all pairs tie, and every difference is exactly 0."""
    rows = table()
    for kind in ("real", "sample", "previous_sample"):
        for other in ("base", "previous"):
            name = f"{kind}_{other}_logp"
            rows = rows.set_column(rows.schema.get_field_index(name), name, rows[f"{kind}_logp"])
    found = heldout_metrics(rows, alpha=alpha, beta=BETA, resamples=100, seed=0)
    assert found["reward_accuracy"]["value"] == 0.5
    for name in ("nll_vs_base", "nll_vs_previous", "kl_base", "kl_previous"):
        assert (found[name]["value"], found[name]["low"], found[name]["high"]) == (0, 0, 0)


def test_reward_accuracy_ignores_shifts_per_prompt() -> None:
    """Adding a function of x to log p of both answers moves no row: only the pair's difference counts."""
    rows, shift = table(), np.random.default_rng(1).normal(size=40) * 50
    moved = rows
    for name in ("real_logp", "previous_sample_logp"):
        column = pa.array(rows[name].to_numpy() + shift)
        moved = moved.set_column(rows.schema.get_field_index(name), name, column)
    first, second = (heldout_metrics(r, alpha=0.5, beta=BETA, resamples=100, seed=0) for r in (rows, moved))
    assert first["reward_accuracy"] == second["reward_accuracy"]
    assert first["heldout_nll"] != second["heldout_nll"]


def test_implicit_reward_alpha_weighs_the_previous_policy() -> None:
    policy, previous, base = np.array([-1.0]), np.array([-3.0]), np.array([-7.0])
    assert implicit_reward(policy, previous, base, 1.0) == policy - previous
    assert implicit_reward(policy, previous, base, 0.0) == policy - base
    assert math.isclose(implicit_reward(policy, previous, base, 0.25)[0], -1 + 0.25 * 3 + 0.75 * 7)


@pytest.mark.parametrize(
    ("reference", "answer", "expected"),
    [("72", "#### 72.0", True), ("#### 1,000", "so 1000", True), ("72", "it is 71", False), ("5", "none", False),
     (None, "5", None), ("red", "red", None)],
)  # fmt: skip
def test_exact_match_needs_a_number_in_the_reference(reference: str | None, answer: str, expected: bool | None) -> None:
    assert exact_match(reference, answer) is expected
