"""A published base is one model: the scorer, both engines and plain transformers read the same from its folder.

Layouts of public reports: weights in one file and in shards, tied and untied heads, templates and end tokens in
different places. vLLM takes 20 s to load, so CI opens one layout with it and the long form all.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GenerationConfig,
)

from spinreg_core.generation.engine import Sampling
from spinreg_core.generation.hf import HfEngine
from spinreg_core.logprobs.sequence import answer_logprobs
from spinreg_core.models.chat_template import Renderer
from spinreg_core.models.checks import require_honest_ties, require_loadable
from spinreg_core.models.loading import load_policy
from spinreg_core.models.source import link_policy, resolve_model
from spinreg_core.store.cache import cache_folder
from tests.support.chat_models import CHATML
from tests.support.files import change_json
from tests.support.plain_logprobs import plain

OTHER, FOR_TOOLS = (f"{name}: {CHATML}" for name in ("other", "tools"))
QUESTION = [{"role": "user", "content": "How many rooms?"}]
TOOLS = [{"type": "function", "function": {"name": "count", "description": "", "parameters": {}}}]


def weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def shards(folder: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="40KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    assert len(list(folder.glob("model-*.safetensors"))) > 2


def one_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    names = load_file(folder / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def vendors_weights(folder: Path) -> None:
    save_file({"tok_embeddings.weight": torch.zeros(8, 4)}, folder / "consolidated.safetensors")


def untied(folder: Path) -> None:
    change_json(folder / "config.json", tie_word_embeddings=False)
    weights(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].flip(0).contiguous()}))


def tied_twice(folder: Path) -> None:
    weights(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))


def half(folder: Path) -> None:
    change_json(folder / "config.json", dtype="float16")
    weights(folder, lambda t: t.update({name: one.half() for name, one in t.items()}))


def template(folder: Path, *, jinja: str | None, config: object = None, processor: str | None = None) -> None:
    (folder / "chat_template.jinja").unlink()
    if jinja is not None:
        (folder / "chat_template.jinja").write_text(jinja)
    if config is not None:
        change_json(folder / "tokenizer_config.json", chat_template=config)
    if processor is not None:
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": processor}))


NAMED = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": FOR_TOOLS}]


def ends(folder: Path, generation: object, config: object) -> None:
    path = folder / "generation_config.json"
    path.unlink()
    if generation is not None:
        path.write_text(json.dumps({"eos_token_id": generation, "repetition_penalty": 1.5, "top_k": 3}))
    change_json(folder / "config.json", eos_token_id=config)


def vision_wrapper(folder: Path) -> None:
    """Gemma 3: the settings of the text model stand in `text_config`, and its end tokens too."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    text = {"vocab_size": 260, "num_hidden_layers": 2, "num_key_value_heads": 1, "head_dim": 16,
            "max_position_embeddings": 512, "eos_token_id": [257, 66]}  # fmt: skip
    image = {"num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (folder / name).unlink()
    config = Gemma3Config(text_config=sizes | text, vision_config=sizes | image, mm_tokens_per_image=1)
    torch.manual_seed(0)
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)


LAYOUTS: dict[str, Callable[[Path], object]] = {
    "as transformers saves it": lambda folder: None,
    "shards": shards,
    "one shard with an index": one_shard,
    "the vendor's weights in the same folder": vendors_weights,
    "an untied head": untied,
    "a tied head that is stored": tied_twice,
    "float16": half,
    "no architectures": lambda folder: change_json(folder / "config.json", architectures=None),
    "another architecture": lambda folder: change_json(
        folder / "config.json", architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=None
    ),
    "a text model in a vision wrapper": vision_wrapper,
    "the template in tokenizer_config.json": lambda folder: template(folder, jinja=None, config=CHATML),
    "two templates that differ": lambda folder: template(folder, jinja=CHATML, config=OTHER),
    "three templates that differ": lambda f: template(f, jinja=CHATML, config=OTHER, processor=OTHER),
    "named templates": lambda folder: template(folder, jinja=None, config=NAMED),
    "named templates and a file": lambda folder: template(folder, jinja=OTHER, config=NAMED),
    "no template": lambda folder: template(folder, jinja=None),
    "end tokens in both files": lambda folder: ends(folder, [257, 65], 66),
    "an end token that the template does not use": lambda folder: ends(folder, 65, 257),
    "end tokens in config.json alone": lambda folder: ends(folder, None, [258, 66]),
    "no end token in either file": lambda folder: ends(folder, None, None),
}


