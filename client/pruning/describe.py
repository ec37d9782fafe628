"""The structure of a model, found from what its layers compute and not from their names.

On a cut pass (cut.py), where every linear layer gives random numbers:

    1. the gradient of one input column of a layer finds the source rows behind it, other numbers in those rows find
       the columns that move with it, and so on until nothing is added: one unit, be it a key-value head or a channel
    2. the other units must lie like the first, side by side: one gradient for each bit of a unit's number, and one for
       its complement, must see exactly the rows foretold, so no row is behind columns of two units
    3. leaves without the rows of some units must leave every layer the inputs it had, but for those units' columns:
       that is what a pruned model computes, with the head counts that its attention modules then read

A model that fails a step is refused, with the module's name. That attention is attention is seen as well: it mixes
positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fedloom.client.pruning.cut import Cut, logical, mixes_positions, touched
from fedloom.client.pruning.proof import prove
from fedloom.client.pruning.structure import Group, Structure
from fedloom.protocols.messages import Axis
from fedloom.strategies.choosing import GroupKind


@dataclass(kw_only=True)
class _Sink:
    """A layer whose first input column depends on some rows of its sources, but not on all."""

    name: str
    layer: int
    rows: dict[str, Tensor]  # of each source, those behind `columns`
    columns: Tensor  # [d_in] bool: those that share rows with the first
    units: int = 0
    axes: dict[str, tuple[int, tuple[int, ...]]] = field(default_factory=dict)  # source: width and offsets


def describe(model: Any) -> Structure:
    """Find the groups of a transformer: attention by key-value heads and feed-forward networks by channels.

    Args:
        model: a transformers model, with adapters or without, that is not pruned.

    Raises:
        ValueError: for a model that cannot be described, naming the module and why.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"a model must be an encoder or a decoder to be pruned, got {type(model).__name__}")
    cut = Cut(model)
    blocks = _blocks(model, cut)
    _refuse_loose_weights(blocks, cut)
    values: dict[str, Tensor] = {}
    try:
        inputs, leaves = cut.run(values)
    except (RuntimeError, TypeError, IndexError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{type(model).__name__} cannot be pruned, a pass on token ids alone fails: {reason}"
        ) from None
    sinks = _candidates(blocks, inputs, leaves)
    _grow(sinks, cut, values, inputs, leaves)
    for sink in sinks:
        _measure(sink, cut)
    _check_cover(blocks, sinks, inputs, cut)
    sinks = [sink for sink in sinks if sink.units > 1]
    _check_bits(sinks, inputs, leaves, cut)
    groups = _named(sinks, [name for name, _ in blocks], inputs, leaves)
    return Structure(layers=len(blocks), groups=prove(groups, cut, values, inputs))


def _blocks(model: Any, cut: Cut) -> list[tuple[str, nn.Module]]:
    """The transformer layers, by name."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            blocks = [(f"{name}.{i}", block) for i, block in enumerate(module)]
            if all(any(layer.startswith(f"{block}.") for layer in cut.layers) for block, _ in blocks):
                return blocks
    raise ValueError(f"a model must have a list of its {count} layers to be pruned, {type(model).__name__} has none")


def _refuse_loose_weights(blocks: Sequence[tuple[str, nn.Module]], cut: Cut) -> None:
    for block, module in blocks:
        for name, parameter in module.named_parameters():
            whole = f"{block}.{name}"
            if parameter.ndim > 1 and not any(whole.startswith(f"{layer}.") for layer in cut.layers):
                raise ValueError(
                    f"{whole} must be the weight of a linear layer to be pruned, got {list(parameter.shape)} "
                    "outside one (a mixture of experts, or a convolution)"
                )


def _candidates(
    blocks: Sequence[tuple[str, nn.Module]], inputs: Mapping[str, Tensor], leaves: Mapping[str, Tensor]
) -> list[_Sink]:
    found = []
    inside = [name for name in leaves if name.startswith(tuple(f"{block}." for block, _ in blocks))]
    for number, (block, _) in enumerate(blocks):
        for name in (name for name in inputs if name.startswith(f"{block}.")):
            x = inputs[name]
            rows = touched(x[..., 0].sum() + (x[..., 0] ** 2).sum(), leaves, inside)
            if any(not bool(part.all()) for part in rows.values()):
                first = torch.zeros(x.shape[-1], dtype=torch.bool, device=x.device)
                first[0] = True
                found.append(_Sink(name=name, layer=number, rows=rows, columns=first))
    owner: dict[str, str] = {}
    for sink in found:
        for source in sink.rows:
            if owner.setdefault(source, sink.name) != sink.name:
                raise ValueError(f"{source} must feed one layer to be pruned, it feeds {owner[source]} and {sink.name}")
    return found


def _grow(
    sinks: Sequence[_Sink],
    cut: Cut,
    values: Mapping[str, Tensor],
    inputs: Mapping[str, Tensor],
    leaves: Mapping[str, Tensor],
) -> None:
    """Step 1: rows behind columns and columns before rows, until neither grows."""
    sources = [source for sink in sinks for source in sink.rows]
    while True:
        moved = {name: value.clone() for name, value in values.items()}
        for sink in sinks:
            for source, rows in sink.rows.items():
                moved[source][..., rows] = cut.draw(moved[source][..., rows])
        after, _ = cut.run(moved)
        grown = False
        for sink in sinks:
            columns = (after[sink.name] != inputs[sink.name]).flatten(0, -2).any(0) | sink.columns
            grown |= not torch.equal(columns, sink.columns)
            sink.columns = columns
        if not grown:
            return
        seen = touched(_read(sinks, inputs, [sink.columns for sink in sinks]), leaves, sources)
        for sink in sinks:
            sink.rows = {source: rows | seen.get(source, rows) for source, rows in sink.rows.items()}


def _read(sinks: Sequence[_Sink], inputs: Mapping[str, Tensor], columns: Iterable[Tensor]) -> Tensor:
    """A scalar that depends on the named columns of every sink."""
    total = torch.zeros((), device=next(iter(inputs.values())).device)
    for sink, chosen in zip(sinks, columns, strict=True):
        x = inputs[sink.name][..., chosen].float()
        total = total + x.sum() + (x**2).sum()
    return total


def _measure(sink: _Sink, cut: Cut) -> None:
    """The shape of a sink's units, from the first."""
    width, size = int(sink.columns.sum()), len(sink.columns)
    if not bool(sink.columns[:width].all()) or size % width:
        raise ValueError(f"{sink.name} must read units side by side to be pruned, its first has {width} of {size}")
    sink.units = size // width
    sink.axes[sink.name] = width, (0,)
    if sink.units == 1:
        return
    for source, rows in sink.rows.items():
        at = torch.nonzero(rows).flatten().tolist()
        starts = [row for before, row in zip([-2, *at], at, strict=False) if row != before + 1]
        run, d_out = len(at) // len(starts), logical(cut.layers[source]).shape[0]
        foretold = [start + i for start in starts for i in range(run)]
        spaced = all(start == number * run * sink.units for number, start in enumerate(starts))
        if at != foretold or not spaced or len(at) * sink.units != d_out:
            raise ValueError(
                f"{source} must make {sink.units} equal units, side by side in each of its parts, to be pruned: "
                f"the first of {sink.name} takes {len(at)} of {d_out} rows, from {starts[:4]}"
            )
        sink.axes[source] = run, tuple(starts)


