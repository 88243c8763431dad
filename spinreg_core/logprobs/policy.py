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
    """Load a policy on one device, or sharded over the ranks.

    change: may add modules to the model, an adapter say; the caller fills them with numbers.

    Raises:
        BadInput: the folder is not a policy that can be loaded.
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
    # DCP reads into the given tensors in place; every rank reads its own shard only.
    dcp.load(weights, storage_reader=HuggingFaceStorageReader(str(folder)))
    return compiled(without_dropout(model), ranks)


def compiled(model: PreTrainedModel, ranks: Ranks) -> PreTrainedModel:
    """Compile the model's transformer layers where `ranks.compile` is set: one graph for all layers and lengths.

    A layer that cannot be compiled runs uncompiled.
    """
    if ranks.compile:
        # The probe for packing runs first, so that its shapes are not compiled.
        packs(model)
        torch._dynamo.config.suppress_errors = True
        # Training and scoring, number formats and (with several ranks) hooks each need a variant of the graph.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
        for layer in transformer_layers(model):
            layer.compile(dynamic=True)
    return model
