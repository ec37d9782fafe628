"""The `subspace` tuner: backpropagation within a sketch, with memory for K optimiser entries and one layer's gradient.

    theta = W0 + S c,    dL/dc = S' dL/dtheta,    c' = AdamW or SGD (c, dL/dc)

Each parameter's gradient is folded into the K-vector by a hook as soon as it is there, and let go; the weights are
rebuilt from W0 after each step, so they are round(W0 + S c) at any time.

With the knob `exchange = "gradient"` the model stays where it is and what is sent is minus the mean gradient; with
`path` local steps are SGD's and what is sent is their mean, c / (lr T).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice

import torch
from torch import Tensor, nn

from fedloom.client import kernels
from fedloom.client.data import Dataset, batches
from fedloom.client.parts import Part
from fedloom.client.place import Place
from fedloom.client.progress import report
from fedloom.client.training import clip_gradient, forward_logits, loss_sum, make_optimizer, read_knobs
from fedloom.client.zeroth_order import clip_scalars, read_exchange
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
    knobs, exchange = read_knobs(task), read_exchange(task)
    if exchange == "path":
        knobs = knobs.model_copy(update={"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0})
    generator = torch.Generator().manual_seed(derive_seed(task.seed, "train", task.round, task.device))
    stream = batches(dataset, knobs.batch_size, knobs.steps * knobs.accumulate, generator)
    c = nn.Parameter(torch.zeros(place.subspace.k, dtype=torch.float32, device=place.resident.device))
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
            report(step + 1, knobs.steps, total["loss_sum"] / total["tokens"])
            if exchange == "gradient":
                continue
            clip_gradient(c.grad, knobs.clip)
            optimizer.step()
            c.grad.zero_()
            place.rebuild(place.start + c.detach().cpu().double().numpy())
    change = c.detach() / (knobs.lr * knobs.steps if exchange == "path" else 1.0)
    change = -c.grad / knobs.steps if exchange == "gradient" else change
    values = clip_scalars(change.cpu().numpy(), task.scalar_limit)
    return Scalars(over=Over.BASIS, k=place.subspace.k, values=values), total


@contextmanager
def folding(place: Place, into: Tensor) -> Iterator[None]:
    """Backward passes in the block add S' grad to `into` [K], layer by layer, and keep no other gradient.

    An embedding's gradient is made for the rows of the batch alone, where its table is used nowhere else.
    """
    trained = {id(part.parameter): part.parameter.requires_grad for part in place.parts}
    tables = lone_tables(place.resident.model)
    hooks = []
    try:
        for table in tables:
            table.sparse = True
        for part in place.parts:
            part.parameter.requires_grad_(True)
            fold = _fold(place, part, into)
            hooks.append(part.parameter.register_post_accumulate_grad_hook(fold))  # type: ignore[no-untyped-call]
        yield
    finally:
        for table in tables:
            table.sparse = False
        for hook in hooks:
            hook.remove()
        for part in place.parts:
            part.parameter.grad = None
            part.parameter.requires_grad_(trained[id(part.parameter)])


def lone_tables(model: nn.Module) -> list[nn.Embedding]:
    """The embeddings whose table is no other module's weight."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding) and not module.sparse]
    return [table for table in tables if owners[id(table.weight)] == 1 and not table.scale_grad_by_freq]


def _fold(place: Place, part: Part, into: Tensor) -> Callable[[Tensor], None]:
    seed = place.subspace.seed

    def fold(parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is None:
            return
        if part.index is not None:
            dense = gradient.to_dense() if gradient.is_sparse else gradient
            kernels.fold_sketch(into, dense.contiguous().view(-1)[part.index], name=part.name, seed=seed)
        elif gradient.is_sparse:
            rows = gradient.coalesce()
            for row, values in zip(rows.indices()[0].tolist(), rows.values(), strict=True):
                kernels.fold_sketch(into, values, name=part.name, seed=seed, start=row * values.numel())
        else:
            kernels.fold_sketch(into, gradient.contiguous().view(-1), name=part.name, seed=seed)

    return fold
