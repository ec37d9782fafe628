"""What a pruned model's folder says of itself: what was kept of each group, and the SHA-256 of every file beside it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedloom.client.pruning.structure import Group, Structure
from fedloom.protocols.messages import Axis
from fedloom.strategies.choosing import GroupKind
from fedloom.strategies.masked import Bits, Keep

MANIFEST = "manifest.json"
FORMAT = 1
WEIGHTS = "model.safetensors"
NEEDED = (WEIGHTS, "config.json")
UNITS_LIMIT = 2**24


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A pruned model: how to make a model of its shapes, and what its files must hash to."""

    architecture: str  # the class in transformers
    structure: Structure
    keep: dict[str, Bits]
    biases: tuple[str, ...]  # sinks that have a bias, which their class does not give them
    tied: Mapping[str, str]  # a tensor that is not written: the one that it shares its numbers with
    files: Mapping[str, str]


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write manifest.json; the files must be there already."""
    groups = {name: _group(group, manifest.keep[name]) for name, group in manifest.structure.groups.items()}
    about: dict[str, Any] = {
        "format": FORMAT,
        "architecture": manifest.architecture,
        "layers": manifest.structure.layers,
        "groups": groups,
        "biases": sorted(manifest.biases),
        "tied": dict(manifest.tied),
        "files": dict(manifest.files),
    }
    about["digest"] = _digest(about)
    (folder / MANIFEST).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """Read manifest.json and hold every file that it names against its hash.

    Raises:
        ValueError: for a folder without one, one that was altered, and files that are missing or were altered.
    """
    path = folder / MANIFEST
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        digest = about.pop("digest")
        if about["format"] != FORMAT or digest != _digest(about):
            raise ValueError("its content must have the format and the digest that it names")
        groups = {name: _read_group(name, entry) for name, entry in about["groups"].items()}
        keep = {name: _bits(name, entry["kept"], entry["units"]) for name, entry in about["groups"].items()}
        manifest = Manifest(
            architecture=str(about["architecture"]),
            structure=Structure(layers=int(about["layers"]), groups=groups),
            keep=keep,
            biases=tuple(map(str, about["biases"])),
            tied=dict(about["tied"]),
            files=dict(about["files"]),
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        problem = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is not the manifest of a pruned model, or altered: {problem}") from None
    for name in NEEDED:
        if name not in manifest.files:
            raise ValueError(f"{path} is not the manifest of a pruned model, or altered: it names no {name}")
    for name, wanted in manifest.files.items():
        if Path(name).name != name or not (folder / name).is_file() or hash_file(folder / name) != wanted:
            raise ValueError(f"{folder / name} must be the file that {MANIFEST} names, it is missing or altered")
    return manifest


def read_keep(path: Path, units: Mapping[str, int]) -> dict[str, Bits]:
    """A keep from JSON: the kept units by group, or the manifest of a pruned model.

    Args:
        units: of each group of the model.

    Raises:
        ValueError: for a file that is no such thing, or does not fit the model.
    """
    try:
        about = json.loads(Path(path).read_text(encoding="utf-8"))
        if isinstance(about.get("groups"), dict):
            about = {name: entry["kept"] for name, entry in about["groups"].items()}
        unknown = sorted(about.keys() - units.keys())
        if unknown:
            raise ValueError(f"it must name groups of the model, got {unknown[0]!r}")
        return {name: _bits(name, indices, units[name]) for name, indices in about.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        problem = " ".join(str(error).split())[:200]
        raise ValueError(
            f"a keep must be JSON with lists of kept units by group, got {str(path)!r}: {problem}"
        ) from None


def hash_file(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def indices_of(keep: Keep) -> dict[str, list[int]]:
    """A keep as lists of kept units, as JSON has it."""
    return {name: np.flatnonzero(bits).tolist() for name, bits in keep.items()}


def _digest(about: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _bits(name: str, indices: Any, units: Any) -> Bits:
    if type(units) is not int or not 1 <= units <= UNITS_LIMIT:
        raise ValueError(f"{name} must have 1 to {UNITS_LIMIT} units, got {str(units)[:80]}")
    if not isinstance(indices, list) or not all(type(index) is int and 0 <= index < units for index in indices):
        raise ValueError(f"{name} must list units in 0..{units - 1}, got {str(indices)[:80]}")
    if not indices or sorted(set(indices)) != indices:
        raise ValueError(f"{name} must list kept units, ascending and at least one, got {str(indices)[:80]}")
    bits = np.zeros(units, np.bool_)
    bits[indices] = True
    return bits


def _group(group: Group, keep: Bits) -> dict[str, Any]:
    return {
        "kind": str(group.kind),
        "layer": group.layer,
        "units": group.units,
        "kept": np.flatnonzero(keep).tolist(),
        "sink": group.sink,
        "columns": _axis(group.columns),
        "sources": {module: _axis(axis) for module, axis in group.sources.items()},
        "attributes": [list(place) for place in group.attributes],
    }


def _axis(axis: Axis) -> dict[str, Any]:
    return {"width": axis.width, "offsets": list(axis.offsets)}


def _read_group(name: str, entry: Mapping[str, Any]) -> Group:
    def axis(parts: Mapping[str, Any]) -> Axis:
        width, offsets = int(parts["width"]), tuple(int(offset) for offset in parts["offsets"])
        if width < 1 or not offsets or min(offsets) < 0:
            raise ValueError(f"{name} must have axes of a width and offsets, got {parts}")
        return Axis(group=name, width=width, offsets=offsets)

    return Group(
        kind=GroupKind(entry["kind"]),
        layer=int(entry["layer"]),
        units=int(entry["units"]),
        sink=str(entry["sink"]),
        columns=axis(entry["columns"]),
        sources={str(module): axis(parts) for module, parts in entry["sources"].items()},
        attributes=tuple((str(module), str(attribute)) for module, attribute in entry["attributes"]),
    )
