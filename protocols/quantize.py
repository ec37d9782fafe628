"""Float32 arrays to and from the dtypes that tensors travel in: fp32, fp16, bf16 and int8.

    fp32   as it is; decoding gives a read-only view of the received bytes
    fp16   IEEE half, round to nearest even; refuses values beyond 65504
    bf16   the upper half of a float32, round to nearest even
    int8   x ~ q * s: one fp32 scale s = max |x| / 127 a slice, q = floor(x / s) + [u < frac(x / s)], u from U[0, 1)

Stochastic rounding makes int8 unbiased, E[q * s] = x (QSGD, Alistarh et al. 2017, with the max norm), so that errors of
many devices average out. u is a Philox stream keyed by a seed and the tensor's name: the same seed gives the same
bytes, and devices or rounds with different seeds round independently.

All encoders take any float dtype and shape, and raise ValueError for values that the wire cannot hold.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedloom.protocols.messages import Array

Float32 = NDArray[np.float32]
Stored = NDArray[Any]

ITEM_BYTES: Final = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}

_LARGEST: Final = {
    "fp32": float(np.finfo(np.float32).max),
    "fp16": 65504.0,
    "bf16": float.fromhex("0x1.fep127"),
    "int8": 126 * 2.0**120,
}
_SMALLEST_SCALE = np.float32(2.0**-126)  # below it division loses bits; such values round to one step, still unbiased
_LARGEST_SCALE = np.float32(2.0**120)  # 127 steps of it are a finite float32
_BLOCK = 1 << 17  # elements worked on at a time, so that temporaries stay in the cache


def known_wire(wire: str) -> None:
    """Raise ValueError unless `wire` names a dtype that tensors travel in."""
    if wire not in ITEM_BYTES:
        raise ValueError(f"wire must be one of {', '.join(ITEM_BYTES)}, got {wire!r}")


def scale_count(shape: tuple[int, ...], axis: int | None) -> int:
    """How many int8 scales an array has: one for each index of `axis`, or one in all."""
    return 1 if axis is None else shape[axis]


def stored_bytes(wire: str, shape: tuple[int, ...], axis: int | None) -> int:
    """How many bytes `store` makes of an array, exact for shapes of any size; an empty array has none."""
    size = math.prod(shape)
    scales = 4 * scale_count(shape, axis) if wire == "int8" and size else 0
    return scales + ITEM_BYTES[wire] * size


def store(x: Array, wire: str, *, axis: int | None, label: str, seed: int) -> list[Stored]:
    """Contiguous little-endian arrays that hold `x` on the wire, one after another.

    Args:
        x: any float array.
        axis: int8 keeps a scale for each index along it; None keeps one for the whole array.
        label: names the tensor in errors and, with `seed`, keys its stochastic rounding.

    Raises:
        ValueError: for a value that is not finite, or beyond what `wire` holds.
    """
    if not np.issubdtype(x.dtype, np.floating):
        raise ValueError(f"{label} must be a float array, got {x.dtype}")
    if x.size == 0:
        return []
    peak = max(float(x.max()), -float(x.min()))  # both are NaN if any value is
    if not math.isfinite(peak):
        raise ValueError(f"{label} must be finite, got {_first_bad(x)}")
    if peak > _LARGEST[wire]:
        hint = "; send it as bf16 or fp32" if wire == "fp16" else ""
        raise ValueError(f"{label} must lie within +-{_LARGEST[wire]:.7g} to travel as {wire}, got {peak:.7g}{hint}")
    if wire == "fp32":
        return [np.ascontiguousarray(x, dtype="<f4")]
    if wire == "fp16":
        return [np.ascontiguousarray(x, dtype="<f2")]
    single = np.ascontiguousarray(x, dtype=np.float32)
    return [_to_bf16(single)] if wire == "bf16" else _to_int8(single, axis, label, seed)


def load(data: memoryview, wire: str, shape: tuple[int, ...], *, axis: int | None, label: str) -> Float32:
    """The read-only float32 array that `data`, exactly `stored_bytes` long, stands for.

    Raises:
        ValueError: for a value that is not finite, or an int8 scale that `store` cannot have made.
    """
    result = _read(data, wire, shape, axis, label)
    if wire != "int8" and not np.isfinite(result).all():
        raise ValueError(f"{label} must be finite, got {_first_bad(result)}")
    result.flags.writeable = False
    return result


def _read(data: memoryview, wire: str, shape: tuple[int, ...], axis: int | None, label: str) -> Float32:
    if wire == "fp32" or 0 in shape:
        return np.require(np.frombuffer(data, "<f4").reshape(shape), np.float32, "A")  # copied where not aligned
    if wire == "fp16":
        return np.frombuffer(data, "<f2").reshape(shape).astype(np.float32)
    if wire == "bf16":
        bits = np.frombuffer(data, "<u2").astype(np.uint32)
        bits <<= np.uint32(16)
        return bits.view(np.float32).reshape(shape)
    count = scale_count(shape, axis)
    scales = np.frombuffer(data, "<f4", count)
    if not bool(((scales >= _SMALLEST_SCALE) & (scales <= _LARGEST_SCALE)).all()):
        raise ValueError(
            f"int8 scales of {label} must lie within 2^-126 and 2^120, got {scales.min()} to {scales.max()}"
        )
    result = np.frombuffer(data, np.int8, offset=4 * count).reshape(shape).astype(np.float32)
    result *= scales.reshape(_scale_shape(shape, axis))
    return result


def _first_bad(x: Array) -> str:
    index = np.unravel_index(int(np.argmin(np.isfinite(x))), x.shape)
    return f"{x[index]} at {[int(i) for i in index]}"


def _scale_shape(shape: tuple[int, ...], axis: int | None) -> tuple[int, ...]:
    return tuple(length if place == axis else 1 for place, length in enumerate(shape))


def _to_bf16(x: Float32) -> Stored:
    """Round to nearest even: add half a step, less one where the kept part is already even, and cut."""
    bits, kept = x.reshape(-1).view(np.uint32), np.empty(x.size, "<u2")
    for start in range(0, x.size, _BLOCK):
        part = bits[start : start + _BLOCK]
        half = part >> np.uint32(16)
        half &= np.uint32(1)
        half += np.uint32(0x7FFF)
        half += part
        half >>= np.uint32(16)
        kept[start : start + _BLOCK] = half
    return kept


def _to_int8(x: Float32, axis: int | None, label: str, seed: int) -> list[Stored]:
    """Scales, then values, both in the order of `x`."""
    others = tuple(place for place in range(x.ndim) if place != axis)
    peaks = np.maximum(x.max(axis=others), -x.min(axis=others)).reshape(_scale_shape(x.shape, axis))
    # One float up, so that the division below never gives more than 127.
    scales = np.maximum(np.nextafter(peaks / np.float32(127), np.float32(np.inf)), _SMALLEST_SCALE)
    key = hashlib.sha256(f"int8/{seed}/{label}".encode()).digest()[:16]
    stream = np.random.Philox(key=int.from_bytes(key, "little"))
    values = np.empty(x.shape, np.int8)
    rows = max(1, _BLOCK // max(1, math.prod(x.shape[1:])))
    for start in range(0, x.shape[0], rows):
        block = slice(start, start + rows)
        y = x[block] / (scales[block] if axis == 0 else scales)
        floor = np.floor(y)
        y -= floor
        floor += _uniform(stream, y.size).reshape(y.shape) < y
        values[block] = floor
    return [scales.reshape(-1).astype("<f4"), values]


def _uniform(stream: np.random.Philox, count: int) -> Float32:
    """Multiples of 2^-24 in [0, 1), from the top bits of each half of a raw draw."""
    halves = stream.random_raw((count + 1) // 2).astype("<u8", copy=False).view("<u4")[:count]
    unit = (halves >> np.uint32(8)).astype(np.float32)
    unit *= np.float32(2.0**-24)
    return unit
