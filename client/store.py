"""What a device keeps on disk: the accumulated patch at its last few versions, and its own adapters of its last rounds.

    patch_dir/v{version}.safetensors   the accumulated payload, and `warm/{module}`: leading rows of the newest delta's A
    state_dir/r{round}.safetensors     the adapter (and head) that the device ended a round with

A file is written whole or not at all, says in its header which run it belongs to, and one of another run counts as
absent. In a simulation, devices share `patch_dir`: a version of a run has the same content for all of them.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedloom.client.patching import BASE
from fedloom.protocols.messages import Array, LowRank, ModelSpec, Patch, Payload
from fedloom.strategies.lowrank import add

WARM_ROWS = 64
PATCHES_KEPT = 8  # versions kept below the newest
STATES_KEPT = 2
CACHED = 2  # patches in memory, shared by the devices of a process


class StaleVersion(ValueError):  # noqa: N818 - a refusal, named for what the server does about it
    """The device does not hold the version that a patch builds on; `version` is what it does hold."""

    def __init__(self, message: str, version: int) -> None:
        super().__init__(message)
        self.version = version


@dataclass(frozen=True, kw_only=True)
class Held:
    """The global model at one version: the accumulated payload, and where the next adapters may start."""

    version: int
    payload: Payload = field(default_factory=Payload)
    warm: Mapping[str, Array] = field(default_factory=dict)  # module: [up to WARM_ROWS, d_in]
    key: Hashable = BASE  # the same key means the same content


_cache: OrderedDict[Hashable, Held] = OrderedDict()

class DeviceStore:
    """One device's files."""

    def __init__(self, patch_dir: Path, state_dir: Path) -> None:
        """The folders are made when something is first written."""
        self.patch_dir, self.state_dir = Path(patch_dir), Path(state_dir)

    def take(self, patch: Patch | None, spec: ModelSpec, run: str) -> Held:
        """The version that a task asks for, added up and written down if it is new. No patch means the base itself.

        Raises:
            StaleVersion: when the patch builds on a version that this device does not hold.
            ValueError: for a patch of another base, or a corrupted file.
        """
        if patch is None:
            return Held(version=0)
        if patch.base_hash != spec.base_hash:
            raise ValueError(
                f"the patch must be for this device's base {spec.base_hash[:12]}, got one for {patch.base_hash[:12]}"
            )
        if patch.version == 0:
            return Held(version=0)
        try:
            held = self._load(patch.version, run)
        except ValueError:
            if patch.since:
                raise
            held = None  # a whole patch heals a corrupted file
        if held is None:
            self._write_patch(self._advance(patch, spec, run), spec, run)
            held = self._load(patch.version, run)
        if held is None:
            raise ValueError(f"{self._patch_path(patch.version)} must be there once written, got nothing")
        return held

    def newest_version(self, run: str | None = None) -> int:
        """The newest version on disk (of `run`, if given); 0 for the base."""
        for version in sorted(_numbers(self.patch_dir, "v"), reverse=True):
            if run is None or _header(self._patch_path(version)).get("run") == run:
                return version
        return 0

    def newest_state(self) -> int:
        """The last round whose adapter is on disk; 0 for none."""
        return max(_numbers(self.state_dir, "r"), default=0)

    def load_state(self, round: int, run: str) -> Payload | None:
        """The device's own adapter after a round; None when it has none of this run."""
        path = self.state_dir / f"r{round}.safetensors"
        if round < 1 or not path.exists():
            return None
        payload, _, meta = _read(path)
        return payload if meta["run"] == run else None

    def save_state(self, round: int, run: str, payload: Payload) -> None:
        """Keep the adapter of a round and of the one before; later rounds, of a run that went back, are dropped."""
        _write(self.state_dir / f"r{round}.safetensors", payload, {}, {"run": run, "round": round})
        rounds = sorted(_numbers(self.state_dir, "r"))
        keep = [number for number in rounds if number <= round][-STATES_KEPT:]
        for number in set(rounds) - set(keep):
            (self.state_dir / f"r{number}.safetensors").unlink(missing_ok=True)

    def _advance(self, patch: Patch, spec: ModelSpec, run: str) -> Held:
        """P_v from P_s and what came since."""
        warm = {name: np.asarray(factor.a[:WARM_ROWS], np.float32) for name, factor in patch.payload.factors.items()}
        if patch.since == 0:
            return Held(version=patch.version, payload=patch.payload, warm=warm)
        older = self._load(patch.since, run)
        if older is None:
            version = self.newest_version(run)
            raise StaleVersion(f"the patch must build on a version held here ({version}), got {patch.since}", version)
        if not patch.payload:
            return Held(version=patch.version, payload=older.payload, warm=older.warm)
        return Held(version=patch.version, payload=add(patch.payload, older.payload, spec), warm=warm)

    def _load(self, version: int, run: str) -> Held | None:
        path = self._patch_path(version)
        try:
            stat = path.stat()
        except FileNotFoundError:
            return None
        key = (str(path), run, stat.st_ino, stat.st_mtime_ns, stat.st_size)
        if key not in _cache:
            payload, warm, meta = _read(path)
            if meta["run"] != run:
                return None
            _cache[key] = Held(version=version, payload=payload, warm=warm, key=key)
            while len(_cache) > CACHED:
                _cache.popitem(last=False)
        _cache.move_to_end(key)
        return _cache[key]

    def _write_patch(self, held: Held, spec: ModelSpec, run: str) -> None:
        meta = {"run": run, "version": held.version, "base_hash": spec.base_hash}
        _write(self._patch_path(held.version), held.payload, held.warm, meta)
        for version in _numbers(self.patch_dir, "v"):
            if version < held.version - PATCHES_KEPT:
                self._patch_path(version).unlink(missing_ok=True)

    def _patch_path(self, version: int) -> Path:
        return self.patch_dir / f"v{version}.safetensors"


