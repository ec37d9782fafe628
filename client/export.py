"""The global model for others: a PEFT adapter folder, the merged model, or the merged model cut down.

Low-rank terms keep their factors (the scale folded into B, so alpha equals the rank); a dense term of a matrix becomes
the factors of its SVD at full numerical rank, since PEFT has no other form for it. A classifier's head goes in whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from fedloom.client.lora import head_modules
from fedloom.client.model import Resident
from fedloom.client.place import Place
from fedloom.client.pruning.narrowing import Biases, apply_keep
from fedloom.client.pruning.saved import save_pruned
from fedloom.protocols.messages import LowRank, MatrixSpec, Payload, Scope, unscaled
from fedloom.strategies.choosing import whole
from fedloom.strategies.masked import Keep, slice_payload

_PREFIX = "base_model.model"


def export_peft(payload: Payload, resident: Resident, folder: Path) -> None:
    """Write an adapter that `peft.PeftModel.from_pretrained(base, folder)` loads.

    Args:
        payload: the global model relative to the public base.
        resident: the base; its weights are not changed.

    Raises:
        ValueError: for a payload of another model.
    """
    _check_names(payload, resident)
    payload = _without_scope(payload, resident)
    if payload.coefficients is not None:
        raise ValueError("a model tuned in a subspace must be exported whole (format merged), got format peft")
    matrices = resident.spec.matrices
    factors = {name: _as_factors(name, payload, size) for name, size in matrices.items()}
    kept = {name: factor for name, factor in factors.items() if factor is not None}
    if not kept:  # PEFT wants a target; this one adds nothing
        name, size = next(iter(matrices.items()))
        kept = {name: unscaled(np.zeros((size.d_out, 1), np.float32), np.zeros((1, size.d_in), np.float32))}
    tensors = {f"{_PREFIX}.{name}.lora_A.weight": _tensor(factor.a) for name, factor in kept.items()}
    tensors |= {f"{_PREFIX}.{name}.lora_B.weight": _tensor(factor.b) for name, factor in kept.items()}
    for name in resident.base.heads:
        head = resident.base.pristine(name)
        tensors[f"{_PREFIX}.{name}"] = head + _tensor(payload.dense[name]) if name in payload.dense else head
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _config(kept, resident).save_pretrained(str(folder))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")


def export_merged(payload: Payload, resident: Resident, folder: Path) -> None:
    """Write the model with the payload merged in, and its tokenizer, as `from_pretrained` loads them.

    The resident is left at its public base.

    Raises:
        ValueError: for a payload of another model.
    """
    with _at(_without_scope(payload, resident), resident):
        resident.model.save_pretrained(folder, state_dict=_state(resident))
        resident.tokenizer.save_pretrained(folder)


def export_pruned(payload: Payload, resident: Resident, folder: Path, keep: Keep, biases: Biases | None = None) -> None:
    """Write the model with the payload merged in and its units outside `keep` removed, as `load_pruned` loads it.

    The resident is left whole, at its public base, with the adapters that it had.

    Args:
        payload: of the whole model, or the slice of it that `keep` leaves.
        biases: added to output and down projections, by module (fluctuation.recovery).

    Raises:
        ValueError: for a payload of another model or keep, or a resident that cannot be pruned.
    """
    if resident.prunable is None:
        raise ValueError("a model must be loaded with prunable=True to be exported pruned, this one was not")
    payload = _without_scope(payload, resident)
    if payload.coefficients is not None:
        raise ValueError("a model tuned in a subspace must be exported whole (format merged), got format pruned")
    if payload.keep:
        wanted, got = (whole(bits, resident.spec.groups) for bits in (keep, payload.keep))
        if any(not np.array_equal(wanted[name], got[name]) for name in wanted):
            raise ValueError("a slice of a payload must have the keep that is exported, got another")
    else:
        payload = slice_payload(payload, resident.spec, keep)
    adapters = resident.adapters.get_factors()
    try:
        apply_keep(resident, keep, biases)
        resident.base.apply(("export", object()), payload)
        save_pruned(resident.prunable, _state(resident), resident.tokenizer, folder)
    finally:
        resident.base.restore()
        apply_keep(resident, {})
        resident.adapters.set_factors(adapters)


def _state(resident: Resident) -> dict[str, Tensor]:
    """The model's tensors by the names that they have without adapters, the head in the dtype of the model."""
    state = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in resident.model.state_dict().items()
        if ".lora_" not in name
    }
    dtype = getattr(torch, resident.config.dtype)
    return state | {name: state[name].to(dtype) for name in resident.base.heads}


