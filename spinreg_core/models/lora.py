"""LoRA: a policy that is the base model plus a low-rank adapter, trained while the base stays as it is.

Decides: which matrices get one (through peft), how it starts, its files, and how base and adapter become the published
policy. Leaves out: the loop (`training/trainer.py`), how weights are spread (`fsdp.py`), whose scores are the
reference.

One adapter is carried through all rounds: policy n is the base plus the adapter of round n,
W_0 + (lora_alpha / rank) B A (Hu et al., arXiv 2106.09685, section 4.1). No policy is ever had by switching an adapter
off: what is scored, sampled and referred to is the merged folder that a round published, and round n + 1 starts from
its adapter.
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
from spinreg_core.errors import BadInput, Damaged

FILE = "adapter_model.safetensors"
_NAME = "default"  # of the one adapter


def add_adapter(model: PreTrainedModel, training: TrainingConfig) -> None:
    """Put an adapter, its numbers still to be set, on the matrices of `training.lora_targets`; freeze all else.

    Adapters are float32 whatever the precision. Raises BadInput for targets that are not there, and for embeddings.
    """
    from peft import LoraConfig, inject_adapter_in_model  # here: only those who use LoRA need it
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
        raise BadInput("training.lora_targets", ", ".join(absent), f"some of {', '.join(sorted(found))}")
    meta = any(p.device.type == "meta" for p in model.parameters())
    inject_adapter_in_model(wanted, model, adapter_name=_NAME, low_cpu_mem_usage=meta)
    if any(isinstance(m, BaseTunerLayer) for m in (model.get_output_embeddings(), model.get_input_embeddings())):
        raise BadInput(
            "training.lora_targets",
            f"{names}, the vocabulary projection among them",
            "matrices of the transformer layers",
        )
    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(layer := module.get_base_layer(), nn.Linear):
            raise BadInput("training.lora_rank", f"a model with matrices of type {type(layer).__name__}",
                           "one with plain linear layers; merging is known for those only")  # fmt: skip
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            _set(model, name, parameter.detach().float())


def _set(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, nn.Parameter(value))


def start_adapter(model: PreTrainedModel, seed: int) -> None:
    """The numbers of a fresh adapter: A uniform in ±1/sqrt(inputs) (peft's), B zero, so the policy is the base.

    They depend on seed and name alone, so the same on any number of ranks.
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
    """Put a written adapter in place. `alone`: there are no other ranks. Raises Damaged where it does not fit."""
    try:
        with safe_open(folder / FILE, "pt") as file:
            stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise Damaged(f"adapter {folder}: found {FILE} that cannot be read ({error}); expected an adapter") from None
    tensors = {_peft_name(name): parameter.detach() for name, parameter in _numbers(model).items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if differing := sorted(name for name in wanted.keys() | stored.keys() if wanted.get(name) != stored.get(name)):
        name = differing[0]
        found, fits = stored.get(name, "nothing"), wanted.get(name, "nothing: the base has no such matrix")
        raise Damaged(f"adapter {folder}: found {found} as the shape of {name}; expected {fits}")
    dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=alone)


def adapter_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """All numbers of the adapter on the CPU, by peft's names. Every rank must call it."""
    return {
        _peft_name(name): (p.full_tensor() if isinstance(p, DTensor) else p).detach().cpu().contiguous()
        for name, p in _numbers(model).items()
    }


def write_adapter(
    tensors: dict[str, Tensor], training: TrainingConfig, folder: Path, *, model_name: str, targets: set[str]
) -> None:
    """A folder that `peft.PeftModel.from_pretrained(base, folder)` and vLLM's LoRARequest read."""
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
    config["target_modules"] = sorted(config["target_modules"])  # peft holds a set, in any order
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def targets_of(model: PreTrainedModel) -> set[str]:
    """Last parts of the names of the matrices that carry the adapter."""
    return {name.partition(".lora_")[0].rpartition(".")[2] for name in _numbers(model)}


def updates(tensors: dict[str, Tensor], training: TrainingConfig) -> dict[str, tuple[Tensor, Tensor]]:
    """By weight name of the base: (B times lora_alpha / rank, A); their product is what the adapter adds."""
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
    """A model's parameters without an adapter's, by the names they have without it."""
    own = _numbers(model)
    return {name.replace(".base_layer.", "."): p for name, p in model.named_parameters() if name not in own}


def _numbers(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if ".lora_A." in name or ".lora_B." in name}


def _peft_name(name: str) -> str:
    return "base_model.model." + name.replace(f".{_NAME}.", ".")
