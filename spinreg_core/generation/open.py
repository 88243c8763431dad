"""Open the engine that a configuration names. Leaves out: what an engine must offer (`engine.py`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spinreg_core.config import EngineName, GenerationConfig, ResourcesConfig
from spinreg_core.errors import BadInput
from spinreg_core.generation.engine import Engine


def open_engine(
    name: EngineName,
    policies: Sequence[Path],
    generation: GenerationConfig,
    resources: ResourcesConfig,
    *,
    pad_id: int,
    weights: Sequence[float] = (1.0,),
    longest: int | None = None,
    loaded: dict[Path, Any] | None = None,
) -> Engine:
    """Load a policy folder into an engine, or several with the weights of their token-level mixture (hf only).

    `longest`: tokens of the longest prompt plus max_new_tokens, for which vllm plans its KV cache (unset: the
    model's whole context). `loaded`: models by folder, which hf takes instead of loading them again, and to which it
    adds what it loads; whoever holds them decides how long they stay. Raises BadInput for a folder, engine or device
    that cannot be used.
    """
    if name == "hf":
        from spinreg_core.generation.hf import HfEngine

        return HfEngine.open(policies, weights, generation, resources, pad_id=pad_id, loaded=loaded)
    if len(policies) > 1:
        raise BadInput("generation.engine", f"{name} for a mixture of {len(policies)} policies", "hf")
    if importlib.util.find_spec("vllm") is None:
        raise BadInput("generation.engine", "vllm, which is not installed here", "hf, or `pip install spinreg[gpu]`")
    from spinreg_core.generation.vllm import VllmEngine

    return VllmEngine(policies[0], generation, resources, longest=longest)
