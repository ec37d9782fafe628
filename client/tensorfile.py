"""A payload (and rows beside it) as one safetensors file: written whole or not at all, its metadata in the header.

Tensors: `a/{module}`, `b/{module}`, `dense/{name}`, `coefficients` (int64) and, of a pruned model's slice, the bitmaps
`keep/{group}` (bool, a byte a unit) of the payload, `warm/{module}` beside.
The header also holds a digest of all of it, so that a damaged file is noticed.
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

from fedloom.protocols import validate
from fedloom.protocols.messages import Array, Coefficients, LowRank, Payload
from fedloom.protocols.validate import one_line
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
    for group, bits in sorted(payload.keep.items()):
        digest.update(f"keep|{group}|{bits.shape}|".encode() + np.packbits(bits).tobytes())
    return digest.hexdigest()


def write_payload(path: Path, payload: Payload, warm: Mapping[str, Array], meta: Mapping[str, Any]) -> None:
    """Write a payload and what stands beside it."""
    tensors: dict[str, Array] = {f"dense/{name}": array for name, array in payload.dense.items()}
    tensors |= {f"warm/{name}": rows for name, rows in warm.items()}
    for name, factor in payload.factors.items():
        tensors |= {f"a/{name}": factor.a, f"b/{name}": factor.b}
    scales = {name: [factor.alpha, factor.rslora] for name, factor in payload.factors.items()}
    contiguous: dict[str, NDArray[Any]] = {n: np.ascontiguousarray(array, np.float32) for n, array in tensors.items()}
    contiguous |= {f"keep/{group}": np.ascontiguousarray(bits, np.bool_) for group, bits in payload.keep.items()}
    about = {**meta, "scales": scales}
    if payload.coefficients is not None:
        contiguous["coefficients"] = np.ascontiguousarray(payload.coefficients.steps, np.int64)
        about |= {"subspace": asdict(payload.coefficients.subspace), "exponent": payload.coefficients.exponent}
    text = json.dumps(about, sort_keys=True)
    write_whole(path, save(contiguous, metadata={"fedloom": text, "digest": _digest(contiguous, text)}))


def _digest(tensors: Mapping[str, NDArray[Any]], text: str) -> str:
    whole = hashlib.blake2b(text.encode(), digest_size=32)
    for name, tensor in sorted(tensors.items()):
        whole.update(f"|{name}|{tensor.dtype.str}|{tensor.shape}|".encode())
        whole.update(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
    return whole.hexdigest()


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


def read_payload(path: Path) -> tuple[Payload, dict[str, Array], dict[str, Any]]:
    """A payload, its warm rows and its metadata.

    Raises:
        ValueError: for a corrupted file, naming it.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        if _digest(tensors, header["fedloom"]) != header["digest"]:
            raise ValueError("its content must have the digest that it names")
        meta = dict(json.loads(header["fedloom"]))
        payload, warm = _parted(tensors, meta)
    except (OSError, SafetensorError, LookupError, ValueError, TypeError, AttributeError, RecursionError) as error:
        problem = one_line(str(error))
        raise ValueError(f"{path} is not a file of this device's store, or corrupted: {problem}") from None
    return payload, warm, meta


def _parted(tensors: Mapping[str, NDArray[Any]], meta: Mapping[str, Any]) -> tuple[Payload, dict[str, Array]]:
    """The payload and the warm rows in a file's tensors."""
    for name, tensor in tensors.items():
        wanted = np.int64 if name == "coefficients" else np.bool_ if name.startswith("keep/") else np.float32
        if tensor.dtype != wanted:
            raise ValueError(f"{name} must be {np.dtype(wanted)}, got {tensor.dtype}")
    factors = {
        name: LowRank(b=tensors[f"b/{name}"], a=tensors[f"a/{name}"], alpha=alpha, rslora=rslora)
        for name, (alpha, rslora) in meta["scales"].items()
    }
    coefficients = None
    if "subspace" in meta:
        subspace = subspace_from(meta["subspace"])
        coefficients = Coefficients(subspace=subspace, exponent=meta["exponent"], steps=tensors["coefficients"])
    dense, warm, keep = (
        {name.removeprefix(kind): array for name, array in tensors.items() if name.startswith(kind)}
        for kind in ("dense/", "warm/", "keep/")
    )
    payload = Payload(factors=factors, dense=dense, coefficients=coefficients, keep=keep)
    validate.check_payload("the payload", payload)
    return payload, warm
