"""A forward pass through perturbed weights that exist one layer at a time.

Each module's weights are made in a scratch buffer right before its forward and thrown away after it; the model in
memory is never touched, so there is nothing to restore and nothing that could drift, and the cost is one layer. Of a
plain embedding table only the rows of the batch are made.

While such a pass runs, the parameters themselves are empty: a model that uses a weight outside its own module's forward
fails there or gives another answer. `works` sees either, and the model is perturbed by rewriting instead (place.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedloom.client.parts import Fill, Part


class Layerwise:
    """Hooks on every module that owns a part; they do nothing but inside `at`."""

    def __init__(self, model: nn.Module, parts: Sequence[Part]) -> None:
        self._parts = list(parts)
        self._fill: Fill | None = None
        self._live: dict[int, Tensor] = {}
        self._undo: list[Any] = []
        self._scratch = torch.empty(0)
        self._top = 0
        by_id = {id(part.parameter): part for part in parts}
        for module in model.modules():
            own = [by_id[id(p)] for p in module.parameters(recurse=False) if id(p) in by_id]
            if own:
                self._attach(module, own)

    def _attach(self, module: nn.Module, own: Sequence[Part]) -> None:
        if type(module) is nn.Embedding and module.max_norm is None and "forward" not in module.__dict__:
            plain, part = module.forward, own[0]
            module.forward = lambda input: plain(input) if self._fill is None else self._rows(part, input)  # type: ignore[method-assign]
            self._undo.append(lambda: module.__dict__.pop("forward"))
            return
        marks: list[int] = []
        before = module.register_forward_pre_hook(lambda *_: self._enter(own, marks))
        after = module.register_forward_hook(lambda *_: self._leave(own, marks))
        self._undo += [before.remove, after.remove]

    def close(self) -> None:
        """Take the hooks off."""
        while self._undo:
            self._undo.pop()()

    def works(self, forward: Callable[[], Tensor]) -> bool:
        """Whether the model runs layer by layer: `forward`, a pass on any batch, answers as it does without."""
        plain = forward()
        try:
            with self.at(_as_it_is):
                made = forward()
        except Exception:  # whatever a model does with a weight that is empty
            return False
        if made.shape != plain.shape:
            return False
        largest = float(plain.nan_to_num(0.0, 0.0, 0.0).abs().max())
        near = largest * torch.finfo(plain.dtype).eps ** 0.5  # products may be summed otherwise elsewhere in memory
        return torch.allclose(made, plain, rtol=0.0, atol=near, equal_nan=True)

    @contextmanager
    def at(self, fill: Fill) -> Iterator[None]:
        """Forward passes in the block see the weights that `fill` makes."""
        self._live = {id(part.parameter): part.parameter.data for part in self._parts}
        empty = {data.dtype: data.new_empty(0) for data in self._live.values()}
        try:
            for part in self._parts:
                part.parameter.data = empty[part.parameter.dtype]
            self._fill = fill
            yield
        finally:
            self._fill, self._top = None, 0
            for part in self._parts:
                part.parameter.data = self._live[id(part.parameter)]
            self._live = {}

    def _enter(self, own: Sequence[Part], marks: list[int]) -> None:
        if self._fill is None:
            return
        marks.append(self._top)
        for part in own:
            live = self._live[id(part.parameter)]
            values = self._take(live)
            self._fill(part, values.view(-1), live.view(-1), None)
            part.parameter.data = values

    def _leave(self, own: Sequence[Part], marks: list[int]) -> None:
        if self._fill is None:
            return
        self._top = marks.pop()
        for part in own:
            live = self._live[id(part.parameter)]
            part.parameter.data = live.new_empty(0)

    def _rows(self, part: Part, ids: Tensor) -> Tensor:
        table = self._live[id(part.parameter)]
        rows, place = torch.unique(ids.long(), return_inverse=True)
        values = table.new_empty((len(rows), table.shape[1]))
        if self._fill is not None:
            self._fill(part, values, table, rows)
        return values[place]

    def _take(self, live: Tensor) -> Tensor:
        """Room for one parameter on the scratch stack; a deeper module's lies above its parent's."""
        size = live.numel() * live.element_size()
        size += -size % 64
        if self._scratch.device != live.device or self._top + size > len(self._scratch):
            # Parents in use keep the old buffer alive; the next pass has one that fits them all.
            self._scratch = torch.empty(self._top + size, dtype=torch.uint8, device=live.device)
        room = self._scratch[self._top : self._top + live.numel() * live.element_size()]
        self._top += size
        return room.view(live.dtype).view(live.shape)


def _as_it_is(part: Part, out: Tensor, base: Tensor, rows: Tensor | None) -> None:
    out.copy_(base if rows is None else base[rows])
