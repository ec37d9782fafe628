"""What the server lets in: an answer to the task that was asked, whole, finite and of the model's shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedloom.protocols.config import Train
from fedloom.protocols.messages import Array, Kind, ModelSpec, Over, Payload, Refusal, Task, Update
from fedloom.protocols.seeds import draw_indices
from fedloom.strategies import intake as strategies_intake
from fedloom.strategies.masked import check_within
from fedloom.strategies.subspace import check_scalars
from fedloom.strategies.unequal import MEASURE, PRUNE_RATIO, RANK, RATIO, REPEATED

# Far above what devices that train send, and far enough below what sums and products of float32 can hold that no
# update stops a run: |b a| stays below 2^40 r, times 2^31 examples below 2^80.
LARGEST: Final = 2.0**20  # value of a tensor
LARGEST_SCALAR: Final = 2.0**10
MOST_EXAMPLES: Final = 2**31
MOST_METRICS: Final = 64
LARGEST_METRIC: Final = 1e15
LONGEST: Final = 1e8  # seconds of a task
NO_REASON: Final = "no reason given"


def check_update(update: Update, task: Task, spec: ModelSpec) -> None:
    """Hold an update against its task and the model.

    Raises:
        ValueError: for an answer to another task (run, round, device, kind, nonce), tensors that nobody asked for, an
            unknown or missing module, a unit that its task has dropped, a wrong shape, rank or alpha, a value that is
            not finite or absurdly large, or metrics that cannot be pooled.
    """
    _check_named(update, task, "an update", ("run", "round", "device", "kind", "nonce"))
    if update.examples < 0:
        raise ValueError(f"an update must count examples >= 0, got {update.examples}")
    if update.examples > MOST_EXAMPLES:
        raise ValueError(f"an update must count examples <= {MOST_EXAMPLES}, got {update.examples}")
    _check_measured(update, task, MOST_METRICS + (len(spec.matrices) if MEASURE in task.knobs else 0))
    if not (task.send and task.kind == Kind.TRAIN):
        if update.payload or update.payload.keep:
            raise ValueError("this task asks for no tensors, got some")
        return
    if task.subspace is not None:
        _check_scalars(update, task)
        return
    _check_repeated(update, task)
    if update.cost.out_of_memory:
        _check_given_up(update, task)
        return
    _check_kept(update, task, spec)
    for name, term in update.payload.factors.items():
        rank, alpha = task.rank_of(name), task.alpha_of(name)
        if (term.rank, term.alpha, term.rslora) != (rank, alpha, task.rslora):
            raise ValueError(
                f"factors of {name} must have the task's rank {rank} and alpha {alpha:g}, "
                f"got rank {term.rank} and alpha {term.alpha:g}"
            )
        _check_size(name, term.b, LARGEST)
        _check_size(name, term.a, LARGEST)
    for name, value in update.payload.dense.items():
        _check_size(name, value, LARGEST)


def _check_given_up(update: Update, task: Task) -> None:
    """No tensors, and the arm that the task told it to pull: what a strategy that fits devices' memory learns from."""
    if update.payload or update.payload.keep:
        raise ValueError("an update that ran out of memory must carry no tensors, got some")
    if not task.ranks and PRUNE_RATIO not in task.knobs:
        raise ValueError("the task leaves nothing to make smaller, got an update that ran out of memory")
    asked = {RATIO: float(task.knobs.get(PRUNE_RATIO, 0.0)), RANK: float(task.rank)}
    for name, value in asked.items():
        if update.metrics.get(name) != value:
            raise ValueError(f"metric {name!r} must be its task's {value:g}, got {update.metrics.get(name)}")


def _check_repeated(update: Update, task: Task) -> None:
    """What a strategy asked for and hears again is what it asked for."""
    for name in REPEATED:
        if name in task.knobs and update.kind == Kind.TRAIN and update.metrics.get(name) != float(task.knobs[name]):
            raise ValueError(f"metric {name!r} must be its task's {task.knobs[name]}, got {update.metrics.get(name)}")


