"""Stores that earlier versions wrote stay usable: read, verified, compared, exported, cleaned, continued, resumed.

tests/data holds, for each version, a store of two finished runs (`store-VERSION.tar.gz`), stores of the same
configuration killed in the middle of a stage (`interrupted-VERSION.tar.gz`) and the object ids (`ids-VERSION.json`).
They are written by scripts/freeze_store.py and never change.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

import spinreg_core
from flows.cli import main
from spinreg_core.maintenance.repair import begin
from spinreg_core.maintenance.verify import verify
from spinreg_core.runs.fetch import fetch_file, fetch_folder
from spinreg_core.runs.head import HELDOUT, require_config, require_head
from spinreg_core.runs.lease import hold_lease
from spinreg_core.runs.objects import manifest_key
from spinreg_core.runs.stages import complete_round
from spinreg_core.store.base import Store
from spinreg_core.store.open import open_store
from tests.support.whole_runs import ROOT, SMOKE, environment, run

DATA = Path(__file__).parents[1] / "data"
VERSIONS = sorted(path.name.removeprefix("ids-").removesuffix(".json") for path in DATA.glob("ids-*.json"))


def unpack(name: str, folder: Path) -> Path:
    with tarfile.open(DATA / name) as archive:
        archive.extractall(folder, filter="data")
    return folder


def object_ids(version: str) -> dict[str, dict[str, str]]:
    runs = json.loads((DATA / f"ids-{version}.json").read_text())["runs"]
    return {run: {stage: entry["object_id"] for stage, entry in stages.items()} for run, stages in runs.items()}


def weights(store: Store, round_number: int) -> dict[str, Any]:
    train = require_head(store, "smoke").stage(round_number, "train")
    return dict(load_file(fetch_folder(store, str(train), "policy") / "model.safetensors"))


def rows(store: Store, round_number: int, stage: str, name: str) -> list[dict[str, Any]]:
    object_id = require_head(store, "smoke").stage(round_number, stage)
    return pq.read_table(fetch_file(store, str(object_id), name)).to_pylist()  # type: ignore[no-any-return]


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def finished(version: str, tmp_path: Path) -> Path:
    return unpack(f"store-{version}.tar.gz", tmp_path / "finished")


def test_status_of_a_frozen_store_shows_two_complete_runs(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--store", str(finished), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["runs"]
    assert {one["run"]: one["complete_round"] for one in found} == {"smoke": 2, "smoke-spin": 2}


def test_verify_of_a_frozen_store_finds_every_file(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("smoke", "smoke-spin"):
        assert main(["verify", name, "--store", str(finished), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert not found["problems"]
        assert len([one for one in found["objects"] if one.startswith("generate-")]) == 5, "held-out answers too"


def test_verify_of_a_frozen_store_finds_damage_of_heldout_answers(finished: Path) -> None:
    answers = require_head(open_store(str(finished)), "smoke").stage(1, HELDOUT)
    shard = next(finished.glob(f"objects/{answers}/data/*/shards/00000.parquet"))
    shard.write_bytes(b"damaged")
    assert main(["verify", "smoke", "--store", str(finished)]) == 74


def damage_evaluation(folder: Path) -> str:
    """Cut the manifest of round 1's evaluation, which alone says from which held-out answers it was made."""
    object_id = str(require_head(open_store(str(folder)), "smoke").stage(1, "evaluate"))
    path = folder / manifest_key(object_id)
    path.write_bytes(path.read_bytes()[:100])
    return object_id