def _numbers(folder: Path, letter: str) -> list[int]:
    names = (path.stem.removeprefix(letter) for path in folder.glob(f"{letter}*.safetensors"))
    return [int(name) for name in names if name.isdecimal()]


def _write(path: Path, payload: Payload, warm: Mapping[str, Array], meta: Mapping[str, Any]) -> None:
    """Write a payload atomically: another process sees the old file or the new one, and so does a restart."""
    tensors: dict[str, Array] = {f"dense/{name}": array for name, array in payload.dense.items()}
    tensors |= {f"warm/{name}": rows for name, rows in warm.items()}
    for name, factor in payload.factors.items():
        tensors |= {f"a/{name}": factor.a, f"b/{name}": factor.b}
    scales = {name: [factor.alpha, factor.rslora] for name, factor in payload.factors.items()}
    contiguous = {name: np.ascontiguousarray(array, np.float32) for name, array in tensors.items()}
    frame = save(contiguous, metadata={"fedloom": json.dumps({**meta, "scales": scales}, sort_keys=True)})
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(frame)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise


def _header(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="numpy") as file:
            return dict(json.loads((file.metadata() or {})["fedloom"]))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is not a file of this device's store, or corrupted: {error}") from None


def _read(path: Path) -> tuple[Payload, dict[str, Array], dict[str, Any]]:
    """A payload, its warm rows and its metadata.

    Raises:
        ValueError: for a corrupted file, naming it.
    """
    meta = _header(path)
    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        factors = {
            name: LowRank(b=tensors[f"b/{name}"], a=tensors[f"a/{name}"], alpha=alpha, rslora=rslora)
            for name, (alpha, rslora) in meta["scales"].items()
        }
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is corrupted: {error}") from None
    dense = {name.removeprefix("dense/"): array for name, array in tensors.items() if name.startswith("dense/")}
    warm = {name.removeprefix("warm/"): array for name, array in tensors.items() if name.startswith("warm/")}
    return Payload(factors=factors, dense=dense), warm, meta
