"""Averages of policies: endpoints, symmetry, the sphere, float32 sums, and memory of one tensor."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from spinreg_core.errors import BadInput
from spinreg_core.models.averaging import Method, arc, average_policy, lerp
from tests.support.tiny_models import write_policy

WEIGHTS = st.floats(0, 1)


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """Interpolate whole tensors at once, in float32."""
    a, b = a.double(), b.double()
    of_a, of_b = arc(float((a * b).sum()), float(a.norm()), float(b.norm()), weight)
    return (of_a * a + of_b * b).float()


def vectors(seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 5, 4, generator=draw)
    return a, b


@given(seed=st.integers(0, 50))
@pytest.mark.parametrize("function", [lerp, slerp])
def test_averages_at_the_ends_are_the_policies(function: object, seed: int) -> None:
    a, b = vectors(seed)
    torch.testing.assert_close(function(a, b, 0.0), a, rtol=1e-6, atol=0)  # type: ignore[operator]
    torch.testing.assert_close(function(a, b, 1.0), b, rtol=1e-6, atol=0)  # type: ignore[operator]


@given(seed=st.integers(0, 50), weight=WEIGHTS)
@pytest.mark.parametrize("function", [lerp, slerp])
def test_averages_of_equal_weights_are_symmetric(function: object, seed: int, weight: float) -> None:
    a, b = vectors(seed)
    one, other = function(a, b, weight), function(b, a, 1 - weight)  # type: ignore[operator]
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@given(weight=WEIGHTS)
def test_slerp_of_orthogonal_vectors_keeps_their_length(weight: float) -> None:
    a, b = torch.zeros(2, 6)
    a[1], b[4] = 3.0, 3.0
    found = slerp(a, b, weight)
    assert float(found.norm()) == pytest.approx(3.0, rel=1e-6)
    assert float(found[1]) == pytest.approx(3 * math.cos(weight * math.pi / 2), abs=1e-5)
    assert float(found[4]) == pytest.approx(3 * math.sin(weight * math.pi / 2), abs=1e-5)


def test_slerp_of_parallel_vectors_is_the_straight_line() -> None:
    a = torch.tensor([1.0, 2.0, -3.0])
    for b in (2 * a, -a, torch.zeros(3), a * (1 + 1e-7)):
        torch.testing.assert_close(slerp(a, b, 0.25), 0.75 * a + 0.25 * b)
        assert slerp(a, b, 0.25).isfinite().all()
    # Near it the two formulas meet: no jump where one takes over from the other.
    turned = a + 3e-4 * torch.tensor([2.0, -1.0, 0.0])
    torch.testing.assert_close(slerp(a, turned, 0.5), lerp(a, turned, 0.5), rtol=1e-6, atol=1e-6)


def policies(root: Path, dtype: torch.dtype = torch.float32) -> list[Path]:
    folders = [write_policy(root / f"{seed}", seed) for seed in range(3)]
    for folder in folders:
        tensors = load_file(folder / "model.safetensors")
        save_file({k: v.to(dtype) for k, v in tensors.items()}, folder / "model.safetensors")
    return folders


@pytest.mark.parametrize("method", ["ema", "liti", "slerp"])
def test_average_policy_matches_the_definition_by_tensor(tmp_path: Path, method: Method) -> None:
    base, before, policy = policies(tmp_path)
    average_policy(method, 0.3, base, before, policy, tmp_path / "out")
    zero, old, new = (load_file(folder / "model.safetensors") for folder in (base, before, policy))
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == new.keys()
    for name in new:
        a, b, o = (x[name].double() for x in (old, new, zero))
        if method == "ema":
            expected = 0.7 * a + 0.3 * b
        elif method == "liti":
            expected = 0.7 * o + 0.3 * b
        else:
            u, v = a - o, b - o
            angle = torch.acos((u * v).sum() / u.norm() / v.norm()) if u.any() and v.any() else None
            # norms that no training moved are equal in all of them: nothing to turn from, the limit
            expected = (
                o + 0.3 * v
                if angle is None
                else o + (torch.sin(0.7 * angle) * u + torch.sin(0.3 * angle) * v) / torch.sin(angle)
            )
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-5, atol=1e-6, msg=name)


def test_average_policy_of_the_first_slerp_is_the_policy(tmp_path: Path) -> None:
    base, _, policy = policies(tmp_path)
    average_policy("slerp", 0.3, base, base, policy, tmp_path / "out")
    found, new = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", policy))
    assert all(torch.equal(found[name], new[name]) for name in new)


def test_average_policy_rounds_once_and_keeps_formats(tmp_path: Path) -> None:
    """In bfloat16, adding a hundredth of a small difference would lose it; here it is rounded once, at the end."""
    base, before, policy = policies(tmp_path, torch.bfloat16)
    average_policy("ema", 0.01, base, before, policy, tmp_path / "out")
    old, new, found = (load_file(f / "model.safetensors") for f in (before, policy, tmp_path / "out"))
    for name in new:
        assert found[name].dtype == torch.bfloat16
        exact = 0.99 * old[name].double() + 0.01 * new[name].double()
        assert torch.equal(found[name], exact.float().bfloat16()), name


def test_average_policy_of_other_shapes_raises(tmp_path: Path) -> None:
    base, before, policy = policies(tmp_path)
    tensors = load_file(before / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:5].contiguous()
    save_file(tensors, before / "model.safetensors")
    with pytest.raises(BadInput, match=r"lm_head\.weight has shape \(5, 32\) in before; expected shape \(61, 32\)"):
        average_policy("ema", 0.5, base, before, policy, tmp_path / "out")


def test_average_policy_of_an_unmoved_tensor_is_the_limit(tmp_path: Path) -> None:
    """An average that still equals the base moves by the weight's share, like one that is close to it."""
    found = []
    for name, moved in (("still", 0.0), ("hardly", 1e-20)):
        folders = []
        for which, value in (("base", 0.0), ("before", moved), ("policy", 1.0)):
            folder = tmp_path / name / which
            folder.mkdir(parents=True)
            save_file({"a": torch.full((4,), value), "b": torch.arange(4.0) * value}, folder / "model.safetensors")
            folders.append(folder)
        average_policy("slerp", 0.1, *folders, tmp_path / name / "out")
        found.append(load_file(tmp_path / name / "out" / "model.safetensors"))
    for tensor in ("a", "b"):
        torch.testing.assert_close(found[0][tensor], found[1][tensor])
    torch.testing.assert_close(found[0]["a"], torch.full((4,), 0.1))


