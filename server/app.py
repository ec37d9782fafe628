"""The ServerApp: Flower starts it, a `prepare` function tells it what to run, the round loop does the rest."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedloom.protocols.config import RunConfig
from fedloom.server.courier import Courier
from fedloom.server.loop import Coordinator, Outcome
from fedloom.server.watch import Watcher
from fedloom.strategies.base import Scaling, Strategy, Workload
from fedloom.strategies.registry import build

log = logging.getLogger("fedloom.server")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one ServerApp is to run, and where it leaves its files."""

    config: RunConfig
    out: Path
    run: str
    resume: bool = False
    durable: bool = False  # keep the running round's accepted answers on disk
    window: int = 32  # messages under way at once
    pause: float = 0.05  # seconds between polls


def build_strategy(config: RunConfig) -> Strategy:
    """The strategy that a recipe names, with its options.

    Raises:
        ValueError: for an unknown strategy or option, naming the nearest.
    """
    scaling = Scaling(alpha=config.lora.alpha, rslora=config.lora.rslora)
    return build(config.strategy.name, config.strategy.options, scaling, workload(config))


def workload(config: RunConfig) -> Workload:
    """What one training step of a recipe is."""
    train = config.train
    optimizer: Literal["adamw", "sgd", "momentum"] = "momentum" if train.momentum else train.optimizer
    if train.optimizer == "adamw":
        optimizer = "adamw"
    return Workload(
        batch=train.batch_size,
        length=config.data.max_length,
        steps=train.steps,
        accumulate=train.accumulate,
        optimizer=optimizer,
    )


def coordinate(
    grid: Grid, plan: Plan, watcher: Watcher | None = None, owners: Callable[[], Mapping[int, str]] | None = None
) -> Outcome:
    """Drive a plan over any grid; `owners` gives the device of each node, where devices have keys.

    Raises:
        ValueError: for an unknown strategy or option, or whatever the round loop refuses.
    """
    courier = Courier(grid, timeout=plan.config.server.timeout, window=plan.window, pause=plan.pause)
    strategy = build_strategy(plan.config)
    run = Coordinator(courier, plan.config, strategy, plan.out, run=plan.run, durable=plan.durable, owners=owners)
    return run.go(resume=plan.resume, watcher=watcher)


def server_app(prepare: Callable[[Context], Plan]) -> ServerApp:
    """A ServerApp that runs what `prepare` makes of Flower's context."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        plan = prepare(context)
        outcome = coordinate(grid, plan)
        log.info("run %s ended at round %d in %s", plan.run, plan.config.server.rounds, plan.out)
        if outcome.history:
            log.info("last evaluation: %s", outcome.history[-1].get("evaluation"))

    return app
