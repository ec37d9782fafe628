"""Directions added to weights, fast, on a CPU: the bits of directions.py, in one pass over memory.

Weights are float32, float16, or uint16, which stands for the bits of bfloat16. An element is computed in float32 and
rounded once, to the nearest, ties to even: out[i] = round(float32(base[i]) + acc), where acc starts at 0 and takes
scales[k] * z_k in the order of k, never fused. So a result depends on neither threads, pieces nor dtype of the rest.

Compiled by Numba on first use (about a second, then from its cache on disk). Threads are of this module's own pools,
made for a call, so that nothing is left behind that a fork or OpenMP would meet.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from types import ModuleType
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedloom.protocols.directions import Float32, Keys, check_k, known_family, name_hash

Weights = NDArray[Any]
Item = TypeVar("Item")
Result = TypeVar("Result")

_KINDS: Final[dict[np.dtype[Any], int]] = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(np.uint16): 2}
_PIECE: Final = 1 << 19  # elements that a thread takes at once, at most
_WORK: Final = 1 << 26  # elements times directions of the same
_TILE: Final = 2048
_FOLDED: Final = 1 << 20  # elements of one partial sum of fold_sketch, at least
_WRAP: Final = 128  # buckets that are there twice, so that a step of 128 elements meets no end
_FLAT: Final = np.zeros(1, np.int64)  # the rows of a flat tensor
_SCRATCH_BYTES: Final = 32768  # more than the tiles of kernels_numba.py take

_hash = lru_cache(maxsize=4096)(name_hash)


def add_directions(
    out: Weights, base: Weights, *, name: str, start: int, family: str, keys: Keys, scales: Float32, threads: int = 1
) -> None:
    """out[i] = round(base[i] + sum_k scales[k] z_k(start + i)), for a run of elements of the tensor `name`.

    out and base are [n] and may be one array; keys uint64 and scales float32, both [directions].

    Raises:
        ValueError: for arguments that are not so.
    """
    _check_run(out, base, start)
    _add(_runs(out, base, start, len(keys)), name, family, keys, scales, threads)


def add_directions_rows(
    out: Weights,
    base: Weights,
    rows: NDArray[np.int64],
    *,
    name: str,
    family: str,
    keys: Keys,
    scales: Float32,
    threads: int = 1,
) -> None:
    """Rows `rows` [n] of the table `name`, perturbed: out [n, d], base [V, d], whose row r begins at element r d.

    Raises:
        ValueError: for arguments that are not so, or a row outside the table.
    """
    _check_rows(out, base, rows)
    _add(_row_groups(out, base, rows, len(keys)), name, family, keys, scales, threads)


def add_sketch(out: Weights, base: Weights, *, name: str, start: int, seed: int, c: Float32, threads: int = 1) -> None:
    """out[i] = round(base[i] + s(start + i) c[h(start + i)]), c [K]; out and base as in `add_directions`.

    Raises:
        ValueError: for arguments that are not so.
    """
    _check_run(out, base, start)
    _add_buckets(_runs(out, base, start, 1), name, seed, c, threads)


def add_sketch_rows(
    out: Weights,
    base: Weights,
    rows: NDArray[np.int64],
    *,
    name: str,
    seed: int,
    c: Float32,
    threads: int = 1,
) -> None:
    """Rows of the table `name`, as `add_directions_rows` takes them, with the sketch's direction S c added.

    Raises:
        ValueError: for arguments that are not so, or a row outside the table.
    """
    _check_rows(out, base, rows)
    _add_buckets(_row_groups(out, base, rows, 1), name, seed, c, threads)


def fold_sketch(into: NDArray[Any], gradient: Weights, *, name: str, start: int, seed: int, threads: int = 1) -> None:
    """into += S' g, into [K] float32 or float64, gradient [n] that of elements start .. start + n - 1 of a tensor.

    Fixed chunks of max(2^20, 64 K) elements are summed in float64, added up in their order, and rounded once into
    `into`: the same bits whatever `threads` is.

    Raises:
        ValueError: for arguments that are not so.
    """
    _check_array("gradient", gradient, 1, *_KINDS)
    _check_array("into", into, 1, np.dtype(np.float32), np.dtype(np.float64))
    _check_start(start)
    k = into.size
    check_k(k, "sketch")
    chunk, size, kind = max(_FOLDED, 64 * k), gradient.itemsize, _KINDS[gradient.dtype]
    address, where = _address(gradient), (*_hash(name), _key(seed), k, k.bit_length() - 1)
    loop = _loops().fold

    def fold(low: int) -> NDArray[np.float64]:
        part, d = np.zeros(k + _WRAP), min(chunk, gradient.size - low)
        loop(_address(part), address + size * low, kind, d, start + low, *where, _scratch.address)
        if k >= _WRAP:
            part[:_WRAP] += part[k:]
        return part[:k]

    total = np.zeros(k)
    for part in _run(fold, range(0, gradient.size, chunk), threads):
        total += part
    into[:] = into + total


_Piece = tuple[int, int, int, int, int, int, int]  # what every loop of kernels_numba.py takes first, out to start


def _runs(out: Weights, base: Weights, start: int, directions: int) -> Iterator[_Piece]:
    """Pieces of consecutive elements."""
    size = max(_TILE, min(_PIECE, _WORK // max(1, directions) // _TILE * _TILE))
    to, source, kinds = _address(out), _address(base), 3 * _KINDS[out.dtype] + _KINDS[base.dtype]
    for low in range(0, out.size, size):
        d = min(size, out.size - low)
        yield to + out.itemsize * low, source + base.itemsize * low, kinds, _flat, 1, d, start + low


def _row_groups(out: Weights, base: Weights, rows: NDArray[np.int64], directions: int) -> Iterator[_Piece]:
    """Pieces of some rows of a table."""
    d = out.shape[1]
    some = max(1, min(_PIECE, _WORK // max(1, directions)) // max(1, d))
    to, source, kinds = _address(out), _address(base), 3 * _KINDS[out.dtype] + _KINDS[base.dtype]
    for low in range(0, len(rows), some):
        count = min(some, len(rows) - low)
        yield to + out.itemsize * low * d, source, kinds, _address(rows) + 8 * low, count, d, 0


def _add(pieces: Iterator[_Piece], name: str, family: str, keys: Keys, scales: Float32, threads: int) -> None:
    """Add a pool's directions to every piece."""
    if known_family(family) == "sketch":
        raise ValueError("a direction must be gaussian or rademacher, got sketch")
    _check_array("keys", keys, 1, np.dtype(np.uint64))
    _check_array("scales", scales, 1, np.dtype(np.float32))
    if len(keys) != len(scales):
        raise ValueError(f"keys and scales must be equally many, got {len(keys)} and {len(scales)}")
    loop = _loops().gaussian if family == "gaussian" else _loops().rademacher
    where = (*_hash(name), _address(keys), _address(scales), len(keys))
    _run(lambda piece: loop(*piece, *where, _scratch.address), pieces, threads)


