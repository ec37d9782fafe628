"""Changes to bytes, protobuf records and JSON trees, drawn from a random.Random so that they can be drawn again."""

from __future__ import annotations

import copy
import random
import struct
from typing import Any, Final

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError

_EDGES: Final = sorted(
    {
        edge + off
        for bits in (0, 3, 7, 8, 15, 16, 20, 22, 31, 32, 53, 63, 64)
        for edge in (2**bits,)
        for off in (-1, 0, 1)
    }
)
_FLOATS: Final = (0.0, -0.0, 1.0, -1.0, float("nan"), float("inf"), float("-inf"), 5e-324, 1.7e308, 3.5e38, 1e-46, 2.0)
_TEXTS: Final = (
    "",
    "q",
    "head",
    "lora",
    "0123abcd",
    "0a" * 32,
    "5e" * 32,
    "\n",
    "\0",
    "../..",
    "\u00fc\U0001f600",
    "x" * 1024,
    "x" * 1025,
)
_INT_TYPES: Final = {  # how many bits, signed or not
    FieldDescriptor.TYPE_UINT64: (64, False),
    FieldDescriptor.TYPE_FIXED64: (64, False),
    FieldDescriptor.TYPE_FIXED32: (32, False),
    FieldDescriptor.TYPE_UINT32: (32, False),
    FieldDescriptor.TYPE_SINT64: (64, True),
    FieldDescriptor.TYPE_INT64: (64, True),
    FieldDescriptor.TYPE_INT32: (32, True),
}


def havoc(data: bytes, rng: random.Random) -> bytes:
    """A few changes of single bytes and blocks."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        place = rng.randrange(len(out) + 1)
        match rng.randrange(7):
            case 0 if out:
                out[place % len(out)] ^= 1 << rng.randrange(8)
            case 1 if out:
                out[place % len(out)] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
            case 2:
                del out[place : place + rng.choice((1, 1, 2, 4, 16, 64))]
            case 3:
                out[place:place] = rng.randbytes(rng.choice((1, 1, 2, 4, 16)))
            case 4 if out:
                start = rng.randrange(len(out))
                out[place:place] = out[start : start + rng.choice((1, 4, 16, 64))]
            case 5:
                out[place : place + 4] = struct.pack("<f", rng.choice((float("nan"), float("inf"), 3e38, -0.0)))
            case _:
                out[place : place + 8] = rng.choice(_EDGES).to_bytes(9, "little")[:8]
    return bytes(out)


def mutate_record(record: Any, rng: random.Random) -> None:
    """Change one field of a record, or of one inside it."""
    holders = [record]
    for holder in holders:
        for field, value in holder.ListFields():
            if field.type == FieldDescriptor.TYPE_MESSAGE:
                holders.extend(value if field.is_repeated else [value])
    holder = rng.choice(holders)
    field = rng.choice(holder.DESCRIPTOR.fields)
    if field.is_repeated:
        _mutate_repeated(getattr(holder, field.name), field, rng)
    elif field.type == FieldDescriptor.TYPE_MESSAGE:
        if holder.HasField(field.name):
            if rng.random() < 0.3:
                holder.ClearField(field.name)
        elif rng.random() < 0.3:
            getattr(holder, field.name).SetInParent()
    elif rng.random() < 0.1:
        holder.ClearField(field.name)
    else:
        setattr(holder, field.name, _scalar(field, getattr(holder, field.name), rng))


def _mutate_repeated(values: Any, field: FieldDescriptor, rng: random.Random) -> None:
    message = field.type == FieldDescriptor.TYPE_MESSAGE
    choice = rng.randrange(4)
    if choice == 0 and values:
        del values[rng.randrange(len(values))]
    elif choice == 1 and values:  # one twice, elsewhere
        values.insert(rng.randrange(len(values) + 1), copy.deepcopy(rng.choice(values)))
    elif choice == 2 and values and not message:
        place = rng.randrange(len(values))
        values[place] = _scalar(field, values[place], rng)
    elif message and values and rng.random() < 0.8:  # another one like it
        values.append(copy.deepcopy(rng.choice(values)))
        if "name" in values[-1].DESCRIPTOR.fields_by_name:
            values[-1].name = rng.choice((*_TEXTS, *"abcdefg"))
    elif message:
        values.add()
    else:
        values.append(_scalar(field, None, rng))


def _scalar(field: FieldDescriptor, old: Any, rng: random.Random) -> Any:
    if field.type in _INT_TYPES:
        bits, signed = _INT_TYPES[field.type]
        value = rng.choice((rng.choice(_EDGES), rng.randrange(20), (old or 0) + rng.choice((-1, 1))))
        value = -value if signed and rng.random() < 0.5 else value
        low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
        return (value - low) % (high - low) + low
    if field.type in (FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT):
        return rng.choice((*_FLOATS, -(old or 0.0), (old or 1.0) * 1.5))
    if field.type == FieldDescriptor.TYPE_BOOL:
        return not old
    if field.type == FieldDescriptor.TYPE_ENUM:
        return rng.choice((*range(6), -1, 2**31 - 1))
    if field.type == FieldDescriptor.TYPE_STRING:
        return rng.choice(_TEXTS)
    return rng.choice((b"", b"\1", bytes(32), rng.randbytes(32), rng.randbytes(5), bytes(1025)))


def parsed(kind: type[Any], body: bytes) -> Any:
    """The record of a body, without fields that it does not know; an empty one where it is none."""
    record = kind()
    try:
        record.ParseFromString(body)
    except DecodeError:
        return kind()
    record.DiscardUnknownFields()
    return record


def mutate_json(tree: Any, rng: random.Random) -> Any:
    """A JSON tree with one place changed: its value, its key or its being there."""
    if rng.random() < 0.02:
        return _leaf(tree, rng)
    try:
        result = copy.deepcopy(tree)
    except RecursionError:  # an earlier change has made it deep
        return _leaf(None, rng)
    holder = result
    while isinstance(holder, dict | list) and holder:
        keys: Any = list(holder) if isinstance(holder, dict) else range(len(holder))
        key = rng.choice(keys)
        inner = holder[key]
        if isinstance(inner, dict | list) and inner and rng.random() < 0.85:
            holder = inner
            continue
        match rng.randrange(5):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[rng.choice((*_TEXTS, "q", "c"))] = inner
            case 1 if isinstance(holder, list):
                holder.append(inner)
            case 2:
                holder[key] = rng.choice([{}, [], [inner], {"x": inner}])
            case _:
                holder[key] = _leaf(inner, rng)
        return result
    return _leaf(tree, rng)


def _leaf(old: Any, rng: random.Random) -> Any:
    kinds: list[Any] = [
        rng.choice(_EDGES) * rng.choice((1, -1)),
        rng.choice(_FLOATS),
        rng.choice(_TEXTS),
        rng.choice((None, True, False)),
        rng.choice(([], {}, "\ud800", "9" * 20)),
    ]
    if isinstance(old, int):
        kinds += [old + 1, old - 1, float(old), str(old)]
    if isinstance(old, str):
        kinds += [old + "x", old[:-1], old.upper()]
    return rng.choice(kinds)
