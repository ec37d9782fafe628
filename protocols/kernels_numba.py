"""The loops of kernels.py, compiled by Numba: tiles of 2048 elements that stay in the L1 cache while they are made.

Every array is an address (int64). A loop handles `count` pieces of `d` consecutive elements: piece j is written to
out[j d ...], read from base[rows[j] d ...], and its elements are start + rows[j] d ... of the tensor. `kinds` is the
kind of out * 3 + the kind of base, 0 float32, 1 float16, 2 bfloat16 bits. `scratch` is SCRATCH_BYTES of memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

from numba import njit

from fedloom.protocols import kernels_llvm as step
from fedloom.protocols.directions import SIGNS_PER_BLOCK

F = TypeVar("F", bound=Callable[..., Any])

# Numba's cache on disk looks at this file alone: it has to change with kernels_llvm.py (a test says to what).
LLVM_SOURCE: Final = "0"

BLOCKS: Final = step.LANES  # that a step draws at once
TILE: Final = BLOCKS * SIGNS_PER_BLOCK
SCRATCH_BYTES: Final = 32768
_BITS: Final = 4 * TILE  # of scratch, after the sums: the signs of up to 4 directions
_OFFSETS: Final = _BITS + 4 * TILE // 8
_BITS_BYTES: Final = TILE // 8


def _jit(function: F) -> F:
    """Compile without the GIL, and keep the machine code on disk where a cache folder can be written."""
    try:
        compiled: F = njit(nogil=True, cache=True)(function)
    except RuntimeError:  # there is none
        compiled = njit(nogil=True)(function)
    return compiled


@_jit
def _size(kind: int) -> int:
    return 4 if kind == 0 else 2


@_jit
def _clear(sums: int, elements: int) -> None:
    for at in range(0, elements, 128):
        step.clear(sums + 4 * at)


@_jit
def _finish(out: int, base: int, sums: int, elements: int, kinds: int) -> None:
    to, source = _size(kinds // 3), _size(kinds % 3)
    whole = elements // 128 * 128
    for at in range(0, whole, 128):
        step.finish(out + to * at, base + source * at, sums + 4 * at, kinds)
    for at in range(whole, elements):
        step.finish_one(out + to * at, base + source * at, sums + 4 * at, kinds)


@_jit
def _sum_signs(
    sums: int, bits: int, block: int, blocks: int, hash2: int, hash3: int, keys: int, scales: int, n: int
) -> None:
    """Tile of blocks block..block + blocks - 1: sums += scales[k] * signs, in the order of k."""
    whole = n // 4 * 4
    for k in range(0, whole, 4):
        for m in range(4):
            step.draw_signs(bits + _BITS_BYTES * m, step.read_int64(keys + 8 * (k + m)), block, hash2, hash3)
        s0, s1 = step.read_float32(scales + 4 * k), step.read_float32(scales + 4 * k + 4)
        s2, s3 = step.read_float32(scales + 4 * k + 8), step.read_float32(scales + 4 * k + 12)
        for b in range(blocks):
            step.add_signs_4(sums + 512 * b, bits + 4 * b, s0, s1, s2, s3)
    for k in range(whole, n):
        step.draw_signs(bits, step.read_int64(keys + 8 * k), block, hash2, hash3)
        scale = step.read_float32(scales + 4 * k)
        for b in range(blocks):
            step.add_signs(sums + 512 * b, bits + 4 * b, scale)


@_jit
def rademacher(
    out: int, base: int, kinds: int, rows: int, count: int, d: int, start: int, hash2: int, hash3: int,
    keys: int, scales: int, n: int, scratch: int,
) -> None:  # fmt: skip
    """out = round(base + sum_k scales[k] z_k), z_k of signs; keys int64 [n], scales float32 [n]."""
    to, source = _size(kinds // 3), _size(kinds % 3)
    for j in range(count):
        row = d * step.read_int64(rows + 8 * j)
        first, stop = start + row, start + row + d
        for block in range(first // 128, (stop + 127) // 128, BLOCKS):
            low, high = max(first, 128 * block), min(stop, 128 * (block + BLOCKS))
            blocks = (high + 127) // 128 - block
            _clear(scratch, 128 * blocks)
            _sum_signs(scratch, scratch + _BITS, block, blocks, hash2, hash3, keys, scales, n)
            at = low - first
            skip = 4 * (low - 128 * block)
            _finish(out + to * (d * j + at), base + source * (row + at), scratch + skip, high - low, kinds)


@_jit
def gaussian(
    out: int, base: int, kinds: int, rows: int, count: int, d: int, start: int, hash2: int, hash3: int,
    keys: int, scales: int, n: int, scratch: int,
) -> None:  # fmt: skip
    """The same with z_k of normals. A step makes 64 normals, so a tile is 32 steps from a multiple of 4 elements."""
    to, source = _size(kinds // 3), _size(kinds % 3)
    for j in range(count):
        row = d * step.read_int64(rows + 8 * j)
        first, stop = start + row, start + row + d
        for begin in range(first // 4 * 4, stop, TILE):
            low, high = max(first, begin), min(stop, begin + TILE)
            steps = (high - begin + 63) // 64
            _clear(scratch, 64 * steps)
            for k in range(n):
                key, scale = step.read_int64(keys + 8 * k), step.read_float32(scales + 4 * k)
                for m in range(steps):
                    step.add_normals(scratch + 256 * m, key, begin // 4 + 16 * m, hash2, hash3, scale)
            for m in range(steps):
                step.untangle(scratch + 256 * m)
            at = low - first
            _finish(out + to * (d * j + at), base + source * (row + at), scratch + 4 * (low - begin), high - low, kinds)


@_jit
def _bucket(element: int, offsets: int, run: int, k: int, shift: int) -> int:
    """h(element), where offsets are those of the runs from `run` on."""
    return (element + step.read_int32(offsets + 4 * ((element >> shift) - run))) & (k - 1)


@_jit
def _draw_offsets(offsets: int, seed: int, run: int, last: int, hash2: int, hash3: int) -> int:
    """Offsets of runs run..last, by 16; returns the run after the last one drawn."""
    while run <= last:
        step.draw_offsets(offsets, seed, run, hash2, hash3)
        offsets += 64
        run += 16
    return run


@_jit
def sketch(
    out: int, base: int, kinds: int, rows: int, count: int, d: int, start: int, hash2: int, hash3: int,
    seed: int, c: int, k: int, shift: int, scratch: int,
) -> None:  # fmt: skip
    """out = round(base + s c[h]); k = 2^shift, and c, float32 [k + 128], goes on after its end with its begin."""
    to, source = _size(kinds // 3), _size(kinds % 3)
    bits, offsets = scratch + _BITS, scratch + _OFFSETS
    for j in range(count):
        row = d * step.read_int64(rows + 8 * j)
        first, stop = start + row, start + row + d
        run = known = 0
        for block in range(first // 128, (stop + 127) // 128, BLOCKS):
            low, high = max(first, 128 * block), min(stop, 128 * (block + BLOCKS))
            blocks = (high + 127) // 128 - block
            step.draw_signs(bits, seed, block, hash2, hash3)
            last = (128 * (block + blocks) - 1) >> shift
            if last >= known:
                run = (128 * block) >> shift
                known = _draw_offsets(offsets, seed, run, last, hash2, hash3)
            for b in range(blocks):
                element = 128 * (block + b)
                if k >= 128:
                    at = c + 4 * _bucket(element, offsets, run, k, shift)
                    step.take_buckets(scratch + 512 * b, at, bits + 4 * b)
                else:
                    for e in range(128):
                        at = c + 4 * _bucket(element + e, offsets, run, k, shift)
                        word = bits + 4 * b + 64 * (e // 32)
                        step.take_bucket(scratch + 512 * b + 4 * e, at, word, e % 32)
            at = low - first
            skip = 4 * (low - 128 * block)
            _finish(out + to * (d * j + at), base + source * (row + at), scratch + skip, high - low, kinds)


@_jit
def fold(
    part: int, gradient: int, kind: int, d: int, start: int, hash2: int, hash3: int,
    seed: int, k: int, shift: int, scratch: int,
) -> None:  # fmt: skip
    """part[h] += s gradient; part float64 [k + 128], whose end belongs to its begin."""
    size, stop = _size(kind), start + d
    bits, offsets = scratch + _BITS, scratch + _OFFSETS
    run = known = 0
    for block in range(start // 128, (stop + 127) // 128, BLOCKS):
        low, high = max(start, 128 * block), min(stop, 128 * (block + BLOCKS))
        blocks = (high + 127) // 128 - block
        _clear(scratch, 128 * blocks)
        skip = scratch + 4 * (low - 128 * block)
        _finish(skip, gradient + size * (low - start), skip, high - low, kind)
        step.draw_signs(bits, seed, block, hash2, hash3)
        last = (128 * (block + blocks) - 1) >> shift
        if last >= known:
            run = (128 * block) >> shift
            known = _draw_offsets(offsets, seed, run, last, hash2, hash3)
        for b in range(blocks):
            element = 128 * (block + b)
            if k >= 128:
                at = part + 8 * _bucket(element, offsets, run, k, shift)
                step.fold_buckets(scratch + 512 * b, at, bits + 4 * b)
            else:
                for e in range(128):
                    at = part + 8 * _bucket(element + e, offsets, run, k, shift)
                    word = bits + 4 * b + 64 * (e // 32)
                    step.fold_bucket(scratch + 512 * b + 4 * e, at, word, e % 32)
