"""Merging against a dense float64 reference, and versions that do not depend on the way to them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fedloom.client.model import Resident, load_model
from fedloom.client.patching import PatchedBase
from fedloom.protocols import config
from fedloom.protocols.messages import LowRank, Payload
from fedloom.strategies.lowrank import add


def _weights(resident: Resident) -> dict[str, torch.Tensor]:
    layers = {name: layer.base_layer.weight for name, layer in resident.adapters.layers.items()}
    return {name: weight.detach().clone() for name, weight in {**layers, **resident.base.heads}.items()}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "classifier"])
def test_merge_equals_a_dense_reference(
    kind: str, request: pytest.FixtureRequest, payload_for: Callable[..., Payload]
) -> None:
    resident: Resident = request.getfixturevalue(kind)
    resident.base.restore()
    before = _weights(resident)
    payload = payload_for(resident.spec, 1)
    name = next(iter(resident.spec.matrices))
    size = resident.spec.matrices[name]
    extra = np.arange(size.d_out * size.d_in, dtype=np.float32).reshape(size.d_out, size.d_in) / 100
    payload = Payload(factors=payload.factors, dense={**payload.dense, name: extra})
    resident.base.apply("v1", payload)
    for module, after in _weights(resident).items():
        delta = np.zeros(before[module].shape) if module in resident.spec.dense else None
        if module in resident.spec.matrices:
            factor = payload.factors[module]
            delta = factor.scale * factor.b.astype(np.float64) @ factor.a.astype(np.float64)
        assert delta is not None
        delta = delta + payload.dense.get(module, 0)
        if module in resident.spec.matrices and resident.spec.matrices[module].kind == "conv1d":
            delta = delta.T
        np.testing.assert_allclose(after.numpy(), before[module].double().numpy() + delta, rtol=1e-6, atol=1e-6)
    resident.base.restore()
    assert all(torch.equal(before[module], after) for module, after in _weights(resident).items())


def test_a_late_joiner_equals_an_early_one(llama: Resident, payload_for: Callable[..., Payload]) -> None:
    deltas = [payload_for(llama.spec, seed, 2) for seed in range(4)]
    total = deltas[0]
    for number, delta in enumerate(deltas[1:]):
        llama.base.apply(("early", number), total)
        total = add(delta, total, llama.spec)
    llama.base.apply("early", total)
    early = _weights(llama)
    dense = {name: sum((d.factors[name].dense() for d in deltas), np.float32(0)) for name in llama.spec.matrices}
    llama.base.restore()
    llama.base.apply("late", Payload(dense=dense))
    for name, weight in _weights(llama).items():
        torch.testing.assert_close(weight, early[name], rtol=0, atol=1e-6)


def test_the_same_version_twice_is_bitwise_equal(llama: Resident, payload_for: Callable[..., Payload]) -> None:
    one, two = payload_for(llama.spec, 1), payload_for(llama.spec, 2)
    llama.base.apply("one", one)
    first = _weights(llama)
    llama.base.apply("two", two)
    llama.base.apply("one", one)
    assert all(torch.equal(first[name], weight) for name, weight in _weights(llama).items())


def test_a_version_that_is_there_is_not_made_again(
    llama: Resident, payload_for: Callable[..., Payload], monkeypatch: pytest.MonkeyPatch
) -> None:
    llama.base.apply("one", payload_for(llama.spec, 1))
    monkeypatch.setattr(PatchedBase, "_write", lambda *_: pytest.fail("written again"))
    llama.base.apply("one", payload_for(llama.spec, 1))


def test_modules_that_a_patch_leaves_out_go_back(llama: Resident, payload_for: Callable[..., Payload]) -> None:
    llama.base.restore()
    before = _weights(llama)
    whole = payload_for(llama.spec, 1)
    name = next(iter(llama.spec.matrices))
    llama.base.apply("whole", whole)
    llama.base.apply("part", Payload(factors={name: whole.factors[name]}))
    changed = {module for module, weight in _weights(llama).items() if not torch.equal(weight, before[module])}
    assert changed == {name}


def test_a_bfloat16_base_is_rounded_once(tiny_llama: Path) -> None:
    """Tiny deltas add up in the payload; patches laid over patched weights would lose each of them."""
    resident = load_model(config.Model(path=str(tiny_llama), dtype="bfloat16"), config.Lora(), seed=0)
    name = next(iter(resident.spec.matrices))
    size = resident.spec.matrices[name]
    base = resident.adapters.layers[name].base_layer.weight.detach().clone()
    small = np.full((size.d_out, size.d_in), 1e-5, np.float32)
    for version in range(1, 101):
        resident.base.apply(version, Payload(dense={name: small * version}))
    after = resident.adapters.layers[name].base_layer.weight
    assert after.dtype == torch.bfloat16
    assert torch.equal(after, (base.float() + torch.tensor(small * 100)).bfloat16())
    assert not torch.equal(after, base)


def test_a_patch_of_another_model_changes_nothing(llama: Resident, payload_for: Callable[..., Payload]) -> None:
    llama.base.apply("one", payload_for(llama.spec, 1))
    before = _weights(llama)
    name = next(iter(llama.spec.matrices))
    factor = LowRank(b=np.ones((3, 1), np.float32), a=np.ones((1, 4), np.float32), alpha=1.0)
    with pytest.raises(ValueError, match=r"must have shape \[32, 64\], got \[3, 4\]"):
        llama.base.apply("bad", Payload(factors={name: factor}))
    with pytest.raises(ValueError, match="a patch must name the adapted modules, got 'lm_head'"):
        llama.base.apply("bad", Payload(factors={"lm_head": factor}))
    with pytest.raises(ValueError, match=r"the adapted modules or the head's parameters, got 'score.weight'"):
        llama.base.apply("bad", Payload(dense={"score.weight": np.ones((2, 2), np.float32)}))
    assert all(torch.equal(before[module], weight) for module, weight in _weights(llama).items())
