"""Quantised base models in 4 or 8 bits under a LoRA adapter (bitsandbytes).

Decides: the formats, and that the base model of a run consists of the rounded weights.
Leaves out: loading (`loading`), the adapter (`lora`).

A quantised base is another model than its original. Reference, samples and the start of training must be one policy, so
the base object of a run holds the rounded weights in full precision (`round_weights`). Rounding them again changes no
bit: the largest number of each block stays as it is, and the others already lie on the levels of the format.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from spinreg_core.errors import BadInput
from spinreg_core.models.fsdp import empty_policy, rewrite
from spinreg_core.models.loading import Precision, load_policy
from spinreg_core.runtime.distributed import Ranks

Bits = Literal["4bit", "8bit"]


def require_library(bits: Bits) -> None:
    """Raise BadInput if bitsandbytes is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise BadInput("training.lora_quantize", f"is {bits}, but bitsandbytes is not installed",
                       "run `pip install spinreg[quantize]`")  # fmt: skip


def load_quantized(folder: Path, precision: Precision, device: torch.device, bits: Bits) -> PreTrainedModel:
    """Load a policy with every linear map except the vocabulary projection in `bits`, frozen. Raises BadInput.

    4bit is NF4 in blocks of 64 with float32 scales (Dettmers et al., arXiv 2305.14314). Double quantisation is off,
    because a second rounding would change it. 8bit is int8 by rows (LLM.int8, arXiv 2208.07339), which also rounds
    activations.
    """
    require_library(bits)
    compute = torch.float32 if precision == "fp32" else torch.bfloat16
    config = (
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
        if bits == "4bit"
        else BitsAndBytesConfig(load_in_8bit=True)
    )
    model = load_policy(folder, precision, device, more={"quantization_config": config, "device_map": {"": device}})
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Otherwise bitsandbytes repacks weights for bfloat16 if an input needs no gradient, as in the first layer.
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    return model


def round_weights(source: Path, folder: Path, bits: Bits, device: torch.device) -> None:
    """Write the weights of a policy folder in float32 after rounding to `bits`.

    Their levels are not always numbers that bfloat16 can represent.
    """
    require_library(bits)
    chosen = {f"{name}.weight" for name in _linear_names(source)}

    def change(name: str, value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        return _rounded(value.to(device), bits).cpu() if name in chosen else value.float()

    rewrite(source, change, folder, Ranks(device))


def _linear_names(folder: Path) -> set[str]:
    """Return the modules that transformers quantises: every linear map except the vocabulary projection."""
    model = empty_policy(folder, "fp32")
    head = model.get_output_embeddings()
    return {name for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


def _rounded(weight: Tensor, bits: Bits) -> Tensor:
    from bitsandbytes import functional

    if bits == "4bit":
        packed, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=False, quant_type="nf4")
        state.dtype = torch.float32
        return functional.dequantize_4bit(packed, state)
    packed, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
    return functional.int8_vectorwise_dequant(packed, scales).float()
