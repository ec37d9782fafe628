"""Hypothesis strategies for good messages, small ones with anything in any place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from fedloom.protocols.messages import (
    Axis,
    Coefficients,
    Cost,
    DeviceReport,
    Hello,
    Kind,
    LowRank,
    MatrixSpec,
    ModelSpec,
    Over,
    Patch,
    Payload,
    Refusal,
    Scalars,
    Scope,
    Start,
    Subspace,
    Task,
    Update,
)
from fedloom.protocols.shapes import FAMILIES, READS, Block, Linear, Shapes

WIRES: Final = st.sampled_from(["fp32", "fp16", "bf16", "int8"])
_TEXT: Final = st.text("abz019 .-_/\u00fc\U0001f600<&", max_size=9)
_NAMES: Final = st.lists(_TEXT, unique=True, max_size=3)
_COUNTS: Final = st.sampled_from([0, 1, 2, 2**20, 2**62, 2**63 - 1])
_WORDS: Final = st.sampled_from([0, 1, 2**32, 2**63, 2**64 - 1])
_SIZES: Final = st.integers(1, 4)
_REALS: Final = st.floats(-1e300, 1e300, allow_nan=False)
_ALPHAS: Final = st.sampled_from([1.0, 4.0, 1e-300, 1e300])
_BITS: Final = st.lists(st.booleans(), min_size=1, max_size=17).filter(any)
_HEX: Final = st.sampled_from(["", "0a", "5e" * 32])
_DIGESTS: Final = st.sampled_from(["0a" * 32, "ff" * 32])


@st.composite
def _arrays(draw: DrawFn, *shape: int) -> Any:
    values = np.random.Generator(np.random.Philox(key=draw(st.integers(0, 2**32 - 1)))).normal(size=shape)
    return (values * draw(st.sampled_from([0.0, 1e-30, 1e-6, 1.0, 1e3]))).astype(np.float32)


@st.composite
def _factors(draw: DrawFn) -> LowRank:
    d_out, d_in, rank = draw(_SIZES), draw(st.integers(0, 4)), draw(_SIZES)
    b, a = draw(_arrays(d_out, rank)), draw(_arrays(rank, d_in))
    return LowRank(b=b, a=a, alpha=draw(_ALPHAS), rslora=draw(st.booleans()))


@st.composite
def _dense(draw: DrawFn) -> Any:
    return draw(_arrays(*draw(st.lists(_SIZES, min_size=1, max_size=4))))


@st.composite
def _scalars(draw: DrawFn) -> Scalars:
    over, k, seed = draw(st.sampled_from(Over)), draw(st.integers(1, 70)), draw(_WORDS)
    count = k if over == Over.BASIS else draw(st.integers(1, 20))
    values = np.full(count, 0.5, np.float32) if draw(st.booleans()) else draw(_arrays(count))
    if over != Over.POOL:
        return Scalars(over=over, k=k, values=values, seed=seed)
    indices = draw(st.lists(st.integers(0, k - 1), min_size=count, max_size=count))
    return Scalars(over=over, k=k, values=values, indices=np.array(indices, np.int64), seed=seed)


@st.composite
def _subspaces(draw: DrawFn) -> Subspace:
    scope, family = draw(st.sampled_from(Scope)), draw(st.sampled_from(["gaussian", "rademacher", "sketch"]))
    k = 2 ** draw(st.integers(0, 6)) if family == "sketch" else draw(st.integers(1, 70))
    own: dict[str, Any] = {}
    if scope == Scope.LORA:
        own = {"rank": draw(_SIZES), "alpha": draw(_ALPHAS), "rslora": draw(st.booleans())}
    if scope == Scope.MASK:
        own = {"mask": draw(_DIGESTS)}
    return Subspace(family=family, k=k, seed=draw(_WORDS), scope=scope, directions=draw(_COUNTS), **own)


@st.composite
def _coefficients(draw: DrawFn) -> Coefficients:
    subspace = draw(_subspaces())
    most = draw(st.sampled_from([0, 3, 2**20, 2**53 - 1]))
    steps = draw(st.lists(st.integers(-most, most), min_size=subspace.k, max_size=subspace.k))
    exponent = draw(st.integers(-1074, min(1023, 1024 - most.bit_length())))
    return Coefficients(subspace=subspace, exponent=exponent, steps=np.array(steps, np.int64))


@st.composite
def _payloads(draw: DrawFn) -> Payload:
    return Payload(
        factors={name: draw(_factors()) for name in draw(_NAMES)},
        dense={name: draw(_dense()) for name in draw(_NAMES)},
        scalars=draw(st.none() | _scalars()),
        coefficients=draw(st.none() | _coefficients()),
        keep={name: np.array(draw(_BITS)) for name in draw(_NAMES)},
    )


@st.composite
def updates(draw: DrawFn) -> Update:
    return Update(
        device=draw(_TEXT),
        round=draw(_COUNTS),
        examples=draw(_COUNTS),
        kind=draw(st.sampled_from(Kind)),
        run=draw(_TEXT | _HEX),
        nonce=draw(_WORDS),
        metrics={name: draw(_REALS) for name in draw(_NAMES)},
        cost=Cost(
            seconds=draw(_ALPHAS),
            peak_rss_bytes=draw(_COUNTS),
            out_of_memory=draw(st.booleans()),
            peak_tensor_bytes=draw(_COUNTS),
        ),
        payload=draw(_payloads()),
    )


@st.composite
def _patches(draw: DrawFn) -> Patch:
    since, version = sorted((draw(_COUNTS), draw(_COUNTS)))
    return Patch(base_hash=draw(_TEXT | _HEX), since=since, version=version, payload=draw(_payloads()))


@st.composite
def tasks(draw: DrawFn) -> Task:
    ranks = {name: draw(_SIZES) for name in draw(_NAMES)}
    knob = st.booleans() | _REALS | _TEXT | st.integers(-(2**63), 2**63 - 1)
    return Task(
        device=draw(_TEXT),
        round=draw(_COUNTS),
        rank=draw(st.sampled_from([1, 2**31 - 1] if ranks else [0, 1, 2**31 - 1])),
        ranks=ranks,
        alpha=draw(_ALPHAS),
        start_from=draw(st.sampled_from(Start)),
        kind=draw(st.sampled_from(Kind)),
        strategy=draw(_TEXT),
        tuner=draw(_TEXT),
        subspace=draw(st.none() | _subspaces()),
        scalar_limit=draw(st.sampled_from([0.0, 1.0, 1e300])),
        rslora=draw(st.booleans()),
        train_a=draw(st.booleans()),
        shared_a_seed=draw(st.none() | _WORDS),
        send=draw(st.booleans()),
        start=draw(_payloads()),
        patch=draw(st.none() | _patches()),
        run=draw(_TEXT | _HEX),
        nonce=draw(_WORDS),
        seed=draw(_WORDS),
        state_round=draw(_COUNTS),
        wire=draw(WIRES),
        knobs={name: draw(knob) for name in draw(_NAMES)},
    )


@st.composite
def _axes(draw: DrawFn, groups: dict[str, int]) -> Axis:
    group, width, free = draw(st.sampled_from(sorted(groups))), draw(_SIZES), 0
    offsets = []
    for gap in draw(st.lists(st.integers(0, 3), min_size=1, max_size=3)):
        offsets.append(free + gap)
        free += gap + groups[group] * width
    return Axis(group=group, width=width, offsets=tuple(offsets))


@st.composite
def _matrices(draw: DrawFn, groups: dict[str, int]) -> MatrixSpec:
    axis = st.none() | _axes(groups) if groups else st.none()
    rows, columns = draw(axis), draw(axis)
    ends = [0 if side is None else side.offsets[-1] + groups[side.group] * side.width for side in (rows, columns)]
    d_out, d_in = (max(end, 1) + draw(st.integers(0, 3)) for end in ends)
    return MatrixSpec(d_out=d_out, d_in=d_in, kind=draw(_TEXT), rows=rows, columns=columns)


@st.composite
def _shapes(draw: DrawFn) -> Shapes:
    large, bytes_ = st.sampled_from([1, 2, 4096, 2**18]), st.sampled_from([1, 4096, 2**40 - 1])
    blocks = [
        Block(heads=kv * draw(_SIZES), kv_heads=kv, head_dim=draw(large), ffn=draw(large))
        for kv in draw(st.lists(_SIZES, min_size=1, max_size=2))
    ]
    linears = {
        name: Linear(
            block=draw(st.integers(0, len(blocks) - 1)),
            reads=draw(st.sampled_from(READS)),
            d_out=draw(large),
            d_in=draw(large),
        )
        for name in draw(_NAMES)
    }
    return Shapes(
        family=draw(st.sampled_from(FAMILIES)),
        hidden=draw(large),
        blocks=tuple(blocks),
        linears=linears,
        columns=draw(large),
        other=draw(st.just(0) | bytes_),
        head=draw(st.just(0) | bytes_),
        item=draw(st.sampled_from([2, 4])),
    )


@st.composite
def hellos(draw: DrawFn) -> Hello:
    report = DeviceReport(
        device=draw(_TEXT),
        examples=draw(_COUNTS),
        rank=draw(st.sampled_from([0, 8, 2**31 - 1])),
        version=draw(_COUNTS),
        state_round=draw(_COUNTS),
        capabilities=tuple(draw(_NAMES)),
        software=draw(_TEXT),
        memory=draw(_COUNTS),
    )
    groups = {name: draw(st.integers(1, 9)) for name in draw(_NAMES)}
    shapes = st.lists(_SIZES, min_size=1, max_size=4).map(tuple)
    spec = ModelSpec(
        base_hash=draw(_TEXT | _HEX),
        matrices={name: draw(_matrices(groups)) for name in draw(_NAMES)},
        dense={name: draw(shapes) for name in draw(_NAMES)},
        mask=draw(st.just("") | _DIGESTS),
        groups=groups,
        shapes=draw(st.none() | _shapes()),
    )
    return Hello(report=report, spec=spec)


def refusals() -> SearchStrategy[Refusal]:
    named = {"device": _TEXT, "round": _COUNTS, "run": _TEXT, "nonce": _WORDS}
    return st.builds(Refusal, reason=_TEXT, version=_COUNTS, **named)


MESSAGES: Final[dict[type[Any], Callable[[], SearchStrategy[Any]]]] = {
    Task: tasks,
    Update: updates,
    Hello: hellos,
    Refusal: refusals,
}
