"""The global patch as state: what every device's model adds to the public base, and how a late one gets there.

    P_v = delta_1 + ... + delta_v,    since(u) = delta_v + ... + delta_{u+1}    so that    P_u + since(u) = P_v

The log keeps P_{v-1} as one sum, recompressed or dense past the break-even rank, and the newest deltas one by one for
as long as handing them out is cheaper than handing out P_v. Its memory does not depend on clients or rounds: at most
P_v, the newest delta, and as much again of older ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedloom.protocols.messages import Array, ModelSpec, Patch, Payload
from fedloom.strategies.base import State
from fedloom.strategies.lowrank import add, bounded, delta_of, payload_of
from fedloom.strategies.packing import pack, spec_of, unpack

WINDOW = 8  # deltas kept one by one, at most


def size(payload: Payload) -> int:
    """How many numbers a payload carries."""
    return sum(term.b.size + term.a.size for term in payload.factors.values()) + sum(
        value.size for value in payload.dense.values()
    )


def tidy(payload: Payload, spec: ModelSpec) -> Payload:
    """The same sum in bounded space: each matrix recompressed or dense past its break-even rank."""
    deltas = {name: bounded(delta_of(payload, name)) for name in spec.matrices}
    return payload_of(deltas, {name: payload.dense[name] for name in spec.dense if name in payload.dense})


@dataclass(frozen=True, kw_only=True)
class PatchLog:
    """The patch at `version`: `older` is all but the newest delta, `recent` the last deltas, newest first."""

    spec: ModelSpec
    version: int = 0
    older: Payload = field(default_factory=Payload)
    recent: tuple[Payload, ...] = ()

    @property
    def total(self) -> Payload:
        """P_v, relative to the public base; its leading factors are the newest delta's."""
        return add(self.recent[0], self.older, self.spec) if self.recent else self.older

    def push(self, delta: Payload) -> PatchLog:
        """The log after one more round."""
        older = tidy(self.total, self.spec) if self.recent else self.older
        budget = size(older) + size(delta)
        recent, spent = [delta], size(delta)
        for payload in self.recent[: WINDOW - 1]:
            spent += size(payload)
            if spent > budget:
                break
            recent.append(payload)
        return PatchLog(spec=self.spec, version=self.version + 1, older=older, recent=tuple(recent))

    def since(self, version: int) -> Patch | None:
        """What takes a model from `version` to the newest; None while the newest is the base itself.

        A device that is up to date gets an empty payload: a task always names the version that its model must be at.

        The whole patch, with since = 0, where the window does not reach, where it is smaller, and for a device that is
        ahead of the log (of a server that went back to a checkpoint).

        Raises:
            ValueError: for a negative version.
        """
        if version < 0:
            raise ValueError(f"a device's version must be >= 0, got {version}")
        total, missed = self.total, self.version - version
        if not total:
            return None
        if missed == 0:
            return Patch(base_hash=self.spec.base_hash, since=version, version=version, payload=Payload())
        if missed > 0 and version and missed <= len(self.recent):
            payload = self.recent[missed - 1]
            for newer in reversed(self.recent[: missed - 1]):
                payload = add(newer, payload, self.spec)
            if missed == 1 or size(payload) <= size(total):
                return Patch(base_hash=self.spec.base_hash, since=version, version=self.version, payload=payload)
        return Patch(base_hash=self.spec.base_hash, since=0, version=self.version, payload=total)

    def tensors(self) -> dict[str, Array]:
        """The log's tensors, for a State."""
        tensors = pack("log/older", self.older)
        for i, payload in enumerate(self.recent):
            tensors |= pack(f"log/recent/{i}", payload)
        return tensors

    def meta(self) -> Mapping[str, Any]:
        """What `read_log` must know beside the tensors."""
        return {"recent": len(self.recent)}


def read_log(state: State) -> PatchLog:
    """The log in a strategy's state."""
    recent = tuple(unpack(f"log/recent/{i}", state.tensors) for i in range(state.meta["log"]["recent"]))
    older = unpack("log/older", state.tensors)
    return PatchLog(spec=spec_of(state), version=state.version, older=older, recent=recent)
