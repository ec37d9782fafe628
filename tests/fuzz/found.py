"""Inputs that once broke a decoder, made by code: the seed run tries each of them again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

import corpus
import numpy as np
from file_targets import joined, parted
from intake_targets import DEVICES, SPEC, cases
from mutation import parsed
from safetensors.numpy import save
from wire_targets import split

from fedloom.protocols import fedloom_pb2 as pb
from fedloom.protocols.codec import encode
from fedloom.protocols.framing import checksum, pack
from fedloom.protocols.messages import (
    Hello,
    LowRank,
    MatrixSpec,
    Over,
    Patch,
    Payload,
    Refusal,
    Scalars,
    Start,
    Task,
    Update,
)

Seeds = Sequence[bytes]
DEEP: Final = b"[" * 60_000  # nested deeper than a parser's stack


def _padding(seeds: Seeds) -> list[bytes]:
    """What fills a tensor up to 16 bytes, not zero: two frames for one message."""
    frame = encode(Update(device="d", round=1, examples=1, payload=Payload(dense={"n": np.ones(3, np.float32)})))
    body, data = split(frame)
    record = parsed(pb.Update, body)
    data = data[:-1] + b"\1"
    record.payload.data_crc32 = checksum([data])
    return [pack(2, record.SerializeToString(deterministic=True), [data])]


def _of(name: str, *, train: bool = True) -> tuple[int, Any]:
    """The number and the case of a strategy's first round."""
    for number, case in enumerate(cases()):
        if type(case.strategy).__name__ == name and (case.task.kind == "train") == train:
            return number, case
    raise ValueError(f"there is no case of {name}")


def _intakes(seeds: Seeds) -> list[bytes]:
    """Finite numbers that no sum survives, scalars along other directions, and more of them than were asked for."""
    made = []
    number, case = _of("FedIT")
    huge = {name: replace(f, b=np.full_like(f.b, 3e38), a=np.full_like(f.a, 3e38)) for name, f in _factors(case.good)}
    made.append((number, replace(case.good, payload=replace(case.good.payload, factors=huge))))
    number, case = _of("FedKSeed")
    scalars = case.good.payload.scalars
    made.append((number, replace(case.good, payload=Payload(scalars=replace(scalars, values=scalars.values * 1e38)))))
    number, case = _of("DeComFL")
    scalars = case.good.payload.scalars
    other = replace(scalars, indices=(scalars.drawn() + 1) % scalars.k)
    made.append((number, replace(case.good, payload=Payload(scalars=other))))
    number, case = _of("Sketch")
    many = Scalars(over=Over.STEPS, k=32, values=np.full(2000, 1e-3, np.float32), seed=case.task.seed)
    made.append((number, replace(case.good, payload=Payload(scalars=many))))
    number, case = _of("Fedloom")
    made.append((number, replace(case.good, metrics={"loss_sum": 1.7e308, "tokens": 5e-324})))
    made.append((number, replace(case.good, examples=2**63 - 1)))
    lines = Refusal(device="hospital-a", round=1, reason="no")
    return [*(bytes([number]) + encode(update) for number, update in made), b"\0" + _with_newline(lines)]


def _factors(update: Update) -> list[tuple[str, LowRank]]:
    return list(update.payload.factors.items())


def _with_newline(refusal: Refusal) -> bytes:
    """A refusal whose reason would be a second line of a log."""
    record = parsed(pb.Refusal, split(encode(refusal))[0])
    record.reason = "no\nround 7: all is well"
    return pack(4, record.SerializeToString(deterministic=True), [])


def _rounds(seeds: Seeds) -> list[bytes]:
    """Metrics that cannot be pooled, a latecomer that cannot be planned for, a model that no memory holds."""
    alone = next(seed for seed in seeds if seed[0] == 0x40)
    body, data = split(alone[1:])
    record = parsed(pb.Update, body)
    del record.metrics[:]
    record.metrics.add(name="loss_sum", value=1.0)
    unpooled = alone[:1] + pack(2, record.SerializeToString(deterministic=True), [data])
    weak = Hello(report=replace(DEVICES[0], rank=1), spec=SPEC)
    giant = replace(SPEC, matrices={"q": MatrixSpec(d_out=2**62, d_in=2**31), "c": MatrixSpec(d_out=9, d_in=9)})
    ffa, fedit = 5, 4  # places in intake_targets.OPTIONS
    made = [unpooled, bytes([0x80 | fedit]) + encode(weak)]
    return [*made, *(bytes([0x40 | each]) + encode(Hello(report=DEVICES[0], spec=giant)) for each in (ffa, fedit))]


def _sealed(table: dict[str, Any], tensors: bytes) -> bytes:
    """A checkpoint with right checksums."""
    table = {**table, "sha256": hashlib.sha256(tensors).hexdigest()}
    rest = {name: value for name, value in table.items() if name != "seal"}
    seal = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    return joined([json.dumps({**rest, "seal": seal}).encode(), tensors])


