"""Resident models of the tiny kinds, and devices around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from fedloom.client.data import Example
from fedloom.client.device import Device
from fedloom.client.model import Resident, load_model
from fedloom.client.store import DeviceStore
from fedloom.protocols import config
from fedloom.protocols.initial import initial_a
from fedloom.protocols.messages import LowRank, ModelSpec, Payload


@pytest.fixture(scope="module")
def llama(tiny_llama: Path) -> Resident:
    return load_model(config.Model(path=str(tiny_llama)), config.Lora(), seed=0)


@pytest.fixture(scope="module")
def gpt2(tiny_gpt2: Path) -> Resident:
    return load_model(config.Model(path=str(tiny_gpt2)), config.Lora(), seed=0)


@pytest.fixture(scope="module")
def classifier(tiny_classifier: Path) -> Resident:
    model = config.Model(path=str(tiny_classifier), task="classify", labels=("lamp", "oven", "alarm"))
    return load_model(model, config.Lora(), seed=0)


@pytest.fixture
def make_device(tmp_path: Path, examples: list[Example]) -> Callable[..., Device]:
    """A device named `name` with the four examples and a folder of its own."""

    def make(
        resident: Resident,
        name: str = "a",
        *,
        train: Sequence[Example] | None = None,
        test: Sequence[Example] | None = None,
        rank: int = 16,
        patches: str = "",
    ) -> Device:
        resident.base.restore()
        return Device(
            name,
            resident=resident,
            train=examples if train is None else train,
            test=examples if test is None else test,
            store=DeviceStore(tmp_path / (patches or name) / "patches", tmp_path / name / "state"),
            rank=rank,
            data_config=config.Data(),
            eval_config=config.Evaluation(),
        )

    return make


def random_payload(spec: ModelSpec, seed: int, rank: int = 3, *, heads: bool = True) -> Payload:
    """A payload that moves every matrix, and every head parameter."""
    factors = {}
    for name, size in spec.matrices.items():
        a = initial_a(seed, f"{name}/a", rank, size.d_in)
        b = initial_a(seed, f"{name}/b", size.d_out, rank)
        factors[name] = LowRank(b=b, a=a, alpha=2.0 * rank)
    generator = np.random.Generator(np.random.Philox(key=seed))
    dense = {name: generator.normal(size=shape).astype(np.float32) for name, shape in spec.dense.items()}
    return Payload(factors=factors, dense=dense if heads else {})


@pytest.fixture
def payload_for() -> Callable[..., Payload]:
    return random_payload
