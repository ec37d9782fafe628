"""Triton's kernels against the NumPy reference, bit for bit: on CUDA, else in Triton's interpreter on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedloom.protocols import directions
from fedloom.protocols.directions import Float32

CUDA = torch.cuda.is_available()
with pytest.MonkeyPatch.context() as patch:
    if not CUDA:
        patch.setenv("TRITON_INTERPRET", "1")  # read where kernels are defined
    from fedloom.client import triton_kernels as kernels

    if kernels.triton is not None:
        from triton import language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]

        box_muller = kernels._box_muller

        @kernels._jit
        def _box_muller_kernel(out: tl.tensor, radius: tl.tensor, angle: tl.tensor, size: tl.constexpr) -> None:
            """Both normals of each pair, out [2, size]."""
            i = tl.arange(0, size)
            first, second = box_muller(tl.load(radius + i).to(tl.uint32), tl.load(angle + i).to(tl.uint32))
            tl.store(out + i, first)
            tl.store(out + size + i, second)


INTERPRETED = type(kernels._fold_kernel).__name__ == "InterpretedFunction"
MISSING = (
    "Triton is not installed: pip install triton"
    if kernels.triton is None
    else ""
    if CUDA or INTERPRETED
    else "no CUDA device, and Triton was imported before this file: set TRITON_INTERPRET=1"
)
needs_kernels = pytest.mark.skipif(bool(MISSING), reason=MISSING)
needs_triton = pytest.mark.skipif(kernels.triton is None, reason=MISSING)

DEVICE = "cuda" if CUDA else "cpu"
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
SLICES = [(0, 1), (0, 4096), (17, 1000), (4095, 4098), (128, 128), (1, 5), (2**35 - 77, 200)]
FOLDS = [(1, 5, 300), (8, 3, 2999), (64, 0, 10_000), (2048, 999, 30_001), (4096, 4096, 4096)]
FOLDS += [(8192, 2**34 + 5, 20_000), (8192, 3, 1)]
KEYS = np.array([0, 2**64 - 1, 0x80000000_7FFFFFFF, 12345678901234567], np.uint64)
SCALES = np.array([0.5, -1e-3, 3.0, 0.1], np.float32)


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton reads the variable again at the first launch."""
    if not CUDA:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def random(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def same(got: Tensor, want: Tensor) -> None:
    """Bit for bit, signed zeros and NaN included."""
    assert got.dtype == want.dtype
    view = BITS[got.dtype]
    assert torch.equal(got.cpu().view(view), want.cpu().view(view))


def moved(base: Tensor, by: Float32, dtype: torch.dtype) -> Tensor:
    """The contract's rounding: one addition in float32, one rounding."""
    return (base.cpu().float() + torch.from_numpy(by).view(base.shape)).to(dtype)


def total(family: str, keys: NDArray[np.uint64], scales: Float32, name: str, start: int, stop: int) -> Float32:
    acc = np.zeros(stop - start, np.float32)
    for key, scale in zip(keys, scales, strict=True):
        acc += scale * directions.direction(family, int(key), name, start, stop)
    return acc


def sketched(seed: int, name: str, c: Float32, start: int, stop: int) -> Float32:
    bucket, sign = directions.sketch_rows(seed, name, len(c), start, stop)
    return np.asarray(sign * c[bucket], np.float32)


def coefficients(k: int) -> Float32:
    return np.random.Generator(np.random.Philox(key=k)).normal(size=k).astype(np.float32)


@needs_kernels
@pytest.mark.parametrize("dtype", kernels.DTYPES)
@pytest.mark.parametrize(("start", "length"), SLICES)
@pytest.mark.parametrize("family", ["gaussian", "rademacher"])
def test_directions_are_the_reference(family: str, start: int, length: int, dtype: torch.dtype) -> None:
    base = random(length, (length,), dtype)
    out = torch.empty_like(base)
    kernels.add_directions(out, base, name="h.0/ä", start=start, family=family, keys=KEYS, scales=SCALES)
    same(out, moved(base, total(family, KEYS, SCALES, "h.0/ä", start, start + length), dtype))


@needs_kernels
@pytest.mark.parametrize("family", ["gaussian", "rademacher"])
def test_a_direction_alone_has_the_reference_s_bits(family: str) -> None:
    zero, scale = torch.zeros(20_001, device=DEVICE), np.ones(1, np.float32)
    for key in KEYS:
        out = torch.empty_like(zero)
        kernels.add_directions(out, zero, name="w", start=3, family=family, keys=key[None], scales=scale)
        same(out, torch.from_numpy(total(family, key[None], scale, "w", 3, 20_004)))


@needs_kernels
@pytest.mark.parametrize("family", ["gaussian", "rademacher"])
def test_out_may_be_base_and_of_another_dtype(family: str) -> None:
    by = total(family, KEYS, SCALES, "w", 9, 5009)
    base = random(1, (5000,), torch.float32)
    for dtype in kernels.DTYPES:
        out = torch.empty(5000, dtype=dtype, device=DEVICE)
        kernels.add_directions(out, base, name="w", start=9, family=family, keys=KEYS, scales=SCALES)
        same(out, moved(base, by, dtype))
        out = base.to(dtype)
        want = moved(out, by, dtype)
        kernels.add_directions(out, out, name="w", start=9, family=family, keys=KEYS, scales=SCALES)
        same(out, want)


@needs_kernels
def test_a_tensor_in_parts_is_the_whole() -> None:
    base, whole = random(2, (7000,), torch.bfloat16), torch.empty(7000, dtype=torch.bfloat16, device=DEVICE)
    kernels.add_directions(whole, base, name="w", start=0, family="gaussian", keys=KEYS, scales=SCALES)
    for first, last in ((0, 1), (1, 130), (130, 4097), (4097, 7000)):
        part = base[first:last].clone()
        kernels.add_directions(part, part, name="w", start=first, family="gaussian", keys=KEYS, scales=SCALES)
        same(part, whole[first:last])


@needs_kernels
@pytest.mark.parametrize("dtype", kernels.DTYPES)
def test_rounding_is_to_nearest_even_and_keeps_what_is_special(dtype: torch.dtype) -> None:
    """Without directions, out is base rounded: ties, overflow, subnormals, infinities."""
    top = np.arange(0, 2**16, 7, dtype=np.uint32)[:, None] << np.uint32(16)
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x1000, 0x2000, 0x3000, 0x0FFF], np.uint32)
    values = torch.from_numpy((top | low).reshape(-1).view(np.float32))
    values = values[~values.isnan()]
    out = torch.empty(len(values), dtype=dtype, device=DEVICE)
    none = np.zeros(0, np.uint64), np.zeros(0, np.float32)
    kernels.add_directions(out, values.to(DEVICE), name="", start=0, family="rademacher", keys=none[0], scales=none[1])
    same(out, (values + 0.0).to(dtype))
    nan = torch.full((1,), float("nan"), device=DEVICE)
    kernels.add_directions(out[:1], nan, name="", start=0, family="rademacher", keys=none[0], scales=none[1])
    assert out[0].isnan()


