"""Removal for real: a pruned model computes what the masked one does, and any keep is made from W0."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prunings import (
    DECODERS,
    KINDS,
    Residents,
    inputs,
    logits,
    make_resident,
    make_residents,
    random_factors,
    random_keep,
    set_adapters,
)

from fedloom.client.data import Dataset, Example
from fedloom.client.lora import ADAPTER
from fedloom.client.model import Resident, hash_state, load_model
from fedloom.client.pruning.narrowing import apply_keep, masked
from fedloom.client.training import tune
from fedloom.protocols import config
from fedloom.protocols.messages import Payload, Start, Task
from fedloom.strategies.masked import Keep, pruned, slice_payload, slice_term


@pytest.fixture(scope="module")
def residents(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tiny_classifier: Path) -> Residents:
    return make_residents(tmp_path_factory, tiny_llama, tiny_classifier)


@pytest.fixture(autouse=True)
def _whole(residents: Residents) -> Iterator[None]:
    yield
    for resident in residents.values():
        resident.base.restore()
        apply_keep(resident, {})


def _gradients(resident: Resident, batch: dict[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Of A and B by module, for a loss that every logit is in."""
    for parameter in resident.adapters.parameters():
        parameter.grad = None
    found = logits(resident.model, batch)
    weight = torch.linspace(-1, 1, found.numel()).view_as(found)
    (found * weight).sum().backward()
    layers = resident.adapters.layers.items()
    return {name: (layer.lora_A[ADAPTER].weight.grad, layer.lora_B[ADAPTER].weight.grad) for name, layer in layers}


def _structure(resident: Resident) -> Any:
    assert resident.prunable is not None
    return resident.prunable.structure


