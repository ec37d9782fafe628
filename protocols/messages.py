"""The few types that flow between a server, its devices and the strategies.

Legend of shapes: r rank, d_out x d_in the logical weight of a linear map (y = W x), whatever the layer stores; K the
dimensions of a subspace, T local steps.
Everything here is plain data on NumPy arrays: a relay or a server needs neither torch nor a model to speak it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedloom.protocols.directions import DIRECTIONS_VERSION
from fedloom.protocols.shapes import Shapes

Array = NDArray[np.floating[Any]]

PROTOCOL_VERSION = 3

NOT_NOW = "not now: "  # begins the reasons of a refusal that pass by themselves, or when the device's owner says so


class Kind(StrEnum):
    """What a task asks for."""

    TRAIN = "train"
    EVALUATE = "evaluate"


class Start(StrEnum):
    """Where a device's trainable adapter begins in a round."""

    FRESH = "fresh"  # B = 0, A random from the task's seed
    PATCH = "patch"  # B = 0, A from the newest delta's right singular vectors, random beyond them
    GIVEN = "given"  # the factors that the task carries
    OWN = "own"  # what the device itself ended with last time


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """One weight's low-rank term: delta W = scale * b @ a, with b [d_out, r] and a [r, d_in].

    `scale` is alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023): alpha and rank always travel with the
    factors, so no side has to guess them.
    """

    b: Array
    a: Array
    alpha: float
    rslora: bool = False

    def __post_init__(self) -> None:
        if self.b.ndim != 2 or self.a.ndim != 2 or self.b.shape[1] != self.a.shape[0] or self.a.shape[0] < 1:
            raise ValueError(f"factors must be b [d_out, r] and a [r, d_in], got {self.b.shape} and {self.a.shape}")

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def dense(self) -> Array:
        """scale * b @ a, [d_out, d_in]."""
        return self.scale * (self.b @ self.a)


def unscaled(b: Array, a: Array) -> LowRank:
    """Factors whose scale is 1: alpha equals the rank."""
    return LowRank(b=b, a=a, alpha=float(a.shape[0]))


class Scope(StrEnum):
    """Which weights a subspace spans."""

    ALL = "all"  # every parameter of the base
    LORA = "lora"  # the factors of adapters that start at B = 0 and the shared A of the subspace's seed
    MASK = "mask"  # a static sparse set of weights that every device was given beforehand


class Over(StrEnum):
    """What the values of a `Scalars` are coefficients of."""

    POOL = "pool"  # the directions of a subspace that `indices` name
    STEPS = (
        "steps"  # sign_vector(seed, t, k) for t = 0, 1, ...: directions within a subspace, known from the task's seed
    )
    BASIS = "basis"  # the k coordinates of a subspace themselves


@dataclass(frozen=True, kw_only=True)
class Subspace:
    """The K directions that a model is tuned along: theta_0 + sum_k c_k z_k, or theta_0 + S c (directions.py)."""

    family: str  # gaussian, rademacher or sketch
    k: int
    seed: int  # of the pool, or of the sketch
    scope: Scope = Scope.ALL
    rank: int = 0  # of the adapters, for `lora`
    alpha: float = 0.0
    rslora: bool = False
    mask: str = ""  # SHA-256 of the mask, for `mask`
    directions: int = DIRECTIONS_VERSION


@dataclass(frozen=True, kw_only=True)
class Scalars:
    """What local steps add to the coefficients: minus learning rate x projected gradient, in the order of the steps.

    The product travels, so whoever rebuilds a model needs to know no learning rate, and schedules are free.
    """

    over: Over
    k: int
    values: Array  # [n] float32
    indices: NDArray[np.int64] | None = None  # [n] in 0..k - 1, for `pool`
    seed: int = 0  # of the directions, for `steps`

    def __post_init__(self) -> None:
        if self.values.ndim != 1:
            raise ValueError(f"scalars must be a vector, got shape {list(self.values.shape)}")
        if (self.indices is not None) != (self.over == Over.POOL):
            raise ValueError(f"scalars must have indices over a pool and there alone, got them over {self.over}")
        if self.indices is not None and self.indices.shape != self.values.shape:
            raise ValueError(f"scalars must have an index each, got {len(self.indices)} for {len(self.values)}")

    def drawn(self) -> NDArray[np.int64]:
        """The indices of a pool's directions, [n].

        Raises:
            ValueError: for scalars that are not over a pool.
        """
        if self.indices is None:
            raise ValueError(f"scalars must be over a pool to have indices, got them over {self.over}")
        return self.indices


@dataclass(frozen=True, kw_only=True)
class Coefficients:
    """The coefficients of a subspace, c = steps x 2^exponent, or a change of them.

    Whole numbers of a power of two: sums are exact, so a device ends at the same bits however it got there.
    """

    subspace: Subspace
    exponent: int
    steps: NDArray[np.int64]  # [k], |steps| < 2^53, so that c is exact in float64

    def __post_init__(self) -> None:
        if self.steps.shape != (self.subspace.k,):
            raise ValueError(f"coefficients must have shape [{self.subspace.k}], got {list(self.steps.shape)}")

    def values(self) -> NDArray[np.float64]:
        """c, [k]."""
        return np.ldexp(self.steps.astype(np.float64), self.exponent)


