"""The last step of describing a model: leaves without some units give what a pruned model computes.

Head counts and split sizes that attention modules hold as whole numbers shrink with their units. Which of them a model
reads differs, so the likely ones are tried, fewest first, until the inputs of every layer are right.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedloom.client.pruning.cut import Cut
from fedloom.client.pruning.structure import Group, kept
from fedloom.strategies.choosing import GroupKind
from fedloom.strategies.masked import Bits, Keep

_COUNTS = {
    GroupKind.ATTENTION: (
        *("num_heads", "num_attention_heads", "n_heads", "n_head", "num_q_heads", "all_head_size", "split_size"),
        *("num_key_value_heads", "num_kv_heads", "n_kv_heads"),
    ),
    GroupKind.FFN: ("intermediate_size", "inner_dim", "ffn_dim"),
}
_WIDTHS = ("embed_dim", "hidden_size", "dim")  # in some models these are the heads' width, in others the residual's


def prove(
    groups: Mapping[str, Group], cut: Cut, values: Mapping[str, Tensor], inputs: Mapping[str, Tensor]
) -> dict[str, Group]:
    """The groups with the attributes that shrink, as far as a pass without some units is right.

    Raises:
        ValueError: when it is not, naming the first group that cannot be removed from.
    """
    tried = [_with_attributes(groups, cut.model, extra) for extra in ((), _WIDTHS)]
    for candidate in tried:
        if not _problem(candidate, cut, values, inputs):
            return candidate
    for name, group in tried[0].items():
        problem = _problem({name: group}, cut, values, inputs)
        if problem:
            raise ValueError(f"{name} cannot be pruned: without some of its units {problem}")
    raise ValueError(f"{next(iter(groups))} cannot be pruned: {_problem(tried[0], cut, values, inputs)}")


def _with_attributes(groups: Mapping[str, Group], model: Any, extra: tuple[str, ...]) -> dict[str, Group]:
    found = {}
    for name, group in groups.items():
        owners = dict.fromkeys(module.rpartition(".")[0] for module in (*group.sources, group.sink))
        wanted = (*_COUNTS[group.kind], *(extra if group.kind is GroupKind.ATTENTION else ()))
        attributes = tuple(
            (owner, attribute)
            for owner in owners
            for attribute, value in vars(model.get_submodule(owner)).items()
            if attribute in wanted and type(value) is int and value and value % group.units == 0
        )
        found[name] = replace(group, attributes=attributes)
    return found


def _problem(groups: Mapping[str, Group], cut: Cut, values: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> str:
    """What is wrong with a pass without some units of each group; empty if nothing is."""
    generator = np.random.Generator(np.random.Philox(key=len(groups)))
    keep = {name: _some(group.units, generator) for name, group in groups.items()}
    rows = {m: kept(axis, values[m].shape[-1], keep) for g in groups.values() for m, axis in g.sources.items()}
    columns = {g.sink: kept(g.columns, inputs[g.sink].shape[-1], keep) for g in groups.values()}
    narrow = {name: _take(value, rows.get(name)) for name, value in values.items()}
    try:
        with shrunk(cut.model, groups, keep):
            got, _ = cut.run(narrow)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        return f"the model fails: {' '.join(str(error).split())[:200]}"
    for name, x in inputs.items():
        wanted = _take(x, columns.get(name))
        near = 8 * torch.finfo(x.dtype).eps
        if name not in got or got[name].shape != wanted.shape:
            return f"{name} reads {list(got[name].shape) if name in got else 'nothing'}, not {list(wanted.shape)}"
        if not torch.allclose(got[name], wanted, rtol=near, atol=near * float(wanted.detach().abs().max())):
            return f"{name} reads other numbers"
    return ""


def _some(units: int, generator: np.random.Generator) -> Bits:
    """At least one unit kept and one removed; the first goes now and then, as any other."""
    count = int(generator.integers(1, units))
    bits = np.zeros(units, np.bool_)
    bits[generator.permutation(units)[:count]] = True
    return bits


def _take(values: Tensor, index: Any) -> Tensor:
    return values if index is None else values[..., torch.from_numpy(index).to(values.device)]


@contextmanager
def shrunk(model: Any, groups: Mapping[str, Group], keep: Keep) -> Iterator[None]:
    """The attributes of attention modules as a pruned model has them; as they were after the block."""
    before = {
        place: getattr(model.get_submodule(place[0]), place[1]) for g in groups.values() for place in g.attributes
    }
    try:
        set_attributes(model, groups, keep, before)
        yield
    finally:
        for (module, attribute), value in before.items():
            setattr(model.get_submodule(module), attribute, value)


def set_attributes(model: Any, groups: Mapping[str, Group], keep: Keep, full: Mapping[tuple[str, str], int]) -> None:
    """Shrink what attention modules count; `full` has the values of the whole model."""
    for name, group in groups.items():
        units = int(keep[name].sum()) if name in keep else group.units
        for module, attribute in group.attributes:
            value = full[module, attribute] // group.units * units
            setattr(model.get_submodule(module), attribute, value)