def _checkpoints(seeds: Seeds) -> list[bytes]:
    """Tensors that are none, tables that are lists, numbers that are texts."""
    about, tensors = parted(seeds[0], 2)
    table = json.loads(about)
    return [
        _sealed(table, b""),
        _sealed(table, save({"b": np.ones(1)})[:-1]),
        _sealed({**table, "spec": {**table["spec"], "matrices": {"q": [4, 3]}}}, tensors),
        _sealed({**table, "spec": {**table["spec"], "matrices": [1]}}, tensors),
        _sealed({**table, "round": [3]}, tensors),
        joined([DEEP, tensors]),
    ]


def _torn(seeds: Seeds) -> list[bytes]:
    """One digit of run.json changed: another version, another round, another share of the ledger."""
    about, tensors = parted(seeds[0], 2)
    changes = ((b'"version": 3', b'"version": 7'), (b'"round": 3', b'"round": 4'), (b'"refused": 1', b'"refused": 9'))
    return [joined([about.replace(old, new), tensors]) for old, new in changes]


def _stores(seeds: Seeds) -> list[bytes]:
    """One bit of a patch, of a state, of the note of what is held; and a note with a name that no file can have."""
    parts = parted(seeds[0], 3)
    made = []
    for place, part in enumerate(parts):
        flipped = part[:-2] + bytes([part[-2] ^ 1]) + part[-1:]
        made.append([*parts[:place], flipped, *parts[place + 1 :]])
    held = next(place for place, part in enumerate(parts) if part.startswith(b"{"))
    for text in (json.dumps({"run": "0123abcd", "lineages": {"1": "x" * 5000}}).encode(), DEEP):
        made.append([*parts[:held], text, *parts[held + 1 :]])
    return [joined(each) for each in made]


def _patches(seeds: Seeds) -> list[bytes]:
    """Patches for another model: once kept as if they fitted, or multiplied out to more than memory holds."""
    base = Task(device="hospital-a", round=4, rank=2, alpha=4.0, start_from=Start.PATCH, run="0123abcd")
    wrong = Payload(dense={"head": np.ones((5, 1), np.float32)})
    long = np.ones((2**15, 1), np.float32)
    wide = Payload(factors={"q": LowRank(b=long, a=long.T, alpha=1.0)})
    scalars = Payload(scalars=corpus.pool_scalars(37, 9))
    return [
        encode(replace(base, patch=Patch(base_hash=SPEC.base_hash, since=since, version=2, payload=payload)))
        for payload in (wrong, wide, scalars, corpus.model_payload(SPEC, 1))
        for since in (0, 1)
    ]


FOUND: Final[dict[str, Callable[[Seeds], list[bytes]]]] = {
    "update": _padding,
    "coefficients": lambda seeds: [bytes.fromhex("050001050500")],  # a state that is cut short
    "rans": lambda seeds: [bytes.fromhex("040001050500")],
    "intake": _intakes,
    "rounds": _rounds,
    "checkpoint": _checkpoints,
    "checkpoint-torn": _torn,
    "journal": lambda seeds: [DEEP, seeds[0].replace(b'"rank": 8', b'"rank": 4')],
    "metrics": lambda seeds: [DEEP, b'{"round": ' + b"9" * 400 + b"}\n", b"\xff\n"],
    "store": _stores,
    "patch": _patches,
    "mask": lambda seeds: [save({"q": np.array([-1], np.int64)})],
    "examples": lambda seeds: [b"\0" + DEEP, b'\0{"prompt": "\\ud800", "completion": "a"}'],
    "recipe": lambda seeds: [b"x = " + DEEP[:9000], b"x" + b".x" * 3000 + b" = 1"],
    "overrides": lambda seeds: [b"x=" + DEEP[:9000], b"x=" + b"{a=" * 2000],
    "server-settings": lambda seeds: [b'[keys]\nfolder = "~nosuchuser/x"'],
    "device-settings": lambda seeds: [b'name = "a"\nstate = "~nosuchuser/x"'],
    "orders": lambda seeds: [DEEP, seeds[0].replace(b'"wait_for": 1', b'"wait_for": Infinity'), b'{"config": []}'],
    "traffic": lambda seeds: [DEEP, b'{"day": "2026-01-31", "up": Infinity, "down": 0}', seeds[0].replace(b"5", b"-5")],
    "outbox": lambda seeds: [DEEP],
    "answers": lambda seeds: [DEEP],
    "reason": lambda seeds: [b"\0\x9f"],
    "door": lambda seeds: [joined([text, *parted(seeds[0], 5)[1:]]) for text in (b"[]", DEEP, b'{"limit": {}}')],
    "standing": lambda seeds: [DEEP, seeds[0].replace(b'"pid": 5', b'"pid": -5')],
    "device-keys": lambda seeds: [DEEP],
    "snapshot": lambda seeds: [DEEP, seeds[0].replace(b'"matrices": {"q": [2, 3, "linear"]}', b'"matrices": 1')],
}


def found(name: str, seeds: Seeds) -> list[bytes]:
    """What once broke a target."""
    return FOUND[name](seeds) if name in FOUND else []
