"""A real device, from its owner's settings: its model, its data and its store."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path

from fedloom.client.agent.accept import check_base
from fedloom.client.agent.home import Home
from fedloom.client.agent.machine import resident_bytes
from fedloom.client.cost import held
from fedloom.client.data import Example
from fedloom.client.device import Device
from fedloom.client.model import load_model
from fedloom.client.readers import read_examples
from fedloom.client.settings import DeviceSettings
from fedloom.client.store import DeviceStore
from fedloom.protocols import config


def own_device(settings: DeviceSettings, home: Home) -> tuple[Device, str]:
    """The device, its data tokenised, and a hash of all that its answers depend on beside the tasks.

    Raises:
        ValueError: in one line, for a model or data that cannot be used, or a base that the owner does not accept.
    """
    train, test = own_examples(settings)
    resident = load_model(settings.model, settings.lora, seed=settings.seed)
    check_base(resident.spec.base_hash, settings.accept)
    device = Device(
        settings.name,
        resident=resident,
        train=train,
        test=test,
        store=DeviceStore(home.patches, home.own),
        rank=settings.rank,
        data_config=config.Data(max_length=settings.data.max_length),
        eval_config=settings.eval,
        capability=settings.capability,
        limit=settings.limit,
        memory=lent_memory(settings.rules.max_memory_mb * 10**6, sum(tensor.nbytes for tensor in held(resident))),
    )
    device.prepare()
    identity = hashlib.blake2b(resident.spec.base_hash.encode(), digest_size=16)
    told = (settings.name, settings.rank, settings.data.max_length, settings.lora, settings.eval, settings.model.device)
    identity.update(repr(told).encode())
    for example in (*train, *test):
        identity.update(repr(astuple(example)).encode())
    return device, identity.hexdigest()


def lent_memory(limit: int, held_now: int) -> int:
    """Bytes for tensors that a device tells a server of, who plans by them: its limit, less what the process takes.

    Args:
        limit: of the whole process, in bytes; 0 sets none, and then nothing is told.
        held_now: bytes of the tensors in memory; the rest of the process is the interpreter and its libraries.
    """
    if not limit:
        return 0
    return max(limit - max(resident_bytes(os.getpid()) - held_now, 0), 1)


def own_examples(settings: DeviceSettings) -> tuple[list[Example], list[Example]]:
    """What the device trains on, and what it is judged by.

    Raises:
        ValueError: for a file that cannot be used.
    """
    data, task = settings.data, settings.model.task
    examples = read_examples(Path(data.train), task=task, limit=data.limit)
    if data.test:
        return examples, read_examples(Path(data.test), task=task, limit=data.limit)
    return held_out(examples, data.test_share)


def held_out(examples: Sequence[Example], share: float) -> tuple[list[Example], list[Example]]:
    """Split examples by their content: one that is held out today still is, or nearly so, when others have come."""
    order = sorted(range(len(examples)), key=lambda index: _lot(examples[index]))
    kept = set(order[: min(max(1, round(len(examples) * share)), len(examples) - 1)] if share else [])
    train = [example for index, example in enumerate(examples) if index not in kept]
    return train, [example for index, example in enumerate(examples) if index in kept]


def _lot(example: Example) -> bytes:
    return hashlib.blake2b(repr(astuple(example)).encode(), digest_size=16).digest()
