"""Open the engine that a configuration names. Leaves out: the contract of engines (`generation.engine`)."""

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

    Args:
        longest: tokens of the longest prompt plus max_new_tokens, for vllm's KV cache (None: the model's context).
        loaded: models by folder. Engine hf uses them, and adds those that it loads; the caller frees them.

    Raises:
        BadInput: the folder, engine or device cannot be used.
    """
    if name == "hf":
        from spinreg_core.generation.compiled_step import Step
        from spinreg_core.generation.hf import HfEngine, tokens_at_once
        from spinreg_core.models.loading import load_policy
        from spinreg_core.runtime.distributed import compiles, resolve_device

        device = resolve_device(resources.device)
        loaded = {} if loaded is None else loaded
        for policy in policies:
            if policy not in loaded:
                # A run replaces auto by the format of its scores (`config.sampling_dtype`). Elsewhere auto is float32.
                loaded[policy] = load_policy(policy, "bf16" if generation.dtype == "bfloat16" else "fp32", device)
        models = [loaded[policy] for policy in policies]
        return HfEngine(models, weights=weights, tokens=tokens_at_once(models, resources), pad_id=pad_id,
                        step=Step(compile=compiles(resources, device)))  # fmt: skip
    if len(policies) > 1:
        raise BadInput("generation.engine", f"is {name}, which samples no mixtures", "set it to hf")
    if importlib.util.find_spec("vllm") is None:
        raise BadInput("generation.engine", "is vllm, which is not installed here",
                       "install it with `pip install spinreg[gpu]`, or set engine hf")  # fmt: skip
    from spinreg_core.generation.vllm import VllmEngine

    return VllmEngine(policies[0], generation, resources, longest=longest)
