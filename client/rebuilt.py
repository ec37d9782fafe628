"""The base's weights, overwritten by W0 + sum_k c_k z_k and brought back, bit for bit.

W0 is set aside in a mapped file, not in memory (mapped.py): it is read when a model is rebuilt. Every version is made
from W0, never from another, and rounded once.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

from torch import Tensor

from fedloom.client.mapped import set_aside
from fedloom.client.parts import Fill, Part
from fedloom.client.patching import BASE


def _copies(values: Mapping[str, Tensor]) -> Fill:
    def fill(part: Part, out: Tensor, base: Tensor, rows: Tensor | None) -> None:
        out.copy_(values[part.name])

    return fill


class Rebuilt:
    """Which version of a subspace a model's weights are at, and the way back to W0."""

    def __init__(self) -> None:
        self.layerwise: bool | None = None  # whether the model runs layer by layer; None: not tried yet
        self._pristine: dict[str, Tensor] = {}
        self._touched: dict[str, Part] = {}
        self._applied: Hashable = BASE
        self._snapshot: tuple[Hashable, dict[str, Tensor]] = (BASE, {})

    @property
    def at_base(self) -> bool:
        return self._applied == BASE

    def has_moved(self, parts: Sequence[Part]) -> bool:
        """Whether these parts, and they alone, are not at W0."""
        return not self.at_base and self._touched.keys() == {part.name for part in parts}

    def pristine(self, part: Part) -> Tensor:
        """W0 of a part, flat, on its device; to be called first while the model is at its base."""
        self._keep(part)
        return self._pristine[part.name].to(part.parameter.device)

    def _keep(self, part: Part) -> None:
        if part.name not in self._pristine:
            self._pristine[part.name] = set_aside(part.read())

    def rebuild(self, parts: Sequence[Part], key: Hashable, fill: Fill, *, keep: bool = False) -> None:
        """Write W0 + what `fill` adds into the parts, unless they hold it (`key` names it).

        Args:
            keep: set the result aside too, for a rebuild that is worth it.
        """
        if key == self._applied:
            return
        kept_key, kept = self._snapshot
        if keep and kept_key == key:
            self.write(parts, _copies(kept))
        else:
            self.write(parts, fill)
        if keep and kept_key != key:
            self._snapshot = (key, {part.name: set_aside(part.read()) for part in parts})
        self._applied = key

    def write(self, parts: Sequence[Part], fill: Fill) -> None:
        """Write what `fill` makes of W0 into the parts."""
        for part in parts:
            self._keep(part)
        self.dirty(parts)  # should a write fail midway, no version is there
        for part in parts:
            part.write(lambda out, part=part: fill(part, out, self.pristine(part), None))  # type: ignore[misc]

    def dirty(self, parts: Sequence[Part]) -> None:
        """Training has moved the parts: no version is there any more."""
        self._touched |= {part.name: part for part in parts}
        self._applied = object()

    def restore(self) -> None:
        """Go back to W0, bit for bit."""
        if self.at_base:
            return
        self.write(list(self._touched.values()), _copies(self._pristine))
        self._touched = {}
        self._applied = BASE
