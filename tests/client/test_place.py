"""A model at a point of a subspace: what it refuses, where its weights start, and which of them move."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from subspaces import (
    clean,
    data_of,
    delta,
    in_scope,
    logits,
    masked,
    point,
    same,
    sizes_of,
    some_mask,
    space,
    task_for,
    values_of,
    weights,
    z,
)

from fedloom.client.data import Example
from fedloom.client.device import Device
from fedloom.client.model import Resident, load_model
from fedloom.client.parts import parts_of
from fedloom.client.place import Place, pool_fill, version_fill
from fedloom.client.zeroth_order import zeroth_order
from fedloom.protocols import config
from fedloom.protocols.directions import FAMILIES, pool_keys
from fedloom.protocols.initial import initial_a
from fedloom.protocols.messages import Patch, Payload, Scope, Start, Task

POOLS = ["gaussian", "rademacher"]
MakeDevice = Callable[..., Device]


@pytest.fixture(scope="module")
def bfloat16(tiny_llama: Path) -> Resident:
    return load_model(config.Model(path=str(tiny_llama), dtype="bfloat16"), config.Lora(), seed=0)


def test_what_a_place_refuses(llama: Resident) -> None:
    before, subspace = weights(clean(llama)), space()
    with pytest.raises(ValueError, match="must be of version 1 on this device, the server asks for version 2"):
        Place(llama, replace(subspace, directions=2), None, "v")
    for other in (space(seed=12), space(k=128), space("rademacher"), space(scope=Scope.LORA)):
        with pytest.raises(ValueError, match=r"coefficients must be of the task's subspace .*seed=11.*, got Subspace"):
            Place(llama, subspace, point(other), "v")
    mask = some_mask(llama)
    resident, wanted = masked(llama, mask), "a" * 64
    with pytest.raises(ValueError, match=f"held here \\({resident.spec.mask[:12]}\\), got aaaaaaaaaaaa"):
        Place(resident, space(scope=Scope.MASK, mask=wanted), None, "v")
    with pytest.raises(ValueError, match=r"the task's mask must be the one held here \(none\), got aaaaaaaaaaaa"):
        Place(llama, space(scope=Scope.MASK, mask=wanted), None, "v")
    for index, what in ([0, 40], "0..31, got"), ([-1, 3], "0..31, got"), ([], "0..31, got"):
        odd = masked(llama, {"model.norm.weight": torch.tensor(index, dtype=torch.int64)})
        with pytest.raises(ValueError, match=f"a mask of model.norm.weight must hold places in {what}"):
            Place(odd, space(scope=Scope.MASK, mask=odd.spec.mask), None, "v")
    odd = masked(llama, {"model.norm.wait": torch.tensor([1])})
    with pytest.raises(ValueError, match=r"must name parameters of the model, got 'model.norm.wait'"):
        Place(odd, space(scope=Scope.MASK, mask=odd.spec.mask), None, "v")
    assert same(before, weights(llama))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "classifier"])
def test_the_names_of_parts_are_those_without_adapters(kind: str, request: pytest.FixtureRequest) -> None:
    """The names that a checkpoint has, each parameter once; factors by module; a head by its own names."""
    resident: Resident = clean(request.getfixturevalue(kind))
    names = [part.name for part in parts_of(resident, Scope.ALL)]
    model = type(resident.model)(resident.model.config)
    assert names == [name for name, _ in model.named_parameters()]
    assert sum(part.size for part in parts_of(resident, Scope.ALL)) == model.num_parameters()
    factors = [part.name for part in parts_of(resident, Scope.LORA)]
    wanted = [f"{module}.lora_{which}" for module in resident.spec.matrices for which in "AB"]
    assert factors == wanted + list(resident.spec.dense)
    other = masked(resident, some_mask(resident))
    assert [part.name for part in parts_of(other, Scope.MASK)] == sorted(f"{name}#mask" for name in names)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "classifier"])
def test_adapters_start_at_the_shared_a_and_at_zero(kind: str, request: pytest.FixtureRequest) -> None:
    """So the model is its base there; coefficients add to the factors, and to a head."""
    resident: Resident = clean(request.getfixturevalue(kind))
    subspace = space(scope=Scope.LORA, rank=3, alpha=5.0, rslora=True)
    with resident.adapters.disabled():
        plain = logits(resident)
    with Place(resident, subspace, None, "v"):
        for name, factor in resident.adapters.get_factors().items():
            np.testing.assert_array_equal(factor.a, initial_a(11, name, 3, factor.a.shape[1]))
            assert not factor.b.any()
            assert (factor.alpha, factor.rslora) == (5.0, True)
        torch.testing.assert_close(logits(resident), plain, rtol=1e-6, atol=1e-6)
    held, heads = point(subspace), {name: head.detach().numpy().copy() for name, head in resident.base.heads.items()}
    c = held.values()
    with Place(resident, subspace, held, "v") as place:
        place.rebuild()
        for name, factor in resident.adapters.get_factors().items():
            a = initial_a(11, name, 3, factor.a.shape[1]).flatten()
            np.testing.assert_allclose(factor.a.flatten(), a + delta(subspace, f"{name}.lora_A", a.size, c), atol=1e-7)
            np.testing.assert_allclose(
                factor.b.flatten(), delta(subspace, f"{name}.lora_B", factor.b.size, c), rtol=1e-7, atol=0
            )
        for name, head in resident.base.heads.items():
            wanted = heads[name].flatten() + delta(subspace, name, head.numel(), c)
            np.testing.assert_allclose(head.detach().numpy().flatten(), wanted, atol=1e-7)
    clean(resident)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["llama", "classifier"])
def test_only_masked_places_move(
    kind: str, family: str, request: pytest.FixtureRequest, examples: list[Example]
) -> None:
    """In a version, and in training: the packed values take the directions of `name#mask`, in order."""
    resident, subspace = in_scope(request.getfixturevalue(kind), Scope.MASK, family)
    held, before = point(subspace, only=5), weights(resident)
    flat = values_of(resident, Scope.MASK)
    with Place(resident, subspace, held, "v") as place:
        place.rebuild()
        version = values_of(resident, Scope.MASK)
        zeroth_order(place, data_of(resident, examples), task_for(subspace, knobs={"lr": 1.0, "steps": 2}))
    after = weights(resident)
    for name, value in flat.items():
        wanted = value + delta(subspace, name, value.size, held.values())
        np.testing.assert_allclose(version[name], wanted, atol=1e-6)
    for name, value in after.items():
        moved = (value != before[name]).flatten().nonzero().flatten()
        index = resident.mask[name.replace(".base_layer.", ".")]
        assert set(moved.tolist()) <= set(index.tolist())
        assert len(moved) > 0.9 * len(index)
    clean(resident)
    assert same(before, weights(resident))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scope", list(Scope))
@pytest.mark.parametrize("kind", ["llama", "gpt2", "classifier"])
def test_serving_is_the_version(kind: str, scope: Scope, family: str, request: pytest.FixtureRequest) -> None:
    """The same logits, bit for bit, from a place that serves, one that was rebuilt, and the weights set by hand."""
    resident, subspace = in_scope(request.getfixturevalue(kind), scope, family)
    held, found = point(subspace, only=5), []
    start = values_of(resident, scope)
    for by_hand in (False, True):
        with torch.inference_mode(), Place(resident, subspace, held, "v") as place:
            place.prepare(lambda: logits(resident))
            with place.serving():
                found.append(logits(resident))
            place.rebuild()
            found.append(logits(resident))
            if by_hand:
                for part in place.parts:
                    base = start[part.name] if scope != Scope.LORA else part.read().numpy()
                    if scope != Scope.LORA:
                        value = base + delta(subspace, part.name, part.size, held.values())
                        part.write(lambda out, value=value: out.copy_(torch.from_numpy(value)))
                place._rebuilt.dirty(place.parts)
                torch.testing.assert_close(logits(resident), found[-1], rtol=1e-5, atol=1e-5)
    clean(resident)
    assert all(torch.equal(found[0], other) for other in found[1:])
    with resident.adapters.disabled():
        assert float((logits(resident) - found[0]).abs().max()) > 1e-4


def test_the_base_is_a_version_too(llama: Resident) -> None:
    """No coefficients: W0 in every family, layer by layer and rewritten."""
    before, plain = weights(clean(llama)), logits(llama)
    for family in FAMILIES:
        with torch.inference_mode(), Place(llama, space(family), None, "v") as place:
            place.prepare(lambda: logits(llama))
            with place.serving():
                assert torch.equal(logits(llama), plain)
            place.rebuild()
            assert torch.equal(logits(llama), plain)
        with Place(llama, space(family), point(space(family), only=2), "w") as place:
            place.rebuild()
    clean(llama)
    assert same(before, weights(llama))


@pytest.mark.parametrize("family", POOLS)
def test_a_16_bit_model_has_its_master_beside_it(bfloat16: Resident, family: str) -> None:
    """master = float32(W0) + sum_k c_k z_k, and a step adds to it in float32; passes round it once."""
    subspace = space(family)
    held = point(subspace, only=5)
    base = values_of(clean(bfloat16), Scope.ALL)
    keys, scales = pool_keys(subspace.seed, np.array([7])), np.array([3e-7], np.float32)
    with torch.inference_mode(), Place(bfloat16, subspace, held, "v") as place:
        place.prepare(lambda: logits(bfloat16))
        assert bfloat16.rebuilt.layerwise
        place.begin()
        assert place.masters.keys() == base.keys()
        before = {name: master.numpy().copy() for name, master in place.masters.items()}
        for name, master in before.items():
            wanted = base[name] + delta(subspace, name, master.size, held.values())
            assert master.dtype == np.float32
            np.testing.assert_allclose(master, wanted, rtol=0, atol=5 * 2.0**-24)
        place.step(keys, scales)
        for name, master in place.masters.items():
            step = np.float32(3e-7) * z(subspace, 7, name, master.numel()).astype(np.float32)
            np.testing.assert_array_equal(master.numpy(), before[name] + step)
        with place.at(pool_fill(subspace, keys, np.zeros(1, np.float32), place.masters)):
            got = logits(bfloat16)
        masters = {part.name: place.masters[part.name].bfloat16() for part in place.parts}
        for part in place.parts:
            part.write(lambda out, value=masters[part.name]: out.copy_(value))
        assert torch.equal(got, logits(bfloat16))
    clean(bfloat16)


def test_a_float32_model_is_its_own_master(llama: Resident) -> None:
    subspace = space("rademacher")
    with torch.inference_mode(), Place(clean(llama), subspace, None, "v") as place:
        place.prepare(lambda: logits(llama))
        place.begin()
        assert not place.masters
    with Place(llama, subspace, None, "v") as place:  # not run layer by layer here
        place.begin()
        assert sum(master.numel() for master in place.masters.values()) == sum(sizes_of(llama, Scope.ALL).values())
    clean(llama)


def test_adapters_are_switched_off_and_on_again(llama: Resident) -> None:
    layers = clean(llama).adapters.layers.values()
    for scope in (Scope.ALL, Scope.LORA):
        with suppress(ZeroDivisionError), Place(llama, space(scope=scope), None, "v"):
            assert all(layer._disable_adapters is (scope == Scope.ALL) for layer in layers)
            raise ZeroDivisionError
        assert not any(layer._disable_adapters for layer in layers)
    clean(llama)


def _low_rank_task(**fields: Any) -> Task:
    knobs = {"steps": 2, "lr": 0.01, "batch_size": 2}
    given = {"device": "a", "round": 1, "rank": 4, "alpha": 8.0, "start_from": Start.FRESH, "seed": 5, "run": "run"}
    return Task(**(given | {"knobs": knobs} | fields))


def _answer(payload: Payload) -> list[np.ndarray[Any, Any]]:
    if payload.scalars is not None:
        return [payload.scalars.values]
    return [array for factor in payload.factors.values() for array in (factor.a, factor.b)] + list(
        payload.dense.values()
    )


@pytest.mark.parametrize("scope", [Scope.ALL, Scope.LORA])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["llama", "classifier"])
def test_low_rank_and_subspace_tasks_take_turns(
    kind: str, family: str, scope: Scope, request: pytest.FixtureRequest, make_device: MakeDevice, payload_for: Any
) -> None:
    """On one resident, each answers as it does alone, on base and patched versions, and W0 comes back."""
    resident: Resident = clean(request.getfixturevalue(kind))
    before, subspace = weights(resident), space(family, scope=scope)
    device = make_device(resident)
    patched = _patch_of(resident, payload_for(resident.spec, 0), 1)
    tuners = ["zeroth_order", "subspace"] if family == "sketch" else ["zeroth_order"]
    tasks = [task_for(subspace, tuner, run="sub", knobs={"steps": 2}) for tuner in tuners]
    tasks += [
        replace(task, patch=_patch_of(resident, Payload(coefficients=point(subspace, only=4)), 2)) for task in tasks
    ]
    tasks += [_low_rank_task(), _low_rank_task(patch=patched)]
    alone = []
    for task in tasks:
        clean(resident)
        alone.append(_answer(device.handle(task).payload))
    clean(resident)
    assert same(before, weights(resident))
    order = np.random.Generator(np.random.Philox(key=1)).permutation(np.repeat(np.arange(len(tasks)), 2))
    for number in order:
        for got, wanted in zip(_answer(device.handle(tasks[number]).payload), alone[number], strict=True):
            np.testing.assert_array_equal(got, wanted)
    clean(resident)
    assert same(before, weights(resident))


def _patch_of(resident: Resident, payload: Payload, version: int) -> Patch:
    return Patch(base_hash=resident.spec.base_hash, since=0, version=version, payload=payload)


def test_a_version_of_zeros_and_few_directions(llama: Resident) -> None:
    """Coefficients of zero are no directions at all: nothing is drawn for them."""
    subspace = space("gaussian", k=4096)
    c = np.zeros(4096)
    c[4095] = 0.5
    before = values_of(clean(llama), Scope.ALL)
    with Place(llama, subspace, None, "v") as place:
        place._rebuilt.write(place.parts, version_fill(subspace, c))
    for name, value in values_of(llama, Scope.ALL).items():
        wanted = before[name] + np.float32(0.5) * z(subspace, 4095, name, value.size).astype(np.float32)
        np.testing.assert_array_equal(value, wanted)
    clean(llama)