@needs_kernels
def test_box_muller_at_its_edges() -> None:
    """Counts 1 and 2^24, both sides of every sqrt(1/2) 2^k, and both sides of each quadrant's ends and middle."""
    counts = {1, 2, 3, 2**24} | {int(2**k * root) + d for k in range(1, 25) for root in (1, 0.5**0.5) for d in (0, 1)}
    turns = [quadrant << 24 | turn for quadrant in range(4) for turn in (0, 1, 2**23 - 1, 2**23, 2**23 + 1, 2**24 - 1)]
    pairs = [((count - 1) << 8, turn << 6) for count in counts if 1 <= count <= 2**24 for turn in turns]
    words = np.zeros((4096, 2), np.uint32)
    words[: len(pairs)] = pairs
    radius, angle = (torch.from_numpy(words[:, i].copy().view(np.int32)).to(DEVICE) for i in (0, 1))
    out = torch.empty(2, 4096, device=DEVICE)
    _box_muller_kernel[(1,)](out, radius, angle, size=4096, enable_fp_fusion=False)
    same(out.t().contiguous(), torch.from_numpy(directions.box_muller(words[:, 0], words[:, 1])))


@needs_kernels
@pytest.mark.parametrize("dtype", kernels.DTYPES)
@pytest.mark.parametrize(("start", "length"), SLICES)
def test_the_sketch_is_the_reference(start: int, length: int, dtype: torch.dtype) -> None:
    base = random(length, (length,), dtype)
    out = torch.empty_like(base)
    for k, seed in ((1, 1), (8, 2**64 - 5), (128, 2**31), (4096, 0), (2**15, 2**32 + 1)):
        c = coefficients(k)
        kernels.add_sketch(out, base, name="w", start=start, seed=seed, c=torch.from_numpy(c).to(DEVICE))
        same(out, moved(base, sketched(seed, "w", c, start, start + length), dtype))