def _check_cover(
    blocks: Sequence[tuple[str, nn.Module]], sinks: Sequence[_Sink], inputs: Mapping[str, Tensor], cut: Cut
) -> None:
    """Every linear layer of a block must belong to a group; attention with a single key-value head may stay whole."""
    single = getattr(cut.model.config.get_text_config(), "num_key_value_heads", 0) == 1
    covered = {name for sink in sinks if sink.units > 1 or single for name in (sink.name, *sink.rows)}
    inside = tuple(f"{block}." for block, _ in blocks)
    for name in (name for name in cut.layers if name.startswith(inside)):
        if name not in inputs:
            raise ValueError(f"{name} must run in every pass to be pruned, it did not")
        if name not in covered:
            coupled = [sink.name for sink in sinks if sink.units == 1 and name in (sink.name, *sink.rows)]
            why = f"all inputs of {coupled[0]} hang together" if coupled else "what it makes goes elsewhere"
            raise ValueError(f"{name} must make or read heads or channels that come apart to be pruned: {why}")


def _check_bits(sinks: Sequence[_Sink], inputs: Mapping[str, Tensor], leaves: Mapping[str, Tensor], cut: Cut) -> None:
    """Step 2: for each bit of a unit's number and each value of it, those units' columns see exactly their rows."""
    sources = [source for sink in sinks for source in sink.rows]
    for bit in range(max((sink.units - 1).bit_length() for sink in sinks)):
        for value in (0, 1):
            chosen = [(torch.arange(sink.units) >> bit) & 1 == value for sink in sinks]
            columns = [_spread(units, *sink.axes[sink.name]) for sink, units in zip(sinks, chosen, strict=True)]
            seen = touched(_read(sinks, inputs, columns), leaves, sources)
            for sink, units in zip(sinks, chosen, strict=True):
                for source in sink.rows:
                    foretold = _spread(units, *sink.axes[source])
                    got = seen[source].cpu() if source in seen else torch.zeros_like(foretold)
                    if not torch.equal(got, foretold):
                        raise ValueError(
                            f"{sink.name} must read {sink.units} units that share no row of {source} to be pruned, "
                            f"{int((got != foretold).sum())} rows lie otherwise"
                        )


def _spread(units: Tensor, width: int, offsets: Sequence[int]) -> Tensor:
    """The rows or columns of the chosen units, as bool over the whole side."""
    return units.repeat_interleave(width).repeat(len(offsets))


def _named(
    sinks: Sequence[_Sink], blocks: Sequence[str], inputs: Mapping[str, Tensor], leaves: Mapping[str, Tensor]
) -> dict[str, Group]:
    """The groups by name: the layer's own, and what it is; a second of a kind in one layer has a number."""
    groups: dict[str, Group] = {}
    for sink in sinks:
        mixes = mixes_positions(inputs[sink.name], leaves, list(sink.rows))
        kind = GroupKind.ATTENTION if mixes else GroupKind.FFN
        same = sum(group.layer == sink.layer and group.kind == kind for group in groups.values())
        name = f"{blocks[sink.layer]}.{kind}" + (f"{same + 1}" if same else "")
        axes = {
            module: Axis(group=name, width=width, offsets=offsets) for module, (width, offsets) in sink.axes.items()
        }
        groups[name] = Group(
            kind=kind,
            layer=sink.layer,
            units=sink.units,
            sink=sink.name,
            columns=axes[sink.name],
            sources={source: axes[source] for source in sink.rows},
        )
    return groups
