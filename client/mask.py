"""A static sparse mask: the few weights that zeroth-order tuning moves, chosen once on public text.

    score_i = (sum over batches of dL/dw_i)^2,    the mask holds the share of weights with the largest scores

after SensZOQ (Guo et al. 2024) and Meerkat: sensitive weights found on public text stay so on private data. Gradients
differ in their last bits from machine to machine, so a mask is made once and handed out with the base, and every
message about it names its SHA-256. A classifier's head, which starts random, is always in it.

A mask is a safetensors file of ascending int64 places in each flat parameter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedloom.client.parts import parameter_names
from fedloom.protocols.validate import one_line

if TYPE_CHECKING:
    from fedloom.client.data import Dataset
    from fedloom.client.model import Resident

BATCHES = 32


def hash_mask(mask: Mapping[str, Tensor]) -> str:
    """SHA-256 over the sorted names and places of a mask."""
    digest = hashlib.sha256()
    for name, index in sorted(mask.items()):
        digest.update(f"{name}|{len(index)}|".encode())
        digest.update(index.numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def read_mask(path: Path) -> tuple[dict[str, Tensor], str]:
    """A mask and its hash.

    Raises:
        ValueError: for a file that is no mask.
    """
    try:
        mask = dict(sorted(load_file(path).items()))
    except (OSError, SafetensorError, RuntimeError, ValueError, LookupError, TypeError) as error:
        problem = one_line(str(error))
        raise ValueError(f"model.mask must be a file that `fedloom mask` made, got {str(path)!r}: {problem}") from None
    if not mask:
        raise ValueError(f"model.mask must be a file that `fedloom mask` made, got {str(path)!r}, which is empty")
    for name, index in mask.items():
        rising = index.dtype == torch.int64 and index.ndim == 1 and len(index) and bool((index.diff() > 0).all())
        if not (rising and int(index[0]) >= 0):
            raise ValueError(
                f"a mask of {name} must hold ascending int64 places, got {index.dtype} {list(index.shape)}"
            )
    return mask, hash_mask(mask)


def make_mask(resident: Resident, dataset: Dataset, *, share: float, batch_size: int) -> dict[str, Tensor]:
    """The most sensitive weights on a public data set.

    Args:
        share: of all weights outside a classifier's head, 0..1.

    Raises:
        ValueError: for a share that is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}")
    scores = _scores(resident, dataset, batch_size)
    heads = {name: torch.arange(head.numel()) for name, head in resident.base.heads.items()}
    names = [name for name in scores if name not in heads]
    every = torch.cat([scores[name] for name in names])
    count = max(1, round(share * len(every)))
    chosen = torch.topk(every, count).indices.sort().values.numpy()
    ends = np.cumsum([len(scores[name]) for name in names])
    parts = np.split(chosen, np.searchsorted(chosen, ends[:-1]))
    starts = [0, *ends[:-1].tolist()]
    found = {
        name: torch.from_numpy(part - start)
        for name, part, start in zip(names, parts, starts, strict=True)
        if len(part)
    }
    return dict(sorted({**found, **heads}.items()))


def write_mask(mask: Mapping[str, Tensor], path: Path) -> str:
    """Write a mask, and return its hash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(mask), path)
    return hash_mask(mask)


def _scores(resident: Resident, dataset: Dataset, batch_size: int) -> dict[str, Tensor]:
    """Squared gradients of the mean loss at the base, flat, by parameter."""
    from fedloom.client.training import forward_logits, loss_sum

    resident.rebuilt.restore()
    resident.base.restore()
    parameters = parameter_names(resident.model)
    trained = {name: parameter.requires_grad for name, parameter in parameters.items()}
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        with resident.adapters.disabled():
            for group in dataset.by_length(batch_size)[:BATCHES]:
                batch = dataset.batch(group)
                loss = loss_sum(forward_logits(resident, batch), batch.labels) / batch.tokens
                loss.backward()  # type: ignore[no-untyped-call]
        return {
            name: (torch.zeros_like(p) if p.grad is None else p.grad).float().square().flatten().cpu()
            for name, p in parameters.items()
        }
    finally:
        for name, parameter in parameters.items():
            parameter.grad = None
            parameter.requires_grad_(trained[name])
