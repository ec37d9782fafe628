"""A payload (and rows beside it) as one safetensors file: written whole or not at all, its metadata in the header.

Tensors: `a/{module}`, `b/{module}`, `dense/{name}` and `coefficients` (int64) of the payload, `warm/{module}` beside.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedloom.protocols.messages import Array, Coefficients, LowRank, Payload
from fedloom.strategies.coefficients import subspace_from


def digest_payload(payload: Payload) -> str:
    """A hash of a payload's content."""
    digest = hashlib.blake2b(digest_size=16)
    for name, factor in sorted(payload.factors.items()):
        digest.update(f"factor|{name}|{factor.b.shape}|{factor.a.shape}|{factor.alpha}|{factor.rslora}|".encode())
        for part in (factor.b, factor.a):
            digest.update(np.ascontiguousarray(part, np.float32).tobytes())
    for name, array in sorted(payload.dense.items()):
        digest.update(f"dense|{name}|{array.shape}|".encode())
        digest.update(np.ascontiguousarray(array, np.float32).tobytes())
    if payload.coefficients is not None:
        digest.update(f"coefficients|{payload.coefficients.subspace}|{payload.coefficients.exponent}|".encode())
        digest.update(np.ascontiguousarray(payload.coefficients.steps, "<i8").tobytes())
    return digest.hexdigest()


def write_payload(path: Path, payload: Payload, warm: Mapping[str, Array], meta: Mapping[str, Any]) -> None:
    """Write a payload and what stands beside it."""
    tensors: dict[str, Array] = {f"dense/{name}": array for name, array in payload.dense.items()}
    tensors |= {f"warm/{name}": rows for name, rows in warm.items()}
    for name, factor in payload.factors.items():
        tensors |= {f"a/{name}": factor.a, f"b/{name}": factor.b}
    scales = {name: [factor.alpha, factor.rslora] for name, factor in payload.factors.items()}
    contiguous: dict[str, NDArray[Any]] = {n: np.ascontiguousarray(array, np.float32) for n, array in tensors.items()}
    about = {**meta, "scales": scales}
    if payload.coefficients is not None:
        contiguous["coefficients"] = np.ascontiguousarray(payload.coefficients.steps, np.int64)
        about |= {"subspace": asdict(payload.coefficients.subspace), "exponent": payload.coefficients.exponent}
    frame = save(contiguous, metadata={"fedloom": json.dumps(about, sort_keys=True)})
    write_whole(path, frame)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file atomically: another process sees the old file or the new one, and so does a restart."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise


def read_header(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="numpy") as file:
            return dict(json.loads((file.metadata() or {})["fedloom"]))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is not a file of this device's store, or corrupted: {error}") from None


def read_payload(path: Path) -> tuple[Payload, dict[str, Array], dict[str, Any]]:
    """A payload, its warm rows and its metadata.

    Raises:
        ValueError: for a corrupted file, naming it.
    """
    meta = read_header(path)
    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        factors = {
            name: LowRank(b=tensors[f"b/{name}"], a=tensors[f"a/{name}"], alpha=alpha, rslora=rslora)
            for name, (alpha, rslora) in meta["scales"].items()
        }
        coefficients = None
        if "subspace" in meta:
            steps = tensors["coefficients"].astype(np.int64)
            subspace = subspace_from(meta["subspace"])
            coefficients = Coefficients(subspace=subspace, exponent=meta["exponent"], steps=steps)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is corrupted: {error}") from None
    dense = {name.removeprefix("dense/"): array for name, array in tensors.items() if name.startswith("dense/")}
    warm = {name.removeprefix("warm/"): array for name, array in tensors.items() if name.startswith("warm/")}
    return Payload(factors=factors, dense=dense, coefficients=coefficients), warm, meta
