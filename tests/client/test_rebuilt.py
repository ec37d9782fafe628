"""Weights rewritten from W0, and W0 brought back, in every bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from subspaces import (
    clean,
    data_of,
    delta,
    in_scope,
    masked,
    point,
    same,
    some_mask,
    space,
    task_for,
    values_of,
    weights,
    z,
)
from torch import Tensor, nn

from fedloom.client.data import Example
from fedloom.client.mapped import set_aside
from fedloom.client.model import Resident, load_model
from fedloom.client.parts import Part, parts_of
from fedloom.client.place import Place, version_fill
from fedloom.client.rebuilt import Rebuilt
from fedloom.client.starting import starting_payload
from fedloom.client.subspace import subspace as first_order
from fedloom.client.training import tune
from fedloom.client.zeroth_order import zeroth_order
from fedloom.protocols import config
from fedloom.protocols.directions import FAMILIES
from fedloom.protocols.messages import Payload, Scope, Start, Subspace, Task

DTYPES = ["float32", "bfloat16", "float16"]
ROUNDING = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}  # half a unit in the last place, relative


@pytest.fixture(scope="module", params=DTYPES)
def any_dtype(request: pytest.FixtureRequest, tiny_llama: Path) -> Resident:
    return load_model(config.Model(path=str(tiny_llama), dtype=request.param), config.Lora(), seed=0)


def _step_by_step(subspace: Subspace, name: str, size: int, c: NDArray[np.float64]) -> NDArray[np.float32]:
    """What is added to W0, by the rule: float32 throughout, in the order of k."""
    if subspace.family == "sketch":
        return delta(subspace, name, size, c.astype(np.float32).astype(np.float64)).astype(np.float32)
    acc = np.zeros(size, np.float32)
    for index in np.flatnonzero(c):
        acc += np.float32(c[index]) * z(subspace, int(index), name, size).astype(np.float32)
    return acc


@pytest.mark.parametrize("family", FAMILIES)
def test_a_version_is_one_rounding_of_the_sum(any_dtype: Resident, family: str) -> None:
    """Bit for bit round(float32(W0) + sum) in NumPy, and within its roundings of the sum in float64."""
    dtype = any_dtype.config.dtype
    subspace = space(family)
    held = point(subspace, only=9)
    clean(any_dtype)
    before = values_of(any_dtype, Scope.ALL)
    with Place(any_dtype, subspace, held, "v") as place:
        place.rebuild()
    after, c = values_of(any_dtype, Scope.ALL), held.values()
    moved = 0
    for name, value in after.items():
        base = before[name].astype(np.float32)
        total = base + _step_by_step(subspace, name, base.size, c)
        wanted = torch.from_numpy(total).to(getattr(torch, dtype)).float().numpy()
        np.testing.assert_array_equal(value.astype(np.float32), wanted)
        exact = base.astype(np.float64) + delta(subspace, name, base.size, c)
        terms = np.abs(base) + sum(abs(c[k]) for k in np.flatnonzero(c)) * 5.8
        bound = ROUNDING[dtype] * np.abs(exact) + 10 * 2.0**-24 * terms + 2.0**-25
        assert (np.abs(value - exact) <= bound).all()
        moved += int((value != before[name]).sum())
    assert moved > 0.9 * sum(value.size for value in after.values())
    clean(any_dtype)
    for name, value in values_of(any_dtype, Scope.ALL).items():
        np.testing.assert_array_equal(value, before[name])


def _rebuild(resident: Resident, examples: list[Example]) -> None:
    with Place(resident, space(), point(space()), "v") as place:
        place.rebuild()


def _dirty(resident: Resident, examples: list[Example]) -> None:
    with Place(resident, space(), point(space()), "v") as place:
        place.rebuild()
        place.rebuild(np.full(64, 0.5))
        for part in place.parts:
            part.parameter.data.mul_(3)
        resident.rebuilt.dirty(place.parts)


def _pool(resident: Resident, examples: list[Example]) -> None:
    subspace = space("rademacher")
    with Place(resident, subspace, point(subspace, only=4), "v") as place:
        zeroth_order(place, data_of(resident, examples), task_for(subspace, knobs={"steps": 3}))


def _backpropagation(resident: Resident, examples: list[Example]) -> None:
    with Place(resident, space(), None, "v") as place:
        first_order(place, data_of(resident, examples), task_for(space(), "subspace", knobs={"steps": 2}))


def _lora_scope(resident: Resident, examples: list[Example]) -> None:
    subspace = space("gaussian", scope=Scope.LORA)
    with Place(resident, subspace, point(subspace, only=4), "v") as place:
        zeroth_order(place, data_of(resident, examples), task_for(subspace))


def _mask_scope(resident: Resident, examples: list[Example]) -> None:
    other = masked(resident, some_mask(resident))
    subspace = space(scope=Scope.MASK, mask=other.spec.mask)
    with Place(other, subspace, point(subspace), "v") as place:
        zeroth_order(place, data_of(other, examples), task_for(subspace))
    clean(other)


def _low_rank(resident: Resident, examples: list[Example]) -> None:
    """A head is trained in place, and its memory becomes part of a longer vector."""
    resident.rebuilt.restore()
    resident.base.apply("low rank", Payload())
    task = Task(device="a", round=1, rank=2, alpha=4.0, start_from=Start.FRESH, knobs={"steps": 3, "lr": 0.1})
    resident.adapters.set_factors(starting_payload(task, resident.spec, {}, None).factors)
    tune(resident, data_of(resident, examples), task)


def _failed(resident: Resident, examples: list[Example]) -> None:
    def fill(part: Part, out: Tensor, base: Tensor, rows: Tensor | None) -> None:
        out.fill_(torch.nan)
        if "encoder" in part.name or "layers.1" in part.name:
            raise KeyError(part.name)

    with Place(resident, space(), None, "v") as place, pytest.raises(KeyError):
        resident.rebuilt.write(place.parts, fill)


STATES: dict[str, Callable[[Resident, list[Example]], None]] = {
    "rebuilt": _rebuild,
    "dirty": _dirty,
    "a pool": _pool,
    "backpropagation": _backpropagation,
    "adapters": _lora_scope,
    "a mask": _mask_scope,
    "a trained head": _low_rank,
    "a failed write": _failed,
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("kind", ["llama", "classifier"])
def test_w0_comes_back_from_any_state(
    kind: str, state: str, request: pytest.FixtureRequest, examples: list[Example]
) -> None:
    """And from that state followed by any of two others."""
    resident: Resident = clean(request.getfixturevalue(kind))
    before = weights(resident)
    for then in ("", "a pool", "adapters"):
        STATES[state](resident, examples)
        if then:
            STATES[then](resident, examples)
        clean(resident)
        assert same(before, weights(resident))


@pytest.mark.parametrize("first", [Scope.ALL, Scope.MASK, Scope.LORA])
@pytest.mark.parametrize("second", [Scope.ALL, Scope.MASK, Scope.LORA])
def test_one_subspace_after_another_leaves_no_trace(classifier: Resident, first: Scope, second: Scope) -> None:
    """Tasks of two runs on one resident: the second finds W0, whatever the first has moved, and so does a third."""
    resident = masked(clean(classifier), some_mask(classifier))
    before, found = weights(resident), []
    for scopes in ((first, second), (second,), (first, second, first, second)):
        for scope in scopes:
            subspace = space("sketch", scope=scope, mask=resident.spec.mask if scope == Scope.MASK else "")
            with Place(resident, subspace, point(subspace), "v") as place:
                place.rebuild()
        found.append(weights(resident) | {f"factor {n}": torch.tensor(f.b) for n, f in _factors(resident, second)})
        clean(resident)
        assert same(before, weights(resident))
    assert same(found[0], found[1])
    assert same(found[0], found[2])


def _factors(resident: Resident, scope: Scope) -> list[tuple[str, Any]]:
    return list(resident.adapters.get_factors().items()) if scope == Scope.LORA else []


@pytest.mark.parametrize("keep", [False, True])
def test_one_key_is_written_once(llama: Resident, keep: bool) -> None:
    """Twice the same version does nothing; after training it is written again: from its copy if one was kept."""
    rebuilt, parts, made = Rebuilt(), parts_of(clean(llama), Scope.ALL), []
    held = version_fill(space("gaussian"), point(space("gaussian"), only=3).values())

    def fill(part: Part, out: Tensor, base: Tensor, rows: Tensor | None) -> None:
        made.append(part.name)
        held(part, out, base, rows)

    rebuilt.rebuild(parts, "one", fill, keep=keep)
    assert len(made) == len(parts)
    first = weights(llama)
    rebuilt.rebuild(parts, "one", fill, keep=keep)
    assert len(made) == len(parts)
    for change in (
        lambda: rebuilt.dirty(parts),
        lambda: rebuilt.write(parts, lambda part, out, base, rows: out.zero_()),
    ):
        change()
        parts[0].parameter.data.zero_()
        rebuilt.rebuild(parts, "one", fill, keep=keep)
        assert same(first, weights(llama))
    assert len(made) == len(parts) * (1 if keep else 3)
    rebuilt.rebuild(parts, "two", _zero, keep=keep)
    assert not same(first, weights(llama))
    rebuilt.rebuild(parts, "one", fill, keep=keep)
    assert same(first, weights(llama))
    assert not rebuilt.at_base
    rebuilt.restore()
    rebuilt.restore()
    assert rebuilt.at_base
    assert same(weights(llama), weights(clean(llama)))


def test_all_that_was_written_comes_back(llama: Resident) -> None:
    rebuilt, parts, before = Rebuilt(), parts_of(clean(llama), Scope.ALL), weights(llama)
    rebuilt.write(parts[:3], _zero)
    rebuilt.rebuild(parts[5:], "some", _zero)
    assert rebuilt.has_moved(parts[:3] + parts[5:])
    assert not rebuilt.has_moved(parts[5:])
    rebuilt.restore()
    assert same(before, weights(llama))
    assert not rebuilt.has_moved([])


def _zero(part: Part, out: Tensor, base: Tensor, rows: Tensor | None) -> None:
    out.zero_()


@pytest.mark.parametrize("scope", list(Scope))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_kept_version_has_the_same_bits(classifier: Resident, family: str, scope: Scope) -> None:
    resident, subspace = in_scope(classifier, scope, family)
    held, found = point(subspace, only=5), []
    for keep in (False, True, True):
        with Place(resident, subspace, held, "v") as place:
            fill = version_fill(subspace, held.values())
            place._rebuilt.rebuild(place.parts, (family, scope, keep), fill, keep=keep)
            if keep:
                place._rebuilt.dirty(place.parts)
                place._rebuilt.rebuild(place.parts, (family, scope, keep), _zero, keep=True)
            found.append({part.name: part.read().clone() for part in place.parts})
    clean(resident)
    assert same(found[0], found[1])
    assert same(found[0], found[2])


def test_what_is_set_aside_is_a_file_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        values = torch.randn(1000).to(dtype)
        kept = set_aside(values)
        wanted = values.clone()
        values.zero_()
        assert torch.equal(kept, wanted)
        assert kept.dtype == dtype
    assert not list(tmp_path.iterdir())


def test_parts_must_lie_in_one_run(llama: Resident, monkeypatch: pytest.MonkeyPatch) -> None:
    clean(llama)
    norm = llama.model.model.norm
    monkeypatch.setattr(norm, "weight", nn.Parameter(torch.ones(32, 2)[:, 0]))
    with pytest.raises(ValueError, match=r"must be contiguous, got model.norm.weight with strides \(2,\)"):
        parts_of(llama, Scope.ALL)
