"""The report of a run built from real store objects: what it says, what it loads (nothing), what it escapes."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from spinreg_core.config import RunConfig
from spinreg_core.errors import BadInput
from spinreg_core.evaluation.formatting import format_estimate
from spinreg_core.evaluation.metrics import GAME, METRICS, PRIMARY
from spinreg_core.formatting import flatten, format_bytes, format_duration
from spinreg_core.reports.run_report import alarms, build_report, render, report_data, verdict, write_report
from spinreg_core.reports.tables import metrics_markdown, metrics_rows, metrics_table
from spinreg_core.runs.job import Job
from spinreg_core.runs.lease import hold_lease
from spinreg_core.runs.objects import fingerprint, publish
from spinreg_core.store.base import Store
from spinreg_core.store.open import open_store
from tests.support.browser import needs_chromium, new_page

HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(2)"> {{ 7*7 }} <!-- & \u2028 "quote"'


def estimate(value: float, half: float, unit: str, n: int = 64) -> dict[str, Any]:
    return {"value": value, "low": value - half, "high": value + half, "n": n, "unit": unit}


def metrics(number: int, nll: list[float], half: float = 0.02) -> dict[str, Any]:
    """Plausible held-out metrics of iterate `number` when `nll` is the list of all iterates' NLL."""
    found = {
        "heldout_nll": estimate(nll[number], 0.08, "nats/token"),
        "kl_base": estimate(3.0 * number, 0.4 * number, "nats/answer"),
        "answer_length": estimate(70.0 - 9 * number, 5, "tokens"),
        "end_of_turn_rate": estimate(0.5 + 0.1 * number, 0.1, "share"),
        "distinct_2": estimate(0.9, 0.02, "share"),
    }
    if number == 0:
        found["human_answer_length"] = estimate(48.0, 4, "tokens")
        found["human_distinct_2"] = estimate(0.97, 0.01, "share")
    else:
        found["nll_vs_base"] = estimate(nll[number] - nll[0], half, "nats/token")
        found["nll_vs_previous"] = estimate(nll[number] - nll[number - 1], half, "nats/token")
        found["reward_accuracy"] = estimate(0.8, 0.08, "share")
        found["kl_previous"] = estimate(3.0, 0.4, "nats/answer")
        found["margin"] = estimate(6.0 * number, 0.5, "nats")
        found["separated"] = estimate(0.25, 0.1, "share")
        found["length_bias"] = estimate(0.31, 0.2, "correlation")
    return found


def steps(number: int, count: int = 8) -> list[dict[str, Any]]:
    return [
        {
            "step": i + 1,
            "loss": 0.69 * math.exp(-i / 9),
            "margin": 2.0 * i,
            "accuracy": min(1.0, 0.5 + i / 10),
            "real_logp": -80.0 + i - 9 * (number - 1),
            "generated_logp": -70.0 - 4 * i,
            "log_ratio_previous_real": 1.0 * i,
            "log_ratio_previous_generated": -4.0 * i,
            "grad_norm": math.nan if i == 0 else 20.0 / i,
            "learning_rate": 5e-6 * (1 - i / count),
            "tokens_per_second": 900.0,
        }
        for i in range(count)
    ]


def summary(number: int, text: str) -> dict[str, Any]:
    """As `training.Round.summary` writes it; human answers lose in round 2."""
    change = -3.21 if number == 2 else 4.56
    return {
        "steps": 8, "pairs": 64, "first_loss": 0.693, "last_loss": 0.319, "loss": 0.5, "accuracy": 0.875,
        "margin": 6.0, "real_logprob_change": change, "real_logprob_change_error": 0.54, "watched_pairs": 32,
        "seconds": 61.0, "tokens_per_second": 900.4,
        "alarms": [f"log p of real answers fell {text}"] if change < 0 else [],
    }  # fmt: skip