@contextmanager
def _at(payload: Payload, resident: Resident) -> Iterator[None]:
    """The resident with a payload merged in; at its public base again after the block."""
    key = ("export", object())
    c = payload.coefficients
    if c is None:
        resident.rebuilt.restore()
        resident.base.apply(key, payload)
        try:
            yield
        finally:
            resident.base.restore()
        return
    with Place(resident, c.subspace, c, key) as place:
        place.rebuild()
        try:
            yield
        finally:
            resident.rebuilt.restore()
            resident.base.restore()


def _without_scope(payload: Payload, resident: Resident) -> Payload:
    """Coefficients of adapters as the adapters that they stand for; any other payload as it is."""
    c = payload.coefficients
    if c is None or c.subspace.scope != Scope.LORA:
        return payload
    with Place(resident, c.subspace, c, object()) as place:
        place.rebuild()
        heads = resident.base.heads
        moved = {
            name: head.detach().cpu().numpy() - resident.base.pristine(name).numpy() for name, head in heads.items()
        }
        factors = resident.adapters.get_factors()
    resident.base.restore()
    return Payload(factors=factors, dense=moved)


def _config(factors: dict[str, LowRank], resident: Resident) -> LoraConfig:
    """The ranks differ by module, so each is given by its whole name, from the start of the path (`^`)."""
    ranks = {name: factor.rank for name, factor in factors.items()}
    common = max(set(ranks.values()), key=list(ranks.values()).count)
    odd = {f"^{name}": rank for name, rank in ranks.items() if rank != common}
    classify = resident.config.task == "classify"
    kinds = {resident.spec.matrices[name].kind for name in factors}
    return LoraConfig(
        r=common,
        lora_alpha=common,
        rank_pattern=odd,
        alpha_pattern=dict(odd),
        target_modules=sorted(factors),
        modules_to_save=sorted(head_modules(resident.model, "classify")) if classify else None,
        task_type="SEQ_CLS" if classify else "CAUSAL_LM",
        fan_in_fan_out=kinds == {"conv1d"},
        base_model_name_or_path=resident.config.path,
        inference_mode=True,
    )


def _as_factors(name: str, payload: Payload, size: MatrixSpec) -> LowRank | None:
    """One matrix's whole delta as unscaled float32 factors; None when there is none."""
    factor = payload.factors.get(name)
    if name not in payload.dense:
        if factor is None:
            return None
        return unscaled((factor.b * np.float32(factor.scale)).astype(np.float32), factor.a.astype(np.float32))
    dense = payload.dense[name].astype(np.float64)
    if factor is not None:
        dense = dense + factor.scale * (factor.b.astype(np.float64) @ factor.a.astype(np.float64))
    u, s, vt = np.linalg.svd(dense, full_matrices=False)
    rank = int(np.sum(s > s[0] * max(dense.shape) * np.finfo(np.float32).eps)) if s[0] > 0 else 0
    if rank == 0:
        return None
    root = np.sqrt(s[:rank])
    return unscaled((u[:, :rank] * root).astype(np.float32), (root[:, None] * vt[:rank]).astype(np.float32))


def _check_names(payload: Payload, resident: Resident) -> None:
    known: dict[str, Any] = {**resident.spec.matrices, **resident.base.heads}
    for name in (*payload.factors, *payload.dense):
        if name not in known:
            raise ValueError(f"a payload must name parts of the model, got {name!r}")


def _tensor(array: np.ndarray[Any, Any]) -> Tensor:
    return torch.tensor(array, dtype=torch.float32)
