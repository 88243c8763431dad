"""Weights on disk: step checkpoints to go on from, and the policy a round publishes.

Decides: what a checkpoint holds (safetensors and JSON, never pickle) and what a published policy folder is.
Leaves out: when they are written and where to (`stages/train.py`), the loop (`training.py`).

A checkpoint: `weights.safetensors` (master weights), `optimizer.safetensors` (its state as `<parameter>/<name>`, and
the random number generators), `state.json` (everything else).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from spinreg_core.errors import Damaged

_RNG = "rng/"


def save_checkpoint(
    folder: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Write a checkpoint into a folder. `state` is JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    parameters = dict(model.named_parameters())  # a tied weight appears once
    save_file({name: p.detach().cpu().contiguous() for name, p in parameters.items()}, folder / "weights.safetensors")
    tensors: dict[str, Tensor] = {f"{_RNG}cpu": torch.get_rng_state()}
    if model.device.type == "cuda":
        tensors[f"{_RNG}cuda"] = torch.cuda.get_rng_state(model.device)
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}/{key}"] = value.detach().cpu().contiguous()
    save_file(tensors, folder / "optimizer.safetensors")
    (folder / "state.json").write_text(json.dumps(state))


def load_checkpoint(
    files: Mapping[str, Path], model: PreTrainedModel, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Put a checkpoint's weights, optimiser state and random number generators in place; returns its `state`.

    `files` maps the three file names to paths. The optimiser must be fresh and made for this model. Raises Damaged
    where weights are missing or of another shape.
    """
    with safe_open(files["weights.safetensors"], "pt") as weights, torch.no_grad():
        names = set(weights.keys())
        for name, parameter in model.named_parameters():
            found = weights.get_tensor(name) if name in names else None
            if found is None or found.shape != parameter.shape:
                raise Damaged(f"checkpoint weight {name}: found {None if found is None else tuple(found.shape)}; "
                              f"expected shape {tuple(parameter.shape)}")  # fmt: skip
            parameter.copy_(found)
    numbers = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    by_name = {name: numbers[id(p)] for name, p in model.named_parameters() if id(p) in numbers}
    states: dict[int, dict[str, Tensor]] = {}
    with safe_open(files["optimizer.safetensors"], "pt") as stored:
        for entry in stored.keys():  # noqa: SIM118 (safe_open is no mapping)
            if not entry.startswith(_RNG):
                name, _, key = entry.rpartition("/")
                states.setdefault(by_name[name], {})[key] = stored.get_tensor(entry)
        torch.set_rng_state(stored.get_tensor(f"{_RNG}cpu"))
        if model.device.type == "cuda" and f"{_RNG}cuda" in set(stored.keys()):
            torch.cuda.set_rng_state(stored.get_tensor(f"{_RNG}cuda"), model.device)
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    return json.loads(files["state.json"].read_text())


def publish_policy(model: PreTrainedModel, previous: Path, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write `model` as an ordinary Hugging Face folder that differs from `previous` in its weights only.

    Weights are safetensors in `dtype` (None: as they are; the model itself is converted, so it is the one that
    was published). Everything else (tokenizer, chat template, generation defaults) is copied byte for byte;
    config.json too, except that its dtype names that of the weights.
    """
    if dtype is not None:
        model.to(dtype)  # type: ignore[arg-type]
    model.generation_config = GenerationConfig()  # what a hub model brings may fail the check made on saving
    model.save_pretrained(folder, max_shard_size="4GB")
    for written in folder.iterdir():
        if not _holds_weights(written.name):
            written.unlink()
    for source in sorted(p for p in previous.rglob("*") if p.is_file()):
        target = folder / source.relative_to(previous)
        if not _holds_weights(source.name) and source.name != "config.json":
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    config = json.loads((previous / "config.json").read_text())
    _set_dtype(config, str(model.dtype).removeprefix("torch."))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _holds_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".gguf", ".pth", ".pt"))


def _set_dtype(config: dict[str, Any], name: str) -> None:
    """`dtype` is what transformers 5 writes, `torch_dtype` what older versions read; parts of a model repeat it."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("dtype", "torch_dtype"):
            if key in part:
                part[key] = name
    config.setdefault("dtype", name)
