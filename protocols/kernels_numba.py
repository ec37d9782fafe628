"""The loops of kernels.py, compiled by Numba: tiles of 2048 elements that stay in the L1 cache while they are made.

Every array is an address (int64). A loop makes `count` pieces of `d` consecutive elements: piece j is written to
out[j d ...], read from base[rows[j] d ...], and its elements are start + rows[j] d ... of the tensor. `kinds` is the
kind of out * 3 + the kind of base, 0 float32, 1 float16, 2 bfloat16 bits. `scratch` is memory: float32 [2048]
sums, the bits of 4 x 2048 signs, and uint32 [2064] offsets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar, cast

from numba import njit

from fedloom.protocols import kernels_llvm as step

F = TypeVar("F", bound=Callable[..., Any])

# Numba's cache on disk watches this file alone, so this has to change with kernels_llvm.py: a test says to what.
LLVM_SOURCE: Final = "3ced835f"

BLOCKS: Final = step.LANES  # of signs, which a step draws at once
WIDE: Final = step.WIDE
TILE: Final = BLOCKS * WIDE
NORMALS: Final = 4 * step.LANES  # made by each of a step's groups
_BITS: Final = 4 * TILE  # of scratch, after the sums: the signs of up to 4 directions
_BITS_BYTES: Final = TILE // 8
_OFFSETS: Final = _BITS + 4 * _BITS_BYTES


def _jit(function: F) -> F:
    """Compile without the GIL, and keep the machine code on disk where a cache folder can be written."""
    try:
        return cast(F, njit(nogil=True, cache=True)(function))
    except RuntimeError:  # there is none
        return cast(F, njit(nogil=True)(function))


@_jit
def _size(kind: int) -> int:
    return 4 if kind == 0 else 2


@_jit
def _clear(sums: int, elements: int) -> None:
    for at in range(0, elements, step.LANES):
        step.clear(sums + 4 * at)


@_jit
def _finish(out: int, base: int, kinds: int, sums: int, elements: int) -> None:
    """out = round(base + sums)."""
    to, source = _size(kinds // 3), _size(kinds % 3)
    whole = elements // step.NARROW * step.NARROW
    for at in range(0, whole, step.NARROW):
        step.finish(out + to * at, base + source * at, kinds, sums + 4 * at)
    for at in range(whole, elements):
        step.finish_one(out + to * at, base + source * at, kinds, sums + 4 * at)


@_jit
def _sum_signs(
    sums: int, bits: int, block: int, blocks: int, hash2: int, hash3: int, keys: int, scales: int, n: int
) -> None:
    """sums += scales[k] * signs of blocks block..block + blocks - 1, in the order of k."""
    whole = n // 4 * 4
    for k in range(0, whole, 4):
        for m in range(4):
            step.draw_signs(bits + _BITS_BYTES * m, step.read_int64(keys + 8 * (k + m)), block, hash2, hash3)
        s0, s1 = step.read_float32(scales + 4 * k), step.read_float32(scales + 4 * k + 4)
        s2, s3 = step.read_float32(scales + 4 * k + 8), step.read_float32(scales + 4 * k + 12)
        for b in range(blocks):
            step.add_signs_4(sums + 4 * WIDE * b, bits + 4 * b, s0, s1, s2, s3)
    for k in range(whole, n):
        step.draw_signs(bits, step.read_int64(keys + 8 * k), block, hash2, hash3)
        scale = step.read_float32(scales + 4 * k)
        for b in range(blocks):
            step.add_signs(sums + 4 * WIDE * b, bits + 4 * b, scale)


@_jit
def rademacher(
    out: int, base: int, kinds: int, rows: int, count: int, d: int, start: int, hash2: int, hash3: int,
    keys: int, scales: int, n: int, scratch: int,
) -> None:  # fmt: skip
    """out = round(base + sum_k scales[k] z_k), z_k of signs; keys int64 [n], scales float32 [n]."""
    to, source, bits = _size(kinds // 3), _size(kinds % 3), scratch + _BITS
    for j in range(count):
        row = d * step.read_int64(rows + 8 * j)
        first, stop = start + row, start + row + d
        for block in range(first // WIDE, (stop + WIDE - 1) // WIDE, BLOCKS):
            low, high = max(first, WIDE * block), min(stop, WIDE * (block + BLOCKS))
            to_at, source_at = out + to * (d * j + low - first), base + source * (row + low - first)
            if n == 1 and high - low == TILE and kinds % step.SAME == 0:  # without the detour through sums
                step.draw_signs(bits, step.read_int64(keys), block, hash2, hash3)
                scale = step.read_float32(scales)
                for b in range(BLOCKS):
                    e = WIDE * b
                    step.finish_signs(to_at + to * e, source_at + source * e, kinds, bits + 4 * b, scale)
            else:
                blocks = (high + WIDE - 1) // WIDE - block
                _clear(scratch, WIDE * blocks)
                _sum_signs(scratch, bits, block, blocks, hash2, hash3, keys, scales, n)
                _finish(to_at, source_at, kinds, scratch + 4 * (low - WIDE * block), high - low)


@_jit
def gaussian(
    out: int, base: int, kinds: int, rows: int, count: int, d: int, start: int, hash2: int, hash3: int,
    keys: int, scales: int, n: int, scratch: int,
) -> None:  # fmt: skip
    """The same with z_k of normals, in tiles from a multiple of 4 elements on."""
    to, source = _size(kinds // 3), _size(kinds % 3)
    made = step.GROUPS * NORMALS
    for j in range(count):
        row = d * step.read_int64(rows + 8 * j)
        first, stop = start + row, start + row + d
        for begin in range(first // 4 * 4, stop, TILE):
            low, high = max(first, begin), min(stop, begin + TILE)
            elements = (high - begin + made - 1) // made * made
            _clear(scratch, elements)
            for k in range(n):
                key, scale = step.read_int64(keys + 8 * k), step.read_float32(scales + 4 * k)
                for e in range(0, elements, made):
                    step.add_normals(scratch + 4 * e, key, (begin + e) // 4, hash2, hash3, scale)
            for e in range(0, elements, NORMALS):
                step.untangle(scratch + 4 * e)
            to_at, source_at = out + to * (d * j + low - first), base + source * (row + low - first)
            _finish(to_at, source_at, kinds, scratch + 4 * (low - begin), high - low)


@_jit
def _draw_offsets(offsets: int, seed: int, run: int, last: int, hash2: int, hash3: int) -> int:
    """Offsets of runs run..last at least; returns the first run that has none."""
    while run <= last:
        step.draw_offsets(offsets, seed, run, hash2, hash3)
        offsets += 4 * BLOCKS
        run += BLOCKS
    return run


@_jit
def _bucket(element: int, offsets: int, run: int, k: int, shift: int) -> int:
    """h(element), where offsets begin with that of a run of k = 2^shift."""
    offset: int = step.read_word(offsets + 4 * ((element >> shift) - run))
    return (element + offset) & (k - 1)


@_jit
def _take(sums: int, bits: int, block: int, blocks: int, c: int, offsets: int, run: int, k: int, shift: int) -> None:
    """sums = signs * c[h], for blocks block..block + blocks - 1."""
    for b in range(blocks):
        element = WIDE * (block + b)
        if k >= WIDE:
            step.take_buckets(sums + 4 * WIDE * b, c + 4 * _bucket(element, offsets, run, k, shift), bits + 4 * b)
        else:
            for e in range(WIDE):
                at, word = c + 4 * _bucket(element + e, offsets, run, k, shift), bits + 4 * b + 64 * (e // 32)
                step.take_bucket(sums + 4 * (WIDE * b + e), at, word, e % 32)


@_jit
def sketch(
    out: int, base: int, kinds: int, rows: int, count: int, d: int, start: int, hash2: int, hash3: int,
    seed: int, c: int, k: int, shift: int, scratch: int,
) -> None:  # fmt: skip
    """out = round(base + s c[h]); c is float32 [k + 128], its begin again after its end."""
    to, source = _size(kinds // 3), _size(kinds % 3)
    bits, offsets = scratch + _BITS, scratch + _OFFSETS
    for j in range(count):
        row = d * step.read_int64(rows + 8 * j)
        first, stop = start + row, start + row + d
        run = known = 0
        for block in range(first // WIDE, (stop + WIDE - 1) // WIDE, BLOCKS):
            low, high = max(first, WIDE * block), min(stop, WIDE * (block + BLOCKS))
            to_at, source_at = out + to * (d * j + low - first), base + source * (row + low - first)
            blocks = (high + WIDE - 1) // WIDE - block
            last = (WIDE * (block + blocks) - 1) >> shift
            if last >= known:
                run = (WIDE * block) >> shift
                known = _draw_offsets(offsets, seed, run, last, hash2, hash3)
            step.draw_signs(bits, seed, block, hash2, hash3)
            if high - low == TILE and kinds % step.SAME == 0 and k >= WIDE:
                for b in range(BLOCKS):
                    e = WIDE * b
                    at = c + 4 * _bucket(low + e, offsets, run, k, shift)
                    step.finish_buckets(to_at + to * e, source_at + source * e, kinds, bits + 4 * b, at)
            else:
                _take(scratch, bits, block, blocks, c, offsets, run, k, shift)
                _finish(to_at, source_at, kinds, scratch + 4 * (low - WIDE * block), high - low)


@_jit
def fold(
    part: int, gradient: int, kind: int, d: int, start: int, hash2: int, hash3: int,
    seed: int, k: int, shift: int, scratch: int,
) -> None:  # fmt: skip
    """part[h] += s gradient; part is float64 [k + 128], what is after its end belongs to its begin."""
    size, stop = _size(kind), start + d
    bits, offsets = scratch + _BITS, scratch + _OFFSETS
    run = known = 0
    for block in range(start // WIDE, (stop + WIDE - 1) // WIDE, BLOCKS):
        low, high = max(start, WIDE * block), min(stop, WIDE * (block + BLOCKS))
        blocks = (high + WIDE - 1) // WIDE - block
        _clear(scratch, WIDE * blocks)
        at = scratch + 4 * (low - WIDE * block)
        _finish(at, gradient + size * (low - start), kind, at, high - low)
        last = (WIDE * (block + blocks) - 1) >> shift
        if last >= known:
            run = (WIDE * block) >> shift
            known = _draw_offsets(offsets, seed, run, last, hash2, hash3)
        step.draw_signs(bits, seed, block, hash2, hash3)
        for b in range(blocks):
            element = WIDE * (block + b)
            if k >= WIDE:
                bucket = part + 8 * _bucket(element, offsets, run, k, shift)
                step.fold_buckets(scratch + 4 * WIDE * b, bucket, bits + 4 * b)
            else:
                for e in range(WIDE):
                    bucket = part + 8 * _bucket(element + e, offsets, run, k, shift)
                    word = bits + 4 * b + 64 * (e // 32)
                    step.fold_bucket(scratch + 4 * (WIDE * b + e), bucket, word, e % 32)
