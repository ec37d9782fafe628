"""Directions on CUDA tensors, as Triton kernels: the same bits as fedloom.protocols.directions, the reference.

    directions   out[i] = round(base[i] + sum_k scales[k] z_k(i))
    sketch       out[i] = round(base[i] + s(i) c[h(i)])
    fold         into   = into + S' g

Sums are taken in float32, in order of k, and rounded once to out's dtype. Nothing is fused into an fma, the root is
correctly rounded, and bfloat16 is rounded by integer arithmetic, so that Triton's interpreter (TRITON_INTERPRET=1, on
the CPU) runs the same operations. Without Triton this module can be imported, not used.

A program makes a tile, elements [t T, (t + 1) T) of the tensor: whole Philox blocks, wherever a slice starts. Keys and
the name's hash reach it in memory, since Triton types an integer argument by its value.
Shapes in comments: T tile, B blocks in a tile, Q buckets and S slices in a tile of the fold.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Final, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedloom.protocols import directions
from fedloom.protocols.directions import Float32, Keys

try:
    import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
    import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]
except ImportError:  # no wheel for this machine
    triton = None

_F = TypeVar("_F")

DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
NORMALS_TILE: Final = 1024
SIGNS_TILE: Final = 4096  # 32 blocks, one for each lane of a warp
LEAST_TILE: Final = directions.SIGNS_PER_BLOCK
FOLD_TILE: Final = 512


def _jit(function: _F) -> _F:
    return function if triton is None else triton.jit(function)  # type: ignore[no-any-return,unused-ignore]


def _constant(value: Any) -> Any:
    return value if triton is None else tl.constexpr(value)


_SIGNS, _NORMALS = _constant(directions.SIGNS), _constant(directions.NORMALS)
_OFFSETS, _STREAM_SHIFT = _constant(directions.OFFSETS), _constant(directions.STREAM_SHIFT)
_LOG_POLY = _constant(directions.LOG_POLY)
_SIN_POLY, _COS_POLY = _constant(directions.SIN_POLY), _constant(directions.COS_POLY)
_LN2, _TURN = _constant(directions.LN2), _constant(directions.HALF_PI * 2.0**-24)
_SQRT_HALF_BITS = _constant(directions.SQRT_HALF_BITS)


@_jit
def _pair(table: tl.tensor, row: tl.tensor) -> Any:
    first = table + 3 * row
    return tl.load(first).to(tl.uint32, bitcast=True), tl.load(first + 1).to(tl.uint32, bitcast=True)


@_jit
def _philox(table: tl.tensor, key: tl.tensor, block: tl.tensor, stream: tl.constexpr) -> Any:
    """The four words of each block, under the key-th key of the table."""
    name0, name1 = _pair(table, 0)
    key0, key1 = _pair(table, key + 1)
    high = (block >> 32).to(tl.uint32) | (stream << _STREAM_SHIFT)
    return tl.philox_impl(block.to(tl.uint32), high, name0, name1, key0, key1)


@_jit
def _signs(table: tl.tensor, key: tl.tensor, number: tl.tensor, tile: tl.constexpr) -> Any:
    """Random signs of the number-th tile, float32 [T]."""
    blocks: tl.constexpr = tile // 128
    w0, w1, w2, w3 = _philox(table, key, number * blocks + tl.arange(0, blocks), _SIGNS)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [blocks * 4, 1])
    lifted = words << (31 - tl.arange(0, 32)).to(tl.uint32)[None, :]  # bit j is the float's sign bit
    return tl.reshape(((lifted & 0x80000000) | 0x3F800000).to(tl.float32, bitcast=True), [tile])


@_jit
def _poly(x: tl.tensor, coefficients: tl.constexpr, terms: tl.constexpr) -> Any:
    value = x * coefficients.value[0] + coefficients.value[1]
    for i in tl.static_range(2, terms):
        value = value * x + coefficients.value[i]
    return value


@_jit
def _log(count: tl.tensor) -> Any:
    """ln(count 2^-24) for counts in 1..2^24."""
    bits = count.to(tl.int32).to(tl.float32).to(tl.int32, bitcast=True) - (24 << 23)
    exponent = (bits - _SQRT_HALF_BITS) >> 23  # arithmetic: the floor of log2
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    square = f * f
    tail = (f * square) * _poly(f, _LOG_POLY, 9) - 0.5 * square
    return exponent.to(tl.float32) * _LN2 + (f + tail)


@_jit
def _flip(x: tl.tensor, bit: tl.tensor) -> Any:
    """x, or -x where the lowest bit is set."""
    return (x.to(tl.uint32, bitcast=True) ^ (bit << 31)).to(tl.float32, bitcast=True)


@_jit
def _box_muller(radius: tl.tensor, angle: tl.tensor) -> Any:
    r = tl.sqrt_rn(-2.0 * _log((radius >> 8) + 1))
    quadrant = angle >> 30
    x = (((angle >> 6) & 0xFFFFFF).to(tl.int32) - (1 << 23)).to(tl.float32) * _TURN
    square = x * x
    sine = x + x * (square * _poly(square, _SIN_POLY, 3))
    cosine = (1.0 - 0.5 * square) + (square * square) * _poly(square, _COS_POLY, 3)
    swap = (quadrant & 1) != 0
    first = _flip(tl.where(swap, sine, cosine), quadrant ^ (quadrant >> 1))  # quadrants 1 and 2
    second = _flip(tl.where(swap, cosine, sine), quadrant >> 1)  # quadrants 2 and 3
    return r * first, r * second


@_jit
def _normals(table: tl.tensor, key: tl.tensor, number: tl.tensor, tile: tl.constexpr) -> Any:
    """Standard normals of the number-th tile, float32 [T]."""
    blocks: tl.constexpr = tile // 4
    w0, w1, w2, w3 = _philox(table, key, number * blocks + tl.arange(0, blocks), _NORMALS)
    first, second = _box_muller(tl.join(w0, w2), tl.join(w1, w3))  # [B, 2]
    return tl.reshape(tl.join(first, second), [tile])


@_jit
def _load(pointer: tl.tensor, mask: tl.tensor, bfloat16: tl.constexpr) -> Any:
    raw = tl.load(pointer, mask=mask, other=0)
    return (raw.to(tl.int32) << 16).to(tl.float32, bitcast=True) if bfloat16 else raw.to(tl.float32)


@_jit
def _store(pointer: tl.tensor, value: tl.tensor, mask: tl.tensor, bfloat16: tl.constexpr) -> None:
    """Round to nearest, ties to even, and write."""
    if bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = tl.where(value == value, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)
        tl.store(pointer, rounded.to(tl.uint16).to(tl.int16, bitcast=True), mask=mask)
    else:
        tl.store(pointer, value.to(pointer.dtype.element_ty), mask=mask)


@_jit
def _place(
    rows: tl.tensor, start: tl.tensor, length: tl.tensor, tiles: tl.tensor, by_rows: tl.constexpr, tile: tl.constexpr
) -> Any:
    """This program's tile: its number, its elements' places in base and in out, and which of them are asked for."""
    program = tl.program_id(0).to(tl.int64)
    row = program // tiles
    first = tl.load(rows + row) * length if by_rows else start
    number = first // tile + program % tiles
    index = number * tile + tl.arange(0, tile)
    column = index - first
    mask = (column >= 0) & (column < length)
    return number, index, index if by_rows else column, row * length + column if by_rows else column, mask


@_jit
def _directions_kernel(
    out: tl.tensor, base: tl.tensor, rows: tl.tensor, start: tl.tensor, length: tl.tensor, tiles: tl.tensor,
    table: tl.tensor, count: tl.tensor, gaussian: tl.constexpr, by_rows: tl.constexpr, out_bfloat16: tl.constexpr,
    base_bfloat16: tl.constexpr, tile: tl.constexpr,
) -> None:  # fmt: skip
    number, _, source, target, mask = _place(rows, start, length, tiles, by_rows, tile)
    acc = tl.zeros([tile], tl.float32)
    for k in range(count):
        scale = tl.load(table + 3 * k + 5).to(tl.float32, bitcast=True)
        z = _normals(table, k, number, tile) if gaussian else _signs(table, k, number, tile)
        acc += scale * z
    _store(out + target, _load(base + source, mask, base_bfloat16) + acc, mask, out_bfloat16)


@_jit
def _sketch_kernel(
    out: tl.tensor, base: tl.tensor, rows: tl.tensor, start: tl.tensor, length: tl.tensor, tiles: tl.tensor,
    table: tl.tensor, buckets: tl.tensor, c: tl.tensor, runs: tl.constexpr, by_rows: tl.constexpr,
    out_bfloat16: tl.constexpr, base_bfloat16: tl.constexpr, tile: tl.constexpr,
) -> None:  # fmt: skip
    """`runs` is how many runs of buckets a tile touches: a power of two, as K and T are."""
    number, index, source, target, mask = _place(rows, start, length, tiles, by_rows, tile)
    offset, _, _, _ = _philox(table, 0, number * tile // buckets + tl.arange(0, runs), _OFFSETS)
    offset = tl.reshape(tl.broadcast_to(offset.to(tl.int64)[:, None], [runs, tile // runs]), [tile])
    moved = _signs(table, 0, number, tile) * tl.load(c + ((index + offset) & (buckets - 1)))
    _store(out + target, _load(base + source, mask, base_bfloat16) + moved, mask, out_bfloat16)


@_jit
def _fold_kernel(
    partial: tl.tensor, gradient: tl.tensor, table: tl.tensor, start: tl.tensor, length: tl.tensor,
    buckets: tl.tensor, runs: tl.tensor, runs_in_slice: tl.tensor, slices: tl.constexpr, columns: tl.constexpr,
    bfloat16: tl.constexpr,
) -> None:  # fmt: skip
    """partial[slice, q] = sum of s(i) g[i] over the slice's runs b, in order, i the element of run b with h(i) = q."""
    program = tl.program_id(0).to(tl.int64)
    across = buckets // columns
    q = (program % across) * columns + tl.arange(0, columns)  # [Q]
    piece = program // across * slices + tl.arange(0, slices)  # [S]
    acc = tl.zeros([slices, columns], tl.float32)
    for step in range(runs_in_slice):
        run = piece * runs_in_slice + step  # [S]
        block = run + start // buckets
        offset, _, _, _ = _philox(table, 0, block, _OFFSETS)
        place = (q[None, :] - offset.to(tl.int64)[:, None]) & (buckets - 1)
        index = block[:, None] * buckets + place  # [S, Q]
        column = index - start
        mask = (run < runs)[:, None] & (column >= 0) & (column < length)
        # A run is cut at any bucket, so each element makes its own block: arithmetic is cheaper here than memory.
        w0, w1, w2, w3 = _philox(table, 0, index >> 7, _SIGNS)
        word = (index >> 5) & 3
        words = tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))
        bit = words >> (index & 31).to(tl.uint32)
        acc += _flip(_load(gradient + column, mask, bfloat16), bit)
    tl.store(partial + piece[:, None] * buckets + q[None, :], acc)


