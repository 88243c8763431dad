"""A frozen base in 4 or 8 bits under a LoRA adapter (bitsandbytes).

Decides: the formats, and that a run's base model is what is left of it in that format. Leaves out: loading
(`logprobs/sequence.py`), the adapter (`lora.py`).

A base kept in few bits is another model than the one it was made of. So that reference, samples and the start of
training are one policy, the run's base object holds the rounded weights, written out in full (`round_weights`).
To round them again changes no bit: of every block the largest number stays what it is, and the others lie on the
format's levels already.
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
    """Raise BadInput where bitsandbytes is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise BadInput("training.lora_quantize", f"{bits}, and no bitsandbytes", "`pip install spinreg[quantize]`")


def load_quantized(folder: Path, precision: Precision, device: torch.device, bits: Bits) -> PreTrainedModel:
    """`load_policy` with every linear map but the vocabulary projection in that format, frozen. Raises BadInput.

    4bit is NF4 in blocks of 64 with float32 scales (Dettmers et al., arXiv 2305.14314, without double quantisation,
    which would not survive a second rounding); 8bit is int8 by rows (LLM.int8, arXiv 2208.07339), which rounds
    activations too.
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
            # Else weights are repacked for bfloat16 as soon as an input needs no gradient, the first layer's say.
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    return model


def round_weights(source: Path, folder: Path, bits: Bits, device: torch.device) -> None:
    """Write the weights of a policy folder as they are after rounding to `bits`, in float32: what the few bits stand
    for is not always a number that bfloat16 has."""
    require_library(bits)
    chosen = {f"{name}.weight" for name in _linear_names(source)}

    def change(name: str, value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        return _rounded(value.to(device), bits).cpu() if name in chosen else value.float()

    rewrite(source, change, folder, Ranks(device))


def _linear_names(folder: Path) -> set[str]:
    """What transformers hands to bitsandbytes: every linear map but the vocabulary projection."""
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
