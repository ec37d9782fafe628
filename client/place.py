"""A model at a point of a subspace: perturbed for forward passes, stepped along directions, or rebuilt.

Perturbed weights are always made from weights that stay as they are, never by adding and taking away again, so nothing
drifts whatever the dtype:

    sketch      w = round(W0 + S (c +- eps v))        made layer by layer; the model in memory stays W0
    pool        w = round(master +- eps z_k)          made layer by layer; a step is master += rho z_k in float32

The master of a float32 model is the model itself; 16-bit models, whose weights would round a step away, and scopes that
are not run layer by layer hold one beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedloom.client import kernels
from fedloom.client.layerwise import Layerwise
from fedloom.client.model import Resident
from fedloom.client.parts import Fill, Part, parts_of
from fedloom.client.rebuilt import Rebuilt
from fedloom.protocols.directions import DIRECTIONS_VERSION, Float32, Keys, pool_keys
from fedloom.protocols.initial import initial_a
from fedloom.protocols.messages import Coefficients, LowRank, MatrixSpec, Scope, Subspace


def sketch_fill(subspace: Subspace, c: NDArray[np.floating[Any]]) -> Fill:
    """Weights at coefficients c [K]: base + S c, c rounded to float32."""
    values = np.ascontiguousarray(c, np.float32)

    def fill(part: Part, out: Tensor, base: Tensor, rows: Tensor | None) -> None:
        if rows is None:
            kernels.add_sketch(out, base, name=part.name, seed=subspace.seed, c=values)
        else:
            kernels.add_sketch_rows(out, base, rows, name=part.name, seed=subspace.seed, c=values)

    return fill


def pool_fill(subspace: Subspace, keys: Keys, scales: Float32, masters: Mapping[str, Tensor]) -> Fill:
    """Weights along directions of a pool: a part's master, or else its base, + sum_k scales[k] z_k."""
    family = subspace.family

    def fill(part: Part, out: Tensor, base: Tensor, rows: Tensor | None) -> None:
        start = masters[part.name].view(base.shape) if part.name in masters else base
        if rows is None:
            kernels.add_directions(out, start, name=part.name, family=family, keys=keys, scales=scales)
        else:
            kernels.add_directions_rows(out, start, rows, name=part.name, family=family, keys=keys, scales=scales)

    return fill


def version_fill(subspace: Subspace, c: NDArray[np.float64]) -> Fill:
    """The weights that coefficients stand for: what every device at that version holds."""
    if subspace.family == "sketch":
        return sketch_fill(subspace, c)
    used = np.flatnonzero(c)
    return pool_fill(subspace, pool_keys(subspace.seed, used), c[used].astype(np.float32), {})


