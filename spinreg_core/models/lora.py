"""LoRA: policies of a frozen base model and a trained low-rank adapter.

Decides: the matrices with an adapter (through peft), its initial numbers and its files, and the merged policy.
Leaves out: the training loop (`training`), sharding (`fsdp`).

One adapter runs through all rounds. Policy n is the base plus the adapter of round n, W_0 + (lora_alpha / rank) B A
(Hu et al., arXiv 2106.09685, section 4.1). Scoring, sampling and the reference use the merged folder that a round
published, never a model with its adapter switched off. Round n + 1 starts from the adapter of round n.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from spinreg_core.config import TrainingConfig
from spinreg_core.errors import BadInput, Damaged, problem_text

FILE = "adapter_model.safetensors"
# The name that peft gives the only adapter.
_NAME = "default"


def add_adapter(model: PreTrainedModel, training: TrainingConfig) -> None:
    """Add an uninitialised adapter to the matrices of `training.lora_targets`, and freeze everything else.

    Adapters are float32 in every precision. Raises BadInput for targets that the model lacks, and for embeddings.
    """
    # Only runs with LoRA need peft.
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    assert training.lora_rank is not None
    names = training.lora_targets
    wanted = LoraConfig(
        r=training.lora_rank,
        lora_alpha=training.lora_alpha,  # type: ignore[arg-type]
        target_modules=names if isinstance(names, str) else list(names),
        init_lora_weights=False,
    )
    found = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if isinstance(names, list) and (absent := sorted(set(names) - found)):
        raise BadInput("training.lora_targets", f"names {', '.join(absent)}, which the model does not have",
                       f"some of {', '.join(sorted(found))}")  # fmt: skip
    meta = any(p.device.type == "meta" for p in model.parameters())
    inject_adapter_in_model(wanted, model, adapter_name=_NAME, low_cpu_mem_usage=meta)
    if any(isinstance(m, BaseTunerLayer) for m in (model.get_output_embeddings(), model.get_input_embeddings())):
        raise BadInput(
            "training.lora_targets",
            f"is {names}, which includes the vocabulary projection",
            "matrices of the transformer layers",
        )
    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(layer := module.get_base_layer(), nn.Linear):
            raise BadInput("training.lora_rank", f"is set, but the model has matrices of type {type(layer).__name__}",
                           "a model with plain linear layers, the only ones that can be merged")  # fmt: skip
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            _set(model, name, parameter.detach().float())


def _set(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, nn.Parameter(value))


def start_adapter(model: PreTrainedModel, seed: int) -> None:
    """Initialise an adapter: A uniform in ±1/sqrt(inputs) as in peft, B zero, so that the policy is the base.

    The numbers depend on the seed and the names alone, and are equal on any number of ranks.
    """
    for name, parameter in _numbers(model).items():
        if ".lora_B." in name:
            parameter.detach().zero_()
            continue
        digest = hashlib.sha256(json.dumps(["spinreg adapter", seed, name]).encode()).digest()
        draw = torch.Generator().manual_seed(int.from_bytes(digest[:4]))
        value = (2 * torch.rand(parameter.shape, generator=draw) - 1) / math.sqrt(parameter.shape[1])
        if isinstance(parameter, DTensor):
            parameter.detach().copy_(
                distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
            )
        else:
            parameter.detach().copy_(value)


def read_adapter(model: PreTrainedModel, folder: Path, *, alone: bool) -> None:
    """Load the adapter of a folder. `alone`: there are no other ranks. Raises Damaged if it does not fit."""
    try:
        with safe_open(folder / FILE, "pt") as file:
            stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        problem = problem_text(f"adapter {folder}", f"has an unreadable {FILE} ({error})", "a complete adapter")
        raise Damaged(problem) from None
    tensors = {_peft_name(name): parameter.detach() for name, parameter in _numbers(model).items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if differing := sorted(name for name in wanted.keys() | stored.keys() if wanted.get(name) != stored.get(name)):
        name = differing[0]
        found, fits = stored.get(name, "no tensor"), wanted.get(name, "none, because the base has no such matrix")
        raise Damaged(problem_text(f"adapter {folder}", f"has shape {found} for {name}", f"{fits}"))
    dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=alone)


def adapter_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return all numbers of the adapter on the CPU, by peft's names. Every rank must call it."""
    return {
        _peft_name(name): (p.full_tensor() if isinstance(p, DTensor) else p).detach().cpu().contiguous()
        for name, p in _numbers(model).items()
    }


def write_adapter(
    tensors: dict[str, Tensor], training: TrainingConfig, folder: Path, *, model_name: str, targets: set[str]
) -> None:
    """Write a folder for `peft.PeftModel.from_pretrained(base, folder)` and vLLM's LoRARequest."""
    from peft import LoraConfig

    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    assert training.lora_rank is not None
    config = LoraConfig(
        r=training.lora_rank,
        lora_alpha=training.lora_alpha,  # type: ignore[arg-type]
        target_modules=sorted(targets),
        base_model_name_or_path=model_name,
        task_type="CAUSAL_LM",
        inference_mode=True,
    ).to_dict()
    # peft holds a set, whose order differs between processes.
    config["target_modules"] = sorted(config["target_modules"])
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def targets_of(model: PreTrainedModel) -> set[str]:
    """Return the last parts of the names of the matrices with an adapter."""
    return {name.partition(".lora_")[0].rpartition(".")[2] for name in _numbers(model)}


def updates(tensors: dict[str, Tensor], training: TrainingConfig) -> dict[str, tuple[Tensor, Tensor]]:
    """Return (B times lora_alpha / rank, A) by weight name of the base. The adapter adds their product."""
    assert training.lora_rank is not None
    scale = training.lora_alpha / training.lora_rank
    found = {}
    for name, value in tensors.items():
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            found[f"{module.removeprefix('base_model.model.')}.weight"] = (
                tensors[f"{module}.lora_B.weight"] * scale,
                value,
            )
    return found


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a model without those of the adapter, by their names without it."""
    own = _numbers(model)
    return {name.replace(".base_layer.", "."): p for name, p in model.named_parameters() if name not in own}


def _numbers(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if ".lora_A." in name or ".lora_B." in name}


def _peft_name(name: str) -> str:
    return "base_model.model." + name.replace(f".{_NAME}.", ".")
