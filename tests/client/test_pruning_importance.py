"""Scores against dense float64 references, the schedule's closed form, choices by hand, what FLAP's bias recovers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prunings import KINDS, Residents, inputs, logits, make_residents, random_keep, set_adapters

from fedloom.client import training
from fedloom.client.data import Dataset, Example
from fedloom.client.lora import ADAPTER
from fedloom.client.model import Resident
from fedloom.client.pruning import importance
from fedloom.client.pruning.cut import logical
from fedloom.client.pruning.fluctuation import calibrate, fluctuation_scores, recovery, start_without_training
from fedloom.client.pruning.importance import Importance
from fedloom.client.pruning.narrowing import apply_keep, masked
from fedloom.client.pruning.structure import Group, Structure
from fedloom.protocols.messages import Axis, Start, Task
from fedloom.strategies.choosing import GroupKind, choose_keep
from fedloom.strategies.masked import Keep, pruned
from fedloom.strategies.sparsity import cubic, spared_layers


@pytest.fixture(scope="module")
def residents(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tiny_classifier: Path) -> Residents:
    return make_residents(tmp_path_factory, tiny_llama, tiny_classifier)


@pytest.fixture(autouse=True)
def _whole(residents: Residents) -> Iterator[None]:
    yield
    for resident in residents.values():
        apply_keep(resident, {})


def _backward(resident: Resident, seed: int) -> None:
    for parameter in resident.adapters.parameters():
        parameter.grad = None
    found = logits(resident.model, inputs("bert" if resident.config.task == "classify" else "llama", seed))
    (found * torch.linspace(-1, 1, found.numel()).view_as(found)).sum().backward()


def _dense(resident: Resident, keep: Keep) -> dict[str, np.ndarray]:
    """s by group in float64, unit by unit, from whole matrices."""
    found: dict[str, Any] = {}
    sizes = pruned(resident.spec, keep)
    assert resident.prunable is not None
    for name, group in resident.prunable.structure.groups.items():
        parts = []
        for module in (*group.sources, group.sink):
            layer = resident.adapters.layers[module]
            a, b = (part[ADAPTER].weight for part in (layer.lora_A, layer.lora_B))
            A, B, gA, gB = (t.detach().double().numpy() for t in (a, b, a.grad, b.grad))  # noqa: N806
            W = logical(layer).detach().double().numpy()  # noqa: N806
            entries = np.abs((gB @ A + B @ gA - gB @ gA) * (W + layer.scaling[ADAPTER] * (B @ A)))
            axis = sizes.matrices[module].columns if module == group.sink else sizes.matrices[module].rows
            side = entries.sum(0) if module == group.sink else entries.sum(1)
            assert axis is not None
            units = np.zeros(sizes.groups[name])
            for unit in range(len(units)):
                for offset in axis.offsets:
                    at = offset + unit * axis.width
                    units[unit] += side[at : at + axis.width].sum()
            parts.append(units / units.mean())
        found[name] = np.mean(parts, axis=0)
    return found


@pytest.mark.parametrize("chunk", [importance.CHUNK, 50])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_the_dense_ones(
    kind: str, chunk: int, residents: Residents, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole and pruned, with their moving average."""
    monkeypatch.setattr(importance, "CHUNK", chunk)
    resident = residents[kind]
    assert resident.prunable is not None
    set_adapters(resident, 1)
    scores = Importance(prunable=resident.prunable)
    wanted: dict[str, np.ndarray] = {}
    for step in range(3):
        _backward(resident, step)
        scores.observe(resident.adapters)
        now = _dense(resident, {})
        wanted = {name: 0.9 * wanted[name] + 0.1 * value for name, value in now.items()} if wanted else now
    for name, value in wanted.items():
        np.testing.assert_allclose(scores.scores[name], value, rtol=2e-4)
    keep = random_keep(dict(resident.spec.groups), 3)
    apply_keep(resident, keep)
    _backward(resident, 4)
    scores.observe(resident.adapters)
    for name, value in _dense(resident, keep).items():
        bits = keep.get(name, np.ones(len(wanted[name]), np.bool_))
        np.testing.assert_allclose(scores.scores[name][bits], 0.9 * wanted[name][bits] + 0.1 * value, rtol=2e-4)
        np.testing.assert_allclose(scores.scores[name][~bits], wanted[name][~bits], rtol=2e-4)
    apply_keep(resident, {})
    _backward(resident, 5)
    scores.observe(resident.adapters)
    for name, value in _dense(resident, {}).items():
        new = ~keep.get(name, np.ones(len(value), np.bool_))
        np.testing.assert_allclose(scores.scores[name][new], value[new], rtol=2e-4)  # regrown: no history


