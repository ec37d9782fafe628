"""Which units matter, from the gradients of the adapters alone (LoRAPrune, Zhang et al. 2023, eq. 6 to 8).

    g = g_B A + B g_A - g_B g_A                 the gradient of a frozen weight, from its adapter's two
    s = |g * (W + scaling B A)|                 entry by entry; summed over a unit's rows or columns, divided by the
                                                module's mean, and averaged over the modules of a group
    S_t = 0.9 S_{t-1} + 0.1 s                   over the steps

g = [g_B | B] [A - g_A ; g_A] has rank 2 r and exists some rows at a time. Legend: W [d_out, d_in], B [d_out, r],
A [r, d_in]; g_B and g_A of the same shapes; units of a group as they stand in the whole model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedloom.client.bits import quantised
from fedloom.client.lora import ADAPTER, Adapters
from fedloom.client.pruning.cut import logical, plain
from fedloom.client.pruning.narrowing import Prunable
from fedloom.protocols.messages import Axis

DECAY = 0.9
CHUNK = 2**16  # entries of g that exist at once: few enough to stay in the cache


@dataclass(kw_only=True)
class Importance:
    """Scores that follow the steps of a training, from those of an earlier one if `scores` are given."""

    prunable: Prunable
    scores: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    _seen: dict[str, NDArray[np.bool_]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._seen = {name: np.ones(len(values), np.bool_) for name, values in self.scores.items()}

    def observe(self, adapters: Adapters) -> None:
        """Take in the gradients that the adapters hold: after `backward`, before they are zeroed.

        Units that were pruned keep their last score; one that is new, or regrown, starts from what it has now.

        Raises:
            ValueError: when no adapted module of a group has a gradient.
        """
        for name, now in self._measure(adapters).items():
            bits = self.prunable.keep[name]
            before = self.scores.get(name, np.zeros(len(bits)))
            seen = self._seen.get(name, np.zeros(len(bits), np.bool_))
            value = np.zeros(len(bits))
            value[bits] = now
            mixed = np.where(seen, DECAY * before + (1 - DECAY) * value, value)
            self.scores[name] = np.where(bits, mixed, before)
            self._seen[name] = bits.copy()

    def _measure(self, adapters: Adapters) -> dict[str, NDArray[np.float64]]:
        """[kept units] by group."""
        found = {}
        measured: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}
        for name, group in self.prunable.structure.groups.items():
            sides = [(source, axis, 0) for source, axis in group.sources.items()] + [(group.sink, group.columns, 1)]
            parts = []
            for module, axis, side in sides:
                if module in adapters.layers:
                    if module not in measured:  # a module may be the sink of one group and a source of another
                        measured[module] = entry_scores(adapters.layers[module])
                    parts.append(by_unit(measured[module][side], axis))
            if not parts:
                raise ValueError(f"a group to prune must have an adapted module, {name} has none")
            found[name] = np.mean([part / part.mean() if part.mean() > 0 else part for part in parts], axis=0)
        return found


def entry_scores(layer: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """|g * (W + scaling B A)| of one adapted layer, summed over each row [d_out] and each column [d_in].

    An A that takes no gradient counts as g_A = 0.

    Raises:
        ValueError: for a layer whose B has no gradient.
    """
    a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    if b.grad is None:
        raise ValueError("importance must be measured between backward and zero_grad, an adapter has no gradient")
    scale = float(layer.scaling[ADAPTER])
    with torch.no_grad():
        grad_a = torch.zeros_like(a) if a.grad is None else a.grad
        left, right = torch.cat([b.grad, b], 1), torch.cat([a - grad_a, grad_a])
        codes = quantised(plain(layer))
        weight = codes.logical() if codes else logical(layer)
        rows, columns = [], torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
        step = max(CHUNK // weight.shape[1], 1)
        for at in range(0, weight.shape[0], step):
            part = torch.addmm(weight[at : at + step].float(), b[at : at + step], a, alpha=scale)
            part.mul_(left[at : at + step] @ right).abs_()
            rows.append(part.sum(1))  # float32: a tenth of the time, and nothing cancels
            columns += part.sum(0)
    return torch.cat(rows).double().cpu().numpy(), columns.cpu().numpy()


def by_unit(values: NDArray[np.float64] | Tensor, axis: Axis) -> NDArray[np.float64]:
    """Values of a side, summed over what each unit that is there owns: [rows or columns] to [kept units]."""
    whole = np.asarray(values, np.float64)
    units: NDArray[np.float64] = whole.reshape(len(axis.offsets), -1, axis.width).sum((0, 2))
    return units
