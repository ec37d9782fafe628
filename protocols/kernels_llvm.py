"""The steps of kernels_numba.py, written in LLVM's vector types: 16 lanes of Philox, signs, normals and roundings.

LLVM lowers <16 x ...> to what a processor has (AVX-512, AVX2, NEON). Arithmetic is strict, neither reassociated nor
contracted, so that a lane does the reference's operations (directions.py) in the reference's order. Memory is given by
addresses, as int64, so that each compiled loop has one signature whatever it works on. Little-endian only.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import Parameter, Signature
from typing import Any, Final

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fedloom.protocols import directions as spec
from fedloom.protocols import philox

LANES: Final = 16
WIDE: Final = 128  # elements that a step takes at once, those of one block of signs

INT1, INT16, INT32, INT64 = (ir.IntType(bits) for bits in (1, 16, 32, 64))
HALF, FLOAT, DOUBLE = ir.HalfType(), ir.FloatType(), ir.DoubleType()
BYTES: Final = {INT16: 2, INT32: 4, INT64: 8, HALF: 2, FLOAT: 4, DOUBLE: 8}
KINDS: Final = (FLOAT, HALF, INT16)  # what weights may be; the bits of a bfloat16 are an integer


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
    return b.load(_at(b, address, element, index), typ=ir.VectorType(element, lanes), align=BYTES[element])


def _store(b: Any, value: Any, address: Any, index: int = 0) -> None:
    element = value.type.element
    b.store(value, _at(b, address, element, index), align=BYTES[element])


def _widen(b: Any, value: Any) -> Any:
    """float32 lanes of float32, float16, or the bits of bfloat16."""
    lanes = value.type.count
    if value.type.element is HALF:
        return b.fpext(value, ir.VectorType(FLOAT, lanes))
    if value.type.element is INT16:
        bits = b.shl(b.zext(value, ir.VectorType(INT32, lanes)), _constant(INT32, 16, lanes))
        return b.bitcast(bits, ir.VectorType(FLOAT, lanes))
    return value


def _narrow(b: Any, value: Any, element: ir.Type) -> Any:
    """The nearest values of a type, ties to even; a NaN stays one."""
    lanes = value.type.count
    if element is HALF:
        return b.fptrunc(value, ir.VectorType(HALF, lanes))
    if element is INT16:
        bits = b.bitcast(value, ir.VectorType(INT32, lanes))
        high = b.lshr(bits, _constant(INT32, 16, lanes))
        odd = b.and_(high, _constant(INT32, 1, lanes))
        nearest = b.lshr(b.add(bits, b.add(odd, _constant(INT32, 0x7FFF, lanes))), _constant(INT32, 16, lanes))
        quiet = b.or_(high, _constant(INT32, 0x40, lanes))
        return b.trunc(b.select(b.fcmp_unordered("uno", value, value), quiet, nearest), ir.VectorType(INT16, lanes))
    return value


def _philox(b: Any, key: Any, index: Any, stream: int, hash2: Any, hash3: Any) -> list[Any]:
    """Words 0..3 of blocks index..index + 15, each <16 x i32>.

    Even and odd blocks go as two <8 x i64> whose high halves may hold anything: a product reads the low halves alone.
    """
    low, half = _constant(INT64, 0xFFFFFFFF, 8), _constant(INT64, 32, 8)
    parities = []
    for parity in (0, 1):
        lanes = ir.Constant(ir.VectorType(INT64, 8), [parity + 2 * lane for lane in range(8)])
        x0 = b.add(_splat(b, index, 8), lanes)
        x1 = b.or_(b.lshr(x0, half), _constant(INT64, stream << spec.STREAM_SHIFT, 8))
        parities.append([x0, x1, _splat(b, hash2, 8), _splat(b, hash3, 8)])
    k0, k1 = key, b.lshr(key, ir.Constant(INT64, 32))
    for number in range(philox.ROUNDS):
        bump0, bump1 = (ir.Constant(INT64, (number * w) & 0xFFFFFFFF) for w in (philox.W0, philox.W1))
        key0, key1 = _splat(b, b.add(k0, bump0), 8), _splat(b, b.add(k1, bump1), 8)
        for x in parities:
            p0 = b.mul(b.and_(x[0], low), _constant(INT64, philox.M0, 8))
            p1 = b.mul(b.and_(x[2], low), _constant(INT64, philox.M1, 8))
            x[0], x[1] = b.xor(b.xor(b.lshr(p1, half), x[1]), key0), p1
            x[2], x[3] = b.xor(b.xor(b.lshr(p0, half), x[3]), key1), p0
    both = (b.or_(b.and_(even, low), b.shl(odd, half)) for even, odd in zip(*parities, strict=True))
    return [b.bitcast(words, ir.VectorType(INT32, LANES)) for words in both]


def _poly(b: Any, coefficients: tuple[float, ...], x: Any) -> Any:
    value = _constant(FLOAT, coefficients[0])
    for coefficient in coefficients[1:]:
        value = b.fadd(b.fmul(value, x), _constant(FLOAT, coefficient))
    return value


def _log(b: Any, count: Any) -> Any:
    """directions._log."""
    floats, ints = ir.VectorType(FLOAT, LANES), ir.VectorType(INT32, LANES)
    bits = b.sub(b.bitcast(b.sitofp(count, floats), ints), _constant(INT32, 24 << 23))
    exponent = b.ashr(b.sub(bits, _constant(INT32, spec.SQRT_HALF_BITS)), _constant(INT32, 23))
    mantissa = b.bitcast(b.sub(bits, b.shl(exponent, _constant(INT32, 23))), floats)
    f = b.fsub(mantissa, _constant(FLOAT, 1))
    square = b.fmul(f, f)
    tail = b.fsub(b.fmul(b.fmul(f, square), _poly(b, spec.LOG_POLY, f)), b.fmul(_constant(FLOAT, 0.5), square))
    return b.fadd(b.fmul(b.sitofp(exponent, floats), _constant(FLOAT, spec.LN2)), b.fadd(f, tail))


def _box_muller(b: Any, radius: Any, angle: Any) -> tuple[Any, Any]:
    """directions.box_muller; bit 31 of angle ^ (angle << 1) is set in quadrants 1 and 2, that of angle in 2 and 3."""
    floats, ints = ir.VectorType(FLOAT, LANES), ir.VectorType(INT32, LANES)
    one = _constant(INT32, 1)
    root = b.module.declare_intrinsic("llvm.sqrt.v16f32", (), ir.FunctionType(floats, [floats]))
    count = b.add(b.lshr(radius, _constant(INT32, 8)), one)
    r = b.call(root, [b.fmul(_constant(FLOAT, -2), _log(b, count))])
    turn = b.sub(b.and_(b.lshr(angle, _constant(INT32, 6)), _constant(INT32, 0xFFFFFF)), _constant(INT32, 1 << 23))
    x = b.fmul(b.sitofp(turn, floats), _constant(FLOAT, spec.HALF_PI * 2.0**-24))
    square = b.fmul(x, x)
    sine = b.fadd(x, b.fmul(x, b.fmul(square, _poly(b, spec.SIN_POLY, square))))
    start = b.fsub(_constant(FLOAT, 1), b.fmul(_constant(FLOAT, 0.5), square))
    cosine = b.fadd(start, b.fmul(b.fmul(square, square), _poly(b, spec.COS_POLY, square)))
    swap = b.icmp_signed("<", b.shl(angle, one), _constant(INT32, 0))
    top = _constant(INT32, 1 << 31)
    flips = b.and_(b.xor(angle, b.shl(angle, one)), top), b.and_(angle, top)
    chosen = b.select(swap, sine, cosine), b.select(swap, cosine, sine)
    first, second = (
        b.fmul(r, b.bitcast(b.xor(b.bitcast(value, ints), flip), floats))
        for value, flip in zip(chosen, flips, strict=True)
    )
    return first, second


def _signed(b: Any, value: Any, bits: Any, index: int) -> Any:
    """-value in the lanes whose bits are set in half-word `index` at an address."""
    mask = b.load(_at(b, bits, INT16, index), typ=INT16, align=2)
    return b.select(b.bitcast(mask, ir.VectorType(INT1, LANES)), b.fneg(value), value)


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


def _add_normals(b: Any, sums: Any, key: Any, block: Any, hash2: Any, hash3: Any, scale: Any) -> None:
    words = _philox(b, key, block, spec.NORMALS, hash2, hash3)
    normals = (*_box_muller(b, words[0], words[1]), *_box_muller(b, words[2], words[3]))
    for element, z in enumerate(normals):
        total = b.fadd(_load(b, sums, FLOAT, element * LANES), b.fmul(_splat(b, scale), z))
        _store(b, total, sums, element * LANES)


def _untangle(b: Any, sums: Any) -> None:
    v = [_load(b, sums, FLOAT, element * LANES) for element in range(4)]
    lanes = ir.Constant(ir.VectorType(INT32, 2 * LANES), [n // 2 + LANES * (n % 2) for n in range(2 * LANES)])
    even, odd = b.shuffle_vector(v[0], v[2], lanes), b.shuffle_vector(v[1], v[3], lanes)
    for part in range(4):
        picks = [8 * part + n // 2 + 2 * LANES * (n % 2) for n in range(LANES)]
        _store(b, b.shuffle_vector(even, odd, ir.Constant(ir.VectorType(INT32, LANES), picks)), sums, part * LANES)


def _finish(count: int) -> Callable[..., None]:
    lanes = min(count, LANES)

    def emit(b: Any, out: Any, base: Any, sums: Any, kinds: Any) -> None:
        after = b.append_basic_block()
        cases = b.switch(kinds, after)
        for number in range(len(KINDS) ** 2):
            block = b.append_basic_block()
            cases.add_case(ir.Constant(INT64, number), block)
            b.position_at_end(block)
            to, source = KINDS[number // len(KINDS)], KINDS[number % len(KINDS)]
            for at in range(0, count, lanes):
                value = b.fadd(_widen(b, _load(b, base, source, at, lanes)), _load(b, sums, FLOAT, at, lanes))
                _store(b, _narrow(b, value, to), out, at)
            b.branch(after)
        b.position_at_end(after)

    return emit


def _clear(b: Any, sums: Any) -> None:
    for vector in range(WIDE // LANES):
        _store(b, _constant(FLOAT, 0), sums, vector * LANES)


def _take_buckets(b: Any, sums: Any, buckets: Any, bits: Any) -> None:
    for vector in range(WIDE // LANES):
        value = _load(b, buckets, FLOAT, vector * LANES)
        _store(b, _signed(b, value, bits, _half_word(vector)), sums, vector * LANES)


def _fold_buckets(b: Any, sums: Any, buckets: Any, bits: Any) -> None:
    for at in range(0, WIDE, LANES):
        signed = _signed(b, _load(b, sums, FLOAT, at), bits, _half_word(at // LANES))
        total = b.fadd(_load(b, buckets, DOUBLE, at), b.fpext(signed, ir.VectorType(DOUBLE, LANES)))
        _store(b, total, buckets, at)


def _signed_one(b: Any, value: Any, word: Any, bit: Any) -> Any:
    shifted = b.lshr(b.load(_at(b, word, INT32), typ=INT32, align=4), b.trunc(bit, INT32))
    return b.select(b.trunc(shifted, INT1), b.fneg(value), value)


def _take_bucket(b: Any, to: Any, bucket: Any, word: Any, bit: Any) -> None:
    value = b.load(_at(b, bucket, FLOAT), typ=FLOAT, align=4)
    b.store(_signed_one(b, value, word, bit), _at(b, to, FLOAT), align=4)


def _fold_bucket(b: Any, value: Any, bucket: Any, word: Any, bit: Any) -> None:
    signed = _signed_one(b, b.load(_at(b, value, FLOAT), typ=FLOAT, align=4), word, bit)
    at = _at(b, bucket, DOUBLE)
    b.store(b.fadd(b.load(at, typ=DOUBLE, align=8), b.fpext(signed, DOUBLE)), at, align=8)


def _read(element: ir.Type) -> Callable[..., Any]:
    def emit(b: Any, address: Any) -> Any:
        return b.load(_at(b, address, element), typ=element, align=BYTES[element])

    return emit


_I64, _F32 = types.int64, types.float32

# Addresses, keys and counters are int64. `sums` is float32 [128]; `bits` is word 0 of a block, and word w is uint32
# 16 w after it, as draw_signs writes 16 blocks.
read_int64 = _step(_read(INT64), _I64, result=_I64)
read_int32 = _step(lambda b, address: b.zext(_read(INT32)(b, address), INT64), _I64, result=_I64)
read_float32 = _step(_read(FLOAT), _I64, result=_F32)
draw_signs = _step(_draw_signs, _I64, _I64, _I64, _I64, _I64)  # to, key, block, hash 2, hash 3: uint32 [4, 16]
draw_offsets = _step(_draw_offsets, _I64, _I64, _I64, _I64, _I64)  # the same: uint32 [16]
add_signs = _step(_add_signs(1), _I64, _I64, _F32)  # sums, bits, scale
add_signs_4 = _step(_add_signs(4), _I64, _I64, _F32, _F32, _F32, _F32)  # of 4 directions whose bits follow each other
add_normals = _step(_add_normals, _I64, _I64, _I64, _I64, _I64, _F32)  # sums [4, 16], key, block, hashes, scale
untangle = _step(_untangle, _I64)  # sums [4, 16] -> [16, 4]
finish = _step(_finish(WIDE), _I64, _I64, _I64, _I64)  # out, base, sums, kind of out * 3 + kind of base
finish_one = _step(_finish(1), _I64, _I64, _I64, _I64)  # the same for one element
clear = _step(_clear, _I64)  # sums
take_buckets = _step(_take_buckets, _I64, _I64, _I64)  # sums, c at the first element's bucket, bits
fold_buckets = _step(_fold_buckets, _I64, _I64, _I64)  # sums, float64 buckets, bits
take_bucket = _step(_take_bucket, _I64, _I64, _I64, _I64)  # to, c at the bucket, word, bit
fold_bucket = _step(_fold_bucket, _I64, _I64, _I64, _I64)  # value, float64 bucket, word, bit
