"""The weights that a subspace spans, as flat named tensors: all of them, a round's adapters, or a sparse mask.

    all    every parameter of the base by its own name, a tied one once
    lora   each adapter's factors as `{module}.lora_A` and `{module}.lora_B`, and a classifier's head by its own names
    mask   the masked positions of a parameter, packed together in order, as `{parameter}#mask`

A name and an element's place in its tensor are all that directions depend on, so these are the same on every device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fedloom.client.lora import ADAPTER
from fedloom.protocols.messages import Scope

if TYPE_CHECKING:
    from fedloom.client.model import Resident

Fill = Callable[["Part", Tensor, Tensor, "Tensor | None"], None]
"""fill(part, out, base, rows): write a part's perturbed values, made of `base`, to `out`; of a table only `rows`."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One named tensor of a subspace, and the parameter that it lies in."""

    name: str
    parameter: nn.Parameter
    index: Tensor | None = None  # the masked places in the flat parameter, ascending

    @property
    def size(self) -> int:
        return self.parameter.numel() if self.index is None else len(self.index)

    def read(self) -> Tensor:
        """The values as they stand, flat: the parameter's own memory, or a copy of its masked places."""
        flat = self.parameter.data.view(-1)
        return flat if self.index is None else flat[self.index]

    def write(self, make: Callable[[Tensor], None]) -> None:
        """Let `make` write new values."""
        flat = self.parameter.data.view(-1)
        if self.index is None:
            make(flat)
            return
        values = torch.empty(len(self.index), dtype=flat.dtype, device=flat.device)
        make(values)
        flat[self.index] = values


def parameter_names(model: nn.Module) -> dict[str, nn.Parameter]:
    """The base's parameters by the names they have without adapters, each once."""
    return {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in model.named_parameters()
        if ".lora_" not in name
    }


def parts_of(resident: Resident, scope: Scope) -> list[Part]:
    """The parts of a scope, in an order that is the same everywhere.

    Raises:
        ValueError: for a mask that does not fit the model, or a parameter that is not contiguous.
    """
    if scope == Scope.LORA:
        layers = resident.adapters.layers.items()
        factors = {f"{name}.lora_{which}": _factor(layer, which) for name, layer in layers for which in "AB"}
        return [Part(name=name, parameter=parameter) for name, parameter in {**factors, **resident.base.heads}.items()]
    if not resident.bits.dense:
        raise ValueError(
            f"a base must be held in 16 bits for its weights to be tuned, got {resident.bits.bits}; "
            "scope 'lora' tunes adapters on a quantised one"
        )
    known = parameter_names(resident.model)
    for name, parameter in known.items():
        if not parameter.is_contiguous():
            raise ValueError(f"a tuned parameter must be contiguous, got {name} with strides {parameter.stride()}")
    if scope == Scope.ALL:
        return [Part(name=name, parameter=parameter) for name, parameter in known.items()]
    return [_masked(name, index, known) for name, index in resident.mask.items()]


def _factor(layer: nn.Module, which: str) -> nn.Parameter:
    weight: nn.Parameter = getattr(layer, f"lora_{which}")[ADAPTER].weight
    return weight


def _masked(name: str, index: Tensor, known: Mapping[str, nn.Parameter]) -> Part:
    if name not in known:
        raise ValueError(f"a mask must name parameters of the model, got {name!r}")
    parameter = known[name]
    if not len(index) or int(index[0]) < 0 or int(index[-1]) >= parameter.numel():
        raise ValueError(
            f"a mask of {name} must hold places in 0..{parameter.numel() - 1}, got {index.tolist()[:3]} ..."
        )
    return Part(name=f"{name}#mask", parameter=parameter, index=index.to(parameter.device))
