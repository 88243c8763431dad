"""Policies of a finished run as model folders that others use without spinreg."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from questions import write_tasks
from runs import SMOKE, environment, run
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from flows.cli import main
from spinreg_core.errors import EXIT_BAD_INPUT, BadInput
from spinreg_core.export import export, parse_size, push, reshard
from spinreg_core.head import read_head, stage_object
from spinreg_core.objects import fetch_folder
from spinreg_core.rounds import measured_objects
from spinreg_core.store import Store, open_store
from spinreg_core.tables import format_estimate

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    tmp = tmp_path_factory.mktemp("export")
    measured = ["-p", f"benchmarks.include_path={write_tasks(tmp / 'tasks')}", "-p", 'benchmarks.tasks=["colours"]',
                "-p", "benchmarks.limit=4", "-p", "benchmarks.rounds=[1]"]  # fmt: skip
    run(
        ["--config", SMOKE, "--store", str(tmp / "store"), "--until-round", "1", *measured],
        environment(tmp),
        tmp / "log",
    )
    return open_store(str(tmp / "store"))


def committed(store: Store) -> Path:
    head = read_head(store, "smoke")
    assert head is not None
    object_id = stage_object(head, 1, "train")
    assert object_id is not None
    return fetch_folder(store, object_id, "policy")


def test_it_is_the_committed_policy_with_a_card(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "model"
    assert main(["export", "smoke", "--store", store.url, "--to", str(target), "--push", str(tmp_path / "hub")]) == 0
    assert f"pushed to {tmp_path / 'hub'}" in capsys.readouterr().out
    for path in committed(store).iterdir():
        assert (target / path.name).read_bytes() == path.read_bytes() == (tmp_path / "hub" / path.name).read_bytes()
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "README.md"} <= {
        path.name for path in target.iterdir()
    }
    GenerationConfig.from_pretrained(target)
    assert AutoTokenizer.from_pretrained(target).chat_template
    card = ModelCard.load(target / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.base_model is None, "random:tiny is no model of the hub"
    report = json.loads((store.read("runs/smoke/report.json") or b"").decode())
    text = card.text
    assert "# smoke, round 1" in text
    assert "| alpha (weight of the previous policy in the reference" in text
    for name in ("held-out NLL", "KL to base", "reward accuracy"):
        assert f"| {name}" in text
    assert [part["name"] for part in report["rounds"][1]["benchmarks"]] == ["colours"]
    assert report["rounds"][0]["benchmarks"] == []
    accuracy = report["rounds"][1]["benchmarks"][0]["metrics"]["acc"]
    assert f"| colours | acc | {format_estimate(accuracy)} | 4 |" in text
    assert list(measured_objects(read_head(store, "smoke") or {}, 1)) == ["lm-eval colours"]
    low = report["rounds"][1]["metrics"]["heldout_nll"]["low"]
    assert f"[{low:.2f}"[:4] in text
    for line in report["lineage"]:
        if line["round"] in (None, 1) and line["stage"] in ("base", "data", "generate", "mix-opponent", "train"):
            assert f"`{line['object_id']}`" in text
    for line in text.splitlines():
        if line.startswith("|") and "metric" not in line and "---" not in line:
            assert line.count("|") in (3, 4, 5), line


def test_in_small_files_it_computes_the_same(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    source = committed(store)
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    reshard(source, folder, 100_000)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2
    assert all(path.stat().st_size < 300_000 for path in files)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in files}
    models = [AutoModelForCausalLM.from_pretrained(place) for place in (source, folder)]
    found, expected = (model.state_dict() for model in models)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_the_base_in_one_file_of_a_chosen_size(store: Store, tmp_path: Path) -> None:
    export(store, "smoke", tmp_path / "base", round_number=0, shard_size="1MB")
    assert [path.name for path in (tmp_path / "base").glob("*.safetensors*")] == ["model.safetensors"]
    assert "# smoke, base" in (tmp_path / "base" / "README.md").read_text()
    AutoModelForCausalLM.from_pretrained(tmp_path / "base")


def test_what_it_refuses(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    with pytest.raises(BadInput, match="which holds something; expected a folder that is empty"):
        export(store, "smoke", tmp_path / "full")
    with pytest.raises(BadInput, match=r"--round: found 7; expected 0 or a round that was trained \(1\)"):
        export(store, "smoke", tmp_path / "none", round_number=7)
    with pytest.raises(BadInput, match="--shard-size: found '5'; expected a size"):
        export(store, "smoke", tmp_path / "none", shard_size="5")
    with pytest.raises(BadInput, match="--push: found 'somewhere'"):
        push(tmp_path / "full", "somewhere")
    with pytest.raises(BadInput, match="which holds something"):
        push(tmp_path / "full", str(tmp_path / "full"))
    assert main(["export", "nobody", "--store", store.url, "--to", str(tmp_path / "none")]) == EXIT_BAD_INPUT
    assert "one of the runs of" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"], "nothing half written is left"
    assert (parse_size("5GB"), parse_size("1.5 mib")) == (5 * 10**9, 3 * 2**19)