MEASURE = """
import json, resource, sys
from pathlib import Path
from spinreg_core.models.averaging import average_policy
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
small, large = ([Path(p) for p in folders] for folders in json.loads(sys.argv[1]))
average_policy("slerp", 0.5, *small, small[0].parent / "small-out")
before = peak()
average_policy("slerp", 0.5, *large, small[0].parent / "large-out")
print(peak() - before)
"""


def test_average_policy_holds_one_tensor_in_memory(tmp_path: Path) -> None:
    """One file of 12 tensors of 16 MB takes no more than one of a single tensor; 192 MB of it are written."""
    sets = []
    for tensors in (1, 12):
        folders = []
        for seed in range(3):
            folder = tmp_path / f"{tensors}-{seed}"
            folder.mkdir()
            torch.manual_seed(seed)
            save_file({f"layer.{i}": torch.randn(2000, 2000) for i in range(tensors)}, folder / "model.safetensors")
            folders.append(str(folder))
        sets.append(folders)
    # M_MMAP_THRESHOLD, so that what is freed is given back.
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps(sets)], capture_output=True, text=True, check=True,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"},
    )  # fmt: skip
    # Files are mapped: pages of theirs that were read count too, until somebody else needs the memory.
    mapped = 3 * 11 * 16e6
    assert int(done.stdout) * 1024 < mapped + 50e6
    assert (tmp_path / "large-out" / "model.safetensors").stat().st_size > 12 * 16e6


@pytest.mark.parametrize("method", ["ema", "liti", "slerp"])
def test_average_policy_of_a_large_tensor_reads_pieces(tmp_path: Path, method: Method) -> None:
    """A tensor of several pieces gets the numbers of the whole; scalars are averaged and whole numbers kept."""
    folders, values = [], []
    for seed in range(3):
        draw = torch.Generator().manual_seed(seed)
        folders.append(tmp_path / str(seed))
        folders[-1].mkdir()
        values.append(torch.randn(2**21 + 5, 4, generator=draw))
        tensors = {"w": values[-1], "s": torch.tensor(float(seed)), "n": torch.arange(3)}
        save_file(tensors, folders[-1] / "model.safetensors")
    average_policy(method, 0.3, *folders, tmp_path / "out")
    found, (zero, old, new) = load_file(tmp_path / "out" / "model.safetensors"), values
    expected = {
        "ema": lambda: lerp(old, new, 0.3), "liti": lambda: lerp(zero, new, 0.3),
        "slerp": lambda: zero + slerp(old - zero, new - zero, 0.3),
    }[method]()  # fmt: skip
    torch.testing.assert_close(found["w"], expected, rtol=1e-5, atol=1e-6)
    assert found["n"].tolist() == [0, 1, 2]
    assert float(found["s"]) == pytest.approx(1.3 if method != "liti" else 0.6)
