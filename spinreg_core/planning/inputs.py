"""The inputs of a plan: the model's shape, the lengths of the data, and the machine's memory and rate.

Decides: where each of them comes from. Leaves out: the arithmetic (`cost_model`) and the text (`plan`).

torch and transformers are imported inside the functions, so that the flow process can import this file.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from spinreg_core.config import RunConfig
from spinreg_core.errors import BadInput
from spinreg_core.formatting import first_line
from spinreg_core.generation.engine import kv_width
from spinreg_core.planning.cost_model import Shape, Sizes
from spinreg_core.store.cache import cache_folder

if TYPE_CHECKING:
    import torch

SAMPLED_ROWS = 512  # rows that are tokenised to learn the lengths


class Machine(TypedDict):
    """A kind of device, the number of ranks that use it and of those that share the weights, and its rate."""

    device: str
    ranks: int
    shards: int
    devices: int
    memory_bytes: int
    tflops: float
    tflops_source: str


def read_shape(model: str) -> tuple[Path, Shape]:
    """Return the folder with the model's configuration and tokenizer, and the model's sizes. Raises BadInput.

    Only the small files of a model on the hub are downloaded. A package is converted, as the run would do.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from spinreg_core.models.source import resolve_model, tokenizer_folder

    folder = (resolve_model if model.startswith("package:") else tokenizer_folder)(model, cache_folder())
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        stored = getattr(config, "dtype", None) or torch.float32
        # Tensors on the meta device have shapes and no memory.
        with torch.device("meta"):
            shapes: Any = AutoModelForCausalLM.from_config(config, dtype=stored, trust_remote_code=False)
            parameters = shapes.num_parameters()
    # transformers raises errors of many kinds here, and all of them are about this model.
    except Exception as error:
        raise BadInput(
            "model", f"{model!r}, with a shape that cannot be read ({first_line(error)})", "a causal language model"
        ) from None
    text = config.get_text_config()
    return folder, Shape(
        parameters=parameters,
        layers=int(text.num_hidden_layers),
        width=int(text.hidden_size),
        mlp_width=int(getattr(text, "intermediate_size", None) or 4 * text.hidden_size),
        heads=int(text.num_attention_heads),
        kv_width=kv_width(text),
        vocabulary=int(text.vocab_size),
        stored_bytes=stored.itemsize,
    )


def _from_limits(config: RunConfig, error: BadInput | OSError) -> tuple[Sizes, str]:
    """Return the sizes of `read_sizes` from the configured limits. Raises `error` if no limit says how many rows."""
    data = config.data
    if data.prompts_per_round is None:
        raise error
    sizes = Sizes(
        train_rows=data.prompts_per_round, heldout_rows=data.heldout_rows, prompt=data.max_prompt_tokens,
        answer=data.max_length - data.max_prompt_tokens, generated=config.generation.max_new_tokens,
        clipped=min(data.max_length - data.max_prompt_tokens, config.generation.max_new_tokens),
        longest_prompt=data.max_prompt_tokens, longest_answer=data.max_length - data.max_prompt_tokens,
    )  # fmt: skip
    return sizes, f"the configured limits, because the data could not be read: {error}"


