"""A comparison of runs: what is paired, which runs are one variant, and that nothing unsupported is claimed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spinreg_core.benchmarks.registry import record_measured
from spinreg_core.benchmarks.results import write_part
from spinreg_core.comparison.compare import BASE, compare, comparison_name
from spinreg_core.comparison.runs import HELDOUT_METRICS, asked_of, benchmark_scores, heldout_scores
from spinreg_core.comparison.wording import (
    agreeing_seeds,
    cells,
    comparison_table,
    comparison_verdict,
    grid_of,
    plane_of,
)
from spinreg_core.config import ObjectiveConfig, RunConfig
from spinreg_core.config.resolve import merge, validate
from spinreg_core.errors import BadInput
from spinreg_core.evaluation.heldout import heldout_metrics
from spinreg_core.reports.run_report import sample_notes
from spinreg_core.runs.head import read_config, require_head
from spinreg_core.runs.job import Job
from spinreg_core.runs.lease import hold_lease
from spinreg_core.runs.objects import fingerprint, publish
from spinreg_core.store.base import Store
from spinreg_core.store.open import open_store
from tests.support.finished_runs import make_run, rows_of


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


def claims(data: dict[str, Any]) -> list[list[str]]:
    found: list[list[str]] = data["verdict"]["claims"]
    return found


def picked(entries: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    (found,) = [one for one in entries if all(one[name] == value for name, value in wanted.items())]
    return found


# --- what is compared --------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 2])
def test_heldout_scores_equal_the_metrics_of_the_run(number: int) -> None:
    rows = rows_of(number, 0.1, np.random.default_rng(0), 7)
    expected = heldout_metrics(rows, alpha=0.5, beta=0.1, resamples=100, seed=0)
    found = heldout_scores(rows, "b", 0.5)
    assert list(found) == [name for name in HELDOUT_METRICS if name in expected]
    for name, one in found.items():
        assert one.value == pytest.approx(expected[name]["value"]), name
    final = rows.set_column(3, "final_answer", [["3", None, "1"] + ["7"] * (len(rows) - 3)])  # sampled: 0, 1, 2, ...
    matches = heldout_scores(final, "b", 0.5)["exact_match"]
    assert (matches.num.sum(), matches.den.sum()) == (1.0, len(rows) - 1)


def test_compare_with_real_differences_claims_them(store: Store, tmp_path: Path) -> None:
    make_run(store, tmp_path, "spin", [0.0, 0.0], objective={"alpha": 1.0})
    make_run(store, tmp_path, "kl", [-0.1, -0.2, -0.3], objective={"alpha": 0.5})
    make_run(store, tmp_path, "dpo", [0.1, 0.2], objective={"alpha": 0.0})
    data = compare(store, ["spin", "kl", "dpo"])
    assert [v["label"] for v in data["variants"]] == ["alpha 1.0", "alpha 0.5", "alpha 0.0"]
    assert (data["reference"], data["round"], data["against"]) == ("alpha 1.0", 2, "spin")
    assert claims(data) == [
        ["alpha 0.5", "alpha 1.0", "lower"],
        ["alpha 0.5", BASE, "lower"],
        ["alpha 0.0", "alpha 1.0", "higher"],
        ["alpha 0.0", BASE, "higher"],
    ]
    assert data["verdict"]["headline"] == (
        "In held-out NLL at round 2, alpha 0.5 is better than alpha 1.0, and alpha 0.0 is worse than alpha 1.0 "
        "(one seed each)."
    )
    text = " ".join(data["verdict"]["sentences"])
    assert "alpha 1.0 against its base model: " in text
    assert "cannot distinguish from no difference" in text
    assert "5 comparisons, corrected together (Holm)" in text
    assert data["families"]["verdict"] == 5
    one = picked(data["comparisons"], metric="heldout_nll", variant="alpha 0.5", against=BASE, round=3)
    assert one["family"] == "rounds"
    assert one["value"] == pytest.approx(-0.3, abs=0.03)
    assert one["low"] < one["value"] < one["high"]
    value = picked(data["values"], metric="heldout_nll", variant="alpha 0.5", round=3)["value"]
    base = picked(data["values"], metric="heldout_nll", variant="alpha 0.5", round=0)["value"]
    assert value - base == pytest.approx(one["value"])
    # The margin has no base to be compared with, and the KL to the base is a difference from it already.
    assert not [c for c in data["comparisons"] if c["against"] == BASE and c["metric"] in ("margin", "kl_base")]
    table = comparison_table(data)
    line = next(line for line in table.splitlines() if line.startswith("held-out NLL"))
    assert line.count("▼") == line.count("▲") == 1
    assert "alpha 0.5 went further" in " ".join(table.split())
    alarmed = {(run, one["round"]) for one in data["alarms"] for run in one["runs"]}
    assert {("dpo", 1), ("dpo", 2)} <= alarmed
    assert not [run for run, _ in alarmed if run == "kl"]
    assert "Alarm of dpo, round 2, held-out rows: Held-out human answers became less likely" in " ".join(table.split())
    found = cells(data)[("heldout_nll", "alpha 0.5", 2)]
    assert found.reference is not None
    assert found.base is not None
    assert (found.reference["better"], found.base["better"]) == (1, 1)


def test_compare_against_another_run_swaps_the_sign(store: Store, tmp_path: Path) -> None:
    make_run(store, tmp_path, "a", [-0.2], objective={"alpha": 1.0})
    make_run(store, tmp_path, "b", [0.0], objective={"alpha": 0.5})
    one, other = compare(store, ["a", "b"]), compare(store, ["a", "b"], against="b")
    assert claims(one)[:1] == [["alpha 1.0", BASE, "lower"]]
    assert ["alpha 0.5", "alpha 1.0", "higher"] in claims(one)
    assert claims(other) == [["alpha 1.0", "alpha 0.5", "lower"], ["alpha 1.0", BASE, "lower"]]


def test_compare_without_differences_claims_nothing(store: Store, tmp_path: Path) -> None:
    false = 0
    for trial in range(8):
        for name, alpha in (("a", 1.0), ("b", 0.5), ("c", 0.0)):
            make_run(store, tmp_path, f"{name}{trial}", [0.0], objective={"alpha": alpha}, data=100 + trial)
        data = compare(store, [f"{name}{trial}" for name in "abc"])
        false += bool(claims(data))
        assert data["verdict"]["headline"].endswith("is supported.") is not bool(
            [c for c in claims(data) if c[1] != BASE]
        )
    assert false <= 2, "the 5 % are held to in test_paired.py, with 200 families"


def test_compare_runs_of_other_seeds_forms_one_variant(store: Store, tmp_path: Path) -> None:
    """Every seed has its own held-out rows: seeds are paired with the same seed of the other variant."""
    for seed in range(3):
        make_run(store, tmp_path, f"spin{seed}", [0.02 * seed], objective={"alpha": 1.0}, seed=seed, data=seed)
    for seed in range(2):
        make_run(store, tmp_path, f"kl{seed}", [-0.2], objective={"alpha": 0.5}, seed=seed, data=seed)
    data = compare(store, ["spin0", "spin1", "spin2", "kl0", "kl1"])
    assert [(v["runs"], v["seeds"]) for v in data["variants"]] == [
        (["spin0", "spin1", "spin2"], [0, 1, 2]),
        (["kl0", "kl1"], [0, 1]),
    ]
    one = picked(data["comparisons"], metric="heldout_nll", variant="alpha 0.5", against="alpha 1.0")
    assert (len(one["values"]), one["n"]) == (2, 96)
    assert one["value"] == pytest.approx(-0.21, abs=0.03)
    spin = picked(data["values"], metric="heldout_nll", variant="alpha 1.0", round=1)
    assert spin["value"] == pytest.approx(np.mean(spin["values"]))
    assert spin["spread"] == pytest.approx(np.std(spin["values"], ddof=1))
    assert data["verdict"]["headline"] == "In held-out NLL at round 1, alpha 0.5 is better than alpha 1.0."
    assert any("2 of 2 seeds with this sign" in sentence for sentence in data["verdict"]["sentences"])
    assert "spread between seeds" in data["verdict"]["sentences"][-1]
    alone = compare(store, ["spin0", "spin1"])
    assert alone["verdict"]["headline"].startswith("One variant, spin0")
    assert {c["against"] for c in alone["comparisons"]} == {BASE}


def test_compare_a_repeated_run_leaves_it_out(store: Store, tmp_path: Path) -> None:
    """Plain SPIN in two grids, say. Before, it was "2 seeds" with a spread of 0, and one policy was two tests."""
    make_run(store, tmp_path, "spin", [0.0], objective={"alpha": 1.0})
    make_run(store, tmp_path, "kl", [-0.2], objective={"alpha": 0.5})
    expected = compare(store, ["spin", "kl"], name="x")
    share_policies(store, "again", "spin", 1.0)
    data = compare(store, ["spin", "again", "kl"], name="x")
    assert data["repeats"] == {"again": "spin"}
    assert any(note.startswith("again is left out") for note in data["notes"])
    for part in ("values", "comparisons", "variants", "verdict", "cost"):
        assert data[part] == expected[part], part
    make_run(store, tmp_path, "further", [0.0, 0.0], objective={"alpha": 1.0})
    assert compare(store, ["spin", "further", "kl"])["repeats"] == {"spin": "further"}, "which went further"
    with pytest.raises(BadInput, match="of one configuration and seed"):
        compare(store, ["spin", "again"])
    turned = compare(store, ["spin", "again", "kl"], against="again", name="x")
    assert (turned["repeats"], turned["variants"][0]["runs"]) == ({"spin": "again"}, ["again"])


def test_compare_a_run_without_rounds_is_bad_input(store: Store, tmp_path: Path) -> None:
    make_run(store, tmp_path, "spin", [0.0])
    with hold_lease(store, RunConfig(run="new"), "test"):
        pass
    with pytest.raises(BadInput, match="run 'new' has no evaluated round yet; run it"):
        compare(store, ["spin", "new"])


def share_policies(store: Store, run: str, source: str, alpha: float) -> None:
    """A run with the objects of another."""
    config, head = RunConfig(run=run, objective=ObjectiveConfig(alpha=alpha)), require_head(store, source)
    with hold_lease(store, config, "test") as session:
        session.commit_inputs(head.base, head.data)
        for entry in head.rounds:
            for stage, object_id in entry.stages.items():
                session.commit(entry.round, stage, object_id)


def test_compare_a_shared_policy_tests_it_once(store: Store, tmp_path: Path) -> None:
    make_run(store, tmp_path, "a", [-0.1], objective={"alpha": 1.0})
    for run, alpha in (("b", 0.5), ("c", 0.25), ("d", 0.0)):  # alpha says nothing in round 1
        share_policies(store, run, "a", alpha)
    data = compare(store, ["a", "b"])
    assert data["families"]["verdict"] == 1
    assert any("are the same policy up to round 1" in sentence for sentence in data["verdict"]["sentences"])
    cost = data["cost"][0]
    assert cost["shared_seconds"] == cost["total_seconds"] > 0
    many = compare(store, ["a", "b", "c", "d"])
    assert many["families"] == data["families"]
    for metric in ("heldout_nll", "entropy", "distinct_2"):
        once = picked(data["comparisons"], metric=metric, variant="alpha 1.0", against=BASE)
        found = [one for one in many["comparisons"] if one["metric"] == metric and one["to_base"]]
        assert [one["repeats"] for one in found] == [None, "alpha 1.0", "alpha 1.0", "alpha 1.0"]
        for one in found:
            for name in ("p", "p_holm", "supported", "corrected_low", "better"):
                assert one[name] == once[name], "however many variants it is part of"
    make_run(store, tmp_path, "e", [0.1], objective={"alpha": 0.75})
    other = compare(store, ["e", "a", "b"])
    assert other["families"]["verdict"] == 3, "e and the shared one against the base, and one against the other"
    assert len([c for c in claims(other) if c[1] == "alpha 0.75"]) == 2


# --- what cannot be compared -------------------------------------------------------------------------


def test_compare_runs_on_other_rows_says_why_unpaired(store: Store, tmp_path: Path) -> None:
    make_run(store, tmp_path, "a", [0.0], objective={"alpha": 1.0})
    make_run(store, tmp_path, "b", [0.0], objective={"alpha": 0.5})
    make_run(store, tmp_path, "odd", [0.0], objective={"alpha": 0.0}, seed=5, data=9)
    data = compare(store, ["a", "b", "odd"])
    assert [one["variant"] for one in data["unpaired"]] == ["alpha 0.0"]
    assert "depend on the seed" in data["unpaired"][0]["why"]
    assert {c["against"] for c in data["comparisons"] if c["variant"] == "alpha 0.0"} == {BASE}
    assert any("is not compared with alpha 1.0 row by row" in s for s in data["verdict"]["sentences"])
    with pytest.raises(BadInput, match=r"none with the held-out rows of 'alpha 1\.0'.*depend on the seed"):
        compare(store, ["a", "odd"])


def test_compare_bad_arguments_are_bad_input(store: Store, tmp_path: Path) -> None:
    make_run(store, tmp_path, "a", [0.0])
    make_run(store, tmp_path, "young", [], objective={"alpha": 1.0})
    for runs, against, name, message in [
        (["a"], None, None, "at least two different runs"),
        (["a", "a"], None, None, "at least two different runs"),
        (["a", "gone"], None, None, "gone"),
        (
            ["a", "young"],
            None,
            None,
            r"that all have evaluated \(last evaluated: a: 1, young: 0\)",
        ),
        (["a", "young"], "other", None, "--against: found 'other'"),
        (["a", "young"], None, "../up", "name of the comparison"),
    ]:
        with pytest.raises(BadInput, match=message):
            compare(store, runs, against, name)


def test_comparison_name_of_many_runs_is_shortened() -> None:
    assert comparison_name(["a", "b"]) == "a-vs-b"
    many = [f"run-number-{i}" for i in range(9)]
    assert comparison_name(many) != comparison_name([*many[:-1], "x"])
    assert len(comparison_name(["x" * 64, "y" * 64])) <= 64
    assert comparison_name(many).startswith("run-number-0-and-8-more-")


# --- beside the numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objectives", "family"),
    [
        ([(1.0, 0.1), (0.5, 0.1), (0.0, 0.1)], "fixed total beta"),
        ([(1.0, 0.1), (0.5, 0.2), (0.25, 0.4)], "beta_0 added"),
        ([(1.0, [0.1, 0.2]), (0.5, [0.2, 0.4])], "beta_0 added"),
        ([(1.0, 0.1), (0.5, 0.3)], "neither"),
        ([(0.5, 0.1), (0.5, 0.3)], "none"),
    ],
)
def test_grid_of_names_the_family_of_alphas(objectives: list[tuple[float, Any]], family: str) -> None:
    assert grid_of([("x", ObjectiveConfig(alpha=a, beta=b)) for a, b in objectives])["family"] == family


def test_plane_of_alpha_and_history_alone_is_a_table() -> None:
    def variant(alpha: float, history: Any, **fields: Any) -> tuple[str, RunConfig]:
        given = {"objective": {"alpha": alpha, "beta": 0.1 / (alpha or 1)}, "opponent": {"history": history}}
        return f"{alpha} {history}", validate(merge(given, fields))

    grid = [variant(a, h) for h in ("all", 10, 2) for a in (0.5, 1.0)]
    assert plane_of(grid) == {
        "alpha": [1.0, 0.5], "history": [2, 10, "all"],
        "labels": [["1.0 2", "1.0 10", "1.0 all"], ["0.5 2", "0.5 10", "0.5 all"]],
    }  # fmt: skip
    known = plane_of(grid[:-1])
    assert known is not None
    assert known["labels"][0] == [None, "1.0 10", "1.0 all"], "a member that failed leaves a hole"
    assert plane_of(grid[:2]) is None, "alpha alone"
    assert plane_of(grid[::2]) is None, "history alone"
    assert plane_of([*grid, grid[0]]) is None, "two for one place"
    other = variant(0.5, 2, objective={"beta": 5.0})
    assert plane_of([one for one in grid if one[0] != "0.5 2"] + [other]) is None, "beta goes with history"
    assert plane_of([*grid[:-1], variant(1.0, 2, training={"learning_rate": 1e-5})]) is None, "something else"


def test_compare_reports_stability_cost_and_lineage(store: Store, tmp_path: Path) -> None:
    make_run(store, tmp_path, "a", [-0.1, 0.3], objective={"alpha": 1.0})
    make_run(store, tmp_path, "b", [-0.1, -0.1], objective={"alpha": 0.5})
    data = compare(store, ["a", "b"])
    step = picked(data["stability"], variant="alpha 1.0", metric="heldout_nll", round=2)
    assert step["value"] == pytest.approx(0.4, abs=0.03)
    assert step["low"] > 0.3
    assert {s["metric"] for s in data["stability"]} == {"heldout_nll", "kl_base", "margin"}
    assert [s["round"] for s in data["stability"] if s["metric"] == "margin"] == [2, 2], "the base has no margin"
    cost = data["cost"][0]
    assert cost["seconds"] == {"generate": 23.0, "mix-opponent": 23.0, "train": 23.0, "evaluate": 33.0,
                               "generate-heldout": 0.0, "benchmark": 0.0}  # fmt: skip
    assert cost["shared_seconds"] == 10.0, "the base's evaluation"
    assert cost["tokens"] == {"generate": 3000.0, "generate-heldout": 0.0, "train": 4000.0,
                              "evaluate": 100.0 + 200 + 300}  # fmt: skip
    assert data["variants"][1]["differences"] == ["objective.alpha: 1.0 -> 0.5"]
    shared = [line for line in data["lineage"] if line["runs"] == ["a", "b"]]
    assert [line["stage"] for line in shared] == ["base", "data", "evaluate"]
    assert len({line["object_id"] for line in data["lineage"]}) == len(data["lineage"]) == 3 + 2 * 2 * 4
    assert json.loads(json.dumps(data, allow_nan=False))["samples"][0]["answers"][-1]["text"].startswith("b round 2")


LM_EVAL: dict[str, Any] = {
    "kind": "lm-eval", "name": "gsm8k", "primary": "exact", "better": "higher",
    "metrics": {"exact": {"value": 0.5, "low": 0.1, "high": 0.9, "n": 2, "unit": "share"}},
    "settings": {"fewshot": 5, "limit": 2, "backend": "hf", "processes": 1, "batch_size": 8, "include_path": "/a",
                 "include_sha256": "i", "questions_as": "plain", "task_versions": {"gsm8k": 3}},
    "fingerprints": {"policy": "p-1", "data": "d", "prompts": "q"}, "versions": {"lm-eval": "1", "spinreg": "1"},
    "cost": {"seconds": 1.0},
}  # fmt: skip
WIN_RATE: dict[str, Any] = {
    "kind": "win-rate", "name": "base", "primary": "win_rate", "better": "higher",
    "metrics": {"win_rate": {"value": 0.5, "low": 0.1, "high": 0.9, "n": 2, "unit": "share"}},
    "settings": {"judge": {"endpoint": "h/v1", "model": "m", "temperature": 0.0, "max_tokens": 9, "tries": 1},
                 "prompts": 2, "identical": 0, "limit": None, "bootstrap": 100, "seed": 0},
    "fingerprints": {"policy": "p-1", "data": "d", "prompts": "q", "evaluate": "e-1", "against": "e-0"},
    "versions": {"spinreg": "1"}, "cost": {"seconds": 1.0},
}  # fmt: skip
MT_BENCH: dict[str, Any] = {
    "kind": "mt-bench", "name": "mt-bench", "primary": "score", "better": "higher",
    "metrics": {"score": {"value": 0.5, "low": 0.1, "high": 0.9, "n": 2, "unit": "of 10"}},
    "settings": WIN_RATE["settings"] | {"max_tokens": 99, "engine": "hf"},
    "fingerprints": {"policy": "p-1", "data": "d", "prompts": "q", "references": "r", "answers": "a-1"},
    "versions": {"spinreg": "1"}, "cost": {"seconds": 1.0},
}  # fmt: skip


def measured(
    store: Store, folder: Path, document: dict[str, Any], values: list[float], key: str = ""
) -> dict[str, Any]:
    """The document of a part that was published."""
    job = Job("lm-eval", fingerprint("lm-eval", {"": key}), {}, store.url, "w", 1, {}, RunConfig(), folder)
    items = [(f"q{i}", document["primary"], value) for i, value in enumerate(values)]
    write_part(folder / f"part{key}", document, [*items, ("q1", "length", 9.0)])
    publish(store, job, folder / f"part{key}", metrics={}, seconds=3.0)
    return document | {"object_id": job.object_id}


def changed(document: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    head, _, rest = path.partition(".")
    return document | {head: changed(document[head], rest, value) if rest else value}


def test_benchmark_scores_are_item_by_item(store: Store, tmp_path: Path) -> None:
    found = benchmark_scores(store, measured(store, tmp_path, LM_EVAL, [1.0, 0.0]))
    assert found is not None
    assert (found.ids, found.value) == (("q0", "q1"), 0.5)
    perplexity = changed(LM_EVAL, "metrics.exact.value", 12.2)
    assert benchmark_scores(store, measured(store, tmp_path, perplexity, [-2.0, -3.0], "x")) is None


@pytest.mark.parametrize(
    ("document", "path", "value"),
    [
        (LM_EVAL, "settings.fewshot", 0), (LM_EVAL, "settings.questions_as", "chat"),
        (LM_EVAL, "settings.include_sha256", "j"), (LM_EVAL, "fingerprints.data", "other"),
        (LM_EVAL, "fingerprints.prompts", "other"), (LM_EVAL, "versions.lm-eval", "2"),
        (LM_EVAL, "settings.task_versions.gsm8k", 4), (LM_EVAL, "primary", "flexible"),
        (WIN_RATE, "settings.judge.model", "other"), (WIN_RATE, "settings.judge.endpoint", "other/v1"),
        (WIN_RATE, "settings.judge.temperature", 1.0), (WIN_RATE, "settings.prompts", 1),
        (WIN_RATE, "fingerprints.prompts", "other"), (WIN_RATE, "fingerprints.against", "e-5"),
        (WIN_RATE, "name", "previous"), (MT_BENCH, "settings.judge.model", "other"),
        (MT_BENCH, "settings.max_tokens", 5), (MT_BENCH, "fingerprints.references", "other"),
        (MT_BENCH, "fingerprints.data", "other"),
    ],
)  # fmt: skip
def test_asked_of_other_questions_differs(document: dict[str, Any], path: str, value: Any) -> None:
    assert asked_of(changed(document, path, value)) != asked_of(document)


@pytest.mark.parametrize(
    ("document", "path", "value"),
    [
        (LM_EVAL, "settings.processes", 8), (LM_EVAL, "settings.batch_size", 1), (LM_EVAL, "settings.limit", None),
        (LM_EVAL, "settings.backend", "vllm"), (LM_EVAL, "settings.include_path", "/b"),
        (LM_EVAL, "fingerprints.policy", "p-2"), (LM_EVAL, "versions.spinreg", "2"), (LM_EVAL, "better", "higher"),
        (WIN_RATE, "settings.identical", 1), (WIN_RATE, "settings.seed", 1), (WIN_RATE, "fingerprints.evaluate", "e-2"),
        (MT_BENCH, "fingerprints.answers", "a-2"), (MT_BENCH, "settings.engine", "vllm"),
        (MT_BENCH, "settings.bootstrap", 7),
    ],
)  # fmt: skip
def test_asked_of_the_same_questions_is_equal(document: dict[str, Any], path: str, value: Any) -> None:
    assert asked_of(changed(document, path, value)) == asked_of(document)


def test_compare_benchmarks_pairs_equal_judges_only(store: Store, tmp_path: Path) -> None:
    """The same answers, graded a point apart by two judges, are no difference; what judges were paid is a cost."""
    make_run(store, tmp_path, "a", [0.0], objective={"alpha": 1.0})
    rng, grades = np.random.default_rng(0), {}
    for run, alpha, judge, shift in (("b", 0.5, "m", 1.0), ("c", 0.0, "other", 1.0)):
        make_run(store, tmp_path, run, [0.0], objective={"alpha": alpha})
        grades[run] = (judge, shift)
    own = rng.uniform(3, 7, 40)
    perplexity = changed(LM_EVAL, "metrics.exact.value", 12.2)
    for run, (judge, shift) in {"a": ("m", 0.0), **grades}.items():
        values = list(own + shift + rng.normal(0, 0.1, 40))
        document = changed(
            changed(MT_BENCH, "settings.judge.model", judge), "metrics.score.value", float(np.mean(values))
        )
        parts = [measured(store, tmp_path, document | {"cost": {"paid": 2.5}}, values, run),
                 measured(store, tmp_path, perplexity, [-2.0] * 3, f"{run}-perplexity")]  # fmt: skip
        config = read_config(store, run)
        assert config is not None
        with hold_lease(store, config, "test") as session:
            record_measured(session, 1, {f"{p['kind']} {p['name']}": p["object_id"] for p in parts})
    data = compare(store, ["a", "b", "c"])
    found = [one for one in data["comparisons"] if one["metric"] == "mt-bench/score"]
    assert [(one["variant"], one["against"], one["supported"], one["n"]) for one in found] == [
        ("alpha 0.5", "alpha 1.0", 1, 40)
    ]
    assert "mt-bench/score of alpha 0.0 is not compared with that of alpha 1.0" in " ".join(data["notes"])
    assert "gsm8k/exact is not a mean over questions, so it is not compared" in " ".join(data["notes"])
    assert "gsm8k/exact" not in data["metrics"]
    shown = data["metrics"]["mt-bench/score"]
    assert (shown["better"], shown["unit"]) == ("higher", "of 10")
    assert [cost["paid"] for cost in data["cost"]] == [2.5] * 3
    graded = [one for one in data["benchmarks"] if one["kind"] == "mt-bench"]
    assert [(one["run"], one["round"], one["settings"]["judge"]["model"]) for one in graded] == [
        ("a", 1, "m"), ("b", 1, "m"), ("c", 1, "other"),
    ]  # fmt: skip
    assert all(one["fingerprints"] and one["cost"] == {"paid": 2.5} for one in graded)
    assert [cost["seconds"]["benchmark"] for cost in data["cost"]] == [6.0] * 3
    assert len([line for line in data["lineage"] if line["stage"] == "benchmark"]) == 6


def test_sample_notes_name_every_odd_sampler() -> None:
    plain = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
    assert sample_notes([plain, plain]) == []
    (note,) = sample_notes([plain, plain | {"top_k": 5, "top_p": 0.5}])
    assert note.startswith("Answers of some runs were sampled with temperature 1.0, top-p 0.5, top-k 5: ")
    assert sample_notes([plain | {"top_k": 5}])[0].startswith("Answers were sampled with ")


def test_verdict_below_30_rows_says_that_intervals_are_too_narrow(store: Store, tmp_path: Path) -> None:
    for run, alpha in (("a", 1.0), ("b", 0.5)):
        make_run(store, tmp_path, run, [0.1], objective={"alpha": alpha})
    data = compare(store, ["a", "b"])
    assert not any("too narrow" in sentence for sentence in data["verdict"]["sentences"])
    for one in data["comparisons"]:
        one["n"] = 20
    assert any("With 20 held-out rows intervals are too narrow" in one for one in comparison_verdict(data)["sentences"])


def test_agreeing_seeds_ignores_a_zero_difference() -> None:
    assert agreeing_seeds(-0.1, [-0.4, 0.0, 0.1]) == 1
    assert agreeing_seeds(0.1, [0.4, 0.0, -0.1]) == 1
