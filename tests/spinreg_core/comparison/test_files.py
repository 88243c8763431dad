"""The page of a comparison: what it loads (nothing), what it escapes, that its filters and downloads work."""

from __future__ import annotations

import base64
import csv
import io
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from flows.cli import main
from spinreg_core.comparison.files import TABLE_SCHEMA, csv_of, render_comparison, write_comparison
from spinreg_core.evaluation.formatting import format_estimate
from spinreg_core.store.base import Store
from spinreg_core.store.open import open_store
from tests.support.browser import complaints_of, needs_chromium, new_page
from tests.support.finished_runs import make_run
from tests.support.pages import HOSTILE, Reader


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


def two_runs(store: Store, folder: Path, text: str = "fine", prefix: str = "") -> list[str]:
    """`spin` gains nothing on its base; `kl` gains, and goes on for a round more."""
    make_run(store, folder, f"{prefix}spin", [0.0, 0.0], objective={"alpha": 1.0}, policy_seed=1, text=text)
    make_run(store, folder, f"{prefix}kl", [-0.1, -0.2, -0.2], objective={"alpha": 0.5}, policy_seed=2, text=text)
    return [f"{prefix}spin", f"{prefix}kl"]


def test_write_comparison_files_hold_the_same_numbers(store: Store, tmp_path: Path) -> None:
    written = write_comparison(store, two_runs(store, tmp_path))
    assert written["html"] == "comparisons/spin-vs-kl/report.html"
    assert json.loads(store.read(written["json"]) or b"", parse_constant=pytest.fail) == written["data"]
    local = store.local_path(written["parquet"])
    assert local is not None
    table = pq.read_table(local)
    assert table.schema.equals(TABLE_SCHEMA)
    data = written["data"]
    assert table.num_rows == len(data["values"]) + len(data["comparisons"])
    lines = list(csv.DictReader(io.StringIO((store.read(written["csv"]) or b"").decode())))
    assert [line["variant"] for line in lines] == table["variant"].to_pylist()
    assert [float(line["value"]) for line in lines] == table["value"].to_pylist()
    page = (store.read(written["html"]) or b"").decode()
    links = {a["id"]: a["href"] or "" for t, a in Reader(page).tags if t == "a"}
    assert base64.b64decode(links["download-csv"].partition(",")[2]) == store.read(written["csv"])
    assert base64.b64decode(links["download-parquet"].partition(",")[2]) == store.read(written["parquet"])
    assert write_comparison(store, ["spin", "kl"])["data"] == data
    assert "download-csv" not in render_comparison(data, {}), "large tables are separate files, not part of the page"
    assert store.list("comparisons/") == sorted(written[kind] for kind in ("html", "json", "csv", "parquet"))


def test_csv_of_a_formula_quotes_it(store: Store, tmp_path: Path) -> None:
    table = pq.read_table(store.local_path(write_comparison(store, two_runs(store, tmp_path))["parquet"]))
    odd = table.slice(0, 1).set_column(2, "variant", [["=1+1"]])
    assert b",'=1+1," in csv_of(odd)


