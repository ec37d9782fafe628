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
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run

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
            patient = PatientGrid(grid, orders, _before(out, orders), post)
            patient.wait()
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
                coordinate(patient, plan, events)
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


class PatientGrid(Grid):
    """Flower's grid, but whoever asks which devices are connected is made to wait for those that should be.

    First for as many as the settings ask for. After a restart also, for less long, for those that took part before: a
    device may be gone for a moment because of what killed the server, and a round that went on without it would be
    another one than was cut.
    """

    def __init__(self, grid: Grid, orders: Orders, before: int, post: Post) -> None:
        self._grid, self._orders, self._post = grid, orders, post
        self._needed = max(orders.wait_for, before)
        self._began = time.monotonic()
        self._rejoined = self._began + min(orders.rejoin_seconds, orders.wait_seconds)

    def wait(self) -> list[int]:
        """The nodes that are connected, once there are enough of them.

        Raises:
            ValueError: when too few come.
        """
        told, least = -1, self._orders.wait_for
        while True:
            nodes, now = list(self._grid.get_node_ids()), time.monotonic()
            if len(nodes) >= self._needed:
                return nodes
            if len(nodes) >= least and now >= self._rejoined:
                log.warning("going on with %d of the %d devices that took part before", len(nodes), self._needed)
                return nodes
            if now - self._began >= self._orders.wait_seconds:
                within = f"{self._orders.wait_seconds:g} s"
                raise ValueError(f"a run waits for {least} devices, got {len(nodes)} within {within}")
            if len(nodes) != told:
                self._post(Stage.WAITING, connected=len(nodes), needed=self._needed)
                told = len(nodes)
            time.sleep(POLL_SECONDS)

    def get_node_ids(self) -> Iterable[int]:
        if time.monotonic() >= self._rejoined or self._orders.config.server.mode == "buffered":
            return self._grid.get_node_ids()
        nodes = self.wait()
        self._post(Stage.RUNNING)
        return nodes

    def set_run(self, run: Run) -> None:
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self._grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self._grid.send_and_receive(messages, timeout=timeout)


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
