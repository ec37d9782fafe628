"""Removing units for real: narrower weights, biases, adapters and head counts; and the masked model that it must equal.

A pruned model is always made from W0, the public base, whose matrices are set aside in mapped files the first time they
are cut: whatever keep a model is at, any other is W0's rows and columns of that keep, bit for bit. So regrown units
start from the public base, and their adapters at zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedloom.client.lora import ADAPTER
from fedloom.client.mapped import set_aside
from fedloom.client.pruning.cut import linears, plain
from fedloom.client.pruning.proof import set_attributes
from fedloom.client.pruning.structure import Structure, kept
from fedloom.protocols.messages import Axis
from fedloom.protocols.validate import check_keep
from fedloom.strategies.choosing import whole
from fedloom.strategies.masked import Bits, Keep, pruned

if TYPE_CHECKING:
    from fedloom.client.model import Resident

Biases = Mapping[str, Tensor]
"""What to add to the outputs of sinks, [d_out] by module, to make up for what was removed."""


def apply_keep(resident: Resident, keep: Keep, biases: Biases | None = None) -> None:
    """Make a resident the public base cut down to `keep`, whatever it was: no patch, rows and columns of W0.

    A resident that has that keep already, and no biases, is left as it is, with its patch. Its spec goes on describing
    the whole model. Adapters keep what they hold of units that stay; regrown units' parts are zero. A patch or a start
    for it must be sliced (strategies.masked.slice_payload).

    Raises:
        ValueError: for a keep that does not fit the model, or a resident that was not loaded to be pruned.
    """
    if resident.prunable is None:
        raise ValueError("a model must be loaded with prunable=True to be pruned, this one was not")
    check_keep("keep", keep, resident.prunable.structure.units)
    resident.rebuilt.restore()
    if not biases and resident.prunable.is_at(keep):
        return
    resident.base.restore()
    resident.prunable.apply(keep, biases)
    sizes = pruned(resident.spec, keep).matrices
    resident.adapters.matrices = dict(sizes)
    resident.base.resize(sizes, resident.prunable.pristine)


@dataclass(kw_only=True)
class Prunable:
    """A model that can be pruned: its structure, what it keeps now, and W0 of all that was ever cut."""

    model: Any
    structure: Structure
    keep: dict[str, Bits] = field(default_factory=dict)
    _aside: dict[tuple[str, str], Tensor] = field(default_factory=dict)  # (module, weight or bias): W0, on the CPU
    _bare: set[str] = field(default_factory=set)  # sinks that have no bias of their own
    _full: dict[tuple[str, str], int] = field(default_factory=dict)
    _biased: set[str] = field(default_factory=set)
    _torn: bool = False  # a cut ended midway (out of memory): the next one goes over everything

    def __post_init__(self) -> None:
        places = [place for group in self.structure.groups.values() for place in group.attributes]
        self._full = {place: getattr(self.model.get_submodule(place[0]), place[1]) for place in places}
        self.keep = whole(self.keep, self.structure.units)

    def is_at(self, keep: Keep) -> bool:
        """Whether the model has this keep, and no biases beside its own."""
        wanted = whole(keep, self.structure.units)
        return not (self._torn or self._biased) and all(
            np.array_equal(bits, self.keep[name]) for name, bits in wanted.items()
        )

    @property
    def added_biases(self) -> set[str]:
        """The sinks that have a bias now, and had none of their own."""
        return self._bare & self._biased

    def apply(self, keep: Keep, biases: Biases | None = None) -> None:
        """Cut the model down to `keep`, from W0. To be called with no patch on it.

        One that fails midway leaves a model that the next call makes whole again, its adapters zero.

        Args:
            biases: added to the sinks' biases, which are made where there are none.

        Raises:
            ValueError: for a keep that does not fit the model, or a bias of what is no sink; the model is unchanged.
        """
        biases = dict(biases or {})
        check_keep("keep", keep, self.structure.units)
        _check_biases(biases, self.structure, self.model)
        wanted = whole(keep, self.structure.units)
        changed = {name for name, bits in wanted.items() if self._torn or not np.array_equal(bits, self.keep[name])}
        sinks = self.structure.columns.keys() if self._torn else self._biased | biases.keys()
        layers = linears(self.model)
        torn, self._torn = self._torn, True
        rows, columns = self.structure.rows, self.structure.columns
        with torch.no_grad():
            for name in dict.fromkeys((*rows, *columns)):
                axes = rows.get(name), columns.get(name)
                if any(axis is not None and axis.group in changed for axis in axes):
                    self._cut(name, layers[name], axes, wanted, None if torn else self.keep)
            for name in sinks:
                self._set_bias(name, plain(layers[name]), biases.get(name))
        set_attributes(self.model, self.structure.groups, wanted, self._full)
        self.keep, self._biased, self._torn = wanted, set(biases), False

    def pristine(self, name: str) -> Tensor:
        """W0 of a module's weight, as far as the model keeps it now; on the CPU, and not to be written to.

        To be called first for a module that no patch is on.
        """
        layer = plain(self.model.get_submodule(name))
        full = self._pristine(name, "weight", layer.weight)
        axes = self.structure.rows.get(name), self.structure.columns.get(name)
        return _narrow(full, axes, self.keep, transposed=isinstance(layer, Conv1D))

    def _cut(
        self, name: str, layer: Any, axes: tuple[Axis | None, Axis | None], keep: Keep, former: Keep | None
    ) -> None:
        base = plain(layer)
        transposed = isinstance(base, Conv1D)
        full = self._pristine(name, "weight", base.weight)
        d_out, d_in = (full.shape[1], full.shape[0]) if transposed else tuple(full.shape)
        rows, columns = kept(axes[0], d_out, keep), kept(axes[1], d_in, keep)
        narrow = _narrow(full, axes, keep, transposed=transposed)
        base.weight.data = narrow.to(base.weight.device, copy=narrow is full)
        if axes[0] is not None and base.bias is not None and name not in self._bare:
            bias = self._pristine(name, "bias", base.bias)
            base.bias.data = _select(bias, 0, rows).to(base.bias.device, copy=True)
        now = (d_out if rows is None else len(rows), d_in if columns is None else len(columns))
        _set_sizes(layer, *now)
        if layer is base:
            return
        if former is None:
            _blank(layer.lora_B[ADAPTER], 0, now[0])
            _blank(layer.lora_A[ADAPTER], 1, now[1])
            return
        before = [kept(axis, size, former) for axis, size in zip(axes, (d_out, d_in), strict=True)]
        _move(layer.lora_B[ADAPTER], 0, d_out, before[0], rows)
        _move(layer.lora_A[ADAPTER], 1, d_in, before[1], columns)

    def _set_bias(self, name: str, base: Any, bias: Tensor | None) -> None:
        """The sink's own bias plus what is given; no bias at all where it has none and none is given."""
        if base.bias is None or name in self._bare:
            self._bare.add(name)
            made = None if bias is None else nn.Parameter(bias.to(base.weight), requires_grad=False)
            base.bias = made
            return
        own = self._pristine(name, "bias", base.bias).to(base.bias.device)
        base.bias.data = own.clone() if bias is None else (own.float() + bias.to(own.device).float()).to(own.dtype)

    def _pristine(self, name: str, which: str, parameter: nn.Parameter) -> Tensor:
        if (name, which) not in self._aside:
            self._aside[name, which] = set_aside(parameter.data.reshape(-1)).view(parameter.shape)
        return self._aside[name, which]


