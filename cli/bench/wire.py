"""`fedloom bench wire`: the bytes that a device sends and receives in a round, counted on the frames themselves.

One round of T local steps goes through the real strategy and codec: scalars of a random walk with realistic spread up,
and down the task that brings a device from the version before to the newest.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fedloom.protocols.codec import decode, encode
from fedloom.protocols.messages import DeviceReport, ModelSpec, Over, Payload, Scalars, Task, Update
from fedloom.protocols.seeds import derive_seed, draw_indices
from fedloom.strategies.base import Scaling
from fedloom.strategies.registry import build
from fedloom.strategies.subspace import check_scalars, contribution

PUBLISHED = 17_984  # FedKSeed: K floats down, a seed and a float a step up
METRICS = {"loss_sum": 812.25, "tokens": 1600.0, "n": 1600.0, "steps": 200.0}


def wire(
    *, strategy: str, k: int, steps: int, cohort: int, wire: str, downlink_bits: int, seed: int = 0
) -> dict[str, Any]:
    """Bytes of one device and round.

    Args:
        strategy: fedkseed, fedkseed_pro, decomfl or sketch (forward-only devices).
        cohort: devices whose scalars make up the round's step, which is what the next task brings down.
        wire: dtype of the scalars.

    Returns:
        `up`, `down`, `total` bytes; the relative error that the scalars' rounding makes in the step; and the published
        exchange's bytes at K = 4096 and 200 steps, scaled to these.
    """
    options: dict[str, Any] = {"k": k, "downlink_bits": downlink_bits}
    if strategy == "fedkseed_pro":
        options["draws"] = steps
    merge = build(strategy, options, Scaling())
    fleet = [
        DeviceReport(device=f"device-{i:02d}", examples=100, rank=1, capabilities=("forward",)) for i in range(cohort)
    ]
    state = merge.init(ModelSpec(base_hash="0" * 64, matrices={}), seed, fleet)
    up, errors = [], []
    for round in (1, 2):
        reports = [DeviceReport(**{**vars(report), "version": state.version}) for report in fleet]
        updates = []
        for task in merge.plan(state, reports, round):
            exact = _answer(task, steps, seed)
            frame = encode(exact, wire=wire, seed=seed)
            updates.append(decode(frame, Update, limit=1 << 24))
            up.append(len(frame))
            errors.append(_error(exact, updates[-1], task))
        state = merge.aggregate(state, updates)
    (late,) = merge.plan(state, [DeviceReport(**{**vars(fleet[0]), "version": state.version - 1})], 3)
    down = len(encode(_complete(late, seed), wire="fp32"))
    each = float(np.mean(up))
    published = 4 * k + 8 * steps
    return {
        "strategy": strategy, "k": k, "steps": steps, "cohort": cohort, "wire": wire, "downlink_bits": downlink_bits,
        "up": each, "down": down, "total": each + down, "step_error": float(np.mean(errors)),
        "published_total": published, "times_fewer": published / (each + down),
    }  # fmt: skip


def _complete(task: Task, seed: int) -> Task:
    """The task with what the round loop fills in."""
    knobs = {"steps": 200, "lr": 1e-5, "batch_size": 8, **task.knobs}
    return Task(
        **{
            **vars(task),
            "run": "0" * 16,
            "nonce": derive_seed("nonce", task.device, task.round),
            "seed": derive_seed(seed, "task", task.round, task.device),
            "wire": "int8",
            "knobs": knobs,
        }
    )


def _answer(task: Task, steps: int, seed: int) -> Update:
    """Scalars as training gives them: a t-distribution's spread, since projected gradients have heavy tails."""
    task = _complete(task, seed)
    rng = np.random.Generator(np.random.Philox(key=derive_seed(seed, task.round, task.device)))
    values = (1e-5 * rng.standard_t(4, steps)).astype(np.float32)
    k = task.subspace.k if task.subspace else 0
    if task.subspace and task.subspace.family == "sketch":
        scalars = Scalars(over=Over.STEPS, k=k, values=values, seed=task.seed)
    else:
        given = task.start.scalars
        drawn = draw_indices(int(task.knobs.get("draw_seed") or derive_seed(task.seed, "directions")), k, steps)
        indices = drawn if given is None or given.indices is None else given.indices[:steps]
        scalars = Scalars(over=Over.POOL, k=k, values=values, indices=indices)
    return Update(
        device=task.device,
        round=task.round,
        examples=100,
        run=task.run,
        nonce=task.nonce,
        metrics=METRICS,
        payload=Payload(scalars=scalars),
    )


def _error(exact: Update, sent: Update, task: Task) -> float:
    if task.subspace is None:
        return 0.0
    one, other = (contribution(check_scalars(u, task.subspace, 0.0), task.subspace) for u in (exact, sent))
    return float(np.linalg.norm(one - other) / np.linalg.norm(one))