def test_scores_need_gradients(residents: Residents) -> None:
    resident = residents["llama"]
    assert resident.prunable is not None
    set_adapters(resident, 1)
    with pytest.raises(ValueError, match="between backward and zero_grad"):
        Importance(prunable=resident.prunable).observe(resident.adapters)


def test_a_frozen_a_counts_as_no_gradient(residents: Residents) -> None:
    resident = residents["llama"]
    factors = resident.adapters.get_factors()
    resident.adapters.set_factors(factors, train_a=False)
    _backward(resident, 0)
    layer = next(iter(resident.adapters.layers.values()))
    rows, columns = importance.entry_scores(layer)
    a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    weight = logical(layer) + layer.scaling[ADAPTER] * b @ a
    entries = ((b.grad @ a) * weight).abs().double().detach().numpy()
    np.testing.assert_allclose(rows, entries.sum(1), rtol=1e-4)
    np.testing.assert_allclose(columns, entries.sum(0), rtol=1e-4)


def test_prune_and_tune_take_turns(
    residents: Residents, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """FedSpine's local loop: some steps, whose gradients are observed; then a cut, with the adapters that it leaves."""
    resident = residents["llama"]
    assert resident.prunable is not None
    set_adapters(resident, 1)
    scores = Importance(prunable=resident.prunable)
    clip = training.clip_gradient

    def observe(gradient: torch.Tensor, limit: float) -> None:
        scores.observe(resident.adapters)
        clip(gradient, limit)

    monkeypatch.setattr(training, "clip_gradient", observe)
    dataset = Dataset(examples, resident, max_length=64, name="a")
    task = Task(device="a", round=1, rank=2, alpha=4.0, start_from=Start.FRESH, knobs={"steps": 2, "batch_size": 2})
    losses, sizes = [], []
    for interval in range(3):
        measured = training.tune(resident, dataset, task)
        losses.append(measured["loss_sum"] / measured["tokens"])
        ratio = cubic(interval + 1, 3, 0.5)
        keep = choose_keep(resident.prunable.structure, scores.scores, ratio, keep=resident.prunable.keep, spared={2})
        apply_keep(resident, keep)
        sizes.append(sum(parameter.numel() for parameter in resident.model.parameters()))
    assert np.isfinite(losses).all()
    assert sizes[0] > sizes[1] > sizes[2]
    assert sum(int((~bits).sum()) for name, bits in keep.items() if name.endswith("ffn")) == 30
    assert keep["model.layers.2.ffn"].all()


def test_the_schedule_is_cubic() -> None:
    assert [cubic(step, 4, 0.5) for step in range(6)] == pytest.approx(
        [0.0, 0.5 * (1 - 0.75**3), 0.5 * (1 - 0.5**3), 0.5 * (1 - 0.25**3), 0.5, 0.5]
    )
    assert cubic(-1, 4, 0.5, 0.2) == pytest.approx(0.2)
    for steps, final, start in ((0, 0.5, 0.0), (4, 1.0, 0.0), (4, 0.5, -0.1)):
        with pytest.raises(ValueError, match="steps and shares"):
            cubic(1, steps, final, start)


def _structure(layers: int, heads: int, channels: int) -> Structure:
    groups = {}
    for layer in range(layers):
        for kind, units in ((GroupKind.ATTENTION, heads), (GroupKind.FFN, channels)):
            name = f"{layer}.{kind}"
            axis = Axis(group=name, width=1)
            groups[name] = Group(
                kind=kind, layer=layer, units=units, sink=f"{name}.sink", columns=axis, sources={f"{name}.source": axis}
            )
    return Structure(layers=layers, groups=groups)


def test_the_least_important_go_over_all_layers() -> None:
    structure = _structure(2, 2, 4)
    scores = {
        "0.attention": np.array([5.0, 4.0]),
        "1.attention": np.array([1.0, 2.0]),
        "0.ffn": np.array([1.0, 9.0, 2.0, 8.0]),
        "1.ffn": np.array([3.0, 7.0, 4.0, 6.0]),
    }
    keep = choose_keep(structure, scores, 0.5, spared=set())
    assert keep["0.attention"].tolist() == [True, False]  # the last unit of layer 1 must stay, so 4.0 goes before 2.0
    assert keep["1.attention"].tolist() == [False, True]
    assert keep["0.ffn"].tolist() == [False, True, False, True]
    assert keep["1.ffn"].tolist() == [False, True, False, True]


def test_the_first_tenth_and_the_last_are_spared() -> None:
    assert spared_layers(32) == {0, 1, 2, 31}
    assert spared_layers(12) == {0, 11}
    structure = _structure(12, 4, 8)
    scores = {name: np.zeros(units) for name, units in structure.units.items()}
    keep = choose_keep(structure, scores, 0.3)
    assert all(keep[f"{layer}.{kind}"].all() for layer in (0, 11) for kind in GroupKind)
    assert sum(int((~keep[f"{layer}.ffn"]).sum()) for layer in range(12)) == 28  # floor(0.3 x 96)
    with pytest.raises(ValueError, match=r"attention can be pruned by 0\.625 at most, got a share of 0\.688"):
        choose_keep(structure, scores, 0.7)


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31), first=st.floats(0, 0.6), second=st.floats(0, 0.6))
def test_pruning_is_monotone(seed: int, first: float, second: float) -> None:
    """Nothing comes back unless it may regrow; the share is exact; every group keeps a unit."""
    structure = _structure(5, 3, 7)
    generator = np.random.Generator(np.random.Philox(key=seed))

    def draw() -> dict[str, np.ndarray]:
        return {name: generator.random(units) for name, units in structure.units.items()}

    before = choose_keep(structure, draw(), first, spared=set())
    later = draw()
    after = choose_keep(structure, later, second, keep=before, spared=set())
    for kind, units in ((GroupKind.ATTENTION, 15), (GroupKind.FFN, 35)):
        gone = sum(int((~after[f"{layer}.{kind}"]).sum()) for layer in range(5))
        assert gone == max(int(first * units + 1e-9), int(second * units + 1e-9))
    for name, bits in after.items():
        assert bits.any()
        assert not (bits & ~before[name]).any()
    fresh = choose_keep(structure, later, second, keep=before, spared=set(), regrow=True)
    again = choose_keep(structure, later, second, spared=set())
    assert all(np.array_equal(fresh[name], again[name]) for name in fresh)