@needs_kernels
@pytest.mark.parametrize(("v", "d"), [(50, 96), (9, 128), (11, 1000), (3, 8192), (300, 1)])
@pytest.mark.parametrize("dtype", kernels.DTYPES)
def test_rows_are_those_of_the_whole_table(v: int, d: int, dtype: torch.dtype) -> None:
    base, rows = random(3, (v, d), dtype), torch.tensor([2, 0, v - 1, 2], device=DEVICE)
    out = torch.empty(4, d, dtype=dtype, device=DEVICE)
    for family in ("gaussian", "rademacher"):
        kernels.add_directions_rows(out, base, rows, name="e", family=family, keys=KEYS, scales=SCALES)
        same(out, moved(base, total(family, KEYS, SCALES, "e", 0, v * d), dtype)[rows.cpu()])
    for k in (4, 2048):
        c = coefficients(k)
        kernels.add_sketch_rows(out, base, rows, name="e", seed=7, c=torch.from_numpy(c).to(DEVICE))
        same(out, moved(base, sketched(7, "e", c, 0, v * d), dtype)[rows.cpu()])


def folded(into: Float32, gradient: Float32, k: int, start: int, seed: int, name: str) -> Float32:
    """The fold in the kernel's order: a slice of runs after the other, float32."""
    bucket, sign = directions.sketch_rows(seed, name, k, start, start + len(gradient))
    run = np.arange(start, start + len(gradient)) // k - start // k
    per_slice = kernels.runs_per_slice(int(run[-1]) + 1)
    partial = np.zeros((int(run[-1]) // per_slice + 1, k), np.float32)
    np.add.at(partial, (run // per_slice, bucket), sign * gradient)  # in order, unbuffered
    acc = np.zeros(k, np.float32)
    for row in partial:
        acc += row
    return into + acc


@needs_kernels
@pytest.mark.parametrize("dtype", kernels.DTYPES)
@pytest.mark.parametrize(("k", "start", "length"), FOLDS)
def test_the_fold_adds_the_transpose(k: int, start: int, length: int, dtype: torch.dtype) -> None:
    gradient, before = random(4, (length,), dtype), coefficients(k)
    into = torch.from_numpy(before.copy()).to(DEVICE)
    kernels.fold_sketch(into, gradient, name="w", start=start, seed=11)
    g = gradient.cpu().float().numpy()
    same(into, torch.from_numpy(folded(before, g, k, start, 11, "w")))
    bucket, sign = directions.sketch_rows(11, "w", k, start, start + length)
    exact = before.astype(np.float64)
    np.add.at(exact, bucket, sign.astype(np.float64) * g)
    np.testing.assert_allclose(into.cpu().numpy(), exact, rtol=1e-5, atol=1e-5 * max(1.0, (length / k) ** 0.5))


@needs_kernels
def test_what_does_not_fit_is_refused() -> None:
    flat, c = torch.zeros(8, device=DEVICE), torch.zeros(4, device=DEVICE)
    given: dict[str, Any] = {"name": "w", "start": 0, "family": "gaussian", "keys": KEYS, "scales": SCALES}
    for out, base, change, what in [
        (flat, flat, {"family": "sketch"}, "gaussian or rademacher"),
        (flat, flat, {"scales": SCALES[:2]}, "must have a scale"),
        (flat, flat, {"start": -1}, "start must be"),
        (flat, flat[:4], {}, "sizes equal"),
        (flat[::2], flat[::2], {}, "contiguous"),
        (flat.double(), flat.double(), {}, "contiguous, of"),
    ]:
        with pytest.raises(ValueError, match=what):
            kernels.add_directions(out, base, **(given | change))
    with pytest.raises(ValueError, match="power of two"):
        kernels.add_sketch(flat, flat, name="w", start=0, seed=0, c=flat[:3])
    with pytest.raises(ValueError, match="float32 vector"):
        kernels.fold_sketch(c.half(), flat, name="w", start=0, seed=0)
    with pytest.raises(ValueError, match=r"\[n, d\]"):
        kernels.add_sketch_rows(flat, flat, torch.zeros(8, dtype=torch.int64, device=DEVICE), name="w", seed=0, c=c)


def test_without_triton_only_use_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "triton", None)
    with pytest.raises(ImportError, match="pip install triton"):
        kernels.fold_sketch(torch.zeros(4), torch.zeros(8), name="w", start=0, seed=0)


COMPILE = """
import re, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fedloom.client import triton_kernels as kernels

POINTERS = {"out": "*i16", "base": "*fp32", "gradient": "*i16", "rows": "*i64", "table": "*i32",
            "c": "*fp32", "partial": "*fp32", "parts": "*fp32", "into": "*fp32"}
HALVES = {"out_bfloat16": True, "base_bfloat16": False}
FORMS = [
    (kernels._directions_kernel, {"gaussian": True, "by_rows": False, "tile": 1024, **HALVES}),
    (kernels._directions_kernel, {"gaussian": False, "by_rows": True, "tile": 4096, **HALVES}),
    (kernels._sketch_kernel, {"runs": 1, "by_rows": True, "tile": 4096, **HALVES}),
    (kernels._sketch_kernel, {"runs": 128, "by_rows": False, "tile": 128, **HALVES}),
    (kernels._fold_kernel, {"slices": 1, "columns": 512, "bfloat16": True}),
    (kernels._fold_kernel, {"slices": 512, "columns": 1, "bfloat16": True}),
    (kernels._total_kernel, {"columns": 128}),
]
for kernel, constants in FORMS:
    for integer in ("i32", "i64", "constexpr"):  # Triton makes a constant of an argument that is 1
        types = {name: "constexpr" if name in constants else POINTERS.get(name, integer) for name in kernel.arg_names}
        ones = {name: 1 for name, kind in types.items() if kind == "constexpr" and name not in constants}
        if not constants.get("by_rows", True):
            types["rows"], ones["rows"] = "constexpr", None
        target, options = GPUTarget("cuda", 80, 32), {"enable_fp_fusion": False}
        source = ASTSource(kernel, types, constants | ones)
        ptx = triton.compile(source, target=target, options=options).asm["ptx"]
        print(kernel.__name__, integer, *sorted(set(re.findall(r"[a-z]+[.a-z]*[.]f32", ptx))))
"""


@needs_triton
def test_what_is_compiled_rounds_every_operation(tmp_path: Path) -> None:
    """For a GPU that need not be here: the PTX fuses nothing, flushes nothing and approximates nothing."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON")}
    ran = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    used = {word for line in ran.stdout.splitlines() for word in line.split()[2:]}
    arithmetic = {
        word for word in used if word.split(".")[0] in {"add", "sub", "mul", "fma", "mad", "div", "sqrt", "neg"}
    }
    assert {"add.rn.f32", "mul.rn.f32"} <= arithmetic
    # older Tritons flush what is subnormal before a root; a radius is 0 or above 1e-7
    assert arithmetic <= {"add.rn.f32", "sub.rn.f32", "mul.rn.f32", "sqrt.rn.f32", "sqrt.rn.ftz.f32"}