def _add_buckets(pieces: Iterator[_Piece], name: str, seed: int, c: Float32, threads: int) -> None:
    """Add the sketch's direction S c to every piece."""
    _check_array("c", c, 1, np.dtype(np.float32))
    k = c.size
    check_k(k, "sketch")
    around = np.concatenate([c, c[:_WRAP]]) if k >= _WRAP else c
    loop, where = _loops().sketch, (*_hash(name), _key(seed), _address(around), k, k.bit_length() - 1)
    _run(lambda piece: loop(*piece, *where, _scratch.address), pieces, threads)


def _run(work: Callable[[Item], Result], items: Iterable[Item], threads: int) -> list[Result]:
    """Results in the order of the items; each thread, this one too, takes the next item when it is free."""
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    waiting = list(items)
    helpers = min(threads, len(waiting) // 2) - 1  # a thread takes as long to start as one piece
    if helpers < 1:
        return list(map(work, waiting))
    done: list[Any] = [None] * len(waiting)
    turns = itertools.count()

    def take_turns() -> None:
        while (turn := next(turns)) < len(waiting):
            done[turn] = work(waiting[turn])

    with ThreadPoolExecutor(helpers) as pool:
        others = [pool.submit(take_turns) for _ in range(helpers)]
        take_turns()
        for other in others:
            other.result()
    return done


@cache
def _loops() -> ModuleType:
    """kernels_numba, imported when first needed: Numba takes a while."""
    from fedloom.protocols import kernels_numba

    return kernels_numba


def _address(array: NDArray[Any]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


class _Scratch(threading.local):
    """Each thread's memory for tiles, from a cache line's begin on."""

    def __init__(self) -> None:
        self.memory = np.empty(_SCRATCH_BYTES + 64, np.uint8)
        self.address = _address(self.memory) + -_address(self.memory) % 64


_scratch = _Scratch()
_flat = _address(_FLAT)


def _key(seed: int) -> int:
    """A 64-bit key as the int64 of its bits."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"a seed must be in 0..2^64 - 1, got {seed}")
    return seed - 2**64 if seed >= 2**63 else seed


def _check_array(what: str, array: NDArray[Any], ndim: int, *dtypes: np.dtype[Any]) -> None:
    if array.dtype not in dtypes:
        raise ValueError(f"{what} must be {' or '.join(map(str, dtypes))}, got {array.dtype}")
    if what in ("out", "into") and not array.flags.writeable:
        raise ValueError(f"{what} must be writeable, got a read-only array")
    if array.ndim != ndim or not array.flags.c_contiguous:
        raise ValueError(f"{what} must be contiguous with {ndim} axes, got {array.shape} with strides {array.strides}")


def _check_start(start: int) -> None:
    if start < 0:
        raise ValueError(f"start must be at least 0, got {start}")


def _check_run(out: Weights, base: Weights, start: int) -> None:
    _check_array("out", out, 1, *_KINDS)
    _check_array("base", base, 1, *_KINDS)
    _check_start(start)
    if out.shape != base.shape:
        raise ValueError(f"out must have the shape of base, {base.shape}, got {out.shape}")


def _check_rows(out: Weights, base: Weights, rows: NDArray[np.int64]) -> None:
    _check_array("out", out, 2, *_KINDS)
    _check_array("base", base, 2, *_KINDS)
    _check_array("rows", rows, 1, np.dtype(np.int64))
    if out.shape != (len(rows), base.shape[1]):
        raise ValueError(f"out must have shape {(len(rows), base.shape[1])}, got {out.shape}")
    if len(rows) and not 0 <= rows.min() <= rows.max() < len(base):
        raise ValueError(f"rows must be in 0..{len(base) - 1}, got {rows.min()}..{rows.max()}")