@_jit
def _total_kernel(into: tl.tensor, parts: tl.tensor, buckets: tl.tensor, n: tl.tensor, columns: tl.constexpr) -> None:
    """into[q] += the sum of parts[:, q], in order."""
    q = tl.program_id(0) * columns + tl.arange(0, columns)
    acc = tl.zeros([columns], tl.float32)
    spot = parts + q
    for _ in range(n):
        acc += tl.load(spot)
        spot += buckets
    tl.store(into + q, tl.load(into + q) + acc)


def add_directions(
    out: Tensor, base: Tensor, *, name: str, start: int, family: str, keys: Keys, scales: Float32
) -> None:
    """out[i] = round(base[i] + sum_k scales[k] z_k(start + i)); out may be base, not overlap it otherwise.

    Args:
        out, base: contiguous, of one size, of any of DTYPES, on one device.
        keys, scales: [K], summed in this order.

    Raises:
        ImportError: without Triton.
        ValueError: for tensors that are not so, or a family other than gaussian and rademacher.
    """
    _check(out, base, start)
    _directions(out, base, None, name, start, family, keys, scales)


def add_directions_rows(
    out: Tensor, base: Tensor, rows: Tensor, *, name: str, family: str, keys: Keys, scales: Float32
) -> None:
    """Rows of a table: out[r] = round(base[rows[r]] + sum_k scales[k] z_k), z_k as in the whole table.

    out [n, d] and base [V, d] lie apart in memory; rows int64 [n] are in 0..V - 1, which is not checked.
    """
    _check_rows(out, base, rows)
    _directions(out, base, rows, name, 0, family, keys, scales)