def _check_kept(update: Update, task: Task, spec: ModelSpec) -> None:
    """The modules that the task names, each of the shape that the update's own keep gives it.

    A device prunes only where its task's start carries a keep, and brings nothing back that is dropped there.
    """
    keep, allowed = update.payload.keep, task.start.keep
    strategies_intake.check_update(
        update, spec, shared_a=not task.train_a, masked=bool(allowed), partial=bool(task.ranks)
    )
    check_within("an update", keep, allowed)
    if task.ranks and update.payload.factors.keys() != task.ranks.keys():
        differ = sorted(update.payload.factors.keys() ^ task.ranks.keys())[:3]
        raise ValueError(f"an update must carry the modules of its task's ranks, got a difference in {differ}")


def check_refusal(refusal: Refusal, task: Task) -> None:
    """Hold a device's 'no' against its task: an old or a borrowed one says nothing of this task.

    Raises:
        ValueError: for a refusal of another task, and what it said.
    """
    try:
        _check_named(refusal, task, "a refusal", ("run", "round", "device", "nonce"))  # the nonce is of one kind alone
    except ValueError as error:
        raise ValueError(f"{error}; it said: {refusal.reason or NO_REASON}") from None


def _check_named(answer: Update | Refusal, task: Task, what: str, names: Sequence[str]) -> None:
    for name in names:
        asked, got = getattr(task, name), getattr(answer, name)
        if asked != got:
            raise ValueError(f"{what}'s {name} must be its task's {asked!r}, got {got!r}")


def _check_size(name: str, values: Array, largest: float) -> None:
    peak = max(float(values.max(initial=0.0)), -float(values.min(initial=0.0)))
    if peak > largest:
        raise ValueError(f"values of {name} must lie within +-{largest:g}, got {peak:g}")


def _check_measured(update: Update, task: Task, most: int) -> None:
    """Metrics that can be pooled: sums with what they are to be divided by, and none that is out of this world.

    What a task asks to be repeated may be as large as the task says: operations are, of a large model.
    """
    metrics = update.metrics
    if len(metrics) > most:
        raise ValueError(f"an update must have <= {most} metrics, got {len(metrics)}")
    if update.cost.seconds > LONGEST:
        raise ValueError(f"an update must have taken <= {LONGEST:g} s, got {update.cost.seconds:g}")
    for name, value in metrics.items():
        if abs(value) > LARGEST_METRIC and not (name in REPEATED and value == task.knobs.get(name)):
            raise ValueError(f"metric {name!r} must lie within +-{LARGEST_METRIC:g}, got {value:g}")
        count = "tokens" if name == "loss_sum" else "n"
        if name.endswith("_sum") and count not in metrics:
            raise ValueError(f"metric {name!r} must come with {count!r}")
    for count in ("n", "tokens"):
        if 0 != metrics.get(count, 0) < 1:
            raise ValueError(f"metric {count!r} must be 0 or >= 1, got {metrics[count]:g}")


def _check_scalars(update: Update, task: Task) -> None:
    """Scalars along the directions that the task gave, in its order."""
    if task.subspace is None:
        return
    scalars = check_scalars(update, task.subspace, task.scalar_limit)
    _check_size("scalars", scalars.values, LARGEST_SCALAR)
    train = Train()  # what a task does not say is the default; each scalar along steps costs the server k signs
    most = int(task.knobs.get("steps", train.steps)) * int(task.knobs.get("directions", train.directions))
    if scalars.over != Over.BASIS and len(scalars.values) > most:
        raise ValueError(f"an update must have <= {most} scalars, one for each direction, got {len(scalars.values)}")
    if scalars.over == Over.STEPS and scalars.seed != task.seed:
        raise ValueError(f"scalars must be along the directions of the task's seed {task.seed}, got {scalars.seed}")
    listed = task.start.scalars
    if listed is not None and not _begins(listed.indices, scalars.indices):
        raise ValueError("scalars must be along the directions that the task lists, got others")
    shared = task.knobs.get("draw_seed")
    if shared is not None and not _begins(draw_indices(int(shared), scalars.k, len(scalars.values)), scalars.indices):
        raise ValueError("scalars must be along the round's shared directions, got others")


def _begins(whole: NDArray[np.int64] | None, part: NDArray[np.int64] | None) -> bool:
    return whole is not None and part is not None and np.array_equal(whole[: len(part)], part)


def without_tensors(update: Update) -> Update:
    """What of an update is kept once it is merged: its numbers."""
    return replace(update, payload=Payload())
