"""What a device keeps on disk: the accumulated patch at its latest versions, and its own adapters of its last rounds.

    patch_dir/v{version}-{lineage}.safetensors   the accumulated payload; `warm/{module}`: leading rows of the newest A
    state_dir/held.json                          which lineage of each version this device holds
    state_dir/r{round}.safetensors               the adapter (and head) that the device ended a round with

A version's lineage is a hash of every payload that led to it. Devices that reach a version by different ways (round by
round, or at once from the base) hold the same model up to float32 rounding but not to the last bit, so each way has a
file of its own: in a simulation devices share `patch_dir`, one file serves all that came the same way, and no device's
bits depend on which process was first. A file is written whole or not at all.

A pruned device is sent its slice of what it missed. Slices are put back at full size, zero in what did not come, before
they are added up: every sum is then taken as of whole patches, and what a device reads of it has the same bits. A
version is known in the units that all its slices had; its file holds these alone.
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
from fedloom.protocols.validate import check_keep
from fedloom.strategies.coefficients import WINDOW
from fedloom.strategies.lowrank import add
from fedloom.strategies.masked import Keep, covers, in_both, pruned, scatter_payload, slice_payload

WARM_ROWS = 64
PATCHES_KEPT = 8  # versions kept below the newest, of factors and dense tensors
COEFFICIENTS_KEPT = WINDOW  # of coefficients, which are small: as far back as a server sends changes
STATES_KEPT = 2
HELD_FILE = "held.json"
CACHED = 4  # patches in memory, shared by the devices of a process
_LINEAGE = re.compile("[0-9a-f]{20}")


class StaleVersion(ValueError):  # noqa: N818 - a refusal, named for what the server does about it
    """The device does not hold what a patch builds on; `version` is what the next patch may build on (0: the base)."""

    def __init__(self, message: str, version: int) -> None:
        super().__init__(message)
        self.version = version


@dataclass(frozen=True, kw_only=True)
class Held:
    """The global model at one version: the accumulated payload, and where the next adapters may start.

    All at full size; what belongs to units that `keep` drops is not to be used.
    """

    version: int
    payload: Payload = field(default_factory=Payload)
    warm: Mapping[str, Array] = field(default_factory=dict)  # module: [up to WARM_ROWS, d_in]
    key: Hashable = BASE  # the same key means the same content
    keep: Keep = field(default_factory=dict)  # the units that the payload is known in; a group not named: all of them


_cache: OrderedDict[Hashable, Held] = OrderedDict()


class DeviceStore:
    """One device's files."""

    def __init__(self, patch_dir: Path, state_dir: Path) -> None:
        """The folders are made when something is first written; devices of a simulation share `patch_dir`."""
        self.patch_dir, self.state_dir = Path(patch_dir), Path(state_dir)

    def take(self, patch: Patch | None, spec: ModelSpec, run: str, keep: Keep | None = None) -> Held:
        """The version that a task asks for, added up and written down if it is new. No patch means the base itself.

        Args:
            keep: the units that the task may keep, as its start names them: what is held must be known in all of them.
                None, as a group that is not named, is the whole model.

        Raises:
            StaleVersion: when the patch builds on a version that this device does not hold, or not in these units.
            ValueError: for a patch of another base, one that does not fit the model or the units of its task, or a
                corrupted file.
        """
        if patch is None:
            return Held(version=0)
        if patch.base_hash != spec.base_hash:
            raise ValueError(
                f"the patch must be for this device's base {spec.base_hash[:12]}, got one for {patch.base_hash[:12]}"
            )
        _check_fits(patch.payload, spec)
        wanted = keep or {}
        if patch.payload and not _known(patch.payload.keep, wanted, spec):
            raise ValueError("a patch must have all units that its task may keep, got a slice without some")
        if patch.version == 0:
            return Held(version=0)
        before = self._lineages(run).get(patch.since, "") if patch.since else "base"
        if patch.since == patch.version:
            return self._find(patch.since, before, spec, run, wanted)
        lineage = _lineage(run, before, patch)
        try:
            is_new = self._load(patch.version, lineage, spec) is None
        except ValueError:
            is_new = True  # corrupted: made again
        if is_new:
            self._write_patch(self._advance(patch, spec, run, before, wanted), lineage, spec)
        held = self._find(patch.version, lineage, spec, run, wanted)
        self._hold(run, patch.version, lineage)
        return held

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

    def _find(self, version: int, lineage: str, spec: ModelSpec, run: str, wanted: Keep) -> Held:
        """A version that is held in these units.

        Raises:
            StaleVersion: for one that is not held at all, or was made of slices that lack some of them.
        """
        held = self._load(version, lineage, spec) or self._stale(version, run)
        if not _known(held.keep, wanted, spec):
            raise StaleVersion(
                f"the patch must build on the base (0): version {version} is held here without units of the task", 0
            )
        return held

    def _advance(self, patch: Patch, spec: ModelSpec, run: str, before: str, wanted: Keep) -> Held:
        """P_v from P_s and what came since."""
        payload = scatter_payload(patch.payload, spec)
        warm = {name: np.asarray(factor.a[:WARM_ROWS], np.float32) for name, factor in payload.factors.items()}
        if patch.since == 0:
            return Held(version=patch.version, payload=payload, warm=warm, keep=in_both({}, patch.payload.keep))
        older = self._find(patch.since, before, spec, run, wanted)
        if not payload:
            return Held(version=patch.version, payload=older.payload, warm=older.warm, keep=older.keep)
        total = add(payload, older.payload, spec)
        return Held(version=patch.version, payload=total, warm=warm, keep=in_both(older.keep, patch.payload.keep))

    def _load(self, version: int, lineage: str, spec: ModelSpec) -> Held | None:
        path = self._patch_path(version, lineage)
        try:
            stat = path.stat()
        except FileNotFoundError:
            return None
        key = (str(path), stat.st_ino, stat.st_mtime_ns, stat.st_size)
        if key not in _cache:
            payload, warm, _ = read_payload(path)
            whole = scatter_payload(payload, spec)
            _cache[key] = Held(version=version, payload=whole, warm=warm, key=key, keep=payload.keep)
            while len(_cache) > CACHED:
                _cache.popitem(last=False)
        _cache.move_to_end(key)
        return _cache[key]

    def _write_patch(self, held: Held, lineage: str, spec: ModelSpec) -> None:
        mine = slice_payload(held.payload, spec, held.keep)
        write_payload(self._patch_path(held.version, lineage), mine, held.warm, {"version": held.version})
        kept = PATCHES_KEPT if held.payload.coefficients is None else COEFFICIENTS_KEPT
        for path in self.patch_dir.glob("v*-*.safetensors"):
            version = path.name[1:].partition("-")[0]
            if version.isdecimal() and int(version) < held.version - kept:
                path.unlink(missing_ok=True)

    def _patch_path(self, version: int, lineage: str) -> Path:
        return self.patch_dir / f"v{version}-{lineage}.safetensors"