def add_sketch(out: Tensor, base: Tensor, *, name: str, start: int, seed: int, c: Tensor) -> None:
    """out[i] = round(base[i] + s(j) c[h(j)]), j = start + i; c float32 [K]; the rest as in `add_directions`."""
    _check(out, base, start)
    _sketch(out, base, None, name, start, seed, c)


def add_sketch_rows(out: Tensor, base: Tensor, rows: Tensor, *, name: str, seed: int, c: Tensor) -> None:
    """Rows of a table, as in `add_directions_rows`: out[r] = round(base[rows[r]] + (S c)[rows[r]])."""
    _check_rows(out, base, rows)
    _sketch(out, base, rows, name, 0, seed, c)


def fold_sketch(into: Tensor, gradient: Tensor, *, name: str, start: int, seed: int) -> None:
    """into += S' g for a gradient whose first element is the start-th of its tensor; into float32 [K].

    No atomics: runs are summed in order in slices of about the root of their number, then the slices in order. The bits
    depend on start, size and K alone.

    Raises:
        ImportError: without Triton.
        ValueError: for tensors of other dtypes or devices, or a K that is not a power of two.
    """
    _check(into, gradient, start, sizes_differ=True)
    buckets = _buckets(into, gradient.device)
    if not gradient.numel():
        return
    runs = -(-(start + gradient.numel()) // buckets) - start // buckets
    runs_in_slice = runs_per_slice(runs)
    columns = min(buckets, FOLD_TILE)
    slices = FOLD_TILE // columns
    groups = -(-runs // (runs_in_slice * slices))
    partial = torch.empty(groups * slices, buckets, dtype=torch.float32, device=into.device)
    _launch(
        _fold_kernel, groups * (buckets // columns), partial, _words(gradient),
        _table(name, np.array([seed], np.uint64), 0.0, into.device),
        start, gradient.numel(), buckets, runs, runs_in_slice,
        slices=slices, columns=columns, bfloat16=gradient.dtype == torch.bfloat16,
    )  # fmt: skip
    columns = min(buckets, LEAST_TILE)
    _launch(_total_kernel, buckets // columns, into, partial, buckets, groups * slices, columns=columns)


def runs_per_slice(runs: int) -> int:
    """How many of a fold's runs are summed before its slices are: the power of two at or above their root."""
    return 1 << -(-(runs - 1).bit_length() // 2)


def _directions(
    out: Tensor, base: Tensor, rows: Tensor | None, name: str, start: int, family: str, keys: Keys, scales: Float32
) -> None:
    if family not in ("gaussian", "rademacher"):
        raise ValueError(f"a direction must be gaussian or rademacher, got {family}")
    if keys.ndim != 1 or keys.shape != scales.shape:
        raise ValueError(f"every key must have a scale, got {list(keys.shape)} and {list(scales.shape)}")
    tile, gaussian = _tile(base, rows, NORMALS_TILE if family == "gaussian" else SIGNS_TILE), family == "gaussian"
    table = _table(name, keys, scales, out.device)
    _write(_directions_kernel, out, base, rows, start, tile, table, len(keys), gaussian=gaussian)


def _sketch(out: Tensor, base: Tensor, rows: Tensor | None, name: str, start: int, seed: int, c: Tensor) -> None:
    buckets, tile = _buckets(c, out.device), _tile(base, rows, SIGNS_TILE)
    table = _table(name, np.array([seed], np.uint64), 0.0, out.device)
    _write(_sketch_kernel, out, base, rows, start, tile, table, buckets, c, runs=max(1, tile // buckets))


def _write(
    kernel: Any, out: Tensor, base: Tensor, rows: Tensor | None, start: int, tile: int, *args: Any, **constants: Any
) -> None:
    """Launch programs for every tile of a slice, or of every row, wherever in a tile it starts."""
    if not out.numel():
        return
    if rows is None:
        length, tiles = out.numel(), -(-(start + out.numel()) // tile) - start // tile
    else:
        length, tiles = base.shape[1], -(-base.shape[1] // tile) + (base.shape[1] % tile != 0)
    _launch(
        kernel, tiles * (1 if rows is None else len(rows)), _words(out), _words(base), rows,
        start, length, tiles, *args, **constants, tile=tile,
        by_rows=rows is not None, out_bfloat16=out.dtype == torch.bfloat16, base_bfloat16=base.dtype == torch.bfloat16,
    )  # fmt: skip


def _tile(base: Tensor, rows: Tensor | None, most: int) -> int:
    """How many elements a program makes: a power of two, so that a table's short rows waste little."""
    length = base.numel() if rows is None else base.shape[1]
    return max(LEAST_TILE, min(most, 1 << max(0, length - 1).bit_length()))


def _table(name: str, keys: Keys, scales: Float32 | float, device: torch.device) -> Tensor:
    """What kernels read, int32 [1 + K, 3]: row 0 the name's hash, row 1 + k the k-th key's halves and its scale."""
    words: NDArray[np.uint32] = np.zeros((1 + len(keys), 3), np.uint32)
    words[0, :2] = directions.name_hash(name)
    words[1:, 0] = keys & np.uint64(0xFFFFFFFF)
    words[1:, 1] = keys >> np.uint64(32)
    words[1:, 2] = np.array(scales, np.float32).view(np.uint32)
    return torch.from_numpy(words.view(np.int32)).to(device)


def _words(tensor: Tensor) -> Tensor:
    """The tensor as kernels take it: bfloat16 as int16."""
    tensor = tensor.detach()
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


def _buckets(c: Tensor, device: torch.device) -> int:
    if c.dtype != torch.float32 or c.ndim != 1 or not c.is_contiguous() or c.device != device:
        raise ValueError(f"buckets must be a contiguous float32 vector on {device}, got {c.dtype} {list(c.shape)}")
    directions.check_k(len(c), "sketch")
    return len(c)


def _check(out: Tensor, base: Tensor, start: int, *, sizes_differ: bool = False) -> None:
    if triton is None:
        raise ImportError("directions on CUDA tensors need Triton, which is not installed: pip install triton")
    if start < 0 or not (sizes_differ or out.numel() == base.numel()):
        raise ValueError(f"start must be >= 0 and sizes equal, got {start}, {out.numel()} and {base.numel()}")
    for tensor in (out, base):
        if tensor.dtype not in DTYPES or not tensor.is_contiguous():
            raise ValueError(f"tensors must be contiguous, of {DTYPES}, got {tensor.dtype} {tensor.stride()}")
    if out.device != base.device:
        raise ValueError(f"tensors must be on one device, got {out.device} and {base.device}")


def _check_rows(out: Tensor, base: Tensor, rows: Tensor) -> None:
    _check(out, base, 0, sizes_differ=True)
    if base.ndim != 2 or rows.ndim != 1 or out.shape != (len(rows), base.shape[1]):
        shapes = [list(tensor.shape) for tensor in (out, rows, base)]
        raise ValueError(f"out, rows and base must be [n, d], [n] and [V, d], got {shapes}")
    if rows.dtype != torch.int64 or not rows.is_contiguous() or rows.device != out.device:
        raise ValueError(f"rows must be contiguous int64 on {out.device}, got {rows.dtype} on {rows.device}")


def _launch(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
    device = args[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(programs,)](*args, **constants, enable_fp_fusion=False)
