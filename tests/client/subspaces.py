"""Places in subspaces of the tiny models, and float64 references of what they hold, made the slow way."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor

from fedloom.client.data import Batch, Dataset, Example
from fedloom.client.lora import _zero
from fedloom.client.mask import hash_mask
from fedloom.client.model import Resident
from fedloom.client.parts import parts_of
from fedloom.client.rebuilt import Rebuilt
from fedloom.client.training import forward_logits
from fedloom.protocols.directions import direction, pool_keys, sketch_rows
from fedloom.protocols.messages import Coefficients, Scope, Start, Subspace, Task

Vector = NDArray[np.float64]
IDS = torch.tensor([[5, 9, 20, 33, 7, 3], [4, 9, 9, 33, 8, 3]])


def space(family: str = "sketch", k: int = 64, scope: Scope = Scope.ALL, **fields: Any) -> Subspace:
    """A subspace of any family and scope; of adapters, at rank 2 and scale 2."""
    given = {"seed": 11} | ({"rank": 2, "alpha": 4.0} if scope == Scope.LORA else {}) | fields
    return Subspace(family=family, k=k, scope=scope, **given)


def point(subspace: Subspace, seed: int = 0, exponent: int = -37, *, only: int = 0) -> Coefficients:
    """Random coefficients below 0.008; of a pool, `only` that many that are not zero."""
    generator = np.random.Generator(np.random.Philox(key=seed))
    steps = generator.integers(-(2**30), 2**30, subspace.k)  # more bits than float32 has
    if only and subspace.family != "sketch":
        steps[generator.permutation(subspace.k)[only:]] = 0
    return Coefficients(subspace=subspace, exponent=exponent, steps=steps)


def delta(subspace: Subspace, name: str, size: int, c: Vector) -> Vector:
    """What coefficients add to the tensor `name`: S c, or sum_k c_k z_k."""
    if subspace.family == "sketch":
        bucket, sign = sketch_rows(subspace.seed, name, subspace.k, 0, size)
        return sign.astype(np.float64) * c[bucket]
    return sum((c[k] * z(subspace, k, name, size) for k in np.flatnonzero(c)), np.zeros(size))


def z(subspace: Subspace, index: int, name: str, size: int) -> Vector:
    """One direction of a pool."""
    key = int(pool_keys(subspace.seed, np.array([index]))[0])
    return direction(subspace.family, key, name, 0, size).astype(np.float64)


def dense(subspace: Subspace, sizes: Mapping[str, int], c: Vector) -> Vector:
    """The same for all tensors, one after the other."""
    return np.concatenate([delta(subspace, name, size, c) for name, size in sizes.items()])


def fold(subspace: Subspace, gradients: Mapping[str, Vector]) -> Vector:
    """S' g of a sketch, [K]."""
    total = np.zeros(subspace.k)
    for name, gradient in gradients.items():
        bucket, sign = sketch_rows(subspace.seed, name, subspace.k, 0, len(gradient))
        np.add.at(total, bucket, sign * gradient)
    return total


def slope(subspace: Subspace, gradients: Mapping[str, Vector], c: Vector) -> float:
    """The derivative of the loss along coefficients c."""
    return float(sum(delta(subspace, name, len(g), c) @ g for name, g in gradients.items()))


def gradients(resident: Resident, scope: Scope, batch: Batch) -> dict[str, Vector]:
    """dL/dw of a batch's mean loss by part, flat: a float64 copy of the model as it stands, by autograd."""
    twin = copy.deepcopy(resident)
    twin.model.double()
    for module in twin.model.modules():
        module._forward_pre_hooks.clear()  # a classifier's head casts what comes in to float32
    for parameter in twin.model.parameters():
        parameter.requires_grad_(True)
    with nullcontext() if scope == Scope.LORA else twin.adapters.disabled():
        logits = forward_logits(twin, batch).double()
        loss = F.cross_entropy(logits.flatten(0, -2), batch.labels.flatten(), reduction="sum") / batch.tokens
        loss.backward()  # type: ignore[no-untyped-call]
    found = {}
    for part in parts_of(twin, scope):
        gradient = part.parameter.grad
        assert gradient is not None
        found[part.name] = (gradient.flatten() if part.index is None else gradient.flatten()[part.index]).numpy()
    return found


