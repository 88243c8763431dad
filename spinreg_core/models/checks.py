"""What the weights of a user's model must be before a run begins with it.

Decides: that they are plain floating-point numbers, fit config.json (neither fewer layers nor more), and are finite;
and which tensors that the architecture does not know are told of instead of refused. Leaves out: which files a model
folder has (`source.py`), loading it for a purpose (`logprobs/sequence.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from spinreg_core.errors import BadInput
from spinreg_core.formatting import first_line
from spinreg_core.models.loading import architecture, load_with_info, loading_errors_as_bad_input
from spinreg_core.models.source import model_files

_PLAIN = ("F64", "F32", "F16", "BF16")  # number formats of weights, as safetensors calls them
_TOLD = 10  # names in one warning


def require_loadable(folder: Path) -> None:
    """Raise BadInput for a folder that `load_policy` would refuse, or whose weights are not plain floating-point
    numbers or are of more layers than its config.json names, without reading them: from the heads of its files.

    Tensors that the architecture does not know are printed by name, but for those that transformers lists as left out
    on purpose.
    """
    names = _plain_tensors(folder)
    with loading_errors_as_bad_input(folder):
        config, _ = architecture(folder)
    text = config.get_text_config()
    layers = getattr(text, "num_hidden_layers", None)
    if isinstance(layers, int):
        # Every layer has a tensor of its own; a model of millions of layers would take hours to be made.
        field = text.attribute_map.get("num_hidden_layers", "num_hidden_layers")
        if not 1 <= layers <= len(names):
            raise BadInput(f"policy folder {folder}", f"{field} {layers} in config.json, and {len(names)} tensors",
                           "the number of layers that there are weights for")  # fmt: skip
    model, info = load_with_info(folder, "fp32", "meta", more={"device_map": "meta"})
    unknown = sorted(info["unexpected_keys"])
    beyond = _beyond(model, unknown)
    if beyond:
        where, there, configured = beyond
        raise BadInput(f"policy folder {folder}", f"weights of {where}.{there}, and {configured} such by config.json",
                       "a config.json for all of them: the model would be cut short")  # fmt: skip
    if unknown:
        more = f" and {len(unknown) - _TOLD} more" if len(unknown) > _TOLD else ""
        print(f"warning: {type(model).__name__} knows no tensors of these names, which take no part: "
              f"{', '.join(unknown[:_TOLD])}{more}", flush=True)  # fmt: skip


def require_finite(folder: Path) -> None:
    """Raise BadInput for a model with NaN or an infinity in a tensor, by name. Reads all weights once."""
    for path in model_files(folder):
        if path.suffix != ".safetensors":
            continue
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                # Both ends of the range are NaN where anything is: one pass, without a copy.
                ends = torch.stack(tensor.aminmax()) if tensor.is_floating_point() and tensor.numel() else tensor
                if ends is not tensor and not ends.isfinite().all():
                    raise BadInput("model", f"{int((~tensor.isfinite()).sum())} of {tensor.numel()} numbers of {name} "
                                   f"in {path} NaN or infinite", "finite weights")  # fmt: skip


def _plain_tensors(folder: Path) -> set[str]:
    """The names of all tensors in a folder. Raises BadInput."""
    names: set[str] = set()
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise BadInput(f"policy folder {folder}", f"{path.name}, which cannot be read ({first_line(error)})",
                           "whole safetensors (was a download cut, or left as a pointer of Git LFS?)"
                           ) from None  # fmt: skip
        strange = sorted(name for name, kind in kinds.items() if name.endswith(".weight") and kind not in _PLAIN)
        if strange:
            raise BadInput(f"policy folder {folder}", f"{strange[0]} in {kinds[strange[0]]}",
                           "weights in bfloat16, float16 or float32")  # fmt: skip
        names.update(kinds)
    return names


def _beyond(model: PreTrainedModel, unknown: Iterable[str]) -> tuple[str, int, int] | None:
    """The first list of the model's parts that the weights have more of than the model has: its name, the number of
    one that is too many, how many the model has. Layers that predict tokens further ahead (DeepSeek-V3, section 2.2,
    and its like number them on after the last layer) are no part of the model."""
    ahead = {name.removesuffix("eh_proj.weight") for name in unknown if name.endswith(".eh_proj.weight")}
    for name in unknown:
        for found in re.finditer(r"\.(\d+)\.", name):
            if name[: found.end()] in ahead:
                break
            for where in (name[: found.start()], f"{model.base_model_prefix}.{name[: found.start()]}"):
                try:
                    part = model.get_submodule(where)
                except AttributeError:
                    continue
                if isinstance(part, nn.ModuleList) and int(found[1]) >= len(part):
                    return where, int(found[1]), len(part)
    return None
