"""Models that are not there, are not whole, or do not belong together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config

from spinreg_core.config import GenerationConfig, ResourcesConfig, TrainingConfig
from spinreg_core.errors import Damaged
from spinreg_core.generation.open import open_engine
from spinreg_core.models.loading import load_policy
from spinreg_core.models.lora import (
    adapter_tensors,
    add_adapter,
    read_adapter,
    start_adapter,
    targets_of,
    write_adapter,
)
from spinreg_core.models.source import resolve_model
from spinreg_core.store.cache import cache_folder
from tests.bad_input.cases import Case, Place, table
from tests.support.chat_models import CHATML, USELESS
from tests.support.files import change_json
from tests.support.hub import disconnect

CASES: list[Case] = []
case = table(CASES, "prepare")

WEIGHTS = "model.safetensors"


def weights(folder: Path, **changed: torch.Tensor | None) -> None:
    """Write some tensors of a model otherwise; None leaves one out."""
    tensors: dict[str, Any] = load_file(folder / WEIGHTS) | changed
    save_file({name: value for name, value in tensors.items() if value is not None}, folder / WEIGHTS)


def broken(what: str) -> Any:
    """A case in which the base model of a run is a spoilt copy of the toy."""

    def add(spoil: Any) -> Any:
        def feed(place: Place) -> object:
            folder = place.model()
            spoil(folder)
            return place.prepare(model=str(folder))

        return case(what)(feed)

    return add


# What `model` says, and there is nothing.
for what, name in {
    "a folder that is not there": "./nowhere",
    "a toy there is none of": "random:huge",
    "a package that is not installed": "package:no_such_package",
    "a package without a model": "package:json",
    "the folder of a user who does not exist": "~no-such-user/model",
    "a name longer than names can be": "x" * 300,
}.items():
    case(f"model: {what}")(lambda place, name=name: place.prepare(model=name))


@case("model: a name on the hub, which is out of reach")
def _(place: Place) -> object:
    disconnect(place.folder, place.patch)
    return place.prepare(model="nobody/nothing")


# Without one of its files, or with another content in it.
for what, name in {"config.json": "config.json", "weights": WEIGHTS, "tokenizer": "tokenizer.json"}.items():
    broken(f"a model without {what}")(lambda folder, name=name: (folder / name).unlink())
for name in ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"):
    broken(f"a model whose {name} ends in its middle")(
        lambda folder, name=name: (folder / name).write_text((folder / name).read_text()[:40])
    )
broken("a model whose config.json is a list")(lambda folder: (folder / "config.json").write_text("[]"))


@broken("a model with pickled weights alone")
def _(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


@broken("a model with an index that names a file that is not there")
def _(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": shards}))


@broken("a model with an index that is none")
def _(folder: Path) -> None:
    (folder / f"{WEIGHTS}.index.json").write_text('{"metadata": {}}')


@broken("a model with an index that names a file elsewhere")
def _(folder: Path) -> None:
    (folder.parent / "elsewhere.safetensors").write_bytes((folder / WEIGHTS).read_bytes())
    (folder / f"{WEIGHTS}.index.json").write_text('{"weight_map": {"a": "../elsewhere.safetensors"}}')


@broken("a model with two sets of weights")
def _(folder: Path) -> None:
    shutil.copyfile(folder / WEIGHTS, folder / "model-00001-of-00001.safetensors")


@broken("a model with weights missing from its index")
def _(folder: Path) -> None:
    shutil.copyfile(folder / WEIGHTS, folder / "part.safetensors")
    names = dict.fromkeys(load_file(folder / WEIGHTS), "part.safetensors")
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": names}))


@broken("a model with tied embeddings and a different lm_head")
def _(folder: Path) -> None:
    weights(folder, **{"lm_head.weight": torch.zeros(259, 64)})


@broken("a model with its template in chat_template.json only")
def _(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHATML}))


@broken("a model with templates in additional_chat_templates")
def _(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool_use.jinja").write_text(CHATML)


# What config.json says.
for what, fields in {
    "code of its own": {"auto_map": {"AutoModelForCausalLM": "modeling.Mine"}},
    "quantised weights": {"quantization_config": {"quant_method": "gptq"}},
    "an architecture nobody knows": {"model_type": "unheard-of"},
    "a number format nobody knows": {"dtype": "float99"},
    "tied weights that are not tied, and not there": {"tie_word_embeddings": False},
    "more layers than there are weights": {"num_hidden_layers": 3},
    "fewer layers than there are weights": {"num_hidden_layers": 1},
    "no layers": {"num_hidden_layers": 0},
    "minus one layer": {"num_hidden_layers": -1},
    "a thousand layers": {"num_hidden_layers": 1000},
    "two hundred thousand layers": {"num_hidden_layers": 200_000},
    "fewer embeddings than the tokenizer has tokens": {"vocab_size": 258},
    "a context window shorter than the rows": {"max_position_embeddings": 512},
    "no width": {"hidden_size": "wide"},
    "no vocabulary projection": {"architectures": ["LlamaModel"]},
}.items():
    broken(f"a model with {what}")(lambda folder, fields=fields: change_json(folder / "config.json", **fields))


# What the files beside it say.
for what, name, field, value in (
    ("an end of generation that is a word", "generation_config.json", "eos_token_id", "x"),
    ("an end token outside the vocabulary", "generation_config.json", "eos_token_id", [257, 999]),
    ("ends of generation in a list of lists", "generation_config.json", "eos_token_id", [[1]]),
    ("a longest input that is a word", "tokenizer_config.json", "model_max_length", "x"),
):
    broken(f"a model with {what}")(
        lambda folder, name=name, field=field, value=value: change_json(folder / name, **{field: value})
    )


@broken("a model that reads and does not write")
def _(folder: Path) -> None:
    T5Config().save_pretrained(folder)


@broken("a model with truncated weights")
def _(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


@broken("a model whose weights are an empty file")
def _(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"")


@broken("a model whose weights are a page of HTML")
def _(folder: Path) -> None:
    (folder / WEIGHTS).write_text("<!DOCTYPE html><html>Sign in to download</html>" * 20)


@broken("a model with a pointer of Git LFS for weights")
def _(folder: Path) -> None:
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 269060552\n")


@broken("a model without the last norm")
def _(folder: Path) -> None:
    weights(folder, **{"model.norm.weight": None})


@broken("a model with a matrix of another shape")
def _(folder: Path) -> None:
    weights(folder, **{"model.layers.0.mlp.up_proj.weight": torch.zeros(128, 32)})


for name, value in {"that are not numbers": torch.nan, "that are infinite": -torch.inf}.items():
    broken(f"a model with weights {name}")(
        lambda folder, value=value: weights(
            folder, **{"model.layers.1.input_layernorm.weight": torch.full((64,), value)}
        )
    )


@broken("a model with weights in whole numbers")
def _(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({name: (100 * value).to(torch.int8) for name, value in tensors.items()}, folder / WEIGHTS)


@broken("a model with weights in eight-bit floats")
def _(folder: Path) -> None:
    weights(folder, **{"model.layers.0.mlp.up_proj.weight": torch.zeros(128, 64).to(torch.float8_e4m3fn)})


@broken("a tokenizer with more tokens than the model has embeddings")
def _(folder: Path) -> None:
    spec = json.loads((folder / "tokenizer.json").read_text())
    extra = {
        "id": 259,
        "content": "What is",
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
    }
    spec["added_tokens"].append(extra | {"special": False})
    (folder / "tokenizer.json").write_text(json.dumps(spec))


@broken("neither a chat template nor an end-of-sequence token")
def _(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    change_json(folder / "tokenizer_config.json", eos_token=None)


# A chat template that cannot be used.
for what, template in {
    "that does not parse": "{% for m in messages %}",
    "that refuses every conversation": "{{ raise_exception('not today') }}",
    "that writes answers in capitals": USELESS["shouts"],
    "that leaves answers out": USELESS["forgets_answers"],
    "that leaves prompts out": CHATML.replace("{% for m in messages %}", "{% for m in messages[1:] %}"),
    "with a generation prompt that does not begin an answer": USELESS["thinks_in_prompt"],
    "that reads a file": "{% include '/etc/passwd' %}",
    "that never ends": "{% for a in range(10**9) %}x{% endfor %}",
}.items():
    broken(f"a chat template {what}")(
        lambda folder, template=template: (folder / "chat_template.jinja").write_text(template)
    )


@broken("an adapter in place of a model")
def _(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


@case("LoRA on matrices that the model does not have")
def _(place: Place) -> object:
    return place.prepare(training={"lora_rank": 4, "lora_targets": ["query_proj"]})


@case("LoRA on the vocabulary projection")
def _(place: Place) -> object:
    return place.prepare(training={"lora_rank": 4, "lora_targets": ["lm_head"]})


def adapter(place: Place, rank: int = 4) -> Path:
    """The adapter of the toy, as a round publishes it."""
    training = TrainingConfig(lora_rank=rank)
    model = load_policy(resolve_model("random:tiny", cache_folder()), "fp32", "cpu")
    add_adapter(model, training)
    start_adapter(model, 0)
    folder = place.folder / "adapter"
    write_adapter(adapter_tensors(model), training, folder, model_name="toy", targets=targets_of(model))
    return folder


def read(place: Place, folder: Path, **fields: object) -> None:
    """Read an adapter as a round that starts from it does."""
    base = place.model()
    if fields:
        change_json(base / "config.json", **fields)
        tensors = load_file(base / WEIGHTS)
        save_file({name: value for name, value in tensors.items() if ".1." not in name}, base / WEIGHTS)
    model = load_policy(base, "fp32", "cpu")
    add_adapter(model, TrainingConfig(lora_rank=4))
    read_adapter(model, folder, alone=True)


@case("an adapter for another base", Damaged, "use")
def _(place: Place) -> object:
    return read(place, adapter(place), num_hidden_layers=1)


@case("an adapter of another rank", Damaged, "use")
def _(place: Place) -> object:
    return read(place, adapter(place, rank=8))


@case("an adapter that ends in its middle", Damaged, "use")
def _(place: Place) -> object:
    folder = adapter(place)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return read(place, folder)


@case("a policy and a base with different vocabularies", noticed="use")
def _(place: Place) -> object:
    base = place.model()
    policy = Path(shutil.copytree(base, place.folder / "policy"))
    change_json(policy / "config.json", vocab_size=300)
    weights(policy, **{"model.embed_tokens.weight": torch.zeros(300, 64)})
    generation = GenerationConfig(engine="hf", dtype="float32")
    return open_engine("hf", [policy, base], generation, ResourcesConfig(device="cpu"), pad_id=258, weights=(0.5, 0.5))
