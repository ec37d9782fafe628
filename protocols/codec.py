"""Messages to bytes and back: strict, bounded, and the same bytes every time.

    frame = encode(update, wire="bf16", seed=7)
    update = decode(frame, Update, limit=512 << 20)

A frame is checked before it is believed, in the order of framing.py, then field by field; whatever is wrong is one
ValueError that says what must hold and what was got. Mappings keep their order. Floats come back as read-only float32
arrays whatever they travelled in, fp32 ones as views that keep the frame in memory.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from google.protobuf.message import DecodeError

from fedloom.protocols import fedloom_pb2 as pb
from fedloom.protocols import translate, validate
from fedloom.protocols.framing import kind_of, pack, unpack
from fedloom.protocols.messages import Hello, Payload, Refusal, Task, Update
from fedloom.protocols.quantize import known_wire
from fedloom.protocols.seeds import derive_seed
from fedloom.protocols.tensors import PackedPayload, pack_payload

Message = Task | Update | Hello | Refusal
T = TypeVar("T", bound=Message)
U = TypeVar("U", bound=Message)


@dataclass(frozen=True, kw_only=True)
class _Format:
    """How one type of message is checked, written and read."""

    record: type[Any]
    check: Callable[[Any], None]
    write: Callable[[Any, translate.Pack], tuple[Any, translate.Data]]
    read: Callable[[Any, memoryview], tuple[Any, memoryview]]


_FORMATS: Final[dict[type[Any], _Format]] = {  # a frame's kind is its message's place here, from 1
    Task: _Format(record=pb.Task, check=validate.check_task, write=translate.write_task, read=translate.read_task),
    Update: _Format(
        record=pb.Update, check=validate.check_update, write=translate.write_update, read=translate.read_update
    ),
    Hello: _Format(record=pb.Hello, check=validate.check_hello, write=translate.write_hello, read=translate.read_hello),
    Refusal: _Format(
        record=pb.Refusal, check=validate.check_refusal, write=translate.write_refusal, read=translate.read_refusal
    ),
}
_NAMES: Final = ("nothing", *(message.__name__ for message in _FORMATS))


def encode(message: Message, *, wire: str = "fp32", seed: int = 0) -> bytes:
    """The frame of a message, its tensors as `wire`: fp32, fp16, bf16 or int8.

    `seed` drives int8's stochastic rounding, together with the message's round, the names of its tensors and, for an
    update, its device: devices that share a task's seed still round independently.

    Raises:
        ValueError: for a field or a tensor that may not travel, or not as `wire`.
    """
    known_wire(wire)
    return _encode(message, lambda payload: pack_payload(payload, wire, _rounding_seed(message, seed)))


def decode(frame: bytes, expect: type[T], *, limit: int) -> T:
    """The message of a frame that must hold an `expect` and have at most `limit` bytes.

    Memory: the frame, at most 4 bytes of float32 a byte of it, 12 a scalar and its index, a bounded body, and some 100
    bytes for each of at most 2^20 coefficients a payload, which may take a second; a byte a unit of at most 2^24.

    Raises:
        ValueError: for anything but a whole, undamaged, well-formed frame of this protocol version.
    """
    form = _FORMATS[expect]
    body, data = unpack(frame, _NAMES.index(expect.__name__), _NAMES, limit=limit)
    record = form.record()
    try:
        record.ParseFromString(body)
    except DecodeError as error:
        raise ValueError(f"body of {expect.__name__} must be its protobuf record: {error}") from None
    record.DiscardUnknownFields()
    if record.SerializeToString(deterministic=True) != body:
        raise ValueError(f"body of {expect.__name__} must hold known fields only, each once and in order")
    message, rest = form.read(record, data)
    if len(rest):
        raise ValueError(f"{expect.__name__} must account for all of its tensor data, {len(rest)} bytes are left")
    form.check(message)
    result: T = message
    return result


def decode_answer(frame: bytes, expect: tuple[type[T], type[U]], *, limit: int) -> T | U:
    """The message of a frame that may hold either of `expect`, as in `decode`."""
    first, second = expect
    if kind_of(frame) == _NAMES.index(second.__name__):
        return decode(frame, second, limit=limit)
    return decode(frame, first, limit=limit)


class TaskEncoder:
    """Encodes the tasks of one round, each payload object only once, however many tasks carry it.

    Payloads are told apart by identity and must not change meanwhile. The data of the `keep` most recently used ones
    stays in memory, so a patch that all devices share is kept while each device's own start comes and goes.
    """

    def __init__(self, wire: str = "fp32", *, seed: int = 0, keep: int = 4) -> None:
        known_wire(wire)
        self._wire, self._seed, self._keep = wire, seed, keep
        self._packed: OrderedDict[tuple[int, int], tuple[Payload, PackedPayload]] = OrderedDict()

    def encode(self, task: Task) -> bytes:
        """The same bytes as `encode(task, wire=wire, seed=seed)`."""
        seed = _rounding_seed(task, self._seed)
        return _encode(task, lambda payload: self._pack(payload, seed))

    def _pack(self, payload: Payload, seed: int) -> PackedPayload:
        key = (id(payload), seed)  # the entry holds the payload, so its id cannot come to mean another
        if key not in self._packed:
            self._packed[key] = (payload, pack_payload(payload, self._wire, seed).joined())
        self._packed.move_to_end(key)
        packed = self._packed[key][1]
        while len(self._packed) > self._keep:
            self._packed.popitem(last=False)
        return packed


def _encode(message: Message, pack_one: translate.Pack) -> bytes:
    if type(message) not in _FORMATS:
        raise ValueError(f"message must be a {', '.join(_NAMES[1:])}, got {type(message).__name__}")
    form = _FORMATS[type(message)]
    form.check(message)
    record, data = form.write(message, pack_one)
    return pack(_NAMES.index(type(message).__name__), record.SerializeToString(deterministic=True), data)


def _rounding_seed(message: Message, seed: int) -> int:
    if isinstance(message, Task):
        return derive_seed(seed, "wire", message.round)
    return derive_seed(seed, "wire", message.round, message.device) if isinstance(message, Update) else seed
