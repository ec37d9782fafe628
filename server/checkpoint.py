"""Checkpoints: one folder a round, state.safetensors beside run.json, whole or not there at all.

A checkpoint is written into a hidden folder, flushed to disk and renamed; run.json names the SHA-256 of the tensors and
its own, so that a torn or altered file is noticed. The newest checkpoint that reads well is the one that counts.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedloom.protocols.messages import ModelSpec
from fedloom.protocols.validate import one_line
from fedloom.server.disk import flush_folder, sealed, unsealed, write_flushed
from fedloom.strategies.base import State
from fedloom.strategies.packing import spec_from_meta, spec_to_meta

_NAME = re.compile(r"round-(\d{6})")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """All that a server needs to go on after round `round` as if nothing had happened."""

    run: str
    round: int
    state: State
    spec: ModelSpec
    roster: Mapping[str, Any]
    ledger: Mapping[str, Any] = field(default_factory=dict)
    refused: int = 0


def write_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep: int = 2) -> Path:
    """Write atomically, then drop all but the newest `keep`."""
    tensors = save({name: np.ascontiguousarray(value) for name, value in checkpoint.state.tensors.items()})
    about = {
        "run": checkpoint.run,
        "round": checkpoint.round,
        "version": checkpoint.state.version,
        "meta": checkpoint.state.meta,
        "spec": spec_to_meta(checkpoint.spec),
        "roster": checkpoint.roster,
        "ledger": checkpoint.ledger,
        "refused": checkpoint.refused,
        "sha256": hashlib.sha256(tensors).hexdigest(),
    }
    final = folder / f"round-{checkpoint.round:06d}"
    draft = folder / f".draft-{checkpoint.round:06d}"
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir(parents=True)
        write_flushed(draft / "state.safetensors", tensors)
        write_flushed(draft / "run.json", sealed(about))
    except OSError:
        shutil.rmtree(draft, ignore_errors=True)  # on a full disk, half a checkpoint is in everyone's way
        raise
    if final.exists():
        shutil.rmtree(final)
    os.replace(draft, final)
    flush_folder(folder)
    for old in _folders(folder)[keep:]:
        shutil.rmtree(old)
    return final


def read_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint folder.

    Raises:
        ValueError: when a file is missing, torn or altered.
    """
    try:
        about = unsealed((path / "run.json").read_bytes())
        tensors = (path / "state.safetensors").read_bytes()
        digest = hashlib.sha256(tensors).hexdigest()
        if digest != about["sha256"]:
            raise ValueError(f"tensors must have SHA-256 {about['sha256'][:12]}, got {digest[:12]}")
        if not all(type(about[name]) is int for name in ("round", "version", "refused")):
            raise ValueError("its round, version and refused must be whole numbers")
        return Checkpoint(
            run=about["run"],
            round=about["round"],
            state=State(version=about["version"], tensors=load(tensors), meta=about["meta"]),
            spec=spec_from_meta(about["spec"]),
            roster=about["roster"],
            ledger=about["ledger"],
            refused=about["refused"],
        )
    except (OSError, LookupError, TypeError, AttributeError, ValueError, SafetensorError) as error:
        problem = one_line(str(error))
        raise ValueError(f"checkpoint {path} cannot be read: {problem}") from None


def latest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that reads well, and a line about each newer one that does not.

    Raises:
        ValueError: when there are checkpoints but none reads well.
    """
    complaints: list[str] = []
    for path in _folders(folder):
        try:
            return read_checkpoint(path), complaints
        except ValueError as error:
            complaints.append(str(error))
    if complaints:
        raise ValueError(complaints[0])
    return None, []


def _folders(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    found = [path for path in folder.glob("round-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: path.name, reverse=True)
