"""Policies whose weights are sharded over ranks (FSDP2), read from and written to ordinary Hugging Face folders.

Decides: the units that are gathered (each transformer layer; embeddings, last norm and projection), their number
format, and that no rank ever holds all weights.
Leaves out: ranks (`runtime`), the loss, its gradient and checkpoints (`training`).

With `mixed`, weights are gathered and used in bfloat16, and gradients are reduced in float32 onto float32 weights.
Then embeddings and the residual stream are bfloat16 too; on one device they stay float32.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from spinreg_core.errors import BadInput
from spinreg_core.models.loading import Precision, architecture, loading_errors_as_bad_input, master_dtype
from spinreg_core.models.lora import base_parameters
from spinreg_core.runtime.distributed import Ranks

# Size of one safetensors file. A rank holds one file at a time while it writes a policy.
_FILE_BYTES = 4 * 10**9


def empty_policy(folder: str | Path, precision: Precision) -> PreTrainedModel:
    """Return the model of a policy folder with meta parameters, which hold no numbers. Raises BadInput."""
    with loading_errors_as_bad_input(folder):
        config, arguments = architecture(folder)
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=master_dtype(precision), trust_remote_code=False, **arguments
            )
    model.tie_weights()
    return model


def shard(model: PreTrainedModel, ranks: Ranks, precision: Precision) -> None:
    """Shard the parameters of a model over the ranks, in place. Then call it through `model.as_forward`."""
    kept: dict[str, Any] = {"mesh": ranks.mesh}
    if precision == "mixed":
        kept["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in transformer_layers(model):
        fully_shard(layer, **kept)
    fully_shard(model, **kept)

    # FSDP gathers weights only inside forward methods, so that a loss computed elsewhere needs one of its own.
    def as_forward(model: nn.Module, function: Callable[..., Any], *arguments: object) -> Any:
        return function(model, *arguments)

    model.as_forward = MethodType(as_forward, model)  # type: ignore[assignment]
    register_fsdp_forward_method(model, "as_forward")


def transformer_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the transformer layers: the modules that transformers itself keeps on one device."""
    names = set(model._no_split_modules or ())
    found = {name: m for name, m in model.base_model.named_modules() if type(m).__name__ in names}
    return [m for name, m in found.items() if not any(name.startswith(f"{outer}.") for outer in found)]


def _stored(folder: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """Return file and shape of every tensor in a policy folder."""
    found: dict[str, tuple[Path, tuple[int, ...]]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with loading_errors_as_bad_input(folder), safe_open(path, "pt") as file:
            found |= {name: (path, tuple(file.get_slice(name).get_shape())) for name in file.keys()}  # noqa: SIM118
    return found


def require_weights(model: PreTrainedModel, folder: Path) -> None:
    """Raise BadInput if a parameter is not in the files of a folder under its own name and with its shape."""
    stored = {name: shape for name, (_, shape) in _stored(folder).items()}
    absent = [name for name, p in base_parameters(model).items() if stored.get(name) != tuple(p.shape)]
    if absent:
        raise BadInput(
            f"policy folder {folder}",
            f"has no usable weights for {len(absent)} tensors ({', '.join(absent[:3])}, ...) under the names that "
            "transformers gives them",
            "weights for every tensor of the architecture in its config.json; if transformers renames weights while "
            "loading, only one process that trains all weights can read them (resources.processes: 1, no "
            "training.lora_rank)",
        )


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the whole tensor, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_shard(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def save_weights(model: PreTrainedModel, folder: Path, ranks: Ranks, dtype: torch.dtype | None) -> None:
    """Write the weights of a sharded model, each rank its share of the files. Every rank must call it."""
    # A tied weight appears once.
    parameters = dict(model.named_parameters())
    numbers = {name: p.numel() * (p.dtype if dtype is None else dtype).itemsize for name, p in parameters.items()}

    def tensor(name: str, own: bool) -> Tensor | None:
        # Every rank takes part, because each holds a part of the tensor.
        found = full_tensor(parameters[name].detach())
        return found.to(device="cpu", dtype=dtype or found.dtype) if own else None

    _save(numbers, tensor, folder, ranks)


def rewrite(source: Path, change: Callable[[str, Tensor], Tensor], folder: Path, ranks: Ranks) -> None:
    """Write the weights of a policy folder as `change(name, weight)` returns them, in at most four bytes a number.

    Memory holds the weights of one file. Each rank writes its share without the others.
    """
    stored = _stored(source)

    def tensor(name: str, own: bool) -> Tensor | None:
        if not own:
            return None
        with safe_open(stored[name][0], "pt") as file:
            return change(name, file.get_tensor(name))

    _save({name: 4 * math.prod(shape) for name, (_, shape) in stored.items()}, tensor, folder, ranks)


def _save(numbers: dict[str, int], tensor: Callable[[str, bool], Tensor | None], folder: Path, ranks: Ranks) -> None:
    """Write tensors as safetensors files of at most 4 GB, with their index. `numbers`: bytes by name.

    The ranks take turns: each holds one file at a time and writes it into its own `folder`. Every rank calls
    `tensor(name, own)` for all names in the same order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files: list[list[str]] = [[]]
    size = 0
    for name, count in numbers.items():
        if files[-1] and size + count > _FILE_BYTES:
            files.append([])
            size = 0
        files[-1].append(name)
        size += count
    names = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    if len(files) == 1:
        names = ["model.safetensors"]
    for i, (file, members) in enumerate(zip(names, files, strict=True)):
        own = i % ranks.size == ranks.rank
        held: dict[str, Tensor] = {}
        for name in members:
            found = tensor(name, own)
            if found is not None:
                held[name] = found.contiguous()
        if own:
            save_file(held, folder / file, metadata={"format": "pt"})
    if ranks.first and len(files) > 1:
        index = {
            "metadata": {"total_size": sum(numbers.values())},
            "weight_map": {name: file for file, members in zip(names, files, strict=True) for name in members},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
