"""What a device keeps on disk: the accumulated patch at its latest versions, and its own adapters of its last rounds.

    patch_dir/v{version}-{lineage}.safetensors   the accumulated payload; `warm/{module}`: leading rows of the newest A
    state_dir/held.json                          which lineage of each version this device holds
    state_dir/r{round}.safetensors               the adapter (and head) that the device ended a round with

A version's lineage is a hash of every payload that led to it. Devices that reach a version by different ways (round by
round, or at once from the base) hold the same model up to float32 rounding but not to the last bit, so each way has a
file of its own: in a simulation devices share `patch_dir`, one file serves all that came the same way, and no device's
bits depend on which process was first. A file is written whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import numpy as np

from fedloom.client.patching import BASE
from fedloom.client.tensorfile import digest_payload, read_payload, write_payload, write_whole
from fedloom.protocols.messages import Array, ModelSpec, Patch, Payload
from fedloom.strategies.coefficients import WINDOW
from fedloom.strategies.lowrank import add

WARM_ROWS = 64
PATCHES_KEPT = 8  # versions kept below the newest, of factors and dense tensors
COEFFICIENTS_KEPT = WINDOW  # of coefficients, which are small: as far back as a server sends changes
STATES_KEPT = 2
HELD_FILE = "held.json"
CACHED = 4  # patches in memory, shared by the devices of a process
_LINEAGE = re.compile("[0-9a-f]{20}")


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
        """The folders are made when something is first written; devices of a simulation share `patch_dir`."""
        self.patch_dir, self.state_dir = Path(patch_dir), Path(state_dir)

    def take(self, patch: Patch | None, spec: ModelSpec, run: str) -> Held:
        """The version that a task asks for, added up and written down if it is new. No patch means the base itself.

        Raises:
            StaleVersion: when the patch builds on a version that this device does not hold.
            ValueError: for a patch of another base, one that does not fit the model, or a corrupted file.
        """
        if patch is None:
            return Held(version=0)
        if patch.base_hash != spec.base_hash:
            raise ValueError(
                f"the patch must be for this device's base {spec.base_hash[:12]}, got one for {patch.base_hash[:12]}"
            )
        _check_fits(patch.payload, spec)
        if patch.version == 0:
            return Held(version=0)
        before = self._lineages(run).get(patch.since, "") if patch.since else "base"
        if patch.since == patch.version:
            return self._load(patch.since, before) or self._stale(patch.since, run)
        lineage = _lineage(run, before, patch)
        try:
            held = self._load(patch.version, lineage)
        except ValueError:
            held = None  # corrupted: made again
        if held is None:
            self._write_patch(self._advance(patch, spec, run, before), lineage)
            held = self._load(patch.version, lineage)
        self._hold(run, patch.version, lineage)
        return held or self._stale(patch.version, run)

    def newest_version(self, run: str | None = None) -> int:
        """The newest version held (of `run`, if given); 0 for the base."""
        lineages = self._lineages(run)
        return max((v for v, lineage in lineages.items() if self._patch_path(v, lineage).exists()), default=0)

    def newest_state(self) -> int:
        """The last round whose adapter is on disk; 0 for none."""
        return max(_numbers(self.state_dir, "r"), default=0)

    def load_state(self, round: int, run: str) -> Payload | None:
        """The device's own adapter after a round; None when it has none of this run."""
        path = self.state_dir / f"r{round}.safetensors"
        if round < 1 or not path.exists():
            return None
        payload, _, meta = read_payload(path)
        return payload if meta.get("run") == run else None

    def save_state(self, round: int, run: str, payload: Payload) -> None:
        """Keep the adapter of a round and of the one before; later rounds, of a run that went back, are dropped."""
        write_payload(self.state_dir / f"r{round}.safetensors", payload, {}, {"run": run, "round": round})
        rounds = sorted(_numbers(self.state_dir, "r"))
        keep = [number for number in rounds if number <= round][-STATES_KEPT:]
        for number in set(rounds) - set(keep):
            (self.state_dir / f"r{number}.safetensors").unlink(missing_ok=True)

    def _lineages(self, run: str | None) -> dict[int, str]:
        """The lineage of each version that this device holds; none of another run's."""
        try:
            noted = json.loads((self.state_dir / HELD_FILE).read_text(encoding="utf-8"))
            known: dict[int, str] = {int(version): str(lineage) for version, lineage in noted["lineages"].items()}
            for version, lineage in known.items():
                if version < 0 or not _LINEAGE.fullmatch(lineage):
                    raise ValueError(f"a version must have the name of its file, got {version}: {lineage[:40]!r}")
            return known if run in (None, noted["run"]) else {}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{self.state_dir / HELD_FILE} is corrupted: {error}") from None

    def _hold(self, run: str, version: int, lineage: str) -> None:
        """Note a version as held, and forget those that are too old to matter."""
        lineages = self._lineages(run)
        if lineages.get(version) == lineage:
            return
        kept = {v: known for v, known in lineages.items() if v >= version - COEFFICIENTS_KEPT} | {version: lineage}
        write_whole(self.state_dir / HELD_FILE, json.dumps({"run": run, "lineages": kept}).encode())

    def _stale(self, asked: int, run: str) -> NoReturn:
        version = self.newest_version(run)
        raise StaleVersion(f"the patch must build on a version held here ({version}), got {asked}", version)

    def _advance(self, patch: Patch, spec: ModelSpec, run: str, before: str) -> Held:
        """P_v from P_s and what came since."""
        warm = {name: np.asarray(factor.a[:WARM_ROWS], np.float32) for name, factor in patch.payload.factors.items()}
        if patch.since == 0:
            return Held(version=patch.version, payload=patch.payload, warm=warm)
        older = self._load(patch.since, before) or self._stale(patch.since, run)
        if not patch.payload:
            return Held(version=patch.version, payload=older.payload, warm=older.warm)
        return Held(version=patch.version, payload=add(patch.payload, older.payload, spec), warm=warm)

    def _load(self, version: int, lineage: str) -> Held | None:
        path = self._patch_path(version, lineage)
        try:
            stat = path.stat()
        except FileNotFoundError:
            return None
        key = (str(path), stat.st_ino, stat.st_mtime_ns, stat.st_size)
        if key not in _cache:
            payload, warm, _ = read_payload(path)
            _cache[key] = Held(version=version, payload=payload, warm=warm, key=key)
            while len(_cache) > CACHED:
                _cache.popitem(last=False)
        _cache.move_to_end(key)
        return _cache[key]

    def _write_patch(self, held: Held, lineage: str) -> None:
        write_payload(self._patch_path(held.version, lineage), held.payload, held.warm, {"version": held.version})
        kept = PATCHES_KEPT if held.payload.coefficients is None else COEFFICIENTS_KEPT
        for path in self.patch_dir.glob("v*-*.safetensors"):
            version = path.name[1:].partition("-")[0]
            if version.isdecimal() and int(version) < held.version - kept:
                path.unlink(missing_ok=True)

    def _patch_path(self, version: int, lineage: str) -> Path:
        return self.patch_dir / f"v{version}-{lineage}.safetensors"


