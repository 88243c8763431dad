"""Loading of a policy from a folder.

Decides: the number format of weights, the attention implementation, and that dropout is off.
Leaves out: log-probabilities (`logprobs`), sharded loading (`fsdp`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from spinreg_core.errors import BadInput
from spinreg_core.formatting import first_line

Precision = Literal["mixed", "bf16", "fp32"]


def master_dtype(precision: Precision) -> torch.dtype:
    """Return the number format of trained weights: float32 for `mixed` and `fp32`, bfloat16 for `bf16`."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def load_policy(
    folder: str | Path, precision: Precision, device: str | torch.device, *, more: Mapping[str, Any] | None = None
) -> PreTrainedModel:
    """Load the causal language model of a Hugging Face folder, ready for `answer_logprobs`, in `master_dtype`.

    Only safetensors are read, and no code from the folder is run. Every dropout rate is zero, so that training mode and
    evaluation mode compute the same. Attention is SDPA where the architecture supports it. Models that cap attention
    logits (Gemma 2) use eager attention, because SDPA would silently ignore the cap. `more`: further arguments of
    `from_pretrained` (`load_quantized`). Raises BadInput for a folder that cannot be loaded.
    """
    return load_and_list_unknown(folder, precision, device, more=more)[0]


def load_and_list_unknown(
    folder: str | Path, precision: Precision, device: str | torch.device, *, more: Mapping[str, Any] | None = None
) -> tuple[PreTrainedModel, list[str]]:
    """Return the model of `load_policy`, and the names of tensors in its files that the architecture does not know."""
    with loading_errors_as_bad_input(folder):
        config, arguments = architecture(folder)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=master_dtype(precision),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            # Refused below, with their names.
            ignore_mismatched_sizes=True,
            **arguments | dict(more or {}),
        )
    model: PreTrainedModel = loaded[0]
    report = loaded[1]
    # transformers fills such tensors with random numbers: every loading would give another policy.
    absent = sorted([*report["missing_keys"], *(str(key[0]) for key in report["mismatched_keys"])])
    if absent:
        raise BadInput(
            f"policy folder {folder}",
            f"has no usable weights for {len(absent)} tensors ({', '.join(absent[:3])}, ...)",
            "weights for every tensor of the architecture in its config.json",
        )  # fmt: skip
    # Further arguments place the model themselves (device_map).
    if not more:
        model.to(device)  # type: ignore[arg-type]
    return without_dropout(model), sorted(report["unexpected_keys"])


@contextmanager
def loading_errors_as_bad_input(folder: str | Path) -> Iterator[None]:
    """Raise errors of transformers for a folder that it cannot load as BadInput."""
    try:
        yield
    except (
        OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError, StrictDataclassError
    ) as error:  # fmt: skip
        raise BadInput(
            f"policy folder {folder}",
            f"cannot be loaded ({first_line(error)})",
            "a Hugging Face causal language model with safetensors weights",
        ) from error


def architecture(folder: str | Path) -> tuple[Any, dict[str, str]]:
    """Return the configuration of a folder without dropout and router logits, and more arguments for its model."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    _zero_dropout(config)
    # The loss has no balance term for experts, and transformers cannot compute it for a padded batch of answers.
    for part in (config, config.get_text_config()):
        if getattr(part, "output_router_logits", False):
            part.output_router_logits = False
    return config, {"attn_implementation": "eager"} if _caps_attention(config) else {}


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model in evaluation mode with dropout layers at rate zero.

    Some architectures have dropout rates that are not in the configuration.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    return model.eval()


def _zero_dropout(config: Any) -> None:
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for name, value in list(vars(part).items()):
            if ("drop" in name or "jitter" in name) and isinstance(value, float):
                setattr(part, name, 0.0)


def _caps_attention(config: Any) -> bool:
    text = config.get_text_config()
    return bool(getattr(text, "attn_logit_softcapping", None) or getattr(text, "attn_logit_softcap", None))