def test_choices_that_cannot_be_made() -> None:
    structure = _structure(2, 2, 4)
    scores = {name: np.zeros(units) for name, units in structure.units.items()}
    with pytest.raises(ValueError, match=r"must be in \[0, 1\), got 1"):
        choose_keep(structure, scores, 1)
    with pytest.raises(ValueError, match=r"0\.ffn has not"):
        choose_keep(structure, {**scores, "0.ffn": np.full(4, np.nan)}, 0.5, spared=set())
    with pytest.raises(ValueError, match="must name groups"):
        choose_keep(structure, scores, 0.5, keep={"elsewhere": np.ones(2, np.bool_)})


def _read(resident: Resident, dataset: Dataset, size: int) -> dict[str, np.ndarray]:
    """What every sink reads of real tokens, [tokens, d_in], float64."""
    seen: dict[str, list[np.ndarray]] = {}
    hooks = []
    mask = torch.empty(0)
    assert resident.prunable is not None
    for sink in resident.prunable.structure.columns:

        def read(_: Any, args: Any, sink: str = sink) -> None:
            seen.setdefault(sink, []).append(args[0][mask].double().numpy())

        hooks.append(resident.model.get_submodule(sink).register_forward_pre_hook(read))
    with torch.no_grad():
        for at in range(0, 4, size):
            batch = dataset.batch(list(range(at, at + size)))
            mask = batch.mask.bool()
            resident.model(input_ids=batch.ids, attention_mask=batch.mask, **_positions(resident, batch))
    for hook in hooks:
        hook.remove()
    return {sink: np.concatenate(parts) for sink, parts in seen.items()}