@pytest.fixture(params=LAYOUTS)
def published(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return publish(request.param, tmp_path)


def publish(layout: str, place: Path) -> Path:
    """Write a model in a layout, and return the folder that a run would publish."""
    folder = Path(shutil.copytree(resolve_model("random:tiny", cache_folder()), place / "model"))
    LAYOUTS[layout](folder)
    resolve_model(str(folder), cache_folder())
    require_loadable(folder)
    require_honest_ties(folder)
    link_policy(folder, place / "policy")
    return Path(shutil.copytree(place / "policy", place / "published"))  # as a store has it, without links


def sampling(renderer: Renderer) -> Sampling:
    return Sampling(1.0, 1.0, 0, 12, tuple(renderer.stop_ids))


def test_published_base_is_scored_as_transformers_reads_it(published: Path) -> None:
    renderer = Renderer.from_folder(published)
    prompts = [renderer.prompt_ids(QUESTION), [3, 4, 5]]
    with torch.no_grad():
        model = load_policy(published, "fp32", "cpu")
        own = AutoModelForCausalLM.from_pretrained(published, dtype="float32")
        sampled = HfEngine([model], tokens=400, pad_id=renderer.pad_id).generate(prompts, sampling(renderer), [1, 2])
        answers = [answer.token_ids for answer in sampled]
        found = answer_logprobs(model, prompts, answers, precision="fp32")
        assert found.tolist() == pytest.approx(plain(own, prompts, answers).tolist(), abs=1e-4)
        assert [sum(answer.logprobs) for answer in sampled] == pytest.approx(found.tolist(), abs=1e-4)


def test_published_base_renders_as_transformers_does(published: Path) -> None:
    renderer, tokenizer = Renderer.from_folder(published), AutoTokenizer.from_pretrained(published)
    for tools in (None, TOOLS):
        rendered = tokenizer.apply_chat_template(QUESTION, tools=tools, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(rendered, add_special_tokens=False).input_ids
        if tools is None:
            assert renderer.prompt_ids(QUESTION) == ids
        else:
            assert rendered.startswith("tools: ") == isinstance(tokenizer.chat_template, dict), "the template for tools"
    places = [(published / "chat_template.jinja").exists(),
              "chat_template" in json.loads((published / "tokenizer_config.json").read_text()),
              (published / "chat_template.json").exists()]  # fmt: skip
    assert sum(places) == 1, "one place for the template"


def test_published_base_ends_with_the_same_tokens_everywhere(published: Path) -> None:
    stops = set(Renderer.from_folder(published).stop_ids)
    said = GenerationConfig.from_pretrained(published).eos_token_id
    assert set(said if isinstance(said, list) else [said]) == stops
    assert json.loads((published / "config.json").read_text())["architectures"], "vLLM needs it"


@pytest.mark.parametrize(
    ("layout", "found"),
    [
        ("as transformers saves it", [257]),
        ("end tokens in both files", [65, 257]),  # no loader reads 66 from config.json
        ("end tokens in config.json alone", [66, 257, 258]),
        ("a text model in a vision wrapper", [66, 257]),
        ("no end token in either file", [257]),
    ],
)
def test_published_base_has_the_ends_that_loaders_read(layout: str, found: list[int], tmp_path: Path) -> None:
    assert sorted(Renderer.from_folder(publish(layout, tmp_path)).stop_ids) == found


def test_published_base_keeps_the_other_fields_of_a_file_it_writes(tmp_path: Path) -> None:
    said = json.loads(
        (publish("an end token that the template does not use", tmp_path) / "generation_config.json").read_text()
    )
    assert said == {"eos_token_id": [65, 257], "repetition_penalty": 1.5, "top_k": 3}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(one, marks=() if one == "three templates that differ" else pytest.mark.long)
        for one in LAYOUTS
        if LAYOUTS[one] is not vision_wrapper  # vLLM would need torchvision and the wrapper's processor
    ],
)
def test_published_base_is_the_same_model_in_vllm(layout: str, tmp_path: Path) -> None:
    published = publish(layout, tmp_path)
    renderer = Renderer.from_folder(published)
    prompts = [renderer.prompt_ids(QUESTION), [3, 4, 5]]
    request, result = tmp_path / "request.json", tmp_path / "answers.json"
    request.write_text(json.dumps({"policy": str(published), "prompts": prompts, "question": QUESTION}))
    command = [sys.executable, "-m", "tests.support.vllm_model", str(request), str(result)]
    subprocess.run(command, check=True, timeout=300)
    found = json.loads(result.read_text())
    answers, sums = zip(*found["answers"], strict=True)
    with torch.no_grad():
        scored = answer_logprobs(load_policy(published, "fp32", "cpu"), prompts, list(answers), precision="fp32")
    assert sums == pytest.approx(scored.tolist(), abs=1e-3)
    assert found["question"] == renderer.prompt_ids(QUESTION)
    assert set(found["ends"]) == set(renderer.stop_ids)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="vLLM can load it")
def test_vllm_engine_of_a_model_that_vllm_refuses_is_bad_input(tmp_path: Path) -> None:
    published = publish("a text model in a vision wrapper", tmp_path)
    request = tmp_path / "request.json"
    request.write_text(json.dumps({"policy": str(published), "longest": 200, "calls": []}))
    command = [sys.executable, "-m", "tests.support.vllm_calls", str(request), str(tmp_path / "answers.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert "BadInput: generation.engine is vllm, which refuses the model or its settings (Model arch" in done.stderr
