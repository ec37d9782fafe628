"""The three ways in which whole numbers are packed: what is read must be what would have been written."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Final

import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from targets import MIB, Broken, Havoc, Target, same

from fedloom.protocols.bitpack import join_bits, pack_bits, split_bits, unpack_bits
from fedloom.protocols.coefficients_wire import pack_steps, unpack_steps
from fedloom.protocols.rans import histogram, rans_decode, rans_encode

_TOP: Final = 2**53 - 1
_MOST: Final = 1 << 12  # steps or symbols of one input


def _number(data: bytes) -> tuple[int, bytes]:
    """A count from the first two bytes, and the rest."""
    return int.from_bytes(data[:2], "little") % (_MOST + 1), data[2:]


def _check_coefficients(data: bytes) -> None:
    k, packed = _number(data)
    steps = unpack_steps(packed, k)
    if steps.shape != (k,) or steps.dtype != np.int64 or (k and int(np.abs(steps).max()) > _TOP):
        raise Broken(f"steps must be {k} within 53 bits, got {steps.dtype} {steps.shape}")
    if pack_steps(steps) != packed:
        raise Broken(f"one string of bytes must stand for steps, got two: {packed.hex()} and {pack_steps(steps).hex()}")


def _steps(values: list[int]) -> bytes:
    return len(values).to_bytes(2, "little") + pack_steps(np.array(values, np.int64))


def _coefficient_seeds() -> list[bytes]:
    rng = random.Random(0)
    drawn = [[round(rng.gauss(0, 10**width)) for _ in range(count)] for width in range(6) for count in (1, 9, 60)]
    return [_steps(values) for values in [*drawn, [0] * 50, [1], [_TOP, -_TOP, 0], [3, -4, 4, 8], [5] * 300]]


def _mutate_counted(data: bytes, rng: random.Random, havoc: Havoc) -> bytes:
    """Another count, or other bytes behind it."""
    if rng.random() < 0.2:
        count = (_number(data)[0] + rng.choice((-1, 1, 8, rng.randrange(100)))) % (_MOST + 1)
        return count.to_bytes(2, "little") + data[2:]
    return data[:2] + havoc(data[2:])


def _built_steps() -> SearchStrategy[bytes]:
    """Right ones, and right ones with a byte changed: what a decoder that trusts its own format would take."""
    step = st.just(0) | st.integers(-9, 9) | st.integers(-_TOP, _TOP)
    good = st.lists(step, min_size=1, max_size=60).map(_steps)
    return good | st.builds(_flipped, good, st.integers(0, 2**16), st.integers(1, 255))


def _flipped(data: bytes, place: int, flip: int) -> bytes:
    place %= len(data)
    return data[:place] + bytes([data[place] ^ flip]) + data[place + 1 :]


def _check_rans(data: bytes) -> None:
    """Count, length of the table, table, code: any table, also one that is no histogram of the symbols."""
    count, rest = _number(data)
    length = rest[0] if rest else 0
    table, coded = rest[1 : 1 + length], rest[1 + length :]
    symbols, used = rans_decode(memoryview(coded), table, count)
    if used > len(coded) or symbols.shape != (count,) or (count and int(symbols.max()) >= len(table)):
        raise Broken(f"{count} symbols below {len(table)} must come of {len(coded)} bytes, got {symbols} of {used}")
    if rans_encode(symbols, table) != coded[:used]:
        raise Broken(f"one string of bytes must stand for symbols, got two for {symbols.tolist()} under {table.hex()}")


def _rans_seeds() -> list[bytes]:
    rng, made = random.Random(1), []
    for top, count in ((1, 5), (2, 30), (3, 9), (20, 100), (104, 300)):
        symbols = np.array([rng.randrange(top) for _ in range(count)], np.int64)
        table = histogram(symbols)
        made.append(struct.pack("<HB", count, len(table)) + table + rans_encode(symbols, table))
    return made


def _check_bits(data: bytes) -> None:
    """Count, width, numbers; and the same bytes as single bits."""
    count, rest = _number(data)
    width, packed = (rest[0] if rest else 0) % 25, rest[1:]
    if width == 1:
        same("bits", join_bits(split_bits(packed, count)), packed)
    numbers = unpack_bits(packed, count, width)
    if numbers.shape != (count,) or (count and not 0 <= int(numbers.min()) <= int(numbers.max()) < 1 << width):
        raise Broken(f"{count} numbers of {width} bits must be that, got {numbers}")
    same("packed numbers", pack_bits(numbers, width), packed)


def _bits(width: int, numbers: list[int]) -> bytes:
    packed = pack_bits(np.array(numbers, np.int64), width)
    return struct.pack("<HB", len(numbers), width) + packed


def _bit_seeds() -> list[bytes]:
    rng = random.Random(2)
    return [
        _bits(width, [rng.randrange(1 << width) for _ in range(count)])
        for width in (0, 1, 2, 3, 5, 8, 12, 20)
        for count in (0, 1, 7, 8, 65)
    ]


def targets(folder: Path) -> dict[str, Target]:
    """Nothing here touches files."""
    made = [
        Target(
            name="coefficients",
            check=_check_coefficients,
            seeds=_coefficient_seeds,
            mutate=_mutate_counted,
            inputs=_built_steps,
        ),
        Target(name="rans", check=_check_rans, seeds=_rans_seeds, mutate=_mutate_counted),
        Target(
            name="bits",
            check=_check_bits,
            seeds=_bit_seeds,
            mutate=_mutate_counted,
            inputs=lambda: st.integers(0, 24).flatmap(
                lambda width: st.lists(st.integers(0, 2**width - 1), max_size=70).map(lambda n: _bits(width, n))
            ),
            memory=MIB,
        ),
    ]
    return {target.name: target for target in made}