def _known(known: Keep, wanted: Keep, spec: ModelSpec) -> bool:
    """Whether what is known in some units is known in all that are wanted."""
    if not known:
        return True
    check_keep("a task's keep", wanted, spec.groups)
    return covers(known, wanted)


def _check_fits(payload: Payload, spec: ModelSpec) -> None:
    """Raise ValueError unless the model has all that a patch adds to, in its shapes: before any of it is kept.

    A slice has the shapes of its keep, and no more rank than the model's matrix: put back at full size, it takes twice
    the matrix at most.
    """
    if payload.scalars is not None:
        raise ValueError("a patch must carry no scalars")
    if payload.keep and payload.coefficients is not None:
        raise ValueError("a patch in a subspace must be of the whole model, got a slice")
    matrices = pruned(spec, payload.keep).matrices if payload.keep else spec.matrices
    shapes: list[tuple[str, tuple[int, ...]]] = [(name, array.shape) for name, array in payload.dense.items()]
    shapes += [(name, (factor.b.shape[0], factor.a.shape[1])) for name, factor in payload.factors.items()]
    for name, shape in shapes:
        matrix = matrices.get(name)
        wanted = (matrix.d_out, matrix.d_in) if matrix else spec.dense.get(name)
        if wanted is None:
            raise ValueError(f"a patch must name what the model has, got {name[:80]!r}")
        if shape != wanted:
            raise ValueError(f"a patch of {name} must have shape {list(wanted)}, got {list(shape)}")
    for name, factor in payload.factors.items() if payload.keep else ():
        most = min(spec.matrices[name].d_out, spec.matrices[name].d_in)
        if factor.rank > most:
            raise ValueError(f"a slice of a patch of {name} must have rank <= {most}, got {factor.rank}")


def _lineage(run: str, before: str, patch: Patch) -> str:
    """The name of the way to a version: all that went into it."""
    way = f"{run}|{before}|{patch.since}|{patch.version}|{patch.base_hash}|{digest_payload(patch.payload)}"
    return hashlib.blake2b(way.encode(), digest_size=10).hexdigest()


def _numbers(folder: Path, letter: str) -> list[int]:
    names = (path.stem.removeprefix(letter) for path in folder.glob(f"{letter}*.safetensors"))
    return [int(name) for name in names if name.isdecimal()]