def test_page_loads_nothing_and_shows_the_data(store: Store, tmp_path: Path) -> None:
    written = write_comparison(store, two_runs(store, tmp_path))
    page, data = (store.read(written["html"]) or b"").decode(), written["data"]
    reader = Reader(page)
    for tag, attributes in reader.tags:
        for name in ("src", "href", "data", "action", "srcset", "poster"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, name)
    assert not {"iframe", "object", "embed", "base", "img", "form"} & {tag for tag, _ in reader.tags}
    policy = next(a["content"] or "" for t, a in reader.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy
    assert sum("Plotly, Inc." in script[:300] for script in reader.scripts) == 1
    text = " ".join(" ".join(reader.text).split())
    assert data["verdict"]["headline"] in text
    assert all(sentence in text for sentence in data["verdict"]["sentences"])
    assert f"within the {data['families']['verdict']} comparisons of the verdict" in text
    assert "objective.alpha: 1.0 -> 0.5" in text
    assert all(line["object_id"] in text for line in data["lineage"])
    embedded = json.loads(next(s for s in reader.scripts if s.startswith("{")))
    assert embedded == data
    assert next(iter(embedded["metrics"])) == data["primary"], "in the order of the table"


def test_page_with_benchmarks_shows_their_settings(store: Store, tmp_path: Path) -> None:
    data = write_comparison(store, two_runs(store, tmp_path))["data"]
    assert "How the benchmarks were measured" not in render_comparison(data, {})
    told = {
        "settings": {"fewshot": 5},
        "fingerprints": {"questions": "0123abcd"},
        "versions": {"lm-eval": "0.4.13"},
        "cost": {},
    }
    benchmark = {"run": "spin", "round": 1, "kind": "lm-eval", "name": "<gsm8k>", "object_id": "lm-eval-1"} | told
    text = " ".join(" ".join(Reader(render_comparison(data | {"benchmarks": [benchmark]}, {})).text).split())
    assert "spin 1 lm-eval <gsm8k> fewshot: 5 questions: 0123abcd lm-eval: 0.4.13" in text


def test_page_with_hostile_text_keeps_it_as_text(store: Store, tmp_path: Path) -> None:
    def read(text: str, prefix: str) -> tuple[Reader, list[Any]]:
        written = write_comparison(store, two_runs(store, tmp_path, text, prefix))
        reader = Reader((store.read(written["html"]) or b"").decode())
        return reader, [(t, {k: v for k, v in a.items() if k not in ("href", "download")}) for t, a in reader.tags]

    _, honest = read("fine", "a")
    reader, hostile = read(HOSTILE, "b")
    # The same elements as with harmless text, attributes included: nothing in the text became markup.
    assert hostile == honest
    assert f"human 0 {HOSTILE}" in "".join(reader.text)
    assert f"bkl round 2 prompt 1 {HOSTILE}" in "".join(reader.text)
    assert "<" not in next(s for s in reader.scripts if s.startswith("{"))


def test_compare_command_prints_table_and_address(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two_runs(store, tmp_path)
    assert main(["compare", "spin", "kl", "--store", store.url, "--against", "kl", "--name", "mine"]) == 0
    printed = capsys.readouterr().out
    assert "alpha 0.5 (reference)" in printed
    assert "In held-out NLL at round 2, alpha 1.0 is worse than alpha 0.5 (one seed each)." in printed
    assert printed.rstrip().endswith(f"comparison: {store.uri('comparisons/mine/report.html')}")
    assert main(["compare", "spin", "kl", "--store", store.url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["reference"] == "alpha 1.0"
    kept = store.list("comparisons/")
    assert main(["gc", "--delete", "--store", store.url]) == 0
    assert store.list("comparisons/") == kept, "gc leaves comparisons alone"
    capsys.readouterr()
    assert main(["compare", "spin", "gone", "--store", store.url]) == 65
    assert "gone" in capsys.readouterr().err


def test_page_of_a_grid_shows_a_plane_with_marks(store: Store, tmp_path: Path) -> None:
    names = []
    for alpha, history in itertools.product((1.0, 0.0), (1, "all")):
        name = f"a{alpha:g}-h{history}"
        make_run(
            store, tmp_path, name, [-0.3 if alpha else 0.0], objective={"alpha": alpha}, opponent={"history": history}
        )
        names.append(name)
    written = write_comparison(store, names)
    assert written["data"]["plane"]["labels"] == [["history 1, alpha 1.0", "history all, alpha 1.0"],
                                                  ["history 1, alpha 0.0", "history all, alpha 0.0"]]  # fmt: skip
    page = (store.read(written["html"]) or b"").decode()
    table = page.partition('id="plane"')[2].partition("</table>")[0]
    cells = [" ".join(re.sub("<[^>]*>", " ", cell).split()) for cell in re.findall("<td>(.*?)</td>", table, re.DOTALL)]
    assert ["▼ better" in cell for cell in cells] == [True, True, False, False], cells
    assert ["▲ worse" in cell for cell in cells] == [False, False, True, True], cells
    values = {(v["variant"], v["metric"]): v for v in written["data"]["values"] if v["round"] == 1}
    labels = itertools.chain.from_iterable(written["data"]["plane"]["labels"])
    for label, cell in zip(labels, cells, strict=True):
        assert cell.startswith(format_estimate(values[label, "heldout_nll"]))
    text = " ".join(" ".join(Reader(page).text).split())
    told = written["data"]["verdict"]["sentences"]
    assert all(sentence in text for sentence in told), "also those folded away"
    claimed = [" is higher than " in sentence or " is lower than " in sentence for sentence in told]
    assert claimed == [True] * sum(claimed) + [False] * (len(told) - sum(claimed)), "what is supported comes first"
    assert sum(claimed) == len(written["data"]["verdict"]["claims"]) == 4


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.long)])
def test_page_in_chromium_filters_and_downloads(store: Store, tmp_path: Path, scheme: Any) -> None:
    written = write_comparison(store, two_runs(store, tmp_path, HOSTILE))
    with new_page(viewport={"width": 390, "height": 800}, color_scheme=scheme) as page:
        complaints = complaints_of(page)
        page.goto(f"file://{store.local_path(written['html'])}")
        page.wait_for_selector("body[data-drawn]")
        drawn = int(page.locator("body").get_attribute("data-drawn") or 0)
        assert drawn == len(written["data"]["metrics"]) + 3
        assert page.locator(".plot .main-svg").count() >= drawn
        # A line per variant: rounds 0 to 2 and 0 to 3.
        assert page.locator("#curves figure:first-child .scatterlayer path.point").count() == 3 + 4
        assert page.evaluate("document.documentElement.scrollWidth") <= 390

        lines = page.locator("#curves figure:first-child .scatterlayer path.point")
        one, other = page.locator("#legend button").all()
        for button, points in ((one, 3), (other, 3 + 4), (other, 4), (other, 3 + 4)):  # none left: all again
            button.click()
            assert lines.count() == points

        def shown() -> list[str]:
            answers = page.locator(".answer.policy:not([hidden]) .text").all_text_contents()
            return [" ".join(text.split()[:5]) for text in answers]

        both = [f"{run} round 2 prompt {i}" for i in range(3) for run in ("spin", "kl")]
        assert shown() == both  # the compared round to begin with
        assert page.locator("#count").text_content() == "6 answers"
        page.select_option("#by-variant", label="alpha 0.5")
        assert shown() == [f"kl round 2 prompt {i}" for i in range(3)]
        page.select_option("#by-round", label="all")
        assert len(shown()) == 3 * 4
        page.fill("#by-text", "ROUND 3 prompt 1")
        assert shown() == ["kl round 3 prompt 1"]
        assert page.locator(".prompt:not([hidden])").count() == 1
        page.fill("#by-text", "question 2")
        assert [text[-8:] for text in shown()] == ["prompt 2"] * 4
        page.fill("#by-text", "nobody said that")
        assert page.locator("#count").text_content() == "0 answers"
        for kind in ("json", "csv", "parquet"):
            with page.expect_download() as download:
                page.click(f"#download-{kind}")
            content = Path(download.value.path()).read_bytes()
            assert download.value.suggested_filename == f"spin-vs-kl.{kind}"
            if kind == "json":
                assert json.loads(content) == written["data"]
            else:
                assert content == store.read(written[kind])
    assert complaints == []
