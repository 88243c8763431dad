"""The report of a run built from real store objects: what it says, what it loads (nothing), what it escapes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from spinreg_core.config import RunConfig
from spinreg_core.errors import BadInput
from spinreg_core.evaluation.formatting import format_estimate
from spinreg_core.evaluation.heldout import metrics_of_round
from spinreg_core.evaluation.metrics import GAME, METRICS, PRIMARY
from spinreg_core.formatting import flatten
from spinreg_core.reports.run_report import (
    alarms,
    heldout_alarms,
    render_report,
    report_data,
    run_verdict,
    write_report,
)
from spinreg_core.reports.tables import metrics_markdown, metrics_rows, metrics_table
from spinreg_core.runs.lease import hold_lease
from spinreg_core.store.base import Store
from spinreg_core.store.open import open_store
from tests.support.browser import complaints_of, needs_chromium, new_page
from tests.support.pages import HOSTILE, Reader
from tests.support.reported_runs import estimate, make_run, metrics, pairs, rows, steps, summary


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


def page_of(store: Store, run: str) -> tuple[str, Any]:
    """The page of a run, and its data."""
    data = report_data(store, run)
    return render_report(data), data


def test_write_report_called_twice_writes_the_same(store: Store, tmp_path: Path) -> None:
    make_run(store, tmp_path, [1.25, 1.10, 1.00])
    written = write_report(store, "demo")
    assert (written["html"], written["json"]) == ("runs/demo/report.html", "runs/demo/report.json")
    data = json.loads(store.read(written["json"]) or b"", parse_constant=pytest.fail)
    assert data == written["data"]
    assert write_report(store, "demo") == written
    page = (store.read(written["html"]) or b"").decode()
    assert page == page_of(store, "demo")[0]


def test_page_shows_the_check_of_sampler_scores(store: Store, tmp_path: Path) -> None:
    page, _ = page_of(make_run(store, tmp_path, [1.25, 1.10, 1.00]), "demo")
    text = " ".join(" ".join(Reader(page).text).split())
    assert "100 / 28" in text
    assert "0: 32, 1: 32" in text
    page, data = page_of(make_run(store, tmp_path, [1.25, 1.10], run="plain"), "plain")
    assert "engine's scores" not in page
    engine = {"engine_checked": 4, "engine_mean_difference": None, "engine_worst_difference": None,
              "engine_shards": 1, "engine_shards_refused": 1}  # fmt: skip
    odd = data["rounds"][1]["pairs"] | engine | {"replay_short": 3}
    del odd["scores_of_engine"]  # a run of an older spinreg
    data["rounds"][1]["pairs"] = odd
    text = " ".join(" ".join(Reader(render_report(data)).text).split())
    assert "3 to replay were missing" in text


def test_page_numbers_are_those_of_the_data(store: Store, tmp_path: Path) -> None:
    page, data = page_of(make_run(store, tmp_path, [1.25, 1.10, 1.00]), "demo")
    text = " ".join(Reader(page).text)
    for number, entry in enumerate(data["rounds"]):
        expected = metrics_of_round(rows(number, [1.25, 1.10, 1.00]), RunConfig(), number)
        assert {n: e for n, e in expected.items() if not n.startswith("human_")} == entry["metrics"]
        for name, one in entry["metrics"].items():
            value, _, interval = format_estimate(one).partition(" ")
            assert value in text, name
            assert interval in text, name
    assert data["human"]["answer_length"]["value"] == 48.0
    assert "human answers" in text
    embedded = json.loads(next(s for s in Reader(page).scripts if s.startswith("{")))
    assert embedded["rounds"] == data["rounds"]
    assert [s["loss"] for s in data["rounds"][1]["training"]["steps"]] == [s["loss"] for s in steps(1)]
    assert data["rounds"][1]["training"]["steps"][0]["grad_norm"] is None  # NaN cannot be JSON
    assert data["rounds"][2]["training"]["summary"] == summary(2, "fine")
    assert [entry["pairs"] for entry in data["rounds"]] == [None, pairs(1), pairs(2)]
    assert "+4.56 ± 0.54" in text
    assert "-3.21 ± 0.54" in text
    assert data["config"] == RunConfig().model_dump(mode="json")
    for name, value in flatten(data["config"]):
        assert name in text
        assert value in text
    objects = [o for entry in data["rounds"] for o in entry["stages"].values()]
    assert {line["object_id"] for line in data["lineage"]} >= set(objects)
    assert len(data["lineage"]) == 2 + 1 + 2 * 4
    assert all(line["object_id"] in text and line["uri"] in text for line in data["lineage"])
    assert "-0.750" in text, "the credit of round 2's tokens"
    assert "+0.250" in text
    for sample in data["samples"]:
        assert [one["round"] for one in sample["rounds"]] == [0, 1, 2]
        assert all(one["text"] in text for one in sample["rounds"])
        assert sample["answer"] in text


def test_page_loads_nothing(store: Store, tmp_path: Path) -> None:
    page, _ = page_of(make_run(store, tmp_path, [1.25, 1.10]), "demo")
    reader = Reader(page)
    for tag, attributes in reader.tags:
        for name in ("src", "href", "data", "action", "srcset", "poster"):
            value = attributes.get(name)
            assert value is None or value == "data:,", (tag, name, value)
    assert not {"iframe", "object", "embed", "base", "img", "form"} & {tag for tag, _ in reader.tags}
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    policy = next(a["content"] for t, a in reader.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert (policy or "").startswith("default-src 'none'")
    assert "http" not in (policy or "")
    assert sum("Plotly, Inc." in script[:300] for script in reader.scripts) == 1


def test_page_with_hostile_text_keeps_it_as_text(store: Store, tmp_path: Path) -> None:
    honest, _ = page_of(make_run(store, tmp_path, [1.25, 1.10, 1.2], run="honest"), "honest")
    page, data = page_of(make_run(store, tmp_path, [1.25, 1.10, 1.2], HOSTILE, run="hostile"), "hostile")
    reader = Reader(page)
    # The same elements as with harmless text, attributes included: nothing in the text became markup.
    assert reader.tags == Reader(honest).tags
    text = "".join(reader.text)
    assert f"human answer 0 {HOSTILE}" in text
    assert f"iterate 2 answers 1 {HOSTILE}" in text
    assert f"log p of real answers fell {HOSTILE}" in text
    assert HOSTILE in json.dumps(data, ensure_ascii=False).replace('\\"', '"')
    embedded = next(s for s in reader.scripts if s.startswith("{"))
    assert "<" not in embedded
    assert json.loads(embedded)["rounds"] == data["rounds"]


def test_report_of_an_unfinished_run_is_written(store: Store, tmp_path: Path) -> None:
    with hold_lease(store, RunConfig(run="young"), "test"):
        pass
    page, data = page_of(store, "young")
    assert data["verdict"]["outcome"] == "none"
    assert "None yet." in page
    assert metrics_rows(data) == []
    assert "Nothing has been evaluated yet." in metrics_table(data)
    make_run(store, tmp_path, [1.25])
    page, data = page_of(store, "demo")
    assert data["verdict"]["headline"] == "Only the base model has been evaluated so far."
    assert "1.25" in page


def test_report_of_a_missing_run_names_the_known_ones(store: Store, tmp_path: Path) -> None:
    make_run(store, tmp_path, [1.25])
    with pytest.raises(BadInput, match=r"'other'.*demo"):
        report_data(store, "other")


# --- verdict and alarms ------------------------------------------------------------------------------


def rounds(nll: list[float], half: float = 0.02) -> list[dict[str, Any]]:
    return [
        {"round": n, "metrics": metrics(n, nll, half), "training": None, "pairs": None, "stages": {}}
        for n in range(len(nll))
    ]


@pytest.mark.parametrize(
    ("nll", "half", "outcome", "words"),
    [
        ([1.25, 1.10, 1.00], 0.02, "improved", r"lower by 0\.250 .*\[0\.230, 0\.270\].*excludes zero"),
        ([1.25, 1.10, 1.40], 0.02, "worse", r"higher by 0\.150 .*\[0\.130, 0\.170\].*excludes zero"),
        ([1.25, 1.10, 1.24], 0.02, "no difference", r"lower by 0\.010 .*\[-0\.010, 0\.030\].*contains zero"),
        ([1.25, 1.10, 1.20], 0.08, "no difference", r"lower by 0\.050 .*\[-0\.030, 0\.130\].*contains zero"),
    ],
)
def test_verdict_follows_the_paired_interval(nll: list[float], half: float, outcome: str, words: str) -> None:
    """About the last round, also where an earlier one was better."""
    found = run_verdict(rounds(nll, half))
    assert (found["outcome"], found["round"]) == (outcome, 2)
    assert re.search(words, found["sentences"][0])
    assert "compared with 1.250 for the base" in found["sentences"][0]


def test_verdict_skips_a_round_without_evaluation() -> None:
    unfinished = [*rounds([1.25, 1.10]), {"round": 2, "metrics": None, "training": None, "pairs": None, "stages": {}}]
    assert run_verdict(unfinished)["round"] == 1


def test_verdict_on_one_row_supports_nothing() -> None:
    entries = rounds([1.25, 0.2])
    entries[1]["metrics"]["nll_vs_base"] |= {"low": None, "high": None, "n": 1}
    found = run_verdict(entries)
    assert found["outcome"] == "no difference"
    assert "no interval" in found["sentences"][0]


def test_verdict_below_30_rows_says_that_its_interval_is_too_narrow() -> None:
    entries = rounds([1.25, 1.10])
    assert not any("too narrow" in sentence for sentence in run_verdict(entries)["sentences"])
    entries[1]["metrics"]["nll_vs_base"]["n"] = 29
    assert run_verdict(entries)["sentences"][1].startswith("With 29 held-out rows intervals are too narrow")


def test_alarms_are_raised_for_supported_rises_only() -> None:
    entries = rounds([1.25, 1.10, 1.20, 1.21, 1.0])
    found = alarms(entries)
    assert [(a["round"], a["where"]) for a in found] == [(2, "held-out rows")]
    assert "higher by 0.100" in found[0]["text"]
    entries[3]["training"] = {"steps": [], "summary": {"alarms": ["log p of real answers fell by 3.1 nats"]}}
    assert [(a["round"], a["where"]) for a in alarms(entries)] == [(2, "held-out rows"), (3, "training")]


def test_alarms_for_a_negative_kl_point_at_the_sampler() -> None:
    """bfloat16 sampling of an fp32 policy gave -15.6 [-17.8, -13.2] on the demo: its samples were the base's."""
    entries = rounds([1.25, 1.10])
    entries[1]["metrics"]["kl_base"] = {"value": -15.6, "low": -17.8, "high": -13.2, "n": 75, "unit": "nats/answer"}
    (found,) = alarms(entries)
    assert (found["round"], found["where"]) == (1, "samples")
    assert "generation.dtype" in found["text"]
    entries[1]["metrics"]["kl_base"]["high"] = 0.4
    assert alarms(entries) == []


