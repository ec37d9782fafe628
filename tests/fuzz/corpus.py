"""Good messages to begin with: every kind, every dtype, every place that a payload may have something in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fedloom.protocols.codec import encode
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
from fedloom.protocols.shapes import Block, Linear, Shapes
from fedloom.strategies.masked import slice_payload

WIRES = ("fp32", "fp16", "bf16", "int8")
SPEC = ModelSpec(
    base_hash="5e" * 32,
    matrices={"q": MatrixSpec(d_out=4, d_in=3), "c": MatrixSpec(d_out=3, d_in=5, kind="conv1d")},
    dense={"head": (2, 3)},
)
PRUNABLE = replace(
    SPEC,
    matrices={
        "q": MatrixSpec(d_out=4, d_in=3, rows=Axis(group="heads", width=2)),
        "c": MatrixSpec(d_out=3, d_in=5, kind="conv1d", columns=Axis(group="heads", width=1, offsets=(0, 3))),
    },
    groups={"heads": 2, "channels": 9},
)
_BLOCK = Block(heads=4, kv_heads=2, head_dim=2, ffn=9)
SHAPED = replace(
    PRUNABLE,
    shapes=Shapes(
        family="llama",
        hidden=3,
        blocks=(_BLOCK, replace(_BLOCK, heads=2, kv_heads=1)),
        linears={
            "q": Linear(block=0, reads="attention", d_out=4, d_in=3),
            "c": Linear(block=1, reads="channels", d_out=3, d_in=5),
        },
        columns=7,
        other=2**40 - 1,
        head=6,
        item=2,
    ),
)
KEEP = {"heads": np.array([False, True]), "channels": np.arange(9) % 2 == 0}
POOL = Subspace(family="rademacher", k=37, seed=5)
SKETCH = Subspace(family="sketch", k=16, seed=6)
LORA = Subspace(family="gaussian", k=5, seed=2**64 - 1, scope=Scope.LORA, rank=2, alpha=4.0, rslora=True)
MASKED = Subspace(family="sketch", k=8, seed=0, scope=Scope.MASK, mask="0a" * 32)


def _values(*shape: int, seed: int = 0) -> Any:
    return np.random.Generator(np.random.Philox(key=seed)).normal(size=shape).astype(np.float32)


def model_payload(spec: ModelSpec = SPEC, rank: int = 2, *, seed: int = 0, with_a: bool = True) -> Payload:
    """Factors of every matrix and a delta of every head."""
    factors = {
        name: LowRank(
            b=_values(matrix.d_out, rank, seed=seed),
            a=_values(rank, matrix.d_in if with_a else 0, seed=seed + 1),
            alpha=2.0 * rank,
        )
        for name, matrix in spec.matrices.items()
    }
    dense = {name: _values(*shape, seed=seed + 2) for name, shape in spec.dense.items()}
    return Payload(factors=factors, dense=dense)


def coefficients(subspace: Subspace, exponent: int = -20, *, seed: int = 0) -> Payload:
    steps = np.rint(30 * _values(subspace.k, seed=seed)).astype(np.int64)
    return Payload(coefficients=Coefficients(subspace=subspace, exponent=exponent, steps=steps))


def pool_scalars(k: int, count: int, *, equal: bool = False) -> Scalars:
    indices = np.arange(count, dtype=np.int64) * 7 % k
    values = np.full(count, 0.25, np.float32) if equal else _values(count)
    return Scalars(over=Over.POOL, k=k, values=values, indices=indices)


def payloads() -> list[Payload]:
    """One for each thing that a payload may carry, an empty one, and one with everything."""
    steps = Scalars(over=Over.STEPS, k=16, values=_values(6), seed=99)
    basis = Scalars(over=Over.BASIS, k=8, values=_values(8))
    shapes = {"v": _values(5), "m": _values(2, 3), "t": _values(2, 1, 3), "f": _values(1, 2, 2, 1)}
    full = replace(model_payload(), scalars=pool_scalars(37, 9), coefficients=coefficients(POOL).coefficients)
    return [
        Payload(),
        model_payload(),
        model_payload(with_a=False),
        Payload(dense=shapes),
        Payload(scalars=pool_scalars(37, 9)),
        Payload(scalars=pool_scalars(4096, 20, equal=True)),
        Payload(scalars=steps),
        Payload(scalars=basis),
        coefficients(POOL),
        coefficients(LORA, 900),
        coefficients(MASKED, -1074),
        full,
        slice_payload(model_payload(PRUNABLE), PRUNABLE, KEEP),
        Payload(keep=KEEP),
    ]


def updates() -> list[Update]:
    base = Update(device="hospital-a", round=3, examples=12, run="0123abcd", nonce=2**63 + 5)
    cost = Cost(seconds=1.5, peak_rss_bytes=10**9)
    made = [replace(base, payload=payload) for payload in payloads()]
    made.append(replace(base, kind=Kind.EVALUATE, metrics={"loss": 0.5, "exact_match": 0.25}, cost=cost))
    given_up = Cost(seconds=0.5, peak_tensor_bytes=2**40, out_of_memory=True)
    made.append(replace(base, metrics={"ratio": 0.25, "rank": 4.0, "need": 2.0**30}, cost=given_up))
    made.append(replace(base, device="w\u00fcste", run="not hexadecimal", examples=2**63 - 1, round=2**63 - 1))
    return made


def tasks() -> list[Task]:
    base = Task(device="hospital-a", round=3, rank=2, alpha=4.0, start_from=Start.FRESH, run="0123abcd", nonce=7)
    patches = [
        Patch(base_hash=SPEC.base_hash, since=since, version=2, payload=payload)
        for since, payload in (
            (2, Payload()),
            (1, model_payload(seed=5)),
            (0, model_payload(rank=1)),
            (0, payloads()[8]),
        )
    ]
    made = [replace(base, patch=patch) for patch in patches]
    made += [replace(base, start_from=Start.GIVEN, start=payload) for payload in payloads()]
    knobs: dict[str, Any] = {"lr": 0.5, "steps": 8, "flag": True, "optimizer": "sgd", "low": -(2**63)}
    made.append(replace(base, knobs=knobs, wire="int8", kind=Kind.EVALUATE, strategy="fedloom", tuner="lora"))
    made.append(replace(base, shared_a_seed=2**64 - 1, train_a=False, send=False, rslora=True, seed=2**64 - 1))
    made.append(replace(base, ranks={"c": 1, "q": 2**31 - 1}))
    made += [replace(base, subspace=subspace, scalar_limit=2.0) for subspace in (POOL, SKETCH, LORA, MASKED)]
    return made


def hellos() -> list[Hello]:
    report = DeviceReport(device="hospital-c", examples=12, rank=2, software="fedloom 0.1.0")
    forward = replace(report, capabilities=("forward", "backprop"), version=5, state_round=4)
    lender = replace(report, memory=4 * 2**30)
    empty = ModelSpec(base_hash="h", matrices={})
    masked = replace(SPEC, mask="0a" * 32)
    return [Hello(report=report, spec=SPEC), Hello(report=lender, spec=SHAPED)] + [
        Hello(report=forward, spec=spec) for spec in (masked, empty, PRUNABLE, replace(SPEC, groups={"heads": 2}))
    ]


def refusals() -> list[Refusal]:
    return [
        Refusal(device="hospital-a", round=3, reason="the data is not here", version=2, run="0a" * 8, nonce=2**64 - 1),
        Refusal(device="hospital-a", round=3, reason="not now: it is paused", version=2, run="r", nonce=1),
        Refusal(device="", round=0, reason=""),
    ]


def frames(messages: Sequence[Any]) -> list[bytes]:
    """Their frames, in every dtype where there are tensors."""
    made: dict[bytes, None] = {}
    for message in messages:
        made |= dict.fromkeys(encode(message, wire=wire, seed=1) for wire in WIRES)
    return list(made)