def _near(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Within 1e-5 of the largest."""
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * max(1.0, float(wanted.abs().max())))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8)
@given(seed=st.integers(0, 2**31))
def test_a_pruned_model_is_the_masked_one(kind: str, seed: int, residents: Residents) -> None:
    """Logits, with padding, and the gradients of what is left of every adapter; the rest of them are zero."""
    resident, batch = residents[kind], inputs(kind, seed % 7)
    keep = random_keep(dict(resident.spec.groups), seed)
    apply_keep(resident, {})
    set_adapters(resident, 1)
    with masked(resident.model, _structure(resident), keep):
        wanted = logits(resident.model, batch).detach()
        slopes = _gradients(resident, batch)
    unpruned = logits(resident.model, batch).detach()
    apply_keep(resident, keep)
    _near(logits(resident.model, batch).detach(), wanted)
    if any(not bits.all() for bits in keep.values()):
        assert (wanted - unpruned).abs().max() > 1e-2
    for name, (a, b) in _gradients(resident, batch).items():
        whole_a, whole_b = slopes[name]
        axes = resident.spec.matrices[name]
        for got, whole, axis in ((a, whole_a.t(), axes.columns), (b.t(), whole_b, axes.rows)):
            bits = np.ones(len(whole), np.bool_)
            if axis is not None and axis.group in keep:
                bits = np.tile(np.repeat(keep[axis.group], axis.width), len(axis.offsets))
            _near(got.t(), whole[bits])
            assert not whole[~bits].any()


@pytest.mark.parametrize("kind", KINDS)
def test_training_mode_without_dropout_is_alike(kind: str, residents: Residents) -> None:
    resident, batch = residents[kind], inputs(kind)
    keep = random_keep(dict(resident.spec.groups), 5)
    set_adapters(resident, 1)
    dropped = [module for module in resident.model.modules() if isinstance(module, torch.nn.Dropout)]
    rates = [module.p for module in dropped]
    resident.model.train()
    try:
        for module in dropped:
            module.p = 0.0
        with masked(resident.model, _structure(resident), keep):
            wanted = logits(resident.model, batch).detach()
        apply_keep(resident, keep)
        _near(logits(resident.model, batch).detach(), wanted)
    finally:
        resident.model.eval()
        for module, rate in zip(dropped, rates, strict=True):
            module.p = rate


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", DECODERS)
def test_generation_with_a_cache(kind: str, attention: str, residents: Residents) -> None:
    """Every new token's logits, from a cache whose layers have as many heads as each layer kept."""
    resident, batch = residents[kind], inputs(kind)
    keep = random_keep(dict(resident.spec.groups), 11)
    set_adapters(resident, 1)
    resident.model.set_attn_implementation(attention)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    try:
        with masked(resident.model, _structure(resident), keep):
            wanted = resident.model.generate(**batch, **options)
        apply_keep(resident, keep)
        got = resident.model.generate(**batch, **options)
    finally:
        resident.model.set_attn_implementation("sdpa")
    assert torch.equal(got.sequences, wanted.sequences)
    _near(torch.stack(got.logits), torch.stack(wanted.logits))
    heads = [layer.keys.shape[1] for layer in got.past_key_values.layers]
    names = [name for name in resident.spec.groups if name.endswith("attention")]
    assert heads == [int(keep[name].sum()) if name in keep else resident.spec.groups[name] for name in names]


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_are_gone(kind: str, residents: Residents) -> None:
    """Parameters and bytes fall by what the removed units owned, to the last one."""
    resident = residents[kind]
    before = {name: parameter.numel() for name, parameter in resident.model.named_parameters()}
    bytes_before = sum(p.untyped_storage().nbytes() for p in resident.model.parameters())
    keep = {name: np.arange(units) % 2 == 0 for name, units in resident.spec.groups.items()}
    apply_keep(resident, keep)
    gone = 0
    for name, parameter in resident.model.named_parameters():
        module = name.replace(".base_layer", "").rpartition(".")[0].partition(".lora_")[0]
        matrix = resident.spec.matrices.get(module)
        small = pruned(resident.spec, keep).matrices.get(module)
        if matrix is None or small is None:
            assert parameter.numel() == before[name]
            continue
        rank = resident.adapters.layers[module].r[ADAPTER]
        sizes = {
            ".lora_A": (rank * matrix.d_in, rank * small.d_in),
            ".lora_B": (rank * matrix.d_out, rank * small.d_out),
            ".weight": (matrix.d_out * matrix.d_in, small.d_out * small.d_in),
            ".bias": (matrix.d_out, small.d_out),
        }
        whole, left = next(size for part, size in sizes.items() if part in name)
        assert (before[name], parameter.numel()) == (whole, left)
        gone += whole - left
    assert gone > 0
    assert bytes_before - sum(p.untyped_storage().nbytes() for p in resident.model.parameters()) == 4 * gone


@pytest.mark.parametrize("kind", KINDS)
def test_any_keep_is_made_from_the_public_base(kind: str, residents: Residents) -> None:
    """Regrown units have W0's weights, bit for bit, whatever was trained or patched meanwhile; their adapters are 0."""
    resident = residents[kind]
    units = dict(resident.spec.groups)
    base, first, second = _plain_hash(resident), random_keep(units, 1), random_keep(units, 2)
    apply_keep(resident, second)
    direct = _plain_hash(resident)
    apply_keep(resident, first)
    set_adapters(resident, 3)
    payload = slice_payload(_payload(resident, 4), resident.spec, first)
    resident.base.apply("v", payload)
    apply_keep(resident, second)
    assert _plain_hash(resident) == direct
    before = {name: resident.adapters.get_factors()[name] for name in resident.spec.matrices}
    apply_keep(resident, {})
    assert _plain_hash(resident) == base
    for name, factor in resident.adapters.get_factors().items():
        again = slice_term(factor, resident.spec.matrices[name], second)
        np.testing.assert_array_equal(again.b, before[name].b)
        np.testing.assert_array_equal(again.a, before[name].a)
        assert np.count_nonzero(factor.b) == np.count_nonzero(before[name].b)
        assert np.count_nonzero(factor.a) == np.count_nonzero(before[name].a)


def _plain_hash(resident: Resident) -> str:
    """Of all but the adapters."""
    model = torch.nn.Module()
    for name, tensor in resident.model.state_dict().items():
        if ".lora_" not in name:
            model.register_buffer(name.replace(".", "/"), tensor)
    return hash_state(model)


def _payload(resident: Resident, seed: int) -> Payload:
    """Factors of every whole matrix, a dense term on one, and a head."""
    factors = random_factors(dict(resident.spec.matrices), seed, 3)
    name = list(factors)[1]
    dense = {part: np.full(shape, 0.25, np.float32) for part, shape in resident.spec.dense.items()}
    return Payload(factors=factors, dense={name: factors.pop(name).dense(), **dense})


@pytest.mark.parametrize("kind", KINDS)
def test_a_patch_goes_on_in_slices(kind: str, residents: Residents) -> None:
    resident, batch = residents[kind], inputs(kind)
    keep, payload = random_keep(dict(resident.spec.groups), 21), _payload(resident, 4)
    resident.base.apply("whole", payload)
    with resident.adapters.disabled(), masked(resident.model, _structure(resident), keep):
        wanted = logits(resident.model, batch).detach()
    apply_keep(resident, keep)
    resident.base.apply("slice", slice_payload(payload, resident.spec, keep))
    apply_keep(resident, keep)  # as it is already: the patch stays on
    with resident.adapters.disabled():
        _near(logits(resident.model, batch).detach(), wanted)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_tuning_a_pruned_model_is_tuning_the_masked_one(
    kind: str, optimizer: str, residents: Residents, examples: list[Example]
) -> None:
    """The `lora` tuner's steps, end to end: loss, and the slices of its factors."""
    resident = residents[kind]
    dataset = Dataset(examples, resident, max_length=64, name="a")
    knobs: dict[str, float | int | str] = {"steps": 4, "batch_size": 2, "optimizer": optimizer, "lr": 0.01}
    task = Task(device="a", round=1, rank=2, alpha=4.0, start_from=Start.FRESH, knobs=knobs)
    keep = random_keep(dict(resident.spec.groups), 31)
    start = random_factors(dict(resident.spec.matrices), 5)
    resident.adapters.set_factors(start)
    with masked(resident.model, _structure(resident), keep):
        wanted = tune(resident, dataset, task)
    tuned = resident.adapters.get_factors()
    apply_keep(resident, keep)
    sliced = {name: slice_term(factor, resident.spec.matrices[name], keep) for name, factor in start.items()}
    resident.adapters.set_factors(sliced)
    got = tune(resident, dataset, task)
    assert got["loss_sum"] == pytest.approx(wanted["loss_sum"], rel=1e-5)
    for name, factor in resident.adapters.get_factors().items():
        whole = slice_term(tuned[name], resident.spec.matrices[name], keep)
        np.testing.assert_allclose(factor.b, whole.b, atol=2e-4)
        np.testing.assert_allclose(factor.a, whole.a, atol=2e-4)
        assert not np.array_equal(factor.b, sliced[name].b)


def test_biases_make_up_for_what_is_gone(residents: Residents) -> None:
    """On a projection without one of its own (Llama), with one (BERT), and gone again afterwards."""
    for kind in ("llama", "bert", "gpt2"):
        resident, batch = residents[kind], inputs(kind)
        keep = random_keep(dict(resident.spec.groups), 41)
        structure = _structure(resident)
        biases = {sink: torch.linspace(-1, 1, 24) for sink in structure.columns}
        with resident.adapters.disabled(), torch.no_grad():
            plain = logits(resident.model, batch)
            with masked(resident.model, structure, keep, biases):
                wanted = logits(resident.model, batch)
            apply_keep(resident, keep, biases)
            assert resident.prunable is not None
            assert resident.prunable.added_biases == (set(biases) if kind == "llama" else set())
            _near(logits(resident.model, batch), wanted)
            apply_keep(resident, {})
            assert torch.equal(logits(resident.model, batch), plain)


def test_a_rank_above_what_is_left_is_no_error(residents: Residents) -> None:
    """One key-value head of 4 rows, and adapters of rank 8."""
    resident = residents["llama"]
    keep = {name: np.arange(units) == 0 for name, units in resident.spec.groups.items()}
    apply_keep(resident, keep)
    set_adapters(resident, 1, rank=8)
    assert logits(resident.model, inputs("llama")).isfinite().all()


def test_bfloat16(tmp_path: Path, tiny_llama: Path) -> None:
    resident = make_resident("qwen2", tmp_path, tiny_llama, "bfloat16")
    keep = random_keep(dict(resident.spec.groups), 3)
    with masked(resident.model, _structure(resident), keep):
        wanted = logits(resident.model, inputs("qwen2")).detach().float()
    apply_keep(resident, keep)
    assert resident.model.dtype == torch.bfloat16
    got = logits(resident.model, inputs("qwen2")).detach().float()
    assert (got - wanted).norm() < 0.03 * wanted.norm()


def test_a_keep_must_fit(residents: Residents, tiny_llama: Path) -> None:
    resident = residents["llama"]
    name = "model.layers.0.attention"
    wrong: list[tuple[Keep, str]] = [
        ({"elsewhere": np.ones(3, np.bool_)}, "must name groups of the model, got 'elsewhere'"),
        ({name: np.ones(4, np.bool_)}, "must have 3 units, got 4"),
        ({name: np.zeros(3, np.bool_)}, r"layers\.0\.attention"),
        ({name: np.ones(3, np.int64)}, r"layers\.0\.attention"),  # type: ignore[dict-item]
    ]
    before = _plain_hash(resident)
    for keep, message in wrong:
        with pytest.raises(ValueError, match=message):
            apply_keep(resident, keep)
        with pytest.raises(ValueError, match=message), masked(resident.model, _structure(resident), keep):
            pass
    for biases, message in (
        ({"elsewhere": torch.zeros(24)}, "must be for an output or down projection, got 'elsewhere'"),
        ({"model.layers.0.mlp.down_proj": torch.zeros(25)}, r"must be \[24\] finite numbers, got \[25\]"),
        ({"model.layers.0.mlp.down_proj": torch.full((24,), torch.nan)}, r"must be \[24\] finite numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            apply_keep(resident, {}, biases)
    assert _plain_hash(resident) == before
    plain = load_model(config.Model(path=str(tiny_llama)), config.Lora(), seed=0)
    assert plain.spec.groups == {}
    with pytest.raises(ValueError, match="loaded with prunable=True"):
        apply_keep(plain, {})


def test_sizes_change_at_the_base_alone(residents: Residents) -> None:
    resident = residents["llama"]
    resident.base.apply("v", _payload(resident, 1))
    with pytest.raises(ValueError, match="a patch is on"):
        resident.base.resize(resident.spec.matrices)
