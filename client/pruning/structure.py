"""What of a model can be removed: groups of coupled structures, and the rows and columns that each unit owns.

A unit is an attention group (one key-value head with all query heads that read it) or a channel of a feed-forward
network. It owns rows of the source matrices that make it and columns of the one sink matrix that reads it; the width of
the residual stream stays. A keep-bitmap says of each unit of a group whether it stays.

Legend of shapes: units of a group; d_out x d_in the logical size of a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedloom.protocols.messages import Axis, ModelSpec
from fedloom.strategies.choosing import GroupKind
from fedloom.strategies.masked import Keep, side


@dataclass(frozen=True, kw_only=True)
class Group:
    """One group of coupled structures."""

    kind: GroupKind
    layer: int  # 0 is the first
    units: int
    sink: str  # the module that reads the units: the output or down projection
    columns: Axis  # of the sink
    sources: Mapping[str, Axis]  # the modules that make the units, and the rows of each
    attributes: tuple[tuple[str, str], ...] = ()  # (module, attribute): whole numbers that shrink with the units


@dataclass(frozen=True, kw_only=True)
class Structure:
    """All groups of a model, in the order of its layers."""

    layers: int
    groups: Mapping[str, Group]

    @property
    def units(self) -> dict[str, int]:
        """The units of each group, as ModelSpec.groups has them."""
        return {name: group.units for name, group in self.groups.items()}

    @property
    def rows(self) -> dict[str, Axis]:
        """The rows of each source by module."""
        return {module: axis for group in self.groups.values() for module, axis in group.sources.items()}

    @property
    def columns(self) -> dict[str, Axis]:
        """The columns of each sink by module."""
        return {group.sink: group.columns for group in self.groups.values()}


def with_structure(spec: ModelSpec, structure: Structure) -> ModelSpec:
    """A spec whose matrices say what may be pruned of them."""
    rows, columns = structure.rows, structure.columns
    matrices = {
        name: replace(size, rows=rows.get(name), columns=columns.get(name)) for name, size in spec.matrices.items()
    }
    return replace(spec, matrices=matrices, groups=structure.units)


def kept(axis: Axis | None, size: int, keep: Keep) -> NDArray[np.int64] | None:
    """The indices that stay of a side of `size`, ascending; None when all do."""
    mask = side(axis, keep, size)
    return None if mask is None else np.flatnonzero(mask)
