"""A small model, devices that answer their tasks with noise, and the dense reference of what a round must give."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from unequal_fleet import adjusted

from fedloom.protocols.directions import pool_keys, signs
from fedloom.protocols.messages import (
    Axis,
    Cost,
    DeviceReport,
    LowRank,
    MatrixSpec,
    ModelSpec,
    Over,
    Payload,
    Scalars,
    Start,
    Task,
    Update,
)
from fedloom.protocols.seeds import derive_seed, draw_indices
from fedloom.protocols.shapes import Block, Linear, Shapes
from fedloom.strategies.base import State, Strategy
from fedloom.strategies.ffa import drop_a, fill_a

K, STEPS = 16, 6

SPEC = ModelSpec(
    base_hash="toy",
    matrices={
        "q": MatrixSpec(d_out=24, d_in=40),
        "c": MatrixSpec(d_out=40, d_in=20, kind="conv1d"),
    },
    dense={"head.weight": (3, 5)},
)
PLAIN = replace(SPEC, dense={})
_LINEARS = {"q": ("attention", 24, 40), "c": ("channels", 40, 20)}
PRUNABLE = replace(  # the same matrices, whose first layer can be pruned; the second is spared and has no adapter
    SPEC,
    matrices={
        "q": replace(SPEC.matrices["q"], rows=Axis(group="0.heads", width=4)),
        "c": replace(SPEC.matrices["c"], columns=Axis(group="0.channels", width=1)),
    },
    groups={"0.heads": 6, "0.channels": 20, "1.heads": 6, "1.channels": 20},
    shapes=Shapes(
        family="llama",
        hidden=40,
        blocks=(Block(heads=6, kv_heads=6, head_dim=4, ffn=20),) * 2,
        linears={
            name + more: Linear(block=block, reads=reads, d_out=d_out, d_in=d_in)
            for block, more in enumerate(("", " above"))
            for name, (reads, d_out, d_in) in _LINEARS.items()
        },
        columns=50,
        other=9000,
        head=15,
    ),
)


def reports(ranks: Sequence[int], version: int = 0, forward: Sequence[int] = ()) -> list[DeviceReport]:
    """Devices of these ranks; those numbered in `forward` cannot backpropagate."""
    return [
        DeviceReport(
            device=f"d{i}",
            examples=3 + i,
            rank=r,
            version=version,
            capabilities=("forward",) if i in forward else ("backprop",),
        )
        for i, r in enumerate(ranks)
    ]


def noise_payload(rng, spec, rank, alpha, *, rslora=False, dtype=np.float64) -> Payload:
    factors = {
        name: LowRank(
            b=rng.standard_normal((m.d_out, rank)).astype(dtype),
            a=rng.standard_normal((rank, m.d_in)).astype(dtype),
            alpha=alpha,
            rslora=rslora,
        )
        for name, m in spec.matrices.items()
    }
    return Payload(factors=factors, dense={n: rng.standard_normal(s).astype(dtype) for n, s in spec.dense.items()})


def update_of(payload: Payload, device: str = "d0", examples: int = 1, round: int = 0) -> Update:
    return Update(device=device, round=round, examples=examples, payload=payload)


def answer(task: Task, spec: ModelSpec, rng, examples: int, dtype=np.float64) -> Update:
    """What a device might send: noise around what it was given."""
    if not task.send:
        return Update(device=task.device, round=task.round, examples=examples)
    if task.subspace is not None:
        return update_of(Payload(scalars=scalars_for(task, rng, dtype)), task.device, examples, task.round)
    payload = noise_payload(rng, spec, task.rank, task.alpha, rslora=task.rslora, dtype=dtype)
    if task.start_from is Start.GIVEN:
        start = task.start if task.shared_a_seed is None else fill_a(task.start, task.shared_a_seed, spec)
        factors = {
            name: replace(
                term,
                b=(term.b + 0.3 * start.factors[name].b).astype(dtype),
                a=(start.factors[name].a + (0.3 * term.a if task.train_a else 0)).astype(dtype),
            )
            for name, term in payload.factors.items()
        }
        payload = Payload(factors=factors, dense=payload.dense)
    if task.shared_a_seed is not None:
        payload = drop_a(payload)
    payload, metrics = adjusted(task, payload, spec, rng)
    update = update_of(payload, task.device, examples, task.round)
    return replace(update, metrics=metrics, cost=Cost(seconds=float(examples)))


def scalars_for(task: Task, rng, dtype=np.float64) -> Scalars:
    """Noise along the directions that a task gives."""
    k = task.subspace.k
    if task.tuner == "subspace":
        return Scalars(over=Over.BASIS, k=k, values=rng.standard_normal(k).astype(dtype))
    values = rng.standard_normal(STEPS).astype(dtype)
    if task.subspace.family == "sketch":
        return Scalars(over=Over.STEPS, k=k, values=values, seed=derive_seed("toy", task.round, task.device))
    if task.start.scalars is not None:
        indices = task.start.scalars.indices[:STEPS]
    else:
        seed = task.knobs.get("draw_seed") or derive_seed("toy", task.round, task.device)
        indices = draw_indices(seed, k, STEPS)
    return Scalars(over=Over.POOL, k=k, values=values, indices=indices)


def answers(strategy: Strategy, state: State, devices, spec, rng, round=None, dtype=np.float64) -> list[Update]:
    """What the devices send in a round; by default the one that comes next."""
    round = state.version if round is None else round
    return [answer(task, spec, rng, 2 + 3 * i, dtype) for i, task in enumerate(strategy.plan(state, devices, round))]


def dense_of(payload: Payload, spec: ModelSpec = SPEC) -> dict[str, np.ndarray]:
    """Every matrix and head of a payload, dense float64; zero where it has none."""
    out = {name: np.zeros((m.d_out, m.d_in)) for name, m in spec.matrices.items()}
    out |= {name: np.zeros(shape) for name, shape in spec.dense.items()}
    out["coefficients"] = np.zeros(K)
    for name, term in payload.factors.items():
        out[name] = out[name] + term.scale * (term.b.astype(np.float64) @ term.a.astype(np.float64))
    for name, value in payload.dense.items():
        out[name] = out[name] + value
    if payload.coefficients is not None:
        out["coefficients"] = payload.coefficients.values()
    if payload.scalars is not None:
        out["coefficients"] = steps_of(payload.scalars)
    return out


def steps_of(scalars: Scalars) -> np.ndarray:
    """What scalars add to the coefficients, by their definition."""
    values = scalars.values.astype(np.float64)
    if scalars.over == Over.BASIS:
        return values
    if scalars.over == Over.POOL:
        return np.eye(scalars.k)[scalars.indices].T @ values
    return np.array([step_direction(scalars.seed, t, scalars.k) for t in range(len(values))]).T @ values


def step_direction(seed: int, t: int, k: int) -> np.ndarray:
    """v_t: the signs of the key that the task's seed gives to step t."""
    return signs(int(pool_keys(seed, np.array([t]))[0]), "", 0, k).astype(np.float64)


def exact_mean(updates: Iterable[Update], spec: ModelSpec = SPEC, weights=None) -> dict[str, np.ndarray]:
    """sum_k p_k s_k B_k A_k, dense float64, and the heads' p_k-weighted mean."""
    updates = list(updates)
    n = np.array([u.examples for u in updates] if weights is None else weights, float)
    parts = [dense_of(u.payload, spec) for u in updates]
    return {name: sum(p * d[name] for p, d in zip(n / n.sum(), parts, strict=True)) for name in parts[0]}


def close(x: dict[str, np.ndarray], y: dict[str, np.ndarray], tol: float = 1e-6) -> None:
    assert x.keys() == y.keys()
    for name in x:
        scale = max(np.linalg.norm(x[name]), np.linalg.norm(y[name]), 1e-30)
        error = np.linalg.norm(x[name] - y[name]) / scale
        assert error <= tol, f"{name}: relative difference {error:.2e}"


def merge(into: dict[str, np.ndarray], payload: Payload, spec: ModelSpec = SPEC) -> dict[str, np.ndarray]:
    delta = dense_of(payload, spec)
    return {name: into[name] + delta[name] for name in into}
