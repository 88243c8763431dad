"""Checks of the weights of a user's model, before a run starts with it.

Decides: that weights are plain, finite floating-point numbers that fit config.json, with neither fewer layers nor more.
Tensors that the architecture does not know are printed, not refused.
Leaves out: the files of a model folder (`source`), loading (`loading`).
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
from spinreg_core.models.loading import architecture, load_and_list_unknown, loading_errors_as_bad_input
from spinreg_core.models.source import model_files

# Number formats of weights, in the terms of safetensors.
_PLAIN = ("F64", "F32", "F16", "BF16")
# Names in one warning.
_LISTED = 10


def require_loadable(folder: Path) -> None:
    """Raise BadInput for a folder that `load_policy` would refuse, without reading its weights.

    Also refuse weights that are not plain floating-point numbers or belong to more layers than config.json has. Print
    the names of tensors that the architecture does not know, except those that transformers ignores on purpose.
    """
    names = _plain_tensors(folder)
    with loading_errors_as_bad_input(folder):
        config, _ = architecture(folder)
    text = config.get_text_config()
    layers = getattr(text, "num_hidden_layers", None)
    if isinstance(layers, int):
        # Every layer has at least one tensor. Building a model of millions of layers would take hours.
        field = text.attribute_map.get("num_hidden_layers", "num_hidden_layers")
        if not 1 <= layers <= len(names):
            raise BadInput(f"policy folder {folder}", f"has {field} {layers} in config.json, but {len(names)} tensors",
                           "the number of layers that the weights have")  # fmt: skip
    model, unknown = load_and_list_unknown(folder, "fp32", "meta", more={"device_map": "meta"})
    beyond = _beyond(model, unknown)
    if beyond:
        where, there, configured = beyond
        raise BadInput(f"policy folder {folder}",
                       f"has weights of {where}.{there}, but config.json configures only {configured}",
                       "a config.json for all of them; otherwise the model would be cut short")  # fmt: skip
    if unknown:
        more = f" and {len(unknown) - _LISTED} more" if len(unknown) > _LISTED else ""
        print(f"warning: {type(model).__name__} does not know these tensors and ignores them: "
              f"{', '.join(unknown[:_LISTED])}{more}", flush=True)  # fmt: skip


def require_finite(folder: Path) -> None:
    """Raise BadInput that names the first tensor with NaN or infinity. Reads all weights once."""
    for path in model_files(folder):
        if path.suffix != ".safetensors":
            continue
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                # Minimum and maximum are NaN if any number is. This takes one pass and no copy.
                ends = torch.stack(tensor.aminmax()) if tensor.is_floating_point() and tensor.numel() else tensor
                if ends is not tensor and not ends.isfinite().all():
                    bad = int((~tensor.isfinite()).sum())
                    raise BadInput(f"model file {path}", f"has NaN or infinity in {bad} of {tensor.numel()} numbers of "
                                   f"{name}", "finite weights")  # fmt: skip


def require_honest_ties(folder: Path) -> None:
    """Raise BadInput if config.json ties the embeddings to a vocabulary projection that has other numbers.

    Versions of transformers differ in the one that they then use.
    """
    config, _ = architecture(folder)
    if not config.get_text_config().tie_word_embeddings:
        return
    places: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            places |= dict.fromkeys(file.keys(), path)
    if "lm_head.weight" not in places:
        return

    def tensor(name: str) -> torch.Tensor:
        with safe_open(places[name], "pt") as file:
            return file.get_tensor(name)

    head = tensor("lm_head.weight")
    embeddings = [name for name in places if name.endswith(("embed_tokens.weight", "wte.weight"))]
    if any(not torch.equal(head, tensor(name)) for name in embeddings):
        raise BadInput(f"model file {folder / 'config.json'}",
                       "has tie_word_embeddings, but lm_head.weight differs from the embeddings",
                       "tie_word_embeddings false, or no lm_head.weight")  # fmt: skip


def _plain_tensors(folder: Path) -> set[str]:
    """Return the names of all tensors in a folder. Raises BadInput."""
    names: set[str] = set()
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise BadInput(f"model file {path}", f"cannot be read ({first_line(error)})",
                           "a complete safetensors file (is it a partial download, or a pointer of Git LFS?)"
                           ) from None  # fmt: skip
        strange = sorted(name for name, kind in kinds.items() if name.endswith(".weight") and kind not in _PLAIN)
        if strange:
            raise BadInput(f"policy folder {folder}", f"has {strange[0]} in {kinds[strange[0]]}",
                           "weights in bfloat16, float16 or float32")  # fmt: skip
        names.update(kinds)
    return names


def _beyond(model: PreTrainedModel, unknown: Iterable[str]) -> tuple[str, int, int] | None:
    """Return the first module list with fewer entries than the weights: its name, a surplus index, its length.

    Layers for multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2) are numbered after the last layer.
    They are not part of the model.
    """
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
