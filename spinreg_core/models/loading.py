"""Load a policy from a folder: number format, attention implementation, no dropout.

Leaves out: log-probabilities (`logprobs/`), sharded loading (`fsdp.py`).
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
    """Number format of the weights that are trained: float32 for `mixed` and `fp32`, bfloat16 for `bf16`."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def load_policy(
    folder: str | Path, precision: Precision, device: str | torch.device, *, more: Mapping[str, Any] | None = None
) -> PreTrainedModel:
    """The causal language model in a Hugging Face folder, ready for `answer_logprobs`, in `master_dtype`.

    Only safetensors are read and no code from the folder is run. Every dropout rate is zero, so training mode and
    evaluation mode compute the same. Attention is SDPA where the architecture has it, and eager for models that cap
    attention logits (Gemma 2), because SDPA would leave the cap out without saying so. `more`: further arguments of
    `from_pretrained` (`quantize.loading`). Raises BadInput for a folder that cannot be loaded.
    """
    return load_with_info(folder, precision, device, more=more)[0]


def load_with_info(
    folder: str | Path, precision: Precision, device: str | torch.device, *, more: Mapping[str, Any] | None = None
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """`load_policy`, and what transformers tells of the loading (`output_loading_info`)."""
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
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **arguments | dict(more or {}),
        )
    model: PreTrainedModel = loaded[0]
    # transformers fills such tensors with random numbers and goes on: another policy at every loading.
    absent = sorted([*loaded[1]["missing_keys"], *(str(key[0]) for key in loaded[1]["mismatched_keys"])])
    if absent:
        raise BadInput(
            f"policy folder {folder}", f"no usable weights for {len(absent)} tensors ({', '.join(absent[:3])}, ...)",
            "weights for every tensor of the architecture its config.json names",
        )  # fmt: skip
    if not more:  # else it is where it was asked to be
        model.to(device)  # type: ignore[arg-type]
    return without_dropout(model), loaded[1]


@contextmanager
def loading_errors_as_bad_input(folder: str | Path) -> Iterator[None]:
    """What transformers raises for a folder it cannot load, as BadInput."""
    try:
        yield
    except (
        OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError, StrictDataclassError
    ) as error:  # fmt: skip
        raise BadInput(
            f"policy folder {folder}",
            first_line(error),
            "a Hugging Face causal language model with safetensors weights",
        ) from error


def architecture(folder: str | Path) -> tuple[Any, dict[str, Any]]:
    """A folder's configuration without dropout, and what the model is to be made with besides."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    _zero_dropout(config)
    return config, {"attn_implementation": "eager"} if _caps_attention(config) else {}


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """The model in evaluation mode, its dropout layers at rate zero: some take theirs from nowhere in the config."""
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
