"""A whole run of two devices, one of which sends anything: as its first words, or as an answer.

Whatever it sends, the other's rounds go on: the run ends, its checkpoint reads well and holds finite numbers, and its
metrics are JSON. The real round loop runs; only the network is left out.
"""

from __future__ import annotations

import json
import logging
import random
import shutil
from collections.abc import Callable, Generator, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Final, cast

from intake_targets import DEVICES, OPTIONS, answer, check_finite, ran_out, spec_for
from targets import MIB, Broken, Havoc, Target
from wire_targets import KINDS, mutate_frame

from fedloom.protocols.codec import decode, encode
from fedloom.protocols.config import RunConfig, build_config
from fedloom.protocols.messages import Hello, Kind, Refusal, Task, Update
from fedloom.protocols.seeds import derive_seed
from fedloom.server.checkpoint import latest_checkpoint
from fedloom.server.courier import Courier, Parcel, Reply
from fedloom.server.loop import CHECKPOINTS, Coordinator
from fedloom.strategies.base import Scaling
from fedloom.strategies.registry import build

_STRATEGIES: Final = tuple(OPTIONS)
_LATE: Final = 0x80  # of the first byte: the stranger comes after round 0
_ALONE: Final = 0x40  # and: there is no other
_STRANGER, _OTHER = 1, 2
_RUN: Final = "0123abcd"
Devices = Callable[[int, str, bytes], bytes]  # node, kind of message, frame in; frame out


class Post:
    """Stands in for the Courier: devices are a function; both are there at first, or the stranger from round 1 on."""

    def __init__(self, devices: Devices, *, late: bool, alone: bool) -> None:
        self._devices, self._late = devices, late
        self._there = [_STRANGER] if alone else [_STRANGER, _OTHER]
        self._looked = 0

    def nodes(self) -> list[int]:
        self._looked += 1
        return [_OTHER] if self._late and self._looked <= 2 else self._there

    def exchange(self, parcels: Iterable[Parcel], group: str) -> Generator[Reply, None, None]:
        for parcel in parcels:
            yield Reply(node=parcel.node, frame=self._devices(parcel.node, parcel.kind, parcel.frame))


def recipe(number: int) -> RunConfig:
    name = _STRATEGIES[number % len(_STRATEGIES)]
    server = {"rounds": 2, "timeout": 30.0}
    return build_config(
        {"strategy": {"name": name, **OPTIONS[name]}, "server": server, "track": {"tensorboard": False}}
    )


def _honest(number: int, node: int, kind: str, frame: bytes) -> bytes:
    """What a device that does what it is asked sends, in a run of that strategy."""
    spec = spec_for(_STRATEGIES[number % len(_STRATEGIES)])
    if kind == "query":
        return encode(Hello(report=DEVICES[node - 1], spec=spec))
    return encode(answer(decode(frame, Task, limit=1 << 24), node, spec))


def _run(number: int, devices: Devices, folder: Path, *, late: bool = False, alone: bool = False) -> None:
    config = recipe(number)
    shutil.rmtree(folder, ignore_errors=True)
    strategy = build(config.strategy.name, config.strategy.options, Scaling())
    courier = cast(Courier, Post(devices, late=late, alone=alone))
    Coordinator(courier, config, strategy, folder, run=_RUN).go()


class Rounds:
    """The target; its runs are written into one folder after another."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "run"

    def check(self, data: bytes) -> None:
        """The first byte chooses a strategy, and whether the stranger is late; the rest is what it sends."""
        first, sent = data[:1] or b"\0", data[1:]
        number, late, greets = first[0] & 0x3F, bool(first[0] & _LATE), _is_greeting(sent)
        alone = not late and bool(first[0] & _ALONE)

        def devices(node: int, kind: str, frame: bytes) -> bytes:
            if node == _STRANGER and (kind == "query" if greets else _is_first_training(frame)):
                return sent
            return _honest(number, node, kind, frame)

        try:
            _run(number, devices, self._folder, late=late, alone=alone)
        except ValueError as error:
            if alone or (greets and not late):
                raise  # nobody is left to go on with, or a fleet that does not fit together is not begun with
            raise Broken(f"one device must not stop a run, got {error}") from error
        self._left(number)

    def _left(self, number: int) -> None:
        """What a run leaves behind."""
        found, complaints = latest_checkpoint(self._folder / CHECKPOINTS)
        if found is None or complaints or found.round != 2:
            raise Broken(f"a run must end with a checkpoint of round 2 that reads well, got {found} {complaints}")
        check_finite(found.state)
        for line in (self._folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            json.loads(line, parse_constant=_no_constant)

    def seeds(self) -> list[bytes]:
        """For every strategy, what an honest device would have sent; and where it can, that its memory ran out."""
        made: list[bytes] = []
        for number in range(len(_STRATEGIES)):
            sent: dict[str, bytes] = {}

            def devices(
                node: int, kind: str, frame: bytes, number: int = number, sent: dict[str, bytes] = sent
            ) -> bytes:
                if node == _STRANGER and kind == "train":
                    task = decode(frame, Task, limit=1 << 24)
                    if task.ranks or task.start.keep:
                        sent.setdefault("out of memory", encode(ran_out(task)))
                frame = _honest(number, node, kind, frame)
                if node == _STRANGER:
                    sent.setdefault(kind, frame)
                return frame

            _run(number, devices, self._folder)
            made += [
                bytes([number | flag]) + sent[kind]
                for kind in ("train", "out of memory")
                for flag in (0, _ALONE)
                if kind in sent
            ]
        greeters = [0, *(number for number, name in enumerate(_STRATEGIES) if spec_for(name).shapes)]
        first_words = [
            bytes([number | flag]) + _honest(number, _STRANGER, "query", b"")
            for number in greeters
            for flag in (0, _LATE, _ALONE)
        ]
        nonce = derive_seed(_RUN, "nonce", Kind.TRAIN, 1, "hospital-a")
        no = Refusal(device="hospital-a", round=1, run=_RUN, nonce=nonce, reason="no", version=1)
        old = replace(no, nonce=nonce ^ 1, version=2**63 - 1)
        return [*made, *first_words, *(bytes([first]) + encode(each) for each in (no, old) for first in (0, _LATE))]


def _is_greeting(frame: bytes) -> bool:
    return len(frame) > 6 and frame[6] == KINDS.index(Hello) + 1


def _is_first_training(frame: bytes) -> bool:
    if not frame:
        return False
    task = decode(frame, Task, limit=1 << 24)
    return task.kind == "train" and task.round == 1


def _no_constant(name: str) -> None:
    raise Broken(f"metrics must be JSON, got {name}")


def _mutate(data: bytes, rng: random.Random, havoc: Havoc) -> bytes:
    if rng.random() < 0.05:
        return bytes([rng.randrange(256)]) + data[1:]
    kind = next((known for number, known in enumerate(KINDS, 1) if data[7:8] == bytes([number])), Update)
    return data[:1] + mutate_frame(data[1:], rng, havoc, kind)


def targets(folder: Path) -> dict[str, Target]:
    """Runs go into `folder`."""
    for room in ("server", "strategies"):
        logging.getLogger(f"fedloom.{room}").setLevel(logging.CRITICAL)
    rounds = Rounds(folder)
    made = Target(
        name="rounds",
        check=rounds.check,
        seeds=rounds.seeds,
        mutate=_mutate,
        seconds=5.0,
        memory=280 * MIB,
    )
    return {made.name: made}
