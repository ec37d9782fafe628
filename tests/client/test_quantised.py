"""Quantised bases: the codes, and training on them, against the dense model that they stand for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedloom.client.bits import hold, quantised
from fedloom.client.data import Dataset, Example
from fedloom.client.device import Device
from fedloom.client.model import Resident, load_model
from fedloom.client.parts import parts_of
from fedloom.client.quantised import NF4, frozen_linear, quantise
from fedloom.client.training import forward_logits, loss_sum
from fedloom.protocols import config
from fedloom.protocols.messages import Payload, Scope, Start, Task
from fedloom.strategies.cost import linear_bytes

KINDS = ("llama", "gpt2", "classifier")


@pytest.fixture(params=KINDS)
def resident(request: pytest.FixtureRequest) -> Iterator[Resident]:
    found: Resident = request.getfixturevalue(request.param)
    yield found
    hold(found, 16)


def _weights(resident: Resident) -> dict[str, torch.Tensor]:
    """What the linear layers compute with, as they store it."""
    found = {}
    for name, layer in resident.bits.layers.items():
        codes = quantised(layer)
        found[name] = codes.dense() if codes else layer.weight.detach().clone()  # type: ignore[operator]
    return found


@given(st.integers(1, 300), st.sampled_from([8, 4]), st.integers(0, 2**31))
def test_the_error_is_half_a_step_at_most(size: int, bits: int, seed: int) -> None:
    weight = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    codes = quantise(weight, bits)
    assert codes.nbytes == linear_bytes(size, bits, 4)
    steps = max(np.diff(NF4)) / 2 if bits == 4 else 0.5 / 127
    group = {8: 128, 4: 64}[bits]
    for at in range(0, size, group):
        error = (codes.dense() - weight)[at : at + group].abs().max()
        assert error <= weight[at : at + group].abs().max() * steps * (1 + 1e-5)


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_are_a_fixed_point_and_zero_stays_zero(bits: int) -> None:
    codes = quantise(torch.randn(64, 32, generator=torch.Generator().manual_seed(0)), bits)
    again = quantise(codes.dense(), bits)
    assert torch.equal(again.codes, codes.codes)
    assert not quantise(torch.zeros(3, 5), bits).dense().any()


def test_nf4_is_the_table_of_the_paper() -> None:
    """All 16 values of a group with scale 1 come back, and a value goes to the nearest of them."""
    table = torch.tensor(NF4)
    assert torch.equal(quantise(table, 4).dense(), table)
    between = torch.tensor([1.0, 0.86, 0.87, -0.84, -0.86])
    assert quantise(between, 4).dense().tolist() == [NF4[15], NF4[14], NF4[15], NF4[1], NF4[0]]
    assert quantise(torch.tensor([1.0, -1.0]), 4).codes[0, 0].item() == 0xF0  # the first in the upper half


@pytest.mark.parametrize("bits", [8, 4])
def test_memory_is_what_the_bits_say(resident: Resident, bits: int) -> None:
    dense = resident.bits.nbytes()
    parameters = sum(layer.weight.numel() for layer in resident.bits.layers.values())  # type: ignore[operator]
    assert dense == 4 * parameters
    hold(resident, bits)
    assert resident.bits.nbytes() / (2 * parameters) == pytest.approx({8: 8.25 / 16, 4: 4.5 / 16}[bits], rel=0.01)
    assert all(layer.weight.numel() == 0 for layer in resident.bits.layers.values())  # type: ignore[operator]


@pytest.mark.parametrize("bits", [8, 4])
def test_16_bits_again_is_the_base_bit_for_bit(resident: Resident, bits: int) -> None:
    before = {name: tensor.clone() for name, tensor in resident.model.state_dict().items()}
    dense = _weights(resident)
    hold(resident, bits)
    hold(resident, 12 - bits)  # from 8 to 4 and back, never from codes
    assert all(torch.equal(w, quantise(dense[name], 12 - bits).dense()) for name, w in _weights(resident).items())
    hold(resident, 16)
    after = resident.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_loss_and_gradients_equal_those_of_the_dense_model_it_stands_for(
    resident: Resident, examples: list[Example], payload_for: Callable[..., Payload], bits: int, dropout: float
) -> None:
    dataset = Dataset(examples, resident, max_length=64, name="t")
    batch = dataset.batch(range(len(examples)))
    resident.adapters.set_factors(payload_for(resident.spec, 3).factors)
    resident.adapters.set_dropout(dropout)

    def step() -> tuple[float, list[torch.Tensor]]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            loss = loss_sum(forward_logits(resident, batch), batch.labels)
        trained = [*resident.adapters.parameters(), *resident.base.heads.values()]
        return float(loss), list(torch.autograd.grad(loss, trained))

    full, _ = step()
    hold(resident, bits)
    loss, gradients = step()
    codes = _weights(resident)
    hold(resident, 16)
    for name, layer in resident.bits.layers.items():
        layer.weight.data = codes[name]
    try:
        dense_loss, dense = step()
    finally:
        resident.adapters.set_dropout(0.0)
        hold(resident, 8)  # whatever was written: back from a copy of it ...
        _restore(resident)
    assert loss == pytest.approx(dense_loss, rel=1e-6)
    assert loss == pytest.approx(full, rel={8: 0.01, 4: 0.1}[bits])
    for got, wanted in zip(gradients, dense, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()) + 1e-7)


def _restore(resident: Resident) -> None:
    """The weights of the folder that a resident came from."""
    fresh = load_model(resident.config, config.Lora(), seed=0)
    hold(resident, 16)
    for name, layer in resident.bits.layers.items():
        layer.weight.data = fresh.bits.layers[name].weight.data  # type: ignore[assignment]


@pytest.mark.parametrize("bits", [8, 4])
def test_a_version_is_the_patched_base_quantised_once(
    resident: Resident, payload_for: Callable[..., Payload], bits: int
) -> None:
    first, second = payload_for(resident.spec, 1), payload_for(resident.spec, 2)
    resident.base.apply("second", second)
    wanted = {name: quantise(weight, bits).dense() for name, weight in _weights(resident).items()}
    hold(resident, bits)
    base = _weights(resident)
    for key, payload in (("first", first), ("second", second)):  # by way of another version
        resident.base.apply(key, payload)
    got = _weights(resident)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert any(not torch.equal(got[name], base[name]) for name in wanted)
    resident.base.restore()
    assert all(torch.equal(weight, base[name]) for name, weight in _weights(resident).items())


def test_a_device_trains_on_codes(
    llama: Resident, make_device: Callable[..., Device], payload_for: Callable[..., Payload]
) -> None:
    device = make_device(llama)
    knobs: dict[str, float | int | str] = {"steps": 6, "batch_size": 4, "lr": 0.02}
    task = Task(device="a", round=1, rank=4, alpha=8.0, start_from=Start.FRESH, knobs=knobs)
    full = device.handle(task)
    hold(llama, 4)
    try:
        coded, again = device.handle(task), device.handle(task)
    finally:
        hold(llama, 16)
    mean = {name: u.metrics["loss_sum"] / u.metrics["tokens"] for name, u in (("full", full), ("coded", coded))}
    assert mean["coded"] == pytest.approx(mean["full"], rel=0.05)
    assert coded.payload.factors.keys() == full.payload.factors.keys()
    for name, factor in coded.payload.factors.items():
        np.testing.assert_array_equal(factor.b, again.payload.factors[name].b)


def test_codes_are_kept_for_the_backward_pass_and_no_dense_weight() -> None:
    weight = quantise(torch.randn(64, 32), 4)
    sizes: list[int] = []
    x = torch.randn(2, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        frozen_linear(x, weight, None).sum()
    assert not sizes


def test_bfloat16(tiny_llama: Path, examples: list[Example]) -> None:
    resident = load_model(config.Model(path=str(tiny_llama), dtype="bfloat16"), config.Lora(), seed=0)
    batch = Dataset(examples, resident, max_length=64, name="t").batch([0, 1])
    full = float(loss_sum(forward_logits(resident, batch), batch.labels))
    hold(resident, 8)
    loss = loss_sum(forward_logits(resident, batch), batch.labels)
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss) == pytest.approx(full, rel=0.01)
    assert all(parameter.grad is not None for parameter in resident.adapters.parameters())


def test_what_cannot_be(llama: Resident, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"one of \(16, 8, 4\) bits, got 5"):
        hold(llama, 5)
    with pytest.raises(ValueError, match=r"quantised to one of \(8, 4\) bits, got 2"):
        quantise(torch.ones(4), 2)
    with pytest.raises(ValueError, match="must be finite to be quantised, got inf"):
        quantise(torch.tensor([1.0, torch.inf]), 8)

    def lacking(*_: object, **__: object) -> None:
        raise NotImplementedError("'bucketize' is not implemented here\nat length")

    monkeypatch.setattr("fedloom.client.bits.quantise", lacking)
    with pytest.raises(ValueError, match=r"in torch.float32 on cpu must be held in 16 bits here, got 4: 'bucketize'"):
        hold(llama, 4)
    assert llama.bits.bits == 16


def test_tuning_the_weights_themselves_needs_them_dense(llama: Resident) -> None:
    hold(llama, 8)
    try:
        with pytest.raises(ValueError, match="held in 16 bits for its weights to be tuned, got 8"):
            parts_of(llama, Scope.ALL)
        assert parts_of(llama, Scope.LORA)
    finally:
        hold(llama, 16)
