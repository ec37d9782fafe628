"""The `subspace` tuner: backpropagation within a sketch, with memory for K optimiser entries and one layer's gradient.

    theta = W0 + S c,    dL/dc = S' dL/dtheta,    c' = AdamW or SGD (c, dL/dc)

Each parameter's gradient is folded into the K-vector by a hook as soon as it is there, and let go; the weights are
rebuilt from W0 after each step, so they are round(W0 + S c) at any time.

With the knob `exchange = "gradient"` the model stays where it is and what is sent is minus the mean gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn

from fedloom.client import kernels
from fedloom.client.data import Dataset, batches
from fedloom.client.parts import Part
from fedloom.client.place import Place
from fedloom.client.training import clip_gradient, forward_logits, loss_sum, make_optimizer, read_knobs
from fedloom.protocols.messages import Over, Scalars, Task
from fedloom.protocols.seeds import derive_seed


def subspace(place: Place, dataset: Dataset, task: Task) -> tuple[Scalars, Mapping[str, float]]:
    """First-order tuning in a sketch: backpropagation, K numbers for an answer.

    Returns:
        The change of the coefficients (or minus the mean gradient), and what `lora` counts.

    Raises:
        ValueError: for a pool of directions, a bad knob, or when the loss stops being finite.
    """
    if place.subspace.family != "sketch":
        raise ValueError(f"the subspace tuner must have a sketch, got directions of family {place.subspace.family!r}")
    knobs = read_knobs(task)
    gradient = task.knobs.get("exchange", "delta") == "gradient"
    generator = torch.Generator().manual_seed(derive_seed(task.seed, "train", task.round, task.device))
    stream = batches(dataset, knobs.batch_size, knobs.steps * knobs.accumulate, generator)
    c = nn.Parameter(torch.zeros(place.subspace.k, dtype=torch.float32))
    c.grad = torch.zeros_like(c)
    optimizer = make_optimizer(c, knobs)
    total: dict[str, float] = {"n": 0, "loss_sum": 0.0, "tokens": 0, "steps": knobs.steps}
    place.rebuild()
    with folding(place, c.grad):
        for step in range(knobs.steps):
            parts = list(islice(stream, knobs.accumulate))
            tokens = sum(part.tokens for part in parts)
            for part in parts:
                loss = loss_sum(forward_logits(place.resident, part), part.labels)
                (loss / tokens).backward()  # type: ignore[no-untyped-call]
                total["loss_sum"] += loss.item()
            total["n"] += sum(len(part.ids) for part in parts)
            total["tokens"] += tokens
            if not math.isfinite(total["loss_sum"]):
                raise ValueError(f"training diverged: the loss of step {step + 1} is not finite, with lr {knobs.lr}")
            if gradient:
                continue
            clip_gradient(c.grad, knobs.clip)
            optimizer.step()
            c.grad.zero_()
            place.rebuild(place.start + c.detach().double().numpy())
    change = -c.grad / knobs.steps if gradient else c.detach()
    values = _clipped(change.numpy().copy(), task.scalar_limit)
    return Scalars(over=Over.BASIS, k=place.subspace.k, values=values), total


@contextmanager
def folding(place: Place, into: Tensor) -> Iterator[None]:
    """Backward passes in the block add S' grad to `into` [K], layer by layer, and keep no other gradient."""
    trained = {id(part.parameter): part.parameter.requires_grad for part in place.parts}
    hooks = []
    try:
        for part in place.parts:
            part.parameter.requires_grad_(True)
            hooks.append(part.parameter.register_post_accumulate_grad_hook(_fold(place, part, into)))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for part in place.parts:
            part.parameter.grad = None
            part.parameter.requires_grad_(trained[id(part.parameter)])


def _fold(place: Place, part: Part, into: Tensor) -> Callable[[Tensor], None]:
    seed = place.subspace.seed

    def fold(parameter: Tensor) -> None:
        if parameter.grad is None:
            return
        flat = parameter.grad.contiguous().view(-1)
        kernels.fold_sketch(into, flat if part.index is None else flat[part.index], name=part.name, seed=seed)
        parameter.grad = None

    return fold


def _clipped(values: np.ndarray, limit: float) -> np.ndarray:
    return np.clip(values, -limit, limit) if limit else values
