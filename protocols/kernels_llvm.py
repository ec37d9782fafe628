"""The steps of kernels_numba.py, written in LLVM's vector types: 16 lanes of Philox, signs, normals and roundings.

LLVM lowers <16 x ...> to what a processor has (AVX-512, AVX2, NEON). Arithmetic is strict, neither reassociated nor
contracted, so that a lane does the reference's operations (directions.py) in the reference's order. Memory is given by
addresses, as int64, so that each compiled loop has one signature whatever it works on. Little-endian only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from inspect import Parameter, Signature
from typing import Any, Final

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fedloom.protocols import directions as spec
from fedloom.protocols import philox

LANES: Final = 16
GROUPS: Final = 4  # of 16 blocks whose normals are made side by side, since one chain of operations leaves units idle
WIDE: Final = spec.SIGNS_PER_BLOCK  # elements of a step: those of one block of signs
NARROW: Final = 32  # elements of a step that has a case for every pair of kinds

INT1, INT16, INT32, INT64 = (ir.IntType(bits) for bits in (1, 16, 32, 64))
FLOAT, DOUBLE = ir.FloatType(), ir.DoubleType()
KINDS: Final = ("float32", "float16", "bfloat16")  # of weights
SAME: Final = len(KINDS) + 1  # of which `kinds` is a multiple where out and base are of one kind


def _constant(element: ir.Type, value: float, lanes: int = LANES) -> ir.Constant:
    if element is FLOAT:
        value = float(np.float32(value))
    return ir.Constant(ir.VectorType(element, lanes), [value] * lanes)


def _splat(b: Any, value: Any, lanes: int = LANES) -> Any:
    vector = ir.VectorType(value.type, lanes)
    one = b.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(INT32, 0))
    return b.shuffle_vector(one, one, _constant(INT32, 0, lanes))


def _at(b: Any, address: Any, element: ir.Type, index: int = 0) -> Any:
    pointer = b.inttoptr(address, ir.PointerType())
    return b.gep(pointer, [ir.Constant(INT64, index)], source_etype=element) if index else pointer


def _load(b: Any, address: Any, element: ir.Type, index: int = 0, lanes: int = LANES) -> Any:
    return b.load(_at(b, address, element, index), typ=ir.VectorType(element, lanes), align=1)


def _store(b: Any, value: Any, address: Any, index: int = 0) -> None:
    b.store(value, _at(b, address, value.type.element, index), align=1)


def _read_weights(b: Any, kind: str, address: Any, index: int, lanes: int) -> Any:
    """float32 lanes of weights of a kind; float16 by integers, since not every processor converts it."""
    if kind == "float32":
        return _load(b, address, FLOAT, index, lanes)
    floats, ints = ir.VectorType(FLOAT, lanes), ir.VectorType(INT32, lanes)
    bits = b.zext(_load(b, address, INT16, index, lanes), ints)
    if kind == "bfloat16":
        return b.bitcast(b.shl(bits, _constant(INT32, 16, lanes)), floats)
    size = b.and_(bits, _constant(INT32, 0x7FFF, lanes))
    shifted = b.shl(size, _constant(INT32, 13, lanes))
    normal = b.add(shifted, _constant(INT32, (127 - 15) << 23, lanes))
    special = b.or_(shifted, _constant(INT32, 0x7F800000, lanes))
    subnormal = b.bitcast(b.fmul(b.sitofp(size, floats), _constant(FLOAT, 2.0**-24, lanes)), ints)
    wide = b.select(b.icmp_signed("<", size, _constant(INT32, 0x400, lanes)), subnormal, normal)
    wide = b.select(b.icmp_signed(">=", size, _constant(INT32, 0x7C00, lanes)), special, wide)
    sign = b.shl(b.and_(bits, _constant(INT32, 0x8000, lanes)), _constant(INT32, 16, lanes))
    return b.bitcast(b.or_(wide, sign), floats)


def _write_weights(b: Any, value: Any, kind: str, address: Any, index: int) -> None:
    """Round float32 lanes to the nearest weights of a kind, ties to even; a NaN stays one."""
    lanes = value.type.count
    if kind == "float32":
        _store(b, value, address, index)
        return
    ints = ir.VectorType(INT32, lanes)
    bits = b.bitcast(value, ints)
    rounded = _bfloat16(b, bits, lanes) if kind == "bfloat16" else _float16(b, bits, lanes)
    sign = b.and_(b.lshr(bits, _constant(INT32, 16, lanes)), _constant(INT32, 0x8000, lanes))
    nan = _constant(INT32, 0x7FC0 if kind == "bfloat16" else 0x7E00, lanes)
    size = b.select(b.fcmp_unordered("uno", value, value), nan, rounded)
    _store(b, b.trunc(b.or_(size, sign), ir.VectorType(INT16, lanes)), address, index)


def _halfway(b: Any, bits: Any, drop: int, lanes: int) -> Any:
    """Without the last `drop` bits, rounded to the nearest, ties to even."""
    kept = b.lshr(bits, _constant(INT32, drop, lanes))
    odd = b.and_(kept, _constant(INT32, 1, lanes))
    up = b.add(odd, _constant(INT32, (1 << (drop - 1)) - 1, lanes))
    return b.lshr(b.add(bits, up), _constant(INT32, drop, lanes))


def _bfloat16(b: Any, bits: Any, lanes: int) -> Any:
    return _halfway(b, b.and_(bits, _constant(INT32, 0x7FFFFFFF, lanes)), 16, lanes)


def _float16(b: Any, bits: Any, lanes: int) -> Any:
    floats, ints = ir.VectorType(FLOAT, lanes), ir.VectorType(INT32, lanes)
    size = b.and_(bits, _constant(INT32, 0x7FFFFFFF, lanes))
    normal = _halfway(b, b.sub(size, _constant(INT32, (127 - 15) << 23, lanes)), 13, lanes)
    half = _constant(FLOAT, 0.5, lanes)  # whose last bit is worth the smallest float16, so that the addition rounds
    subnormal = b.sub(b.bitcast(b.fadd(b.bitcast(size, floats), half), ints), b.bitcast(half, ints))
    small = b.icmp_signed("<", size, _constant(INT32, (127 - 14) << 23, lanes))
    large = b.icmp_signed(">=", size, _constant(INT32, (127 + 16) << 23, lanes))
    return b.select(large, _constant(INT32, 0x7C00, lanes), b.select(small, subnormal, normal))


def _philox(b: Any, key: Any, index: Any, stream: int, hash2: Any, hash3: Any, groups: int = 1) -> list[Any]:
    """Words 0..3 of blocks index..index + 16 groups - 1, each <16 groups x i32>.

    Even and odd blocks go as two vectors of i64 whose high halves may hold anything: a product reads low halves alone.
    """
    lanes = groups * LANES // 2
    low, half = _constant(INT64, 0xFFFFFFFF, lanes), _constant(INT64, 32, lanes)
    parities = []
    for parity in (0, 1):
        numbers = ir.Constant(ir.VectorType(INT64, lanes), [parity + 2 * lane for lane in range(lanes)])
        x0 = b.add(_splat(b, index, lanes), numbers)
        x1 = b.or_(b.lshr(x0, half), _constant(INT64, stream << spec.STREAM_SHIFT, lanes))
        parities.append([x0, x1, _splat(b, hash2, lanes), _splat(b, hash3, lanes)])
    k0, k1 = key, b.lshr(key, ir.Constant(INT64, 32))
    for number in range(philox.ROUNDS):
        bump0, bump1 = (ir.Constant(INT64, (number * w) & 0xFFFFFFFF) for w in (philox.W0, philox.W1))
        key0, key1 = _splat(b, b.add(k0, bump0), lanes), _splat(b, b.add(k1, bump1), lanes)
        for x in parities:
            p0 = b.mul(b.and_(x[0], low), _constant(INT64, philox.M0, lanes))
            p1 = b.mul(b.and_(x[2], low), _constant(INT64, philox.M1, lanes))
            x[0], x[1] = b.xor(b.xor(b.lshr(p1, half), x[1]), key0), p1
            x[2], x[3] = b.xor(b.xor(b.lshr(p0, half), x[3]), key1), p0
    both = (b.or_(b.and_(even, low), b.shl(odd, half)) for even, odd in zip(*parities, strict=True))
    return [b.bitcast(words, ir.VectorType(INT32, 2 * lanes)) for words in both]


def _poly(b: Any, coefficients: tuple[float, ...], x: Any) -> Any:
    lanes = x.type.count
    value = _constant(FLOAT, coefficients[0], lanes)
    for coefficient in coefficients[1:]:
        value = b.fadd(b.fmul(value, x), _constant(FLOAT, coefficient, lanes))
    return value


def _log(b: Any, count: Any) -> Any:
    """directions._log."""
    lanes = count.type.count
    floats, ints = ir.VectorType(FLOAT, lanes), ir.VectorType(INT32, lanes)
    bits = b.sub(b.bitcast(b.sitofp(count, floats), ints), _constant(INT32, 24 << 23, lanes))
    exponent = b.ashr(b.sub(bits, _constant(INT32, spec.SQRT_HALF_BITS, lanes)), _constant(INT32, 23, lanes))
    mantissa = b.bitcast(b.sub(bits, b.shl(exponent, _constant(INT32, 23, lanes))), floats)
    f = b.fsub(mantissa, _constant(FLOAT, 1, lanes))
    square = b.fmul(f, f)
    cubes = b.fmul(b.fmul(f, square), _poly(b, spec.LOG_POLY, f))
    tail = b.fsub(cubes, b.fmul(_constant(FLOAT, 0.5, lanes), square))
    return b.fadd(b.fmul(b.sitofp(exponent, floats), _constant(FLOAT, spec.LN2, lanes)), b.fadd(f, tail))


def _box_muller(b: Any, radius: Any, angle: Any) -> tuple[Any, Any]:
    """directions.box_muller; bit 31 of angle ^ (angle << 1) is set in quadrants 1 and 2, that of angle in 2 and 3."""
    lanes = radius.type.count
    floats, ints = ir.VectorType(FLOAT, lanes), ir.VectorType(INT32, lanes)
    one = _constant(INT32, 1, lanes)
    root = b.module.declare_intrinsic(f"llvm.sqrt.v{lanes}f32", (), ir.FunctionType(floats, [floats]))
    count = b.add(b.lshr(radius, _constant(INT32, 8, lanes)), one)
    r = b.call(root, [b.fmul(_constant(FLOAT, -2, lanes), _log(b, count))])
    fraction = b.and_(b.lshr(angle, _constant(INT32, 6, lanes)), _constant(INT32, 0xFFFFFF, lanes))
    turn = b.sub(fraction, _constant(INT32, 1 << 23, lanes))
    x = b.fmul(b.sitofp(turn, floats), _constant(FLOAT, spec.HALF_PI * 2.0**-24, lanes))
    square = b.fmul(x, x)
    sine = b.fadd(x, b.fmul(x, b.fmul(square, _poly(b, spec.SIN_POLY, square))))
    start = b.fsub(_constant(FLOAT, 1, lanes), b.fmul(_constant(FLOAT, 0.5, lanes), square))
    cosine = b.fadd(start, b.fmul(b.fmul(square, square), _poly(b, spec.COS_POLY, square)))
    swap = b.icmp_signed("<", b.shl(angle, one), _constant(INT32, 0, lanes))
    top = _constant(INT32, 1 << 31, lanes)
    flips = b.and_(b.xor(angle, b.shl(angle, one)), top), b.and_(angle, top)
    chosen = b.select(swap, sine, cosine), b.select(swap, cosine, sine)
    first, second = (
        b.fmul(r, b.bitcast(b.xor(b.bitcast(value, ints), flip), floats))
        for value, flip in zip(chosen, flips, strict=True)
    )
    return first, second


def _signed(b: Any, value: Any, bits: Any, index: int) -> Any:
    """-value in the lanes whose bits are set in half-word `index` at an address."""
    word = _splat(b, b.load(_at(b, bits, INT32, index // 2), typ=INT32, align=1))
    # not <16 x i1> of the half-word: AVX-512 has that, a quarter faster, but others take it apart bit by bit
    own = ir.Constant(ir.VectorType(INT32, LANES), [1 << (LANES * (index % 2) + lane) for lane in range(LANES)])
    chosen = b.icmp_signed("!=", b.and_(word, own), _constant(INT32, 0))
    return b.select(chosen, b.fneg(value), value)


def _half_word(vector: int) -> int:
    """Where a block's bits 16 vector .. 16 vector + 15 are in what draw_signs writes, from the block's word 0."""
    return vector // 2 * 2 * LANES + vector % 2


def _step(emit: Callable[..., Any], *arguments: types.Type, result: types.Type = types.void) -> Any:
    """emit(builder, *values) as a function for compiled code."""

    def lower(context: Any, b: Any, _: Any, values: Any) -> Any:
        made = emit(b, *values)
        return context.get_dummy_value() if result is types.void else made

    def typed(_: Any, *__: Any) -> Any:
        return result(*arguments), lower

    names = ("context", *(f"value{n}" for n in range(len(arguments))))  # that Numba may bind arguments to
    vars(typed)["__signature__"] = Signature([Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in names])
    return intrinsic(typed)


def _draw_signs(b: Any, to: Any, key: Any, block: Any, hash2: Any, hash3: Any) -> None:
    for word, vector in enumerate(_philox(b, key, block, spec.SIGNS, hash2, hash3)):
        _store(b, vector, to, word * LANES)


def _draw_offsets(b: Any, to: Any, key: Any, block: Any, hash2: Any, hash3: Any) -> None:
    _store(b, _philox(b, key, block, spec.OFFSETS, hash2, hash3)[0], to)


def _add_signs(count: int) -> Callable[..., None]:
    def emit(b: Any, sums: Any, bits: Any, *scales: Any) -> None:
        rows = [_splat(b, scale) for scale in scales]
        for vector in range(WIDE // LANES):
            total = _load(b, sums, FLOAT, vector * LANES)
            for number in range(count):
                half_word = number * 8 * LANES + _half_word(vector)
                total = b.fadd(total, _signed(b, rows[number], bits, half_word))
            _store(b, total, sums, vector * LANES)

    return emit


def _lanes(b: Any, first: Any, second: Any, numbers: Iterable[int]) -> Any:
    """The numbered lanes of two vectors, the second's after the first's."""
    chosen = list(numbers)
    return b.shuffle_vector(first, second, ir.Constant(ir.VectorType(INT32, len(chosen)), chosen))


def _add_normals(b: Any, sums: Any, key: Any, block: Any, hash2: Any, hash3: Any, scale: Any) -> None:
    w = _philox(b, key, block, spec.NORMALS, hash2, hash3, GROUPS)
    blocks = GROUPS * LANES
    pairs = _box_muller(b, *(_lanes(b, w[n], w[n + 2], range(2 * blocks)) for n in (0, 1)))
    for element in range(spec.NORMALS_PER_BLOCK):
        for group in range(GROUPS):
            begin = element // 2 * blocks + group * LANES
            z = _lanes(b, pairs[element % 2], pairs[element % 2], range(begin, begin + LANES))
            at = (spec.NORMALS_PER_BLOCK * group + element) * LANES
            _store(b, b.fadd(_load(b, sums, FLOAT, at), b.fmul(_splat(b, scale), z)), sums, at)


def _untangle(b: Any, sums: Any) -> None:
    v = [_load(b, sums, FLOAT, element * LANES) for element in range(4)]
    zipped = [number // 2 + LANES * (number % 2) for number in range(2 * LANES)]
    even, odd = _lanes(b, v[0], v[2], zipped), _lanes(b, v[1], v[3], zipped)
    for part in range(4):
        picks = (8 * part + number // 2 + 2 * LANES * (number % 2) for number in range(LANES))
        _store(b, _lanes(b, even, odd, picks), sums, part * LANES)


def _finish(count: int, term: Callable[..., Any], every: int = 1) -> Callable[..., None]:
    """out = round(base + term) for `count` elements, with a case for kinds 0, every, 2 every, ..."""
    lanes = min(count, LANES)

    def emit(b: Any, out: Any, base: Any, kinds: Any, *source: Any) -> None:
        after = b.append_basic_block()
        cases = b.switch(kinds, after)
        for number in range(0, len(KINDS) ** 2, every):
            block = b.append_basic_block()
            cases.add_case(ir.Constant(INT64, number), block)
            b.position_at_end(block)
            to, kind = KINDS[number // len(KINDS)], KINDS[number % len(KINDS)]
            for at in range(0, count, lanes):
                value = b.fadd(_read_weights(b, kind, base, at, lanes), term(b, at, lanes, *source))
                _write_weights(b, value, to, out, at)
            b.branch(after)
        b.position_at_end(after)

    return emit


def _from_sums(b: Any, at: int, lanes: int, sums: Any) -> Any:
    return _load(b, sums, FLOAT, at, lanes)


def _from_signs(b: Any, at: int, _: int, bits: Any, scale: Any) -> Any:
    # 0 + x, for the sum of one direction starts at 0 too: it makes +0 of -0
    return b.fadd(_constant(FLOAT, 0), _signed(b, _splat(b, scale), bits, _half_word(at // LANES)))


def _from_buckets(b: Any, at: int, _: int, bits: Any, buckets: Any) -> Any:
    return _signed(b, _load(b, buckets, FLOAT, at), bits, _half_word(at // LANES))


def _clear(b: Any, sums: Any) -> None:
    _store(b, _constant(FLOAT, 0), sums)


def _take_buckets(b: Any, sums: Any, buckets: Any, bits: Any) -> None:
    for at in range(0, WIDE, LANES):
        _store(b, _from_buckets(b, at, LANES, bits, buckets), sums, at)


def _fold_buckets(b: Any, sums: Any, buckets: Any, bits: Any) -> None:
    for at in range(0, WIDE, LANES):
        signed = _signed(b, _load(b, sums, FLOAT, at), bits, _half_word(at // LANES))
        total = b.fadd(_load(b, buckets, DOUBLE, at), b.fpext(signed, ir.VectorType(DOUBLE, LANES)))
        _store(b, total, buckets, at)


def _signed_one(b: Any, value: Any, word: Any, bit: Any) -> Any:
    shifted = b.lshr(b.load(_at(b, word, INT32), typ=INT32, align=1), b.trunc(bit, INT32))
    return b.select(b.trunc(shifted, INT1), b.fneg(value), value)


def _take_bucket(b: Any, to: Any, bucket: Any, word: Any, bit: Any) -> None:
    value = b.load(_at(b, bucket, FLOAT), typ=FLOAT, align=1)
    b.store(_signed_one(b, value, word, bit), _at(b, to, FLOAT), align=1)


def _fold_bucket(b: Any, value: Any, bucket: Any, word: Any, bit: Any) -> None:
    signed = _signed_one(b, b.load(_at(b, value, FLOAT), typ=FLOAT, align=1), word, bit)
    at = _at(b, bucket, DOUBLE)
    b.store(b.fadd(b.load(at, typ=DOUBLE, align=1), b.fpext(signed, DOUBLE)), at, align=1)


def _read(element: ir.Type) -> Callable[..., Any]:
    def emit(b: Any, address: Any) -> Any:
        return b.load(_at(b, address, element), typ=element, align=1)

    return emit


_I64, _F32 = types.int64, types.float32

# Addresses, keys and counters are int64. `sums` is float32 [128]. `bits` is word 0 of a block's signs; as draw_signs
# writes 16 blocks, its word w is the uint32 16 w after it. `kinds` is out's place in KINDS * 3 + base's.
read_int64 = _step(_read(INT64), _I64, result=_I64)
read_word = _step(lambda b, address: b.zext(_read(INT32)(b, address), INT64), _I64, result=_I64)
read_float32 = _step(_read(FLOAT), _I64, result=_F32)
draw_signs = _step(_draw_signs, _I64, _I64, _I64, _I64, _I64)  # to uint32 [4, 16], key, first block, two hashes
draw_offsets = _step(_draw_offsets, _I64, _I64, _I64, _I64, _I64)  # to uint32 [16], the same
clear = _step(_clear, _I64)  # 16 of sums
add_signs = _step(_add_signs(1), _I64, _I64, _F32)  # sums, bits, scale
add_signs_4 = _step(_add_signs(4), _I64, _I64, _F32, _F32, _F32, _F32)  # of 4 directions, one draw after another
add_normals = _step(_add_normals, _I64, _I64, _I64, _I64, _I64, _F32)  # float32 [GROUPS, 4, 16], key, block, ..., scale
untangle = _step(_untangle, _I64)  # float32 [4, 16] to [16, 4], the order of elements
finish = _step(_finish(NARROW, _from_sums), _I64, _I64, _I64, _I64)  # out, base, kinds, sums
finish_one = _step(_finish(1, _from_sums), _I64, _I64, _I64, _I64)  # of one element
finish_signs = _step(_finish(WIDE, _from_signs, SAME), _I64, _I64, _I64, _I64, _F32)  # ..., bits, scale
finish_buckets = _step(
    _finish(WIDE, _from_buckets, SAME), _I64, _I64, _I64, _I64, _I64
)  # ..., bits, c from a bucket on
take_buckets = _step(_take_buckets, _I64, _I64, _I64)  # sums, c from a bucket on, bits
take_bucket = _step(_take_bucket, _I64, _I64, _I64, _I64)  # float32, c at the bucket, word, its bit
fold_buckets = _step(_fold_buckets, _I64, _I64, _I64)  # sums, float64 from a bucket on, bits
fold_bucket = _step(_fold_bucket, _I64, _I64, _I64, _I64)  # float32, float64 at the bucket, word, its bit
