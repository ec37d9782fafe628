"""The directions that a model is tuned along: the same bits on every device, from a seed, a tensor's name and an index.

    gaussian    z ~ N(0, I_d)                  theta = theta_0 + sum_k c_k z_k, one stream for each seed of a pool
    rademacher  z in {-1, +1}^d                the same, with signs
    sketch      S[i, h(i)] = s(i)              theta = theta_0 + S c, so that theta_i = theta_0,i + s(i) c[h(i)]

Randomness is Philox4x32-10 (philox.py). Its key is the seed of a direction; its counter is

    word 0   low half of the block index           what a block of four words is for, at block index b:
    word 1   high bits of the block index,         SIGNS    128 elements i = 128 b + 32 w + j, bit j of word w; set: -1
             and the stream in the top 8 bits      NORMALS  4 elements i = 4 b + (0..3), two Box-Muller pairs
    word 2,3 hash of the tensor's name             OFFSETS  r_b of the sketch's b-th run of K elements, word 0
                                                   POOL     the key of a pool's b-th direction, words 0 and 1

so an element's value does not depend on how a tensor is split, in which order it is made, or on dtype, threads or
device. The sketch is a count sketch (Charikar et al. 2002) whose buckets are runs: h(i) = (i + r_b) mod K, b = i div K,
K a power of two. Its columns are orthogonal: S'S is diagonal, with about d / K on it.

The normals are Box and Muller's, made of IEEE float32 additions, products, one square root and integer operations in a
fixed order, never fused: these are exactly rounded everywhere, so normals are bit-identical too. Everything here is the
plain reference that fast kernels are held against.
"""

from __future__ import annotations

import hashlib
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from fedloom.protocols.philox import Words, philox4x32

Float32 = NDArray[np.float32]
Keys = NDArray[np.uint64]
Family = Literal["gaussian", "rademacher", "sketch"]

DIRECTIONS_VERSION: Final = 1  # changes with any bit of any direction
FAMILIES: Final[tuple[Family, ...]] = ("gaussian", "rademacher", "sketch")

SIGNS: Final = 0
NORMALS: Final = 1
OFFSETS: Final = 2
POOL: Final = 3
STREAM_SHIFT: Final = 24  # of word 1

SIGNS_PER_BLOCK: Final = 128
NORMALS_PER_BLOCK: Final = 4

# ln(1 + f) on [sqrt(1/2) - 1, sqrt(2) - 1], sin and cos on [-pi/4, pi/4]: the Cephes library's minimax polynomials.
LOG_POLY: Final = (
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
    -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
)  # fmt: skip
SIN_POLY: Final = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
COS_POLY: Final = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
LN2: Final = 0.6931471805599453
HALF_PI: Final = 1.5707963267948966
SQRT_HALF_BITS: Final = 0x3F3504F3  # of sqrt(1/2) in float32


def known_family(family: str) -> Family:
    """Raise ValueError unless directions of this family exist."""
    if family not in FAMILIES:
        raise ValueError(f"a family of directions must be one of {', '.join(FAMILIES)}, got {family!r}")
    return family


def check_k(k: int, family: str) -> None:
    """Raise ValueError unless a subspace of this family can have k dimensions."""
    if not 1 <= k <= 2**20:
        raise ValueError(f"a subspace must have 1..{2**20} directions, got {k}")
    if family == "sketch" and k & (k - 1):
        raise ValueError(f"a sketch must have a power of two of buckets, got {k}")


