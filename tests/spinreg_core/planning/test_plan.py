"""`spinreg plan`: where its numbers come from, that its document adds up, what it warns of and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from spinreg_core.config import RunConfig
from spinreg_core.config.resolve import merge
from spinreg_core.data.load import load_rows
from spinreg_core.errors import BadInput
from spinreg_core.models.chat_template import Renderer
from spinreg_core.models.source import resolve_model
from spinreg_core.planning.cost_model import Sizes, round_store
from spinreg_core.planning.inputs import measured_tflops, read_machine, read_shape, read_sizes
from spinreg_core.planning.plan import UTILISATION, plan
from spinreg_core.store.cache import cache_folder
from tests.support.builders import make_config


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPINREG_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def configured(**values: Any) -> RunConfig:
    tiny = {
        "model": "random:tiny", "data": {"prompts_per_round": 64, "heldout_rows": 75},
        "generation": {"engine": "hf", "max_new_tokens": 96}, "resources": {"device": "cpu"},
    }  # fmt: skip
    return make_config(**merge(tiny, values))


def tiny_folder() -> Path:
    return resolve_model("random:tiny", cache_folder())


@pytest.fixture
def giant(tmp_path: Path) -> str:
    """A folder that describes a model of 70 B parameters, with the tokenizer of the tiny one and no weights."""
    folder = tmp_path / "giant"
    folder.mkdir()
    for path in tiny_folder().iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    LlamaConfig(
        vocab_size=128_256, hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, tie_word_embeddings=False, dtype="bfloat16",
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


# Where the numbers come from


def test_read_shape_equals_the_model() -> None:
    folder, shape = read_shape("random:tiny")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    config = model.config
    assert (shape.layers, shape.width, shape.mlp_width) == (2, 64, 128)
    assert shape.kv_width == model.model.layers[0].self_attn.k_proj.out_features
    assert shape.vocabulary == config.vocab_size == model.get_output_embeddings().out_features
    assert shape.stored_bytes == 4


def test_read_shape_of_70b_loads_no_weights(giant: str) -> None:
    _, shape = read_shape(giant)
    assert shape.parameters == 70_553_706_496  # Llama 3 70B
    assert (shape.kv_width, shape.stored_bytes) == (1024, 2)


def test_read_sizes_measures_the_rendered_rows() -> None:
    config = configured()
    sizes, source = read_sizes(config, tiny_folder())
    renderer = Renderer.from_folder(tiny_folder())
    rows = load_rows("builtin:demo", config.data).rows
    lengths = [
        (len(renderer.prompt_ids(row.messages)), len(renderer.answer_ids(row.messages, row.answer))) for row in rows
    ]
    assert source == f"measured on {len(rows)} of {len(rows)} training rows"
    assert sizes.train_rows == len(rows)
    assert sizes.heldout_rows == 75
    assert sizes.prompt == pytest.approx(sum(p for p, _ in lengths) / len(rows))
    assert sizes.answer == pytest.approx(sum(min(a, 1024 - p) for p, a in lengths) / len(rows))
    assert sizes.longest_prompt == max(p for p, _ in lengths)
    assert sizes.longest_answer == max(min(a, 1024 - p) for p, a in lengths)
    assert sizes.generated == config.generation.max_new_tokens


def test_read_sizes_leaves_out_long_prompts(tmp_path: Path) -> None:
    rows = [{"prompt": f"question {i}", "response": "short"} for i in range(30)]
    rows += [{"prompt": f"{i} " + "x" * 400, "response": "short"} for i in range(10)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    limits = {"max_prompt_tokens": 100, "max_length": 300, "heldout_rows": 8}
    sizes, _ = read_sizes(configured(dataset=str(file), data=limits), tiny_folder())
    assert sizes.heldout_rows == 8
    assert 20 <= sizes.train_rows <= 30
    assert sizes.longest_prompt <= 100


def test_read_sizes_without_data_takes_the_limits(tmp_path: Path) -> None:
    config = configured(dataset=str(tmp_path / "no-such.jsonl"), data={"prompts_per_round": 50})
    sizes, source = read_sizes(config, tiny_folder())
    assert source.startswith("the configured limits, because the data could not be read: dataset")
    assert sizes == Sizes(
        train_rows=50,
        heldout_rows=75,
        prompt=512,
        answer=512,
        clipped=96,
        generated=96,
        longest_prompt=512,
        longest_answer=512,
    )
    assert "because the data could not be read" in plan(config, tflops=1.0)[0]


def test_plan_without_data_or_limits_is_bad_input(tmp_path: Path) -> None:
    config = configured(dataset=str(tmp_path / "no-such.jsonl"), data={"prompts_per_round": None})
    with pytest.raises(BadInput, match="no-such"):
        plan(config, tflops=1.0)


def test_read_machine_rate_is_measured_or_stated() -> None:
    machine = read_machine(configured(), None)
    assert machine["tflops"] > 1e-4
    assert machine["tflops_source"].startswith("measured in a second, float32 matrix product")
    assert "bfloat16" in read_machine(configured(training={"precision": "mixed"}), None)["tflops_source"]
    assert read_machine(configured(), 500.0) | {"memory_bytes": 0} == {
        "device": "cpu", "ranks": 1, "shards": 1, "devices": 1, "memory_bytes": 0, "tflops": 500.0,
        "tflops_source": "stated",
    }  # fmt: skip


def test_measured_tflops_returns_a_plausible_rate() -> None:
    assert 1e-4 < measured_tflops("cpu", torch.float32) < 1e4


def test_read_machine_memory_is_at_most_the_total() -> None:
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 2**28 < read_machine(configured(), 1.0)["memory_bytes"] <= total


# The document


def test_plan_document_adds_up_and_is_json() -> None:
    text, document = plan(configured(until_round=3), tflops=2.0)
    assert json.loads(json.dumps(document)) == document
    assert [entry["round"] for entry in document["rounds"]] == [0, 1, 2, 3]
    assert [entry["pairs"] for entry in document["rounds"]] == [0, 64, 128, 192]
    for entry in document["rounds"]:
        for name in ("tokens", "flops", "seconds"):
            assert entry[name] == pytest.approx(sum(stage[name] for stage in entry["stages"].values()))
        assert entry["store_bytes"] == sum(entry["store"].values())
    for name in ("tokens", "flops", "seconds", "store_bytes"):
        assert document["total"][name] == pytest.approx(sum(entry[name] for entry in document["rounds"]))
    for parts in document["memory"].values():
        assert parts["total"] == sum(size for name, size in parts.items() if name != "total")
    assert set(document["memory"]) == {"generate", "mix-opponent", "train", "evaluate"}
    for words in ("random:tiny", "0 (base)", "2 TFLOP/s (stated)", "mix-opponent", "train 30%", "generate with hf 5%"):
        assert words in text
    assert "generate with vllm" not in text
    assert max(map(len, text.splitlines())) < 160


@pytest.mark.parametrize(
    ("asked", "rounds"), [({}, 1), ({"rounds": 2}, 2), ({"until_round": 2}, 2), ({"until_round": 0}, 0)]
)
def test_plan_counts_the_requested_rounds(asked: dict[str, int], rounds: int) -> None:
    _, document = plan(configured(**asked), tflops=1.0)
    assert document["rounds"][-1]["round"] == rounds


def test_plan_time_is_work_over_the_used_rate() -> None:
    slow, fast = (plan(configured(), tflops=rate)[1] for rate in (1.0, 4.0))
    assert slow["total"]["seconds"] == pytest.approx(4 * fast["total"]["seconds"])
    generate = slow["rounds"][1]["stages"]["generate"]
    assert generate["seconds"] == pytest.approx(generate["flops"] / (1e12 * UTILISATION["generate with hf"]))


def test_plan_of_two_nodes_halves_generation() -> None:
    one, two = (
        plan(configured(resources={"device": "cpu", "nodes": n, "rendezvous": "a:1"}), tflops=1.0)[1]["rounds"][1]
        for n in (1, 2)
    )
    assert two["stages"]["generate"]["seconds"] == pytest.approx(one["stages"]["generate"]["seconds"] / 2)
    assert two["stages"]["evaluate"]["seconds"] > one["stages"]["evaluate"]["seconds"] / 2


def test_round_store_of_a_policy_matches_its_file() -> None:
    _, shape = read_shape("random:tiny")
    sizes = read_sizes(configured(), tiny_folder())[0]
    planned = round_store(configured(), shape, sizes, 1)["policy"]
    stored = (tiny_folder() / "model.safetensors").stat().st_size  # float32, as a master copy
    assert planned <= stored <= planned * 1.05


# Warnings and refusals


def test_plan_that_does_not_fit_warns(giant: str, tmp_path: Path) -> None:
    config = configured(model=giant, store=str(tmp_path / "store"), until_round=100)
    text, document = plan(config, tflops=500.0)
    stages = {warning.split()[0] for warning in document["warnings"]}
    assert {"train", "mix-opponent"} <= stages
    train = next(warning for warning in document["warnings"] if warning.startswith("train"))
    assert "the largest part is weights" in train or "the largest part is activations" in train
    assert any("the store will grow by" in warning and str(tmp_path) in warning for warning in document["warnings"])
    assert all(f"WARNING: {warning}" in text for warning in document["warnings"])
    assert not (tmp_path / "store").exists()


def test_plan_that_fits_does_not_warn(tmp_path: Path) -> None:
    assert plan(configured(store=str(tmp_path)), tflops=1.0)[1]["warnings"] == []


def test_plan_with_a_remote_store_does_not_connect() -> None:
    config = configured(store="s3://bucket-that-is-nowhere/prefix")
    assert plan(config, tflops=1.0)[1]["warnings"] == []


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_plan_with_a_bad_rate_is_bad_input(rate: float) -> None:
    with pytest.raises(BadInput, match="--tflops"):
        plan(configured(), tflops=rate)


def test_plan_with_a_missing_model_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="model"):
        plan(configured(model=str(tmp_path / "nothing")), tflops=1.0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="shape that cannot be read"):
        plan(configured(model=str(tmp_path / "empty")), tflops=1.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_plan_with_a_missing_gpu_is_bad_input() -> None:
    with pytest.raises(BadInput, match="torch sees no GPU"):
        plan(configured(resources={"device": "cuda"}), tflops=1.0)


def test_read_sizes_counts_the_heldout_rows_of_the_run(tmp_path: Path) -> None:
    def rows(name: str, openings: list[int]) -> str:
        lines = [json.dumps({"prompt": f"What is {i}?", "answer": f"It is {n}."}) for n, i in enumerate(openings)]
        (tmp_path / name).write_text("\n".join(lines))
        return str(tmp_path / name)

    many, few = rows("many.jsonl", list(range(40))), rows("few.jsonl", [i % 5 for i in range(100)])
    data = {"heldout_dataset": few, "heldout_rows": 60}
    sizes, _ = read_sizes(configured(dataset=many, data=data), tiny_folder())
    assert (sizes.heldout_rows, sizes.train_rows) == (5, 35)
    with pytest.raises(BadInput, match=r"data\.heldout_rows is 8, .* only 5 different openings"):
        read_sizes(configured(dataset=few, data={"heldout_rows": 8, "prompts_per_round": 12}), tiny_folder())
