"""Averages of policies in the space of weights: EMA over rounds, LITI towards the base, SLERP.

Decides: the arithmetic, which is float64 in every storage format and rounds once. Memory holds pieces of four million
numbers of each policy.
Leaves out: the use of an average (`runs`), the time of averaging (`stages`).

With π_n the policy that round n trained, A_0 = π_0 the base, and w the weight of the new policy:

    ema     A_n = (1 - w) A_{n-1} + w π_n
    liti    A_n = (1 - w) π_0 + w π_n                        (WARP, arXiv 2406.16768, equation 4)
    slerp   A_n = π_0 + slerp(A_{n-1} - π_0, π_n - π_0; w)   (WARP, equation 3, for every tensor on its own)

A_1 of slerp is π_1, because there is no earlier direction. For a tensor that is equal in A_{n-1} and π_0, slerp is its
limit, the straight line.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from spinreg_core.errors import BadInput

Method = Literal["ema", "liti", "slerp"]
# Below this sine of the angle, directions are so close (or so opposite) that the weights of slerp lose all digits.
_PARALLEL = 1e-4
# Numbers of a tensor that are in memory at once.
_PIECE = 2**22
# Returns the part of a tensor at an index, in float64, or in float32 as the final result.
_Read = Callable[[Any], Tensor]


def lerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """Return (1 - weight) a + weight b in float32. The ends are exact."""
    return ((1 - weight) * a.double() + weight * b.double()).float()


def arc(product: float, norm_a: float, norm_b: float, weight: float) -> tuple[float, float]:
    """Return the weights of a and b in slerp(a, b; w) = [sin((1 - w) Ω) a + sin(w Ω) b] / sin Ω.

    Ω is the angle between a and b, from their inner product and norms. If one of them is zero or they are parallel,
    there is no arc, and the weights are those of the straight line, its limit.
    """
    cosine = product / norm_a / norm_b if norm_a > 0 and norm_b > 0 else 1.0
    sine = max(0.0, 1 - cosine**2) ** 0.5
    if sine < _PARALLEL:
        return 1 - weight, weight
    angle = math.acos(min(1.0, max(-1.0, cosine)))
    return math.sin((1 - weight) * angle) / math.sin(angle), math.sin(weight * angle) / math.sin(angle)


def average_policy(method: Method, weight: float, base: Path, before: Path, policy: Path, folder: Path) -> None:
    """Write A_n as a policy folder: the files of π_n (`policy`) with other weights.

    `before` is A_{n-1}. Raises BadInput for a tensor that is absent from one of them or differs in shape.
    """
    # In the first round, slerp has no earlier direction.
    first = before.resolve() == base.resolve()
    with ExitStack() as stack:
        read = {name: _reader(path, stack) for name, path in {"base": base, "before": before}.items()}

        def other(which: str, name: str, shape: list[int]) -> _Read:
            found = read[which](name)
            if found is None or found.get_shape() != shape:
                problem = "is absent from" if found is None else f"has shape {tuple(found.get_shape())} in"
                raise BadInput(f"average of policies, tensor {name}", f"{problem} {which}", f"shape {tuple(shape)}")
            return partial(_doubled, found)

        def averaged(name: str, new: _Read, shape: list[int]) -> _Read:
            if method == "ema":
                earlier = other("before", name, shape)
                return lambda piece: lerp(earlier(piece), new(piece), weight)
            origin = other("base", name, shape)
            if method == "liti":
                return lambda piece: lerp(origin(piece), new(piece), weight)
            if first:
                return new
            earlier = other("before", name, shape)
            product, square_a, square_b = 0.0, 0.0, 0.0
            for piece in _pieces(shape):
                zero = origin(piece)
                a, b = earlier(piece) - zero, new(piece) - zero
                product, square_a, square_b = (
                    total + float((x * y).sum())
                    for total, x, y in ((product, a, b), (square_a, a, a), (square_b, b, b))
                )
            of_a, of_b = arc(product, square_a**0.5, square_b**0.5, weight)

            def combined(piece: Any) -> Tensor:
                zero = origin(piece)
                return zero + of_a * (earlier(piece) - zero) + of_b * (new(piece) - zero)

            return combined

        for source in sorted(p for p in policy.rglob("*") if p.is_file()):
            target = folder / source.relative_to(policy)
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.suffix == ".safetensors":
                _rewrite(source, averaged, target)
            else:
                shutil.copyfile(source, target)


def _rewrite(source: Path, averaged: Callable[[str, _Read, list[int]], _Read], target: Path) -> None:
    """Write a safetensors file with the same header and other numbers.

    The writer of the library would need the whole file in memory.
    """
    with open(source, "rb") as file, open(target, "wb") as out, safe_open(source, "pt") as tensors:
        size = file.read(8)
        header = file.read(int.from_bytes(size, "little"))
        out.write(size + header)
        entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        for name in sorted(entries, key=lambda name: entries[name]["data_offsets"][0]):
            own, shape = tensors.get_slice(name), list(entries[name]["shape"])
            found: _Read | None = None
            if entries[name]["dtype"].startswith(("F", "BF")):
                found = averaged(name, partial(_doubled, own), shape)
            for piece in _pieces(shape):
                value = own[piece] if found is None else found(piece).float().to(own[piece].dtype)
                out.write(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _doubled(tensor: Any, piece: Any) -> Tensor:
    values: Tensor = tensor[piece].double()
    return values


def _pieces(shape: list[int]) -> Iterator[Any]:
    """Yield indices that cut a tensor along its first dimension into parts of bounded size."""
    if not shape:
        yield ...
        return
    rows = max(1, _PIECE // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], rows):
        yield slice(start, start + rows)


def _reader(folder: Path, stack: ExitStack) -> Callable[[str], Any]:
    """Return a function from the name of a tensor to its slices, or None."""
    files = [stack.enter_context(safe_open(path, "pt")) for path in sorted(folder.glob("*.safetensors"))]
    where = {name: file for file in files for name in file.keys()}  # noqa: SIM118
    return lambda name: where[name].get_slice(name) if name in where else None
