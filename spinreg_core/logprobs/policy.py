"""Load a policy for scoring or training, on one rank or sharded over many, compiled where asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader
from transformers import PreTrainedModel

from spinreg_core.logprobs.sequence import packs
from spinreg_core.models.fsdp import empty_policy, require_weights, shard, transformer_layers
from spinreg_core.models.loading import Precision, load_policy, without_dropout
from spinreg_core.models.lora import base_parameters
from spinreg_core.runtime.distributed import Ranks


def load_for(
    ranks: Ranks,
    folder: str | Path,
    precision: Precision,
    change: Callable[[PreTrainedModel], None] = lambda model: None,
) -> PreTrainedModel:
    """`load_policy` on one device, or its like spread over the ranks. Raises BadInput.

    `change` may add modules to the model (an adapter); their numbers are the caller's to set.
    """
    if ranks.mesh is None:
        model = load_policy(folder, precision, ranks.device)
        change(model)
        return compiled(model, ranks)
    model = empty_policy(folder, precision)
    require_weights(model, Path(folder))
    change(model)
    buffers = {name: buffer.to(ranks.device) for name, buffer in model.named_buffers()}
    shard(model, ranks, precision)
    model.to_empty(device=ranks.device)
    for name, buffer in buffers.items():
        owner, _, attribute = name.rpartition(".")
        model.get_submodule(owner)._buffers[attribute] = buffer
    weights = {name: parameter.detach() for name, parameter in base_parameters(model).items()}
    dcp.load(weights, storage_reader=HuggingFaceStorageReader(str(folder)))  # into the tensors themselves
    return compiled(without_dropout(model), ranks)


def compiled(model: PreTrainedModel, ranks: Ranks) -> PreTrainedModel:
    """The model with its transformer layers compiled, where `ranks` say so: one graph for all layers and lengths.

    A layer that cannot be compiled runs as it is.
    """
    if ranks.compile:
        packs(model)  # found out before, so that what is tried there is not compiled
        torch._dynamo.config.suppress_errors = True
        # Training and scoring, formats and, with several ranks, hooks make one variant each.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
        for layer in transformer_layers(model):
            layer.compile(dynamic=True)
    return model
