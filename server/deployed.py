"""The ServerApp of a deployed run: Flower starts it, OUT/plan.json tells it what to do, the round loop does the rest.

It is one process of several that share OUT. It holds a lock on the folder while it works, since Flower may end an
earlier one late; and it says in OUT/serverapp.json where it stands, for the server that watches it.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedloom.server.app import Plan, coordinate
from fedloom.server.bundle_app import SETTING
from fedloom.server.events import EVENTS_FILE, EventLog
from fedloom.server.loop import CHECKPOINTS
from fedloom.server.orders import Orders, read_orders
from fedloom.server.processes import MARK
from fedloom.server.standing import Stage, Standing, write_standing

log = logging.getLogger("fedloom.server")

LOCK_FILE = "serverapp.lock"
LOCK_SECONDS = 90.0
POLL_SECONDS = 0.2
WINDOW = 100_000  # messages under way at once: SuperLink keeps them on disk, so that all devices work at the same time


def run_in(out: Path, grid: Grid, run_id: int) -> None:
    """Do what OUT/plan.json says on a grid, and leave word of how it went.

    Raises:
        ValueError: for whatever the round loop refuses, or when too few devices come.
    """
    with _alone(out):
        post = Post(out, run_id)
        post(Stage.STARTED)
        try:
            orders = read_orders(out)
            _wait_for_devices(grid, orders, _before(out, orders), post)
            post(Stage.RUNNING)
            events = EventLog(out / EVENTS_FILE)
            plan = Plan(
                config=orders.config,
                out=out,
                run=orders.run,
                resume=True,
                durable=True,
                window=WINDOW,
                pause=POLL_SECONDS,
            )
            try:
                coordinate(grid, plan, events)
                events.finished()
            except ValueError as error:
                events.stopped(str(error))
                raise
            finally:
                events.close()
        except BaseException as error:
            kind = type(error).__name__
            post(Stage.FAILED, error=" ".join(str(error).split()) or kind, kind=kind)
            raise
        post(Stage.FINISHED)


class Post:
    """Says in OUT/serverapp.json where this process stands."""

    def __init__(self, out: Path, run_id: int) -> None:
        self._out, self._run_id = out, run_id
        self._created = psutil.Process().create_time()

    def __call__(self, stage: Stage, **about: Any) -> None:
        standing = Standing(pid=os.getpid(), created=self._created, run_id=self._run_id, stage=stage, **about)
        write_standing(self._out, standing)


def _wait_for_devices(grid: Grid, orders: Orders, before: int, post: Post) -> None:
    """Wait until as many are connected as the settings ask for; after a restart also, for less long, for those that
    took part before."""
    began = time.monotonic()
    rejoined = began + min(orders.rejoin_seconds, orders.wait_seconds)
    told = -1
    while True:
        connected, now = len(list(grid.get_node_ids())), time.monotonic()
        if connected >= max(orders.wait_for, before):
            return
        if connected >= orders.wait_for and now >= rejoined:
            log.warning("going on with %d of the %d devices that took part before", connected, before)
            return
        if now - began >= orders.wait_seconds:
            raise ValueError(
                f"a run waits for {orders.wait_for} devices, got {connected} within {orders.wait_seconds:g} s"
            )
        if connected != told:
            post(Stage.WAITING, connected=connected, needed=max(orders.wait_for, before))
            told = connected
        time.sleep(POLL_SECONDS)


def _before(out: Path, orders: Orders) -> int:
    """How many of the devices that a checkpoint knows are still let in."""
    for path in sorted((out / CHECKPOINTS).glob("round-*/run.json"), reverse=True):
        try:
            roster: Mapping[str, object] = json.loads(path.read_bytes())["roster"]
        except (OSError, ValueError, KeyError):
            continue
        return sum(name in orders.names for name in roster) if orders.names else len(roster)
    return 0


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Hold the folder's lock; the system lets go of it when this process ends, however it ends.

    Raises:
        ValueError: when another ServerApp keeps it.
    """
    with (out / LOCK_FILE).open("a") as file:
        until = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= until:
                    raise ValueError(f"{out} must be free, an earlier ServerApp still works on it") from None
                time.sleep(POLL_SECONDS)
        yield


def _out_of(context: Context) -> Path:
    """The run's folder: a SuperLink of the server's own has it in its environment, one that was joined is told it.

    Raises:
        ValueError: when neither is so.
    """
    told = str(context.run_config.get(SETTING, "")) or os.environ.get(MARK, "")
    if not told:
        raise ValueError(
            f"a run must be told its folder by the run setting {SETTING!r}: start it with `fedloom server`"
        )
    return Path(told)


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """What Flower calls."""
    run_in(_out_of(context), grid, context.run_id)
