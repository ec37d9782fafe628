"""The `lora` tuner: AdamW or SGD on the adapters (and on a classifier's head), for a number of steps.

The loss of a step is the mean over all completion tokens of its `accumulate` batches (over all texts, for classifiers),
so that k small batches make the same step as one batch of their size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name that everyone knows it by
from torch import Tensor, nn

from fedloom.client.data import Batch, Dataset, batches
from fedloom.client.model import Resident
from fedloom.client.progress import report
from fedloom.protocols.config import Train
from fedloom.protocols.messages import Task
from fedloom.protocols.seeds import derive_seed


def forward_logits(resident: Resident, batch: Batch) -> Tensor:
    """The logits that `batch.labels` are about: [n, width, vocabulary], or [n, classes]."""
    options: dict[str, Any] = {"use_cache": False}
    if batch.width:  # right-padded texts keep the model's own positions, which RoBERTa counts from 2
        options |= {"position_ids": batch.positions, "logits_to_keep": batch.width + 1}
    taken = {name: value for name, value in options.items() if name in resident.forward_options}
    logits: Tensor = resident.model(input_ids=batch.ids, attention_mask=batch.mask, **taken).logits
    if not batch.width:
        return logits
    return logits[:, -batch.width - 1 : -1]  # column t predicts token t + 1


def loss_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy in float32, summed over what has a label."""
    return F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), reduction="sum")


class FlatParameters:
    """Parameters as views of one vector, and their gradients as views of another.

    Clipping and the optimiser then take a few calls on long vectors in place of some for each of a hundred factors.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.values = nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in parameters]))
        self.grad = self.values.grad = torch.zeros_like(self.values)
        at = 0
        for parameter in parameters:
            span = slice(at, at + parameter.numel())
            parameter.data = self.values.data[span].view_as(parameter)
            parameter.grad = self.grad[span].view_as(parameter)
            at += parameter.numel()


def tune(resident: Resident, dataset: Dataset, task: Task) -> Mapping[str, float]:
    """LoRA by backpropagation: AdamW or SGD on a device's own examples, for the steps that the task's knobs say.

    Returns:
        `loss_sum` and `tokens` over all batches (their ratio is the mean training loss), `n`, the examples seen, and
        `steps`.

    Raises:
        ValueError: for a bad knob, or when the loss stops being finite.
    """
    knobs = read_knobs(task)
    seed = derive_seed(task.seed, "train", task.round, task.device)
    generator = torch.Generator().manual_seed(seed)
    trained = [*resident.adapters.parameters(), *resident.base.heads.values()]
    flat = FlatParameters(trained)
    dropout = float(task.knobs.get("dropout", 0.0))
    stream = batches(dataset, knobs.batch_size, knobs.steps * knobs.accumulate, generator)
    resident.adapters.set_dropout(dropout)
    try:
        with torch.random.fork_rng(enabled=dropout > 0):
            if dropout > 0:
                torch.manual_seed(seed)
            return _steps(resident, stream, flat, knobs)
    finally:
        resident.adapters.set_dropout(0.0)
        for parameter in trained:
            parameter.grad = None


def read_knobs(task: Task) -> Train:
    """The training knobs of a task, checked as in a recipe; those that it leaves out keep the recipe's defaults."""
    known = {name: value for name, value in task.knobs.items() if name in Train.model_fields}
    try:
        return Train.model_validate(known)
    except ValueError as error:
        raise ValueError(f"the task's training knobs must be as in a recipe: {_first(error)}") from None


def _first(error: ValueError) -> str:
    details = getattr(error, "errors", None)
    if details is None:
        return str(error)
    first = details()[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}, got {first['input']!r}"


def _steps(resident: Resident, stream: Iterable[Batch], flat: FlatParameters, knobs: Train) -> dict[str, float]:
    optimizer = make_optimizer(flat.values, knobs)
    total: dict[str, float] = {"n": 0, "loss_sum": 0.0, "tokens": 0, "steps": knobs.steps}
    remaining = iter(stream)
    for step in range(knobs.steps):
        parts = list(islice(remaining, knobs.accumulate))
        tokens = sum(part.tokens for part in parts)
        for part in parts:
            loss = loss_sum(forward_logits(resident, part), part.labels)
            (loss / tokens).backward()  # type: ignore[no-untyped-call]
            total["loss_sum"] += loss.item()
        total["n"] += sum(len(part.ids) for part in parts)
        total["tokens"] += tokens
        if not math.isfinite(total["loss_sum"]):
            raise ValueError(f"training diverged: the loss of step {step + 1} is not finite, with lr {knobs.lr}")
        if resident.adapters.on_gradients is not None:
            resident.adapters.on_gradients(resident.adapters)
        clip_gradient(flat.grad, knobs.clip)
        optimizer.step()
        flat.grad.zero_()
        report(step + 1, knobs.steps, total["loss_sum"] / total["tokens"])
    if not bool(torch.isfinite(flat.values).all()):
        raise ValueError(f"training diverged: the adapter is not finite after {knobs.steps} steps, with lr {knobs.lr}")
    return total


def clip_gradient(gradient: Tensor, limit: float) -> None:
    """Scale a gradient to a norm of at most `limit`, as torch's clip_grad_norm_ does; 0 leaves it alone."""
    if limit:
        gradient.mul_((limit / (torch.linalg.vector_norm(gradient) + 1e-6)).clamp_(max=1.0))


def make_optimizer(values: nn.Parameter, knobs: Train) -> torch.optim.Optimizer:
    """The local optimiser that a recipe asks for."""
    if knobs.optimizer == "adamw":
        return torch.optim.AdamW([values], lr=knobs.lr, weight_decay=knobs.weight_decay, fused=True)
    return torch.optim.SGD([values], lr=knobs.lr, momentum=knobs.momentum, weight_decay=knobs.weight_decay)