def read_sizes(config: RunConfig, folder: Path) -> tuple[Sizes, str]:
    """Return rows and lengths, and their source: the data, or the configured limits if it cannot be read.

    Generated answers are assumed to be as long as allowed. Raises BadInput.
    """
    from spinreg_core.data.filters import load_training
    from spinreg_core.data.load import load_heldout, require_usable
    from spinreg_core.data.row_file import take_rows
    from spinreg_core.data.split import given_heldout, split_rows
    from spinreg_core.models.chat_template import Renderer

    data, new = config.data, config.generation.max_new_tokens
    try:
        loaded = load_training(config.dataset, data).loaded
        require_usable(loaded, loaded.rejected, data.max_bad_share)
        given = load_heldout(config.dataset, data)
    except (BadInput, OSError) as error:
        return _from_limits(config, error)
    # Outside of the `try`: a bad split stops the run too, so it must stop the plan.
    train, held = (
        split_rows(loaded.rows, data.heldout_rows, config.seed)
        if given is None
        else given_heldout(loaded.rows, given.rows, data.heldout_rows, config.seed)
    )
    rows, heldout = take_rows(loaded.rows, train), len(held)
    try:
        renderer = Renderer.from_folder(folder, config.data.template_arguments)
        chosen = rows[:: -(-len(rows) // SAMPLED_ROWS)]
        lengths = []
        for row in chosen:
            try:
                prompt = len(renderer.prompt_ids(row.messages, row.tools))
                answer = len(renderer.answer_ids(row.messages, row.reply, row.tools))
            # The run leaves such a row out as well.
            except BadInput:
                continue
            if prompt <= data.max_prompt_tokens:
                lengths.append((prompt, min(answer, data.max_length - prompt)))
        if not lengths:
            raise BadInput("data.max_prompt_tokens", f"{data.max_prompt_tokens}, below every prompt", "a larger number")
    except (BadInput, OSError) as error:
        return _from_limits(config, error)
    whole = len(chosen) == len(rows)
    longest = max(prompt for prompt, _ in lengths), max(max(answer, new) for _, answer in lengths)
    # Rows outside of the sample may be longer, so the limits apply.
    if not whole:
        longest = data.max_prompt_tokens, data.max_length - data.max_prompt_tokens
    sizes = Sizes(
        train_rows=round(len(rows) * len(lengths) / len(chosen)),
        heldout_rows=heldout,
        prompt=sum(prompt for prompt, _ in lengths) / len(lengths),
        answer=sum(answer for _, answer in lengths) / len(lengths),
        clipped=sum(min(answer, new) for _, answer in lengths) / len(lengths),
        generated=float(new),
        longest_prompt=longest[0],
        longest_answer=longest[1],
    )
    return sizes, f"measured on {len(chosen)} of {len(rows)} training rows"


def read_machine(config: RunConfig, tflops: float | None) -> Machine:
    """Return the device with its memory and rate, measured unless `tflops` states it. Raises BadInput without a GPU
    that the configuration asks for."""
    import torch

    from spinreg_core.runtime.distributed import processes_here, resolve_device

    device = resolve_device(config.resources.device)
    here = processes_here(config.resources)
    shards = here if config.resources.shard_over == "auto" else config.resources.shard_over
    memory = torch.cuda.get_device_properties(0).total_memory if device == "cuda" else _main_memory() // here
    source = "stated"
    if tflops is None:
        dtype = torch.float32 if config.training.precision == "fp32" else torch.bfloat16
        tflops = measured_tflops(device, dtype)
        source = (
            f"measured in a second, {str(dtype).removeprefix('torch.')} matrix product: other work on the machine "
            "lowers it, --tflops states it"
        )
    # Ranks on a CPU share the cores that were measured, so a machine counts as one device.
    devices = here * config.resources.nodes if device == "cuda" else config.resources.nodes
    return {"device": device, "ranks": here * config.resources.nodes, "shards": shards, "devices": devices,
            "memory_bytes": memory, "tflops": tflops, "tflops_source": source}  # fmt: skip


def measured_tflops(device: str, dtype: torch.dtype) -> float:
    """Return the best rate of matrix products on a device within a second, in TFLOP/s (2 n^3 operations each)."""
    import torch

    n = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best, end = float("inf"), time.monotonic() + 1
    while best == float("inf") or time.monotonic() < end:
        start = time.perf_counter()
        _ = a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best / 1e12


def _main_memory() -> int:
    """Return the bytes of memory that this process may use: the machine's, or the limit of its control group."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        limit = Path("/sys/fs/cgroup", name)
        if limit.exists() and (text := limit.read_text().strip()).isdigit():
            found = min(found, int(text))
    return found