# --- tables ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "low", "high", "text"),
    [
        (1.23567, 1.20111, 1.26111, "1.236 [1.201, 1.261]"),
        (57.34, 51.2, 63.9, "57.3 [51.2, 63.9]"),
        (-0.0001, -0.031, 0.031, "0.000 [-0.031, 0.031]"),
        (0.0, 0.0, 0.0, "0.000"),
        (2.5, None, None, "2.500"),
        (123456.0, 120000.0, 130000.0, "123456 [120000, 130000]"),
    ],
)
def test_format_estimate_rounds_by_the_interval(value: float, low: float | None, high: float | None, text: str) -> None:
    assert format_estimate({"value": value, "low": low, "high": high, "n": 9, "unit": "x"}) == text


def test_tables_mark_primary_metric_and_direction(store: Store, tmp_path: Path) -> None:
    data = report_data(make_run(store, tmp_path, [1.25, 1.10, 1.20]), "demo")
    table = metrics_table(data)
    first = next(line for line in table.splitlines() if line.startswith("held-out NLL"))
    assert first.split("  ")[0] == "held-out NLL * ↓ (nats/token)"
    assert "1.250 [1.17" in first
    assert re.search(r"^reward accuracy ↑ \(share\) +- +0\.797", table, re.MULTILINE)
    assert re.search(r"^KL to base \(nats/answer\) +0\.000", table, re.MULTILINE)
    assert "Rows: n 64." in table
    assert "human_answer_length" not in table
    words = " ".join(table.split())
    assert f"* primary metric. {data['primary']['reason']}" in words
    assert " ".join(data["verdict"]["sentences"]) in words
    assert "fixed as the primary metric before" in words
    assert "ALARM, round 2, held-out rows" in table
    assert max(map(len, table.splitlines())) <= 120
    rows = metrics_rows(data)
    assert rows[0]["metric"].startswith("held-out NLL * ↓")
    assert {row["better"] for row in rows} == {"lower", "higher", ""}
    assert all(set(row) == {"metric", "better", "base", "round 1", "round 2"} for row in rows)
    markdown = metrics_markdown(data)
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert len(lines) == 2 + len(rows)
    assert lines[2].startswith("| **held-out NLL \\* ↓ (nats/token, n 64)** | 1.250 [1.17")
    assert "**Alarm, round 2, held-out rows.**" in markdown