class Place:
    """One task's model in a subspace: a context, at whose end the next task may find any weights it likes."""

    def __init__(self, resident: Resident, subspace: Subspace, held: Coefficients | None, key: Hashable) -> None:
        """
        Args:
            held: the coefficients of the version that the model is to be at; None for the base.
            key: names that version: the same key means the same content.

        Raises:
            ValueError: for another version of directions, coefficients of another subspace, or a mask that is not held.
        """
        _check(resident, subspace, held)
        self.resident, self.subspace = resident, subspace
        self.start: NDArray[np.float64] = np.zeros(subspace.k) if held is None else held.values()
        self._key = (key, subspace)
        self._rebuilt = resident.rebuilt
        if subspace.scope == Scope.LORA:
            self._rebuilt.restore()
            resident.adapters.set_factors(shared_factors(subspace, resident.adapters.matrices))
            self._rebuilt = Rebuilt()  # adapters are new in every task, and so is their W0
        self.parts = parts_of(resident, subspace.scope)
        if not self._rebuilt.has_moved(self.parts):
            self._rebuilt.restore()
            resident.base.restore()
        self.masters: dict[str, Tensor] = {}
        self._layerwise: Layerwise | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        if self.subspace.scope != Scope.LORA:
            self._stack.enter_context(self.resident.adapters.disabled())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._layerwise is not None:
            self._layerwise.close()
        self._stack.close()

    def prepare(self, forward: Callable[[], Tensor]) -> None:
        """Find out whether the model can run layer by layer; `forward` is one pass on any batch."""
        if self.subspace.scope != Scope.ALL or self._rebuilt.layerwise is False:
            return
        layerwise = Layerwise(self.resident.model, self.parts)
        if self._rebuilt.layerwise is None:
            self._rebuilt.restore()  # what a failed task left may be no number
            self._rebuilt.layerwise = layerwise.works(forward)
        if self._rebuilt.layerwise:
            self._layerwise = layerwise
        else:
            layerwise.close()

    @contextmanager
    def at(self, fill: Fill) -> Iterator[None]:
        """Forward passes in the block see the weights that `fill` makes of W0, or of the masters."""
        if self._layerwise is not None:
            with self._layerwise.at(fill):
                yield
            return
        self._rebuilt.write(self.parts, fill)
        yield

    def begin(self) -> None:
        """Make ready for forward passes at perturbed weights."""
        if self.subspace.family == "sketch":
            if self._layerwise is not None:
                self._rebuilt.restore()
            return
        self.rebuild()
        for part in self.parts:
            if self._layerwise is None or part.parameter.dtype != torch.float32:
                self.masters[part.name] = self._master(part)

    def step(self, keys: Keys, scales: Float32) -> None:
        """Move a pool's master by sum_k scales[k] z_k, in float32."""
        self._rebuilt.dirty(self.parts)
        fill = pool_fill(self.subspace, keys, scales, {})
        for part in self.parts:
            master = self.masters.get(part.name)
            master = part.parameter.data.view(-1) if master is None else master
            fill(part, master, master, None)

    def rebuild(self, c: NDArray[np.float64] | None = None) -> None:
        """Write the weights at `c`, or at the version's own coefficients, into the model."""
        point = self.start if c is None else c
        key = self._key if c is None else object()
        self._rebuilt.rebuild(
            self.parts, key, version_fill(self.subspace, point), keep=self.subspace.family != "sketch" and c is None
        )

    @contextmanager
    def serving(self) -> Iterator[None]:
        """The model at the version's own coefficients, for evaluation."""
        if self.subspace.family == "sketch" and self._layerwise is not None:
            self._rebuilt.restore()
            with self._layerwise.at(version_fill(self.subspace, self.start)):
                yield
            return
        self.rebuild()
        yield

    def _master(self, part: Part) -> Tensor:
        """float32(W0) + sum_k c_k z_k, not rounded to the model's dtype."""
        base = self._rebuilt.pristine(part)
        master = torch.empty(base.shape, dtype=torch.float32, device=base.device)
        version_fill(self.subspace, self.start)(part, master, base.float(), None)
        return master


def shared_factors(subspace: Subspace, matrices: Mapping[str, MatrixSpec]) -> dict[str, LowRank]:
    """The adapters that every device's directions start from: B = 0 and A from the subspace's seed."""
    return {
        name: LowRank(
            b=np.zeros((size.d_out, subspace.rank), np.float32),
            a=initial_a(subspace.seed, name, subspace.rank, size.d_in),
            alpha=subspace.alpha,
            rslora=subspace.rslora,
        )
        for name, size in matrices.items()
    }


def _check(resident: Resident, subspace: Subspace, held: Coefficients | None) -> None:
    if subspace.directions != DIRECTIONS_VERSION:
        raise ValueError(
            f"directions must be of version {DIRECTIONS_VERSION} on this device, "
            f"the server asks for version {subspace.directions}"
        )
    if held is not None and held.subspace != subspace:
        raise ValueError(f"coefficients must be of the task's subspace {subspace}, got {held.subspace}")
    if subspace.scope == Scope.MASK and subspace.mask != resident.spec.mask:
        raise ValueError(
            f"the task's mask must be the one held here ({resident.spec.mask[:12] or 'none'}), got {subspace.mask[:12]}"
        )
