"""The ranks of one stage: process groups, device mesh, and the collectives that stages use.

Decides: the process groups and the mesh (HSDP: `resources.shard_over` ranks share a copy of the weights, and further
ranks repeat it). Leaves out: starting the ranks (`runtime.torchrun`), sharded weights (`models.fsdp`), the rows of each
rank (`logprobs.packing`).

With a single process all of this is the identity.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from spinreg_core.config import ResourcesConfig
from spinreg_core.errors import BadInput

T = TypeVar("T")
# Ranks wait for each other's files for this many collective timeouts: two hours by default. `rank_watch` finds a
# stalled transfer or a suspended rank long before; this limit is for lost nodes.
_FILES = 12


def resolve_device(name: str) -> str:
    """Return cuda or cpu for `resources.device`: auto prefers a GPU.

    Raises:
        BadInput: cuda is asked for, and torch sees no GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise BadInput("resources.device", "is cuda, but torch sees no GPU", "set it to auto or cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def compiles(resources: ResourcesConfig, device: str) -> bool:
    """Return True where models are compiled: `resources.compile`, with auto on GPUs only."""
    return resources.compile == "on" or (resources.compile == "auto" and device == "cuda")


def processes_here(resources: ResourcesConfig) -> int:
    """Return the processes of this node: `resources.processes`, where auto is one per GPU, or one on a CPU.

    Raises:
        BadInput: there are more processes than GPUs.
    """
    gpus = torch.cuda.device_count() if resolve_device(resources.device) == "cuda" else 0
    if resources.processes == "auto":
        return max(gpus, 1)
    if gpus and resources.processes > gpus:
        raise BadInput("resources.processes", f"is {resources.processes} with {gpus} GPUs here",
                       f"set it to at most {gpus}")  # fmt: skip
    return resources.processes


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks of the stage. A single process has no mesh and no groups.

    files           group for waiting on files, with a long timeout
    checkpoints     group for the thread that writes checkpoints. Collectives of two threads over one gloo group would
                    pair up in any order, and hang or mix their data.
    compile         models that are loaded have their layers compiled
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    files: dist.ProcessGroup | None = None
    checkpoints: dist.ProcessGroup | None = None
    compile: bool = False

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, table: Tensor) -> Tensor:
        """Add up a CPU tensor over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(table)
        return table

    def gather(self, value: T, group: dist.ProcessGroup | None = None) -> list[T]:
        """Return every rank's value, in the order of ranks. `group`: instead of `files`, for another thread."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=group or self.files)
        return found

    def local_main_first(self, action: Callable[[], T]) -> T:
        """Run `action` on the first rank of each node, then on its other ranks, which find its files in the cache."""
        if self.size == 1:
            return action()
        if int(os.environ["LOCAL_RANK"]) == 0:
            try:
                return action()
            finally:
                # Also after an error, or the other ranks would wait for the timeout.
                dist.barrier(group=self.files)
        dist.barrier(group=self.files)
        return action()


def init_ranks(resources: ResourcesConfig) -> Ranks:
    """Join the other ranks of the stage, where torchrun's environment names several.

    Raises:
        BadInput: `resources.shard_over` does not divide the number of ranks.
    """
    device = resolve_device(resources.device)
    compiled = compiles(resources, device)
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        return Ranks(torch.device(device), compile=compiled)
    local = int(os.environ["LOCAL_RANK"])
    shard = int(os.environ["LOCAL_WORLD_SIZE"]) if resources.shard_over == "auto" else resources.shard_over
    if size % shard:
        raise BadInput("resources.shard_over", f"is {shard} with {size} processes", "set it to a divisor of them")
    if device == "cuda":
        # NCCL's collectives use the current device, which is the first one in every process by default.
        torch.cuda.set_device(local)
    timeout = datetime.timedelta(seconds=resources.collective_timeout_seconds)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "cpu:gloo", timeout=timeout)
    mesh = (
        init_device_mesh(device, (size,), mesh_dim_names=("shard",))
        if shard == size
        else init_device_mesh(device, (size // shard, shard), mesh_dim_names=("replicate", "shard"))
    )
    groups: list[Any] = [dist.new_group(backend="gloo", timeout=_FILES * timeout) for _ in range(2)]
    here = torch.device(f"cuda:{local}" if device == "cuda" else "cpu")
    return Ranks(here, dist.get_rank(), size, mesh, *groups, compile=compiled)  # type: ignore[misc]