def test_table_of_a_long_run_fits_the_terminal(store: Store, tmp_path: Path) -> None:
    data = report_data(make_run(store, tmp_path, [1.25 - 0.01 * n for n in range(11)]), "demo")
    table = metrics_table(data)
    blocks = table.split("\n\n")[:4]
    assert all(block.splitlines()[1].startswith("held-out NLL * ↓") for block in blocks)
    assert [n for block in blocks for n in re.findall(r"base|round \d+", block.splitlines()[0])] == [
        "base",
        *(f"round {n}" for n in range(1, 11)),
    ]
    assert max(len(line) for block in blocks for line in block.splitlines()) <= 120


def test_table_shows_known_metrics_in_order(store: Store, tmp_path: Path) -> None:
    data = report_data(make_run(store, tmp_path, [1.25, 1.10]), "demo")
    shown = [row["metric"] for row in metrics_rows(data)]
    order = [name for name in METRICS if name in data["rounds"][1]["metrics"]]
    assert [s.split(" (")[0].rstrip(" *↓↑") for s in shown] == [METRICS[n]["label"] for n in order]
    assert order[0] == PRIMARY


# --- a real browser ----------------------------------------------------------------------------------


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.long)])
def test_page_in_chromium_opens_without_a_complaint(store: Store, tmp_path: Path, scheme: Any) -> None:
    make_run(store, tmp_path, [1.25, 1.10, 1.20], HOSTILE)
    keys = write_report(store, "demo")
    path = store.local_path(keys["html"])
    with new_page(viewport={"width": 390, "height": 800}, color_scheme=scheme) as page:
        complaints = complaints_of(page)
        page.goto(f"file://{path}")
        page.wait_for_selector("body[data-drawn]")
        drawn = int(page.locator("body").get_attribute("data-drawn") or 0)
        defined = keys["data"]["rounds"][1]["metrics"]
        metrics_drawn = len([n for n in (*METRICS, *GAME) if n in defined])
        assert drawn == metrics_drawn + 10 + 1  # all training curves but the two against the base; margins of rounds
        assert page.locator(".plot .main-svg").count() >= drawn
        # Every curve has a point per round in which its metric is defined.
        points = page.locator("#metric-charts figure:first-child .scatterlayer path.point").count()
        assert points == 3
        # On a phone the page itself does not scroll sideways; wide tables scroll in their boxes.
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert complaints == []


def test_alarms_for_a_negative_kl_claim_no_certainty() -> None:
    kl = {"heldout_nll": estimate(2.0, 0.1, "nats/token"), "kl_base": estimate(-1.0, 0.5, "nats/answer")}
    (alarm,) = heldout_alarms(1, kl, level=0.0)
    assert "hardly ever happens" in alarm["text"]
    assert "can do" not in alarm["text"]