def pairs(number: int) -> dict[str, Any]:
    """The metrics of the stage `mix-opponent`."""
    return {
        "pairs": 64, "by_iterate": {str(k): 64 // number for k in range(number)}, "generated_truncated": 3,
        "clipped": 2, "dropped": 0, "empty_generated": 1, "scores_computed": 100, "scores_reused": 28,
    }  # fmt: skip


def make_run(
    store: Store,
    tmp_path: Path,
    nll: list[float],
    text: str = "fine",
    run: str = "demo",
    config: RunConfig | None = None,
) -> Store:
    """A run with len(nll) - 1 rounds, published and committed as stages do it."""
    config = config or RunConfig(run=run)

    def put(stage: str, number: int, files: dict[str, str], found: dict[str, Any] | None = None) -> str:
        key = {"stage": stage, "round": number, "run": run, "text": text}
        folder = tmp_path / "out" / run / f"{stage}-{number}"
        folder.mkdir(parents=True)
        for name, content in files.items():
            (folder / name).write_text(content)
        job = Job(stage, fingerprint(stage, key), key, store.url, "e0001-aa", number, {"from": text}, config, tmp_path)
        return publish(store, job, folder, metrics=found or {}, seconds=12.5 + 60 * number)["object_id"]

    with hold_lease(store, config, "test") as session:
        session.commit_inputs(put("base", 0, {"weights": "w" * 2000}), put("data", 0, {"train.parquet": "p"}))
        for number in range(len(nll)):
            if number:
                session.commit(number, "generate", put("generate", number, {"shard": "s"}))
                session.commit(number, "mix-opponent", put("mix-opponent", number, {"pairs": "p"}, pairs(number)))
                lines = "\n".join(json.dumps(step) for step in steps(number))
                files = {"metrics.jsonl": lines, "summary.json": json.dumps(summary(number, text))}
                session.commit(number, "train", put("train", number, files))
            samples = [
                {
                    "prompt_id": f"{i:016x}",
                    "messages": [{"role": "user", "content": f"question {i} {text}"}],
                    "answer": f"human answer {i} {text}",
                    "sample": f"iterate {number} answers {i} {text}",
                    "finish": "length" if i else "stop",
                }
                for i in range(3)
            ]
            shown: dict[str, Any] = {"samples": samples}
            if number:
                for sample in samples:
                    tokens = [[f"{text} ", 0.25], ["token", -0.5 * number], ["", 0.0]]
                    sample["credit"] = {"answer": tokens, "sample": tokens[:1]}
                shown["margins"] = {"edges": [-1.0, 0.0, 1.0], "counts": [20, 44], "quantiles": {"0.5": 0.3}}
            files = {"metrics.json": json.dumps(metrics(number, nll)), "samples.json": json.dumps(shown)}
            session.commit(number, "evaluate", put("evaluate", number, files))
    return store


class Reader(HTMLParser):
    """Tags, attributes and visible text of a page, as a browser's parser splits them."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self._in: str | None = None
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in = tag if tag in ("script", "style") else None

    def handle_endtag(self, tag: str) -> None:
        self._in = None

    def handle_data(self, data: str) -> None:
        (self.scripts if self._in == "script" else self.text).append(data)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


def test_the_report_is_written_to_the_store_and_again(store: Store, tmp_path: Path) -> None:
    make_run(store, tmp_path, [1.25, 1.10, 1.00])
    written = write_report(store, "demo")
    assert (written["html"], written["json"]) == ("runs/demo/report.html", "runs/demo/report.json")
    data = json.loads(store.read(written["json"]) or b"", parse_constant=pytest.fail)
    assert data == written["data"]
    assert write_report(store, "demo") == written
    page = (store.read(written["html"]) or b"").decode()
    assert page == build_report(store, "demo")[0]


def test_report_opponent_shows_scores_iterates_and_missing_pairs(store: Store, tmp_path: Path) -> None:
    page, data = build_report(make_run(store, tmp_path, [1.25, 1.10, 1.00]), "demo")
    text = " ".join(" ".join(Reader(page).text).split())
    assert "100 / 28" in text
    assert "0: 32, 1: 32" in text
    data["rounds"][1]["pairs"] = data["rounds"][1]["pairs"] | {"replay_short": 3}
    text = " ".join(" ".join(Reader(render(data)).text).split())
    assert "3 to replay were not there" in text


def test_every_number_of_the_page_is_in_the_data(store: Store, tmp_path: Path) -> None:
    page, data = build_report(make_run(store, tmp_path, [1.25, 1.10, 1.00]), "demo")
    text = " ".join(Reader(page).text)
    for number, entry in enumerate(data["rounds"]):
        expected = metrics(number, [1.25, 1.10, 1.00])
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


def test_the_page_loads_nothing(store: Store, tmp_path: Path) -> None:
    page, _ = build_report(make_run(store, tmp_path, [1.25, 1.10]), "demo")
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


def test_hostile_text_stays_text(store: Store, tmp_path: Path) -> None:
    honest, _ = build_report(make_run(store, tmp_path, [1.25, 1.10, 1.2], run="honest"), "honest")
    page, data = build_report(make_run(store, tmp_path, [1.25, 1.10, 1.2], HOSTILE, run="hostile"), "hostile")
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


def test_a_run_that_goes_on_can_be_reported(store: Store, tmp_path: Path) -> None:
    with hold_lease(store, RunConfig(run="young"), "test"):
        pass
    page, data = build_report(store, "young")
    assert data["verdict"]["outcome"] == "none"
    assert "None yet." in page
    assert metrics_rows(data) == []
    assert "Nothing has been evaluated yet." in metrics_table(data)
    make_run(store, tmp_path, [1.25])
    page, data = build_report(store, "demo")
    assert data["verdict"]["headline"] == "Only the base model has been evaluated so far."
    assert "1.25" in page


def test_an_unknown_run_is_named_with_the_known_ones(store: Store, tmp_path: Path) -> None:
    make_run(store, tmp_path, [1.25])
    with pytest.raises(BadInput, match=r"'other'.*found no such run; expected .*demo"):
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
def test_the_verdict_is_what_the_paired_interval_supports(
    nll: list[float], half: float, outcome: str, words: str
) -> None:
    """About the last round, also where an earlier one was better."""
    found = verdict(rounds(nll, half))
    assert (found["outcome"], found["round"]) == (outcome, 2)
    assert re.search(words, found["sentences"][0])
    assert "against 1.250 for the base" in found["sentences"][0]


def test_the_verdict_skips_a_round_that_is_not_evaluated_yet() -> None:
    unfinished = [*rounds([1.25, 1.10]), {"round": 2, "metrics": None, "training": None, "pairs": None, "stages": {}}]
    assert verdict(unfinished)["round"] == 1


def test_one_held_out_row_supports_nothing() -> None:
    entries = rounds([1.25, 0.2])
    entries[1]["metrics"]["nll_vs_base"] |= {"low": None, "high": None, "n": 1}
    found = verdict(entries)
    assert found["outcome"] == "no difference"
    assert "no interval" in found["sentences"][0]


def test_alarms_are_raised_by_supported_rises_only() -> None:
    entries = rounds([1.25, 1.10, 1.20, 1.21, 1.0])
    found = alarms(entries)
    assert [(a["round"], a["where"]) for a in found] == [(2, "held-out rows")]
    assert "higher by 0.100" in found[0]["text"]
    entries[3]["training"] = {"steps": [], "summary": {"alarms": ["log p of real answers fell by 3.1 nats"]}}
    assert [(a["round"], a["where"]) for a in alarms(entries)] == [(2, "held-out rows"), (3, "training")]


def test_a_kl_below_zero_says_that_the_sampled_policy_is_not_the_scored_one() -> None:
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
def test_digits_follow_the_interval(value: float, low: float | None, high: float | None, text: str) -> None:
    assert format_estimate({"value": value, "low": low, "high": high, "n": 9, "unit": "x"}) == text


def test_tables_mark_the_primary_metric_and_the_direction(store: Store, tmp_path: Path) -> None:
    data = report_data(make_run(store, tmp_path, [1.25, 1.10, 1.20]), "demo")
    table = metrics_table(data)
    first = next(line for line in table.splitlines() if line.startswith("held-out NLL"))
    assert first.split("  ")[0] == "held-out NLL * ↓ (nats/token)"
    assert "1.250 [1.170, 1.330]" in first
    assert re.search(r"^reward accuracy ↑ \(share\) +- +0\.800", table, re.MULTILINE)
    assert re.search(r"^KL to base \(nats/answer\) +0\.000", table, re.MULTILINE)
    assert "Rows: n 64." in table
    assert "human_answer_length" not in table
    words = " ".join(table.split())
    assert f"* primary metric. {data['primary']['reason']}" in words
    assert " ".join(data["verdict"]["sentences"]) in words
    assert "fixed as the primary metric before" in words
    assert "ALARM, round 2, held-out rows" in table
    assert max(map(len, table.splitlines())) <= 110
    rows = metrics_rows(data)
    assert rows[0]["metric"].startswith("held-out NLL * ↓")
    assert {row["better"] for row in rows} == {"lower", "higher", ""}
    assert all(set(row) == {"metric", "better", "base", "round 1", "round 2"} for row in rows)
    markdown = metrics_markdown(data)
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert len(lines) == 2 + len(rows)
    assert lines[2].startswith("| **held-out NLL \\* ↓ (nats/token, n 64)** | 1.250 [1.170, 1.330] |")
    assert "**Alarm, round 2, held-out rows.**" in markdown


def test_a_long_run_fits_the_terminal(store: Store, tmp_path: Path) -> None:
    data = report_data(make_run(store, tmp_path, [1.25 - 0.01 * n for n in range(11)]), "demo")
    table = metrics_table(data)
    blocks = table.split("\n\n")[:4]
    assert all(block.splitlines()[1].startswith("held-out NLL * ↓") for block in blocks)
    assert [n for block in blocks for n in re.findall(r"base|round \d+", block.splitlines()[0])] == [
        "base",
        *(f"round {n}" for n in range(1, 11)),
    ]
    assert max(len(line) for block in blocks for line in block.splitlines()) <= 120


def test_only_known_metrics_are_shown_and_in_their_order(store: Store, tmp_path: Path) -> None:
    data = report_data(make_run(store, tmp_path, [1.25, 1.10]), "demo")
    shown = [row["metric"] for row in metrics_rows(data)]
    order = [name for name in METRICS if name in data["rounds"][1]["metrics"]]
    assert [s.split(" (")[0].rstrip(" *↓↑") for s in shown] == [METRICS[n].label for n in order]
    assert order[0] == PRIMARY


def test_sizes_and_durations() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1024, 500 * 2**20, 3 * 2**40)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "500 MiB",
        "3072 GiB",
    ]
    assert [format_duration(s) for s in (4.21, 187, 7500)] == ["4.2 s", "3:07 min", "2:05 h"]


# --- a real browser ----------------------------------------------------------------------------------


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.long)])
def test_chromium_opens_it_from_disk_without_a_complaint(store: Store, tmp_path: Path, scheme: Any) -> None:
    make_run(store, tmp_path, [1.25, 1.10, 1.20], HOSTILE)
    keys = write_report(store, "demo")
    path = store.local_path(keys["html"])
    complaints: list[str] = []
    with new_page(viewport={"width": 390, "height": 800}, color_scheme=scheme) as page:
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: complaints.append(request.url) if request.url[:5] == "http:" else None)
        page.on("request", lambda request: complaints.append(request.url) if request.url[:6] == "https:" else None)
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


def test_a_negative_kl_is_an_alarm_that_claims_no_certainty() -> None:
    kl = {"heldout_nll": estimate(2.0, 0.1, "nats/token"), "kl_base": estimate(-1.0, 0.5, "nats/answer")}
    (alarm,) = alarms([{"round": 1, "metrics": kl, "training": None}])
    assert "hardly ever do" in alarm["text"]
    assert "can do" not in alarm["text"]
