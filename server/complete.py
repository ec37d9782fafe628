"""What a task needs beyond its strategy's plan: the run, a nonce, a seed, the wire and the recipe's knobs."""

from __future__ import annotations

import math
from dataclasses import replace

from fedloom.protocols.config import RunConfig
from fedloom.protocols.messages import Kind, Task
from fedloom.protocols.seeds import derive_seed


def complete(task: Task, config: RunConfig, *, run: str) -> Task:
    """Fill in what is not the strategy's business. The same task of the same run is always the same bytes."""
    evaluation = {"batch_size": config.eval.batch_size, "rouge": int(config.eval.rouge)}
    evaluation["max_new_tokens"] = config.eval.max_new_tokens
    knobs = training_knobs(config, task.round) if task.kind == Kind.TRAIN else evaluation
    return replace(
        task,
        run=run,
        nonce=derive_seed(run, "nonce", task.kind, task.round, task.device),
        seed=derive_seed(config.seed, "task", task.round, task.device),
        strategy=config.strategy.name,
        tuner=task.tuner if config.train.tuner == "auto" else config.train.tuner,
        wire=config.wire.up,
        knobs={**knobs, **task.knobs},
    )


def training_knobs(config: RunConfig, round: int) -> dict[str, float | int | str]:
    """What a device needs to be told of a recipe's training: what is not the default."""
    train = config.train
    told = train.model_dump(exclude={"tuner", "schedule"}, exclude_defaults=True)
    if config.lora.dropout:
        told["dropout"] = config.lora.dropout
    if train.schedule == "constant":
        return told
    done = (round - 1) / config.server.rounds
    share = 1 - done if train.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return told | {"lr": train.lr * share} | ({"zo_lr": train.zo_lr * share} if train.zo_lr else {})
