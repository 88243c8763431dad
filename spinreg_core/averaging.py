"""Policies that are averages of others in the space of weights: EMA over rounds, LITI towards the base, SLERP.

Decides: the arithmetic, in float32 whatever the weights are stored in, and that it goes tensor by tensor: what is in
memory is one tensor of each policy.
Leaves out: what an average is used for (`rounds.py`), when it is made (`stages/train.py`).

With π_n the policy that round n trained, A_0 = π_0 the base, and w the weight of the new one:

    ema     A_n = (1 - w) A_{n-1} + w π_n
    liti    A_n = (1 - w) π_0 + w π_n                        (WARP, arXiv 2406.16768, equation 4)
    slerp   A_n = π_0 + slerp(A_{n-1} - π_0, π_n - π_0; w)   (WARP, equation 3, for every tensor on its own)

A_1 of slerp is π_1: there is no earlier direction to turn from.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from torch import Tensor

from spinreg_core.errors import BadInput

Method = Literal["ema", "liti", "slerp"]

# Sine of the angle below which directions are so near (or so opposite) that the weights of slerp lose all digits.
_PARALLEL = 1e-4


def lerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """(1 - weight) a + weight b, float32. The ends are exact."""
    return ((1 - weight) * a.double() + weight * b.double()).float()


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """[sin((1 - w) Ω) a + sin(w Ω) b] / sin Ω with Ω the angle between a and b as one vector each, float32.

    Where one of them is zero or they are parallel there is no arc: the straight line then, which is its limit.
    """
    a, b = a.double(), b.double()
    norms = a.norm() * b.norm()
    cosine = float((a * b).sum() / norms) if norms > 0 else 1.0
    sine = max(0.0, 1 - cosine**2) ** 0.5
    if norms == 0 or sine < _PARALLEL:
        return lerp(a, b, weight)
    angle = torch.acos(torch.tensor(min(1.0, max(-1.0, cosine)), dtype=torch.float64))
    return ((torch.sin((1 - weight) * angle) * a + torch.sin(weight * angle) * b) / torch.sin(angle)).float()


def average_policy(method: Method, weight: float, base: Path, before: Path, policy: Path, folder: Path) -> None:
    """Write A_n as a policy folder: that of π_n (`policy`), other weights in the same files, everything else as it is.

    `before` is A_{n-1}. Raises BadInput where a tensor is not in all of them with one shape.
    """
    with ExitStack() as stack:
        read = {name: _reader(path, stack) for name, path in {"base": base, "before": before}.items()}

        def other(which: str, name: str, shape: torch.Size) -> Tensor:
            found = read[which](name)
            if found is None or found.shape != shape:
                held = "nothing" if found is None else f"shape {tuple(found.shape)}"
                raise BadInput(f"average of policies, tensor {name}", f"{held} in {which}", f"{tuple(shape)}")
            return found.float()

        def change(name: str, value: Tensor) -> Tensor:
            if not value.is_floating_point():
                return value
            new = value.float()
            if method == "ema":
                return lerp(other("before", name, value.shape), new, weight).to(value.dtype)
            origin = other("base", name, value.shape)
            if method == "liti":
                return lerp(origin, new, weight).to(value.dtype)
            turned = other("before", name, value.shape) - origin
            return (origin + slerp(turned, new - origin, weight)).to(value.dtype) if bool(turned.any()) else value

        for source in sorted(p for p in policy.rglob("*") if p.is_file()):
            target = folder / source.relative_to(policy)
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.suffix == ".safetensors":
                _rewrite(source, change, target)
            else:
                shutil.copyfile(source, target)


def _rewrite(source: Path, change: Callable[[str, Tensor], Tensor], target: Path) -> None:
    """A safetensors file with the same header and other numbers. (The library's writer wants all of a file at once.)"""
    with open(source, "rb") as file, open(target, "wb") as out, safe_open(source, "pt") as tensors:
        size = file.read(8)
        header = file.read(int.from_bytes(size, "little"))
        out.write(size + header)
        entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        for name in sorted(entries, key=lambda name: entries[name]["data_offsets"][0]):
            value = change(name, tensors.get_tensor(name)).contiguous()
            out.write(value.reshape(-1).view(torch.uint8).numpy().data)


def _reader(folder: Path, stack: ExitStack) -> Callable[[str], Tensor | None]:
    files = [stack.enter_context(safe_open(path, "pt")) for path in sorted(folder.glob("*.safetensors"))]
    where = {name: file for file in files for name in file.keys()}  # noqa: SIM118
    return lambda name: where[name].get_tensor(name) if name in where else None
