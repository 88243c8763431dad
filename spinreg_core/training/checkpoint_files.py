"""Weights on disk: step checkpoints to resume from, and the policy that a round publishes.

Decides: the contents of a checkpoint (safetensors and JSON, never pickle) and of a published policy folder.
Leaves out: when and where they are written (`stages`, `training.step_checkpoints`), the loop (`training.trainer`).

torch.distributed.checkpoint (DCP) writes a checkpoint: every rank its own share (`shard-00001-...safetensors`). Any
number of ranks can read it. Its tensors are `weights/<parameter>` (trained master weights),
`optimizer/<parameter>/<name>` and `rng/<device>`; everything else is in `state.json`.
"""

from __future__ import annotations

import json
import shutil
import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from transformers import GenerationConfig, PreTrainedModel

from spinreg_core.config import TrainingConfig
from spinreg_core.errors import Damaged
from spinreg_core.models.fsdp import rewrite, save_weights
from spinreg_core.models.lora import adapter_tensors, targets_of, updates, write_adapter
from spinreg_core.runtime.distributed import Ranks

# DCP warns about a single process, which is intended here. It warns in a thread of its own, which a context manager
# around the call would not reach.
warnings.filterwarnings("ignore", "torch.distributed is disabled")


def start_checkpoint(
    folder: Path,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    state: str,
    ranks: Ranks,
    group: dist.ProcessGroup | None = None,
) -> Future[Any]:
    """Copy a checkpoint to host memory, and return while a thread writes it into `folder`.

    Args:
        state: the text of `state.json`.
        group: a gloo group for this checkpoint alone; no other collective may run over it until the future is done.

    Returns:
        A future that is done when all ranks have written their shares, and that raises the error of any of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if ranks.first:
        (folder / "state.json").write_text(state)
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    begun = dcp.async_save(
        _tensors(model, optimizer), storage_writer=writer, process_group=group, no_dist=ranks.size == 1
    )
    assert isinstance(begun, Future)
    return begun


def own_files(folder: Path, ranks: Ranks) -> list[Path]:
    """Return the files of a finished checkpoint that this rank wrote; ranks of a node may share the folder."""
    return sorted([*folder.glob(f"shard-{ranks.rank + 1:05d}-*"), *([folder / "state.json"] if ranks.first else [])])


def _tensors(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {"rng/cpu": torch.get_rng_state()}
    if model.device.type == "cuda":
        found["rng/cuda"] = torch.cuda.get_rng_state(model.device)
    for name, parameter in _trained(model).items():
        found[f"weights/{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"optimizer/{name}/{key}"] = value.detach()
    return found


def _trained(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    # `named_parameters` names a tied weight once.
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def load_checkpoint(folder: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer, ranks: Ranks) -> str:
    """Put a checkpoint's weights, optimiser state and random number generators in place. Returns its `state`.

    `folder` holds the files of all ranks that wrote it. The optimiser must be fresh and made for this model.

    Raises:
        Damaged: weights are missing or have another shape.
    """
    parameters = _trained(model)
    stored = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    sizes = {name: tuple(getattr(entry, "size", ())) for name, entry in stored.items()}
    tensors: dict[str, Tensor] = {}
    states: dict[str, dict[str, Tensor]] = {}
    for name, parameter in parameters.items():
        found = sizes.get(f"weights/{name}")
        if found != tuple(parameter.shape):
            raise Damaged(f"checkpoint weight {name}: found {found}; expected shape {tuple(parameter.shape)}")
        tensors[f"weights/{name}"] = parameter.detach()
    for entry, size in sizes.items():
        kind, _, rest = entry.partition("/")
        if kind == "rng":
            tensors[entry] = torch.zeros(size, dtype=torch.uint8)
        elif kind == "optimizer":
            name, _, key = rest.rpartition("/")
            value = torch.zeros_like(parameters[name].detach()) if size else torch.zeros(())
            tensors[entry] = states.setdefault(name, {})[key] = value
    # DCP reads into the given tensors, so those of the model receive their values in place.
    dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=ranks.size == 1)
    numbers = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    by_number = {numbers[id(parameters[name])]: state for name, state in states.items()}
    optimizer.load_state_dict({"state": by_number, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(tensors["rng/cpu"])
    if model.device.type == "cuda" and "rng/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng/cuda"], model.device)
    return (folder / "state.json").read_text()


def publish_adapted(
    model: PreTrainedModel, base: Path, folder: Path, training: TrainingConfig, model_name: str, ranks: Ranks
) -> None:
    """Write a LoRA policy twice: `adapter/` for peft and vLLM, and `policy/` with the adapter merged into the base.

    The merged weights are float32, so that scoring sees the policy that the next round starts from. Each of several
    ranks writes its share into its own `folder`.
    """
    tensors = adapter_tensors(model)
    added = updates(tensors, training)

    def summed(name: str, weight: Tensor) -> Tensor:
        if name in added:
            b, a = added[name]
            weight = weight.float() + b @ a
        return weight.float() if weight.is_floating_point() else weight

    rewrite(base, summed, folder / "policy", ranks)
    if ranks.first:
        write_adapter(tensors, training, folder / "adapter", model_name=model_name, targets=targets_of(model))
        copy_rest(base, folder / "policy", torch.float32)


def publish_policy(
    model: PreTrainedModel, previous: Path, folder: Path, dtype: torch.dtype | None = None, ranks: Ranks | None = None
) -> None:
    """Write `model` as an ordinary Hugging Face folder that differs from `previous` in its weights only.

    Weights are safetensors in `dtype` (None: unchanged). Everything else (tokenizer, chat template, generation
    defaults) is copied byte for byte; config.json too, except for its dtype. Each of several ranks writes its share
    into its own `folder`.
    """
    if ranks is not None and ranks.size > 1:
        save_weights(model, folder, ranks, dtype)
        if not ranks.first:
            return
    else:
        if dtype is not None:
            model.to(dtype)  # type: ignore[arg-type]
        # transformers checks the generation settings on saving, and some models of the hub fail that check.
        model.generation_config = GenerationConfig()
        model.save_pretrained(folder, max_shard_size="4GB")
        for written in folder.iterdir():
            if not _holds_weights(written.name):
                written.unlink()
    copy_rest(previous, folder, dtype or model.dtype)


def copy_rest(previous: Path, folder: Path, dtype: torch.dtype) -> None:
    """Copy a policy folder without its weights; config.json gets `dtype`."""
    for source in sorted(p for p in previous.rglob("*") if p.is_file()):
        target = folder / source.relative_to(previous)
        if not _holds_weights(source.name) and source.name != "config.json":
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    text = _with_dtype((previous / "config.json").read_text(), str(dtype).removeprefix("torch."))
    (folder / "config.json").write_text(text)


def _holds_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".gguf", ".pth", ".pt"))


def _with_dtype(text: str, name: str) -> str:
    """Return a config.json with another dtype, which parts of a model repeat.

    transformers 5 writes `dtype`; older versions read `torch_dtype`.
    """
    config = json.loads(text)
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("dtype", "torch_dtype"):
            if key in part:
                part[key] = name
    config.setdefault("dtype", name)
    return json.dumps(config, indent=2) + "\n"
