"""What a device keeps on disk: the accumulated patch at its latest versions, and its own adapters of its last rounds.

    patch_dir/v{version}.safetensors   the accumulated payload, and `warm/{module}`: first rows of the newest delta's A
    state_dir/r{round}.safetensors     the adapter (and head) that the device ended a round with

A file is written whole or not at all, and says in its header which run it belongs to; one of another run counts as
absent. A version made from another patch than the one at hand (of a server that went back) is made anew.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fedloom.client.patching import BASE
from fedloom.client.tensorfile import digest_payload, read_header, read_payload, write_payload
from fedloom.protocols.messages import Array, ModelSpec, Patch, Payload
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
class Source:
    """What a version was made from: the version before, and a digest of the payload that came."""

    since: int
    digest: str


@dataclass(frozen=True, kw_only=True)
class Held:
    """The global model at one version: the accumulated payload, and where the next adapters may start."""

    version: int
    payload: Payload = field(default_factory=Payload)
    warm: Mapping[str, Array] = field(default_factory=dict)  # module: [up to WARM_ROWS, d_in]
    source: Source | None = None  # the patch that it was made from; None for the base
    key: Hashable = BASE  # the same key means the same content


_cache: OrderedDict[Hashable, Held] = OrderedDict()


class DeviceStore:
    """One device's files."""

    def __init__(self, patch_dir: Path, state_dir: Path, *, shared: bool = False) -> None:
        """The folders are made when something is first written.

        Args:
            shared: whether other devices use `patch_dir` too, as in a simulation. A version that one of them made on
                another way (from the base, say, rather than from the version before) then serves all: the same up to
                float32 rounding, and merged into the resident model only once.
        """
        self.patch_dir, self.state_dir, self._shared = Path(patch_dir), Path(state_dir), shared

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
        source = Source(since=patch.since, digest=digest_payload(patch.payload))
        try:
            held = self._load(patch.version, run)
        except ValueError:
            if patch.since:
                raise
            held = None  # a whole patch heals a corrupted file
        if held is not None and (patch.since == patch.version or self._trusts(held.source, source)):
            return held
        made = self._advance(patch, spec, run)
        self._write_patch(made, source, run)
        return self._load(patch.version, run) or made

    def newest_version(self, run: str | None = None) -> int:
        """The newest version on disk (of `run`, if given); 0 for the base."""
        for version in sorted(_numbers(self.patch_dir, "v"), reverse=True):
            if run is None or read_header(self._patch_path(version)).get("run") == run:
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
        payload, _, meta = read_payload(path)
        return payload if meta["run"] == run else None

    def save_state(self, round: int, run: str, payload: Payload) -> None:
        """Keep the adapter of a round and of the one before; later rounds, of a run that went back, are dropped."""
        write_payload(self.state_dir / f"r{round}.safetensors", payload, {}, {"run": run, "round": round})
        rounds = sorted(_numbers(self.state_dir, "r"))
        keep = [number for number in rounds if number <= round][-STATES_KEPT:]
        for number in set(rounds) - set(keep):
            (self.state_dir / f"r{number}.safetensors").unlink(missing_ok=True)

    def _trusts(self, held: Source | None, asked: Source) -> bool:
        """Whether a version on disk is the one that a patch makes."""
        return held == asked or (self._shared and held is not None and held.since != asked.since)

    def _advance(self, patch: Patch, spec: ModelSpec, run: str) -> Held:
        """P_v from P_s and what came since."""
        warm = {name: np.asarray(factor.a[:WARM_ROWS], np.float32) for name, factor in patch.payload.factors.items()}
        if patch.since == 0:
            return Held(version=patch.version, payload=patch.payload, warm=warm, key=object())
        older = self._load(patch.since, run)
        if older is None:
            version = self.newest_version(run)
            raise StaleVersion(f"the patch must build on a version held here ({version}), got {patch.since}", version)
        if not patch.payload:
            return Held(version=patch.version, payload=older.payload, warm=older.warm, key=object())
        total = add(patch.payload, older.payload, spec)
        return Held(version=patch.version, payload=total, warm=warm, key=object())

    def _load(self, version: int, run: str) -> Held | None:
        path = self._patch_path(version)
        try:
            stat = path.stat()
        except FileNotFoundError:
            return None
        key = (str(path), run, stat.st_ino, stat.st_mtime_ns, stat.st_size)
        if key not in _cache:
            payload, warm, meta = read_payload(path)
            if meta["run"] != run:
                return None
            source = Source(since=meta["since"], digest=meta["digest"])
            _cache[key] = Held(version=version, payload=payload, warm=warm, source=source, key=key)
            while len(_cache) > CACHED:
                _cache.popitem(last=False)
        _cache.move_to_end(key)
        return _cache[key]

    def _write_patch(self, held: Held, source: Source, run: str) -> None:
        meta = {"run": run, "version": held.version, "since": source.since, "digest": source.digest}
        write_payload(self._patch_path(held.version), held.payload, held.warm, meta)
        for version in _numbers(self.patch_dir, "v"):
            if version < held.version - PATCHES_KEPT:
                self._patch_path(version).unlink(missing_ok=True)

    def _patch_path(self, version: int) -> Path:
        return self.patch_dir / f"v{version}.safetensors"


def _numbers(folder: Path, letter: str) -> list[int]:
    names = (path.stem.removeprefix(letter) for path in folder.glob(f"{letter}*.safetensors"))
    return [int(name) for name in names if name.isdecimal()]