def _check_fits(payload: Payload, spec: ModelSpec) -> None:
    """Raise ValueError unless the model has all that a patch adds to, in its shapes: before any of it is kept."""
    if payload.scalars is not None:
        raise ValueError("a patch must carry no scalars")
    shapes: list[tuple[str, tuple[int, ...]]] = [(name, array.shape) for name, array in payload.dense.items()]
    shapes += [(name, (factor.b.shape[0], factor.a.shape[1])) for name, factor in payload.factors.items()]
    for name, shape in shapes:
        matrix = spec.matrices.get(name)
        wanted = (matrix.d_out, matrix.d_in) if matrix else spec.dense.get(name)
        if wanted is None:
            raise ValueError(f"a patch must name what the model has, got {name[:80]!r}")
        if shape != wanted:
            raise ValueError(f"a patch of {name} must have shape {list(wanted)}, got {list(shape)}")


def _lineage(run: str, before: str, patch: Patch) -> str:
    """The name of the way to a version: all that went into it."""
    way = f"{run}|{before}|{patch.since}|{patch.version}|{patch.base_hash}|{digest_payload(patch.payload)}"
    return hashlib.blake2b(way.encode(), digest_size=10).hexdigest()


def _numbers(folder: Path, letter: str) -> list[int]:
    names = (path.stem.removeprefix(letter) for path in folder.glob(f"{letter}*.safetensors"))
    return [int(name) for name in names if name.isdecimal()]
