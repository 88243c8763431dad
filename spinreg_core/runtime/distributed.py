"""The processes of one stage: how they are joined, which device each has, and what they tell each other.

Decides: the process group, the mesh (HSDP: a copy of the weights is spread over `resources.shard_over` ranks and
repeated beyond). Leaves out: starting the processes (`runtime/torchrun.py`), weights that are spread over them
(`models/fsdp.py`), which rank computes which row (`logprobs/packing.py`).

A stage run by hand is one process, and everything here is then the identity.
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
# So many collective timeouts ranks wait for each other's files, to be written or fetched: two hours by default.
# One whose bytes stand still, or that does not run, is found by its node long before (`runtime/rank_watch.py`); this
# is for lost nodes.
_FILES = 12


def resolve_device(name: str) -> str:
    """`resources.device`: auto is a GPU where there is one. Raises BadInput for a GPU that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise BadInput("resources.device", "cuda, but torch sees no GPU", "auto or cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def compiles(resources: ResourcesConfig, device: str) -> bool:
    """`resources.compile`: auto is on GPUs."""
    return resources.compile == "on" or (resources.compile == "auto" and device == "cuda")


def processes_here(resources: ResourcesConfig) -> int:
    """`resources.processes` of this node: auto is one per GPU, and one on a CPU. Raises BadInput."""
    gpus = torch.cuda.device_count() if resolve_device(resources.device) == "cuda" else 0
    if resources.processes == "auto":
        return max(gpus, 1)
    if gpus and resources.processes > gpus:
        raise BadInput("resources.processes", f"{resources.processes}, with {gpus} GPUs here", "at most one per GPU")
    return resources.processes


@dataclass(frozen=True)
class Ranks:
    """This process among those of the stage. `mesh` is None where it is alone."""

    device: torch.device
    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    files: dist.ProcessGroup | None = None  # for everything that waits for files
    checkpoints: dist.ProcessGroup | None = None  # for the thread that writes checkpoints meanwhile
    compile: bool = False  # the layers of models that are loaded

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, table: Tensor) -> Tensor:
        """A tensor on the CPU, added up over all ranks."""
        if self.size > 1:
            dist.all_reduce(table)
        return table

    def gather(self, value: T, group: dist.ProcessGroup | None = None) -> list[T]:
        """Every rank's value, in the order of ranks. `group`: another one than `files`, for another thread."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=group or self.files)
        return found

    def local_main_first(self, action: Callable[[], T]) -> T:
        """`action` on one rank per node, then on the others, which find what it left in the cache."""
        if self.size == 1:
            return action()
        if int(os.environ["LOCAL_RANK"]) == 0:
            try:
                return action()
            finally:  # what it raises must not leave the others waiting
                dist.barrier(group=self.files)
        dist.barrier(group=self.files)
        return action()


def init_ranks(resources: ResourcesConfig) -> Ranks:
    """Join the other processes of the stage, if it was started with several (torchrun's environment).

    Raises BadInput for a mesh that does not fit.
    """
    device = resolve_device(resources.device)
    compiled = compiles(resources, device)
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        return Ranks(torch.device(device), compile=compiled)
    local = int(os.environ["LOCAL_RANK"])
    shard = int(os.environ["LOCAL_WORLD_SIZE"]) if resources.shard_over == "auto" else resources.shard_over
    if size % shard:
        raise BadInput("resources.shard_over", shard, f"a divisor of the {size} processes")
    if device == "cuda":
        torch.cuda.set_device(local)
    timeout = datetime.timedelta(seconds=resources.collective_timeout_seconds)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "cpu:gloo",
        timeout=timeout,
    )
    mesh = (
        init_device_mesh(device, (size,), mesh_dim_names=("shard",))
        if shard == size
        else init_device_mesh(device, (size // shard, shard), mesh_dim_names=("replicate", "shard"))
    )
    groups: list[Any] = [dist.new_group(backend="gloo", timeout=_FILES * timeout) for _ in range(2)]
    here = torch.device(f"cuda:{local}" if device == "cuda" else "cpu")
    return Ranks(here, dist.get_rank(), size, mesh, *groups, compile=compiled)  # type: ignore[misc]


def destroy_ranks() -> None:
    """The end of `init_ranks`."""
    if dist.is_initialized():
        dist.destroy_process_group()