@dataclass(frozen=True, kw_only=True)
class Payload:
    """What adds to a model: low-rank terms by module name, dense terms by module or parameter name, coefficients.

    `scalars` is a device's answer in a subspace, or the server's list of directions to step along; it is no part of a
    model. With `keep`, the terms are those of a pruned model: b has the kept rows and a the kept columns alone, in
    their order; a group that is not named is kept whole.
    """

    factors: Mapping[str, LowRank] = field(default_factory=dict)
    dense: Mapping[str, Array] = field(default_factory=dict)
    scalars: Scalars | None = None
    coefficients: Coefficients | None = None
    keep: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)  # [units] by group, for a pruned model's terms

    def __bool__(self) -> bool:
        return bool(self.factors or self.dense or self.scalars is not None or self.coefficients is not None)


@dataclass(frozen=True, kw_only=True)
class Patch:
    """The global model at `version`, relative to what a device holds at `since` (0: the public base itself).

    A device whose version is not `since` must restore its base when `since` is 0, and refuse otherwise.
    A payload with a `keep` is what a device needs that may keep no more than these units, as its task's start says.
    Factors are ordered newest delta first, so their leading rows of A are the newest right singular vectors.
    """

    base_hash: str
    since: int
    version: int
    payload: Payload


@dataclass(frozen=True, kw_only=True)
class Axis:
    """The side of a matrix along which a group's units (attention heads, FFN channels) lie.

    Unit u owns the `width` consecutive indices from offset + u * width, for every offset: one offset for a plain
    projection, three for a fused q, k, v.
    """

    group: str  # a key of ModelSpec.groups
    width: int
    offsets: tuple[int, ...] = (0,)


@dataclass(frozen=True, kw_only=True)
class MatrixSpec:
    """One weight that may carry an adapter: its logical size, how its layer stores it, and what may be pruned of it."""

    d_out: int
    d_in: int
    kind: str = "linear"  # "linear" stores [d_out, d_in]; "conv1d" (GPT-2) stores [d_in, d_out]
    rows: Axis | None = None  # the group that its outputs belong to, if they can be pruned
    columns: Axis | None = None  # the group that its inputs belong to


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What a server knows of the model without loading it: adapted matrices, dense parameters, the base's hash."""

    base_hash: str
    matrices: Mapping[str, MatrixSpec]
    dense: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    mask: str = ""  # SHA-256 of the sparse mask that the device holds, if any
    groups: Mapping[str, int] = field(default_factory=dict)  # units of each group of coupled structures
    shapes: Shapes | None = None  # what memory and time depend on, where it is known


@dataclass(frozen=True, kw_only=True)
class DeviceReport:
    """What a device says of itself: its name, data, limits, and the model version it holds."""

    device: str
    examples: int
    rank: int  # the largest adapter rank it can train
    version: int = 0  # the patch version it holds; 0 is the public base
    state_round: int = 0  # the last round whose result the server accepted from it; 0 for none
    capabilities: tuple[str, ...] = ("backprop",)  # or ("forward",): forward passes alone
    software: str = ""
    memory: int = 0  # bytes lent to the model and its training; 0: not said


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the server asks of one device this round."""

    device: str
    round: int
    rank: int
    alpha: float
    start_from: Start
    kind: Kind = Kind.TRAIN
    strategy: str = ""  # the recipe's, for devices that accept only some
    tuner: str = "lora"
    subspace: Subspace | None = None  # set: coefficients of it are trained, and `rank`, `alpha` are not used
    scalar_limit: float = 0.0  # the largest |scalar| that the answer may carry; 0: any finite one
    rslora: bool = False
    train_a: bool = True  # False: A is frozen (FFA-LoRA)
    shared_a_seed: int | None = None  # set: A is initial_a(this seed, ...) on both sides and travels as a [r, 0]
    send: bool = True  # False: the adapter stays on the device (local-only)
    ranks: Mapping[str, int] = field(default_factory=dict)  # set: these modules alone, at these ranks (see `rank_of`)
    start: Payload = field(default_factory=Payload)  # its `keep`: what the device may keep; it may prune these groups
    patch: Patch | None = None  # brings the model to a version, empty when it is there; None: the base itself
    run: str = ""
    nonce: int = 0
    seed: int = 0
    state_round: int = 0  # which of its own saved states the device goes on from
    wire: str = "fp32"  # the dtype that the answer travels in
    knobs: Mapping[str, float | int | str] = field(default_factory=dict)

    def rank_of(self, module: str) -> int:
        """The rank of a module's adapter; 0 for a module that gets none."""
        return self.ranks.get(module, 0) if self.ranks else self.rank

    def alpha_of(self, module: str) -> float:
        """The alpha of a module's adapter: the task's per rank, so that alpha / rank is the same for every module."""
        return self.alpha * self.rank_of(module) / self.rank if self.ranks else self.alpha


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a task cost its device."""

    seconds: float = 0.0
    peak_rss_bytes: int = 0
    out_of_memory: bool = False  # the task was given up for want of memory: no tensors come with it
    peak_tensor_bytes: int = 0  # of live tensors, the model's among them; 0: not counted


@dataclass(frozen=True, kw_only=True)
class Update:
    """What a device answers: how much data stands behind it, what it measured and cost, and the tensors."""

    device: str
    round: int
    examples: int
    kind: Kind = Kind.TRAIN
    run: str = ""
    nonce: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)
    payload: Payload = field(default_factory=Payload)


@dataclass(frozen=True, kw_only=True)
class Hello:
    """A device's first words: who it is and which model it holds."""

    report: DeviceReport
    spec: ModelSpec


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A device's 'no' to a task, with a reason and the version that it really holds.

    It names its task as an Update does, so that an old one is no answer to a new task; a 'no' to anything else than a
    task has no run, round and nonce.
    """

    device: str
    round: int
    reason: str
    version: int = 0
    run: str = ""
    nonce: int = 0