def test_verify_of_a_frozen_store_finds_a_damaged_evaluation(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    object_id = damage_evaluation(finished)
    assert require_head(open_store(str(finished)), "smoke").stage(1, HELDOUT) is None
    assert main(["verify", "smoke", "--store", str(finished), "--json"]) == 74
    found = json.loads(capsys.readouterr().out)
    assert {problem["object_id"] for problem in found["problems"]} == {object_id}


@pytest.mark.slow
def test_repair_of_a_frozen_store_makes_a_damaged_evaluation_again(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPINREG_CACHE", str(tmp_path / "cache"))
    store = open_store(str(finished))
    heldout = require_head(store, "smoke").stage(1, HELDOUT)
    object_id = damage_evaluation(finished)
    with hold_lease(store, require_config(store, "smoke"), "test") as lease:
        assert begin(store, lease, [object_id]) == [(1, "evaluate")]
    head = spinreg_core.run(ROOT / SMOKE, store=str(finished), until_round=0).head
    assert (head.stage(1, HELDOUT), head.stage(1, "evaluate")) == (heldout, object_id)
    assert head.repair is None
    assert verify(store, "smoke").problems == []


def test_report_of_a_frozen_store_has_the_numbers_it_had(finished: Path) -> None:
    before = json.loads((finished / "runs/smoke/report.json").read_text())
    assert main(["report", "smoke", "--store", str(finished)]) == 0
    after = json.loads((finished / "runs/smoke/report.json").read_text())
    # All but the intervals, which 0.1.0 had too narrow.
    numbers = [
        [{name: (e["value"], e["n"], e["unit"]) for name, e in one["metrics"].items()} for one in report["rounds"]]
        for report in (before, after)
    ]
    assert numbers[0] == numbers[1]
    assert (finished / "runs/smoke/report.html").stat().st_size > 10_000


def test_compare_of_a_frozen_store_finds_the_differing_fields(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compare", "smoke", "smoke-spin", "--name", "both", "--store", str(finished), "--json"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["differences"] for one in found["variants"]] == [[], ["objective.alpha: 0.5 -> 1.0"]]


def test_export_of_a_frozen_store_is_the_committed_policy(finished: Path, tmp_path: Path) -> None:
    assert main(["export", "smoke", "--round", "2", "--store", str(finished), "--to", str(tmp_path / "model")]) == 0
    expected = weights(open_store(str(finished)), 2)
    exported = load_file(tmp_path / "model" / "model.safetensors")
    assert exported.keys() == expected.keys()
    assert all((exported[name] == expected[name]).all() for name in expected)


def test_gc_of_a_frozen_store_keeps_all_that_runs_need(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path for path in finished.rglob("*") if path.is_file()}
    assert main(["gc", "--store", str(finished), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["items"] == []
    # A rule finds held-out answers as well, which heads of 0.1.0 do not name.
    assert main(["gc", "--store", str(finished), "--delete", "-p", "keep.generations=needed"]) == 0
    left = {path for path in finished.rglob("*.parquet") if path.is_file()}
    gone = sorted(str(path.relative_to(finished)) for path in before - left if path.suffix == ".parquet")
    assert gone
    assert all(one.startswith("objects/generate-") for one in gone)


@pytest.mark.slow
def test_run_continues_a_frozen_store_by_a_third_round(version: str, finished: Path, tmp_path: Path) -> None:
    ids = object_ids(version)["smoke"]
    run(["--config", SMOKE, "--store", str(finished), "--until-round", "3"], environment(tmp_path), tmp_path / "log")
    head = require_head(open_store(str(finished)), "smoke")
    assert complete_round(head) == 3
    for name, object_id in ids.items():  # what was committed stays as it was
        number, _, stage = name.partition("/")
        assert (head.stage(int(number), stage) if stage else getattr(head, name)) == object_id
    assert all(head.stage(number, HELDOUT) for number in range(4))
    assert main(["verify", "smoke", "--store", str(finished)]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["generate", "train"])
def test_run_resumes_a_frozen_interruption_to_the_undisturbed_result(
    version: str, stage: str, finished: Path, tmp_path: Path
) -> None:
    folder = unpack(f"interrupted-{version}.tar.gz", tmp_path / "interrupted") / stage
    parts = {path.relative_to(folder): path.read_bytes() for path in folder.glob("objects/generate-*/parts/*.json")}
    text = run(["--config", SMOKE, "--store", str(folder)], environment(tmp_path), tmp_path / "log")
    assert {path: (folder / path).read_bytes() for path in parts} == parts, "committed shards stay"
    assert ("shards were committed before" in text) == (stage == "generate")
    assert ("step 2" in text) or stage == "generate"
    resumed, undisturbed = open_store(str(folder)), open_store(str(finished))
    head, ids = require_head(resumed, "smoke"), object_ids(version)["smoke"]
    assert {name: head.stage(int(name[0]), name[2:]) for name in ids if "/" in name} == {
        name: object_id for name, object_id in ids.items() if "/" in name
    }
    for number in (1, 2):
        pairs = [rows(one, number, "mix-opponent", "pairs.parquet") for one in (resumed, undisturbed)]
        for a, b in zip(*pairs, strict=True):
            assert {name: value for name, value in a.items() if not isinstance(value, float)} == {
                name: value for name, value in b.items() if not isinstance(value, float)
            }
            assert [a[name] for name in a if isinstance(a[name], float)] == pytest.approx(
                [b[name] for name in b if isinstance(b[name], float)], abs=1e-4
            )
        found, expected = weights(resumed, number), weights(undisturbed, number)
        assert found.keys() == expected.keys()
        assert all(abs(found[name] - expected[name]).max() < 1e-4 for name in expected)