def _check_biases(biases: Biases, structure: Structure, model: nn.Module) -> None:
    sinks = structure.columns
    layers = linears(model)
    for name, bias in biases.items():
        if name not in sinks or name in structure.rows:
            raise ValueError(f"a bias must be for an output or down projection, got {name!r}")
        base = plain(layers[name])
        d_out = base.weight.shape[1] if isinstance(base, Conv1D) else base.weight.shape[0]
        if tuple(bias.shape) != (d_out,) or not bool(torch.isfinite(bias).all()):
            raise ValueError(f"a bias of {name} must be [{d_out}] finite numbers, got {list(bias.shape)}")


def _select(values: Tensor, side: int, index: NDArray[np.int64] | None) -> Tensor:
    return values if index is None else values.index_select(side, torch.from_numpy(index))


def _narrow(full: Tensor, axes: tuple[Axis | None, Axis | None], keep: Keep, *, transposed: bool) -> Tensor:
    """The rows and columns of W0 that are kept; `full` itself, which may be a mapped file, where all are."""
    d_out, d_in = full.shape[::-1] if transposed else full.shape
    rows, columns = kept(axes[0], d_out, keep), kept(axes[1], d_in, keep)
    sides = (columns, rows) if transposed else (rows, columns)
    return _select(_select(full, 0, sides[0]), 1, sides[1])


def _blank(linear: Any, side: int, size: int) -> None:
    """One factor of an adapter, zero, of a new size."""
    shape = list(linear.weight.shape)
    shape[side] = size
    values = torch.zeros(shape, dtype=linear.weight.dtype, device=linear.weight.device)
    linear.weight = nn.Parameter(values, requires_grad=linear.weight.requires_grad)
    linear.out_features, linear.in_features = shape


def _set_sizes(layer: Any, d_out: int, d_in: int) -> None:
    for module in {id(layer): layer, id(plain(layer)): plain(layer)}.values():
        if isinstance(module, Conv1D):
            module.nf, module.nx = d_out, d_in
        else:
            module.out_features, module.in_features = d_out, d_in


def _move(
    linear: Any,
    side: int,
    size: int,
    before: NDArray[np.int64] | None,
    after: NDArray[np.int64] | None,
) -> None:
    """One factor of an adapter, from one keep to another, by way of the whole width; what is regrown is zero."""
    values = linear.weight.data
    if before is not None:
        shape = list(values.shape)
        shape[side] = size
        values = values.new_zeros(shape).index_copy_(side, torch.from_numpy(before).to(values.device), values)
    if after is not None:
        values = values.index_select(side, torch.from_numpy(after).to(values.device))
    linear.weight = nn.Parameter(values.contiguous().clone(), requires_grad=linear.weight.requires_grad)
    linear.out_features, linear.in_features = linear.weight.shape


@contextmanager
def masked(model: nn.Module, structure: Structure, keep: Keep, biases: Biases | None = None) -> Iterator[None]:
    """The model as it is, with what the sinks read of removed units set to zero: what a pruned model must compute.

    Raises:
        ValueError: for a keep that does not fit the model.
    """
    check_keep("keep", keep, structure.units)
    hooks: list[Any] = []
    layers = linears(model)
    for group in structure.groups.values():
        layer = layers[group.sink]
        weight = plain(layer).weight
        size = group.columns.width * group.units
        index = kept(group.columns, size, keep)
        if index is not None:
            mask = torch.zeros(size, dtype=weight.dtype, device=weight.device)
            mask[torch.from_numpy(index).to(weight.device)] = 1
            hooks.append(layer.register_forward_pre_hook(lambda _, args, m=mask: (args[0] * m, *args[1:])))
        if biases and group.sink in biases:
            bias = biases[group.sink].to(weight)
            hooks.append(layer.register_forward_hook(lambda _, args, out, b=bias: out + b))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