def sizes_of(resident: Resident, scope: Scope) -> dict[str, int]:
    return {part.name: part.size for part in parts_of(resident, scope)}


def values_of(resident: Resident, scope: Scope) -> dict[str, NDArray[Any]]:
    """Copies of the parts as they stand; bfloat16 as float32, which holds it."""
    read = {part.name: part.read() for part in parts_of(resident, scope)}
    return {name: (v.float() if v.dtype == torch.bfloat16 else v).numpy().copy() for name, v in read.items()}


def weights(resident: Resident) -> dict[str, Tensor]:
    """A copy of every parameter but the adapters'."""
    named = resident.model.named_parameters()
    return {name: parameter.detach().clone() for name, parameter in named if ".lora_" not in name}


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def same(x: Mapping[str, Tensor], y: Mapping[str, Tensor]) -> bool:
    """Whether two models' parameters agree in every bit."""
    return x.keys() == y.keys() and all(torch.equal(bits(value), bits(y[name])) for name, value in x.items())


def logits(resident: Resident) -> Tensor:
    with torch.inference_mode():
        found: Tensor = resident.model(input_ids=IDS).logits
        return found


def clean(resident: Resident) -> Resident:
    """The resident at its base, as if it had just been loaded, every parameter at the begin of a cache line.

    Layer by layer they are made there; a product's last bit may depend on where its factors lie.
    """
    resident.rebuilt.restore()
    for parameter in resident.model.parameters():
        if parameter.data_ptr() % 64:
            parameter.data = parameter.data.clone()
    resident.base.restore()
    resident.rebuilt.layerwise = None
    resident.adapters.set_factors({name: _zero(size) for name, size in resident.spec.matrices.items()})
    return resident


def masked(resident: Resident, mask: Mapping[str, Tensor]) -> Resident:
    """The resident at its base, as if it had just been loaded with a mask."""
    clean(resident)
    ordered = dict(sorted(mask.items()))
    spec = replace(resident.spec, mask=hash_mask(ordered))
    return replace(resident, mask=ordered, spec=spec, rebuilt=Rebuilt())


def some_mask(resident: Resident, share: float = 0.01, seed: int = 0) -> dict[str, Tensor]:
    """Random places of every parameter, and a head whole."""
    from fedloom.client.parts import parameter_names

    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, parameter in parameter_names(resident.model).items():
        count = parameter.numel() if name in resident.base.heads else max(1, round(share * parameter.numel()))
        found[name] = torch.randperm(parameter.numel(), generator=generator)[:count].sort().values
    return found


def in_scope(resident: Resident, scope: Scope, family: str = "sketch", k: int = 64) -> tuple[Resident, Subspace]:
    """The resident and a subspace of this scope, with a mask where that takes one."""
    clean(resident)
    if scope == Scope.MASK:
        resident = masked(resident, some_mask(resident))
        return resident, space(family, k, scope, mask=resident.spec.mask)
    return resident, space(family, k, scope)


def data_of(resident: Resident, examples: Sequence[Example]) -> Dataset:
    return Dataset(examples, resident, max_length=64, name="a")


def task_for(subspace: Subspace, tuner: str = "zeroth_order", **fields: Any) -> Task:
    """One step on batches of four, unless the fields say otherwise; knobs add to these."""
    knobs = {"steps": 1, "lr": 1e-2, "batch_size": 4} | fields.pop("knobs", {})
    settings: dict[str, Any] = {"device": "a", "round": 1, "rank": max(subspace.rank, 1), "alpha": 1.0, "seed": 5}
    settings |= {"start_from": Start.FRESH, "tuner": tuner, "subspace": subspace, "run": "run", "knobs": knobs}
    return Task(**(settings | fields))