def name_hash(name: str) -> tuple[int, int]:
    """The counter's words 2 and 3 for a tensor: the first 64 bits of SHA-256 of its name."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def key_words(key: int) -> tuple[int, int]:
    """A 64-bit key as Philox takes it: low half, high half."""
    return key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF


def blocks(key: int, stream: int, name: str, first: int, last: int) -> Words:
    """Philox blocks first..last - 1 of a stream, [last - first, 4]."""
    index = np.arange(first, last, dtype=np.uint64)
    counter = np.empty((len(index), 4), np.uint32)
    counter[:, 0] = index & np.uint64(0xFFFFFFFF)
    counter[:, 1] = (index >> np.uint64(32)) | np.uint64(stream << STREAM_SHIFT)
    counter[:, 2:] = name_hash(name)
    return philox4x32(counter, np.array(key_words(key), np.uint32))


def pool_keys(seed: int, indices: NDArray[np.integer]) -> Keys:
    """The keys of directions `indices` of the pool that a seed stands for, uint64 [n]."""
    chosen = np.asarray(indices).astype(np.uint64)
    counter = np.zeros((len(chosen), 4), np.uint32)
    counter[:, 0] = chosen
    counter[:, 1] = POOL << STREAM_SHIFT
    words = philox4x32(counter, np.array(key_words(seed), np.uint32)).astype(np.uint64)
    return np.asarray(words[:, 0] | (words[:, 1] << np.uint64(32)), np.uint64)


def direction(family: str, key: int, name: str, start: int, stop: int) -> Float32:
    """Elements start..stop - 1 of one direction in a tensor, float32.

    Raises:
        ValueError: for the sketch, which has no directions of its own, or an unknown family.
    """
    if known_family(family) == "rademacher":
        return signs(key, name, start, stop)
    if family == "gaussian":
        return normals(key, name, start, stop)
    raise ValueError("a direction must be gaussian or rademacher, got sketch")


def signs(key: int, name: str, start: int, stop: int) -> Float32:
    """Random signs, float32 [stop - start]."""
    first, last = start // SIGNS_PER_BLOCK, -(-stop // SIGNS_PER_BLOCK)
    words = blocks(key, SIGNS, name, first, last).reshape(-1, 1)
    bits = ((words >> np.arange(32, dtype=np.uint32)) & np.uint32(1)).reshape(-1)
    skip = start - first * SIGNS_PER_BLOCK
    return np.float32(1) - np.float32(2) * bits[skip : skip + stop - start].astype(np.float32)


def normals(key: int, name: str, start: int, stop: int) -> Float32:
    """Standard normals, float32 [stop - start], |z| < 5.8."""
    first, last = start // NORMALS_PER_BLOCK, -(-stop // NORMALS_PER_BLOCK)
    pairs = blocks(key, NORMALS, name, first, last).reshape(-1, 2)
    skip = start - first * NORMALS_PER_BLOCK
    return box_muller(pairs[:, 0], pairs[:, 1]).reshape(-1)[skip : skip + stop - start]


def box_muller(radius: Words, angle: Words) -> Float32:
    """Two normals for each pair of words, float32 [n, 2]."""
    r = np.sqrt(np.float32(-2) * _log((radius >> np.uint32(8)) + np.uint32(1)))
    quadrant = angle >> np.uint32(30)
    turn = ((angle >> np.uint32(6)) & np.uint32(0xFFFFFF)).astype(np.int32) - np.int32(1 << 23)
    x = turn.astype(np.float32) * np.float32(HALF_PI * 2.0**-24)
    square = x * x
    sine = x + x * (square * _poly(SIN_POLY, square))
    cosine = (np.float32(1) - np.float32(0.5) * square) + (square * square) * _poly(COS_POLY, square)
    swap = (quadrant & np.uint32(1)).astype(bool)
    first, second = np.where(swap, sine, cosine), np.where(swap, cosine, sine)
    # quadrants 0..3: (c, s), (-s, c), (-c, -s), (s, -c)
    first = np.where((quadrant == 1) | (quadrant == 2), -first, first)
    second = np.where(quadrant >= 2, -second, second)
    return np.stack([r * first, r * second], axis=-1)


def _log(count: Words) -> Float32:
    """ln(count 2^-24) for counts in 1..2^24, float32."""
    bits = count.astype(np.float32).view(np.uint32) - np.uint32(24 << 23)
    shifted = bits - np.uint32(SQRT_HALF_BITS)  # wraps below zero: the arithmetic shift makes the floor of log2
    exponent = shifted.view(np.int32) >> np.int32(23)
    mantissa = (bits - (exponent.view(np.uint32) << np.uint32(23))).view(np.float32)
    f = mantissa - np.float32(1)
    square = f * f
    tail = (f * square) * _poly(LOG_POLY, f) - np.float32(0.5) * square
    return np.asarray(exponent.astype(np.float32) * np.float32(LN2) + (f + tail), np.float32)


def _poly(coefficients: tuple[float, ...], x: Float32) -> Float32:
    """Horner's rule, highest power first."""
    value = np.full_like(x, np.float32(coefficients[0]))
    for coefficient in coefficients[1:]:
        value = value * x + np.float32(coefficient)
    return value


def sketch_rows(seed: int, name: str, k: int, start: int, stop: int) -> tuple[NDArray[np.int64], Float32]:
    """Rows start..stop - 1 of S: the bucket h(i) of each element, int64, and its sign s(i), float32."""
    check_k(k, "sketch")
    index = np.arange(start, stop, dtype=np.int64)
    first = start // k
    offsets = blocks(seed, OFFSETS, name, first, -(-stop // k))[:, 0].astype(np.int64)
    return (index + offsets[index // k - first]) & (k - 1), signs(seed, name, start, stop)


def sign_vector(seed: int, step: int, k: int) -> Float32:
    """The step-th direction v in {-1, +1}^k within a subspace, drawn from a task's seed."""
    return signs(int(pool_keys(seed, np.array([step]))[0]), "", 0, k)