def _positions(resident: Resident, batch: Any) -> dict[str, Any]:
    return {"position_ids": batch.positions} if batch.width and "position_ids" in resident.forward_options else {}


@pytest.mark.parametrize("kind", KINDS)
def test_fluctuation_and_its_bias(kind: str, residents: Residents, examples: list[Example]) -> None:
    """The root of variance x weight norm, by its mean, padding left out; the bias makes every sink's error smaller."""
    resident = residents[kind]
    set_adapters(resident, 2)
    dataset = Dataset(examples, resident, max_length=64, name="a")
    moments = calibrate(resident, [dataset.batch([0, 1]), dataset.batch([2, 3])])
    scores = fluctuation_scores(resident, moments)
    keep = random_keep(dict(resident.spec.groups), 9)
    biases = recovery(resident, moments, keep)
    assert resident.prunable is not None
    seen = _read(resident, dataset, 2)
    for name, group in resident.prunable.structure.groups.items():
        layer, x = resident.adapters.layers[group.sink], seen[group.sink]
        a, b = (part[ADAPTER].weight.detach().double().numpy() for part in (layer.lora_A, layer.lora_B))
        weight = logical(layer).detach().double().numpy() + layer.scaling[ADAPTER] * (b @ a)
        entries = x.var(0, ddof=1) * (weight**2).sum(0)
        units = np.sqrt(entries.reshape(group.units, -1).mean(1))
        np.testing.assert_allclose(scores[name], units / units.mean(), rtol=1e-4, atol=1e-4)
        gone = ~np.repeat(keep.get(name, np.ones(group.units, np.bool_)), group.columns.width)
        assert (group.sink in biases) == bool(gone.any())
        if gone.any():
            np.testing.assert_allclose(biases[group.sink].numpy(), weight[:, gone] @ x[:, gone].mean(0), atol=1e-4)
            lost = x[:, gone] @ weight[:, gone].T
            assert ((lost - biases[group.sink].numpy()) ** 2).sum() < (lost**2).sum()


def test_the_bias_brings_the_model_closer(residents: Residents, examples: list[Example]) -> None:
    """FLAP end to end: at a third pruned, the calibration texts' logits are nearer with the bias than without."""
    resident = residents["llama"]
    set_adapters(resident, 2)
    dataset = Dataset(examples, resident, max_length=64, name="a")
    batch = dataset.batch([0, 1, 2, 3])
    keep, biases = start_without_training(resident, [batch], 0.3)
    assert {name for name, bits in keep.items() if not bits.all()} <= {
        f"model.layers.{layer}.{kind}" for layer in (0, 1) for kind in GroupKind
    }
    told = {"input_ids": batch.ids, "attention_mask": batch.mask}
    assert resident.prunable is not None
    with torch.no_grad():
        whole = logits(resident.model, told)
        with masked(resident.model, resident.prunable.structure, keep):
            without = logits(resident.model, told)
        apply_keep(resident, keep, biases)
        recovered = logits(resident.model, told)
    assert (recovered - whole).norm() < (without - whole).norm()
    with pytest.raises(ValueError, match="prunable and whole"):
        calibrate(resident, [batch])
    apply_keep(resident, {})
    with pytest.raises(ValueError, match="at least a batch"):
        calibrate(resident, [])
