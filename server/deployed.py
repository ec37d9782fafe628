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
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run

from fedloom.server.app import Plan, coordinate
from fedloom.server.bundle_app import SETTING
from fedloom.server.disk import room_for
from fedloom.server.enrolled import Enrolled
from fedloom.server.events import EVENTS_FILE, EventLog
from fedloom.server.loop import CHECKPOINTS
from fedloom.server.orders import Orders, read_orders
from fedloom.server.processes import MARK, birth, private
from fedloom.server.standing import Stage, Standing, write_standing
from fedloom.server.superlink import FOLDER

log = logging.getLogger("fedloom.server")

LOCK_FILE = "serverapp.lock"
LOCK_SECONDS = 90.0
POLL_SECONDS = 0.2
WINDOW = 100_000  # messages under way at once: SuperLink keeps them on disk, so that all devices work at the same time


def run_in(out: Path, grid: Grid, run_id: int) -> None:
    """Do what OUT/plan.json says on a grid, and leave word of how it went.

    Raises:
        ValueError: for whatever the round loop refuses, when too few devices come, or OUT is somebody else's.
    """
    with private(out), room_for(out), _alone(out):
        post = Post(out, run_id)
        try:
            with room_for(out):
                _run(out, grid, post)
        except BaseException as error:
            kind = type(error).__name__
            post(Stage.FAILED, error=" ".join(str(error).split()) or kind, kind=kind)
            raise
        post(Stage.FINISHED)


def _run(out: Path, grid: Grid, post: Post) -> None:
    """Wait for the devices and drive the rounds."""
    post(Stage.STARTED)
    orders = read_orders(out)
    owners = None if orders.names is None else Enrolled(out / FOLDER).names
    patient = PatientGrid(grid, orders, _before(out, orders), post, owners)
    patient.wait()
    post(Stage.RUNNING)
    events = EventLog(out / EVENTS_FILE)
    plan = Plan(
        config=orders.config, out=out, run=orders.run, resume=True, durable=True, window=WINDOW, pause=POLL_SECONDS
    )
    try:
        coordinate(patient, plan, events, owners)
        events.finished()
    except ValueError as error:
        with suppress(OSError):  # on a full disk, there may be no room for the line that says so
            events.stopped(str(error))
        raise
    finally:
        events.close()


class Post:
    """Says in OUT/serverapp.json where this process stands."""

    def __init__(self, out: Path, run_id: int) -> None:
        self._out, self._run_id = out, run_id
        self._born = birth(os.getpid())

    def __call__(self, stage: Stage, **about: Any) -> None:
        standing = Standing(pid=os.getpid(), born=self._born, run_id=self._run_id, stage=stage, **about)
        write_standing(self._out, standing)


class PatientGrid(Grid):
    """Flower's grid, but whoever asks which devices are connected is made to wait for those that should be.

    First for as many as the settings ask for. After a restart also, for less long, for those that took part before: a
    device may be gone for a moment because of what killed the server, and a round that went on without it would be
    another one than was cut.

    Where devices have keys, a node that is on nobody's name is not there: its key was taken back, or was let in a
    moment ago and is not written down yet.
    """

    def __init__(
        self, grid: Grid, orders: Orders, before: int, post: Post, owners: Callable[[], Mapping[int, str]] | None = None
    ) -> None:
        """`owners` gives the device of each node, by the keys."""
        self._grid, self._orders, self._post, self._owners = grid, orders, post, owners
        self._needed = max(orders.wait_for, before)
        self._began = time.monotonic()
        self._rejoined = self._began + min(orders.rejoin_seconds, orders.wait_seconds)
        self._least = orders.wait_for  # to begin with; from then on, those who are left go on

    def wait(self) -> list[int]:
        """The nodes that are connected, once there are enough of them, or time is up for those that came once and left.

        Raises:
            ValueError: when too few come.
        """
        told, least = -1, self._least
        while True:
            nodes, now = self._connected(), time.monotonic()
            if len(nodes) >= self._needed:
                self._least = 1
                return nodes
            if len(nodes) >= least and now >= self._rejoined:
                self._least = 1
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
            return self._connected()
        nodes = self.wait()
        self._post(Stage.RUNNING)
        return nodes

    def _connected(self) -> list[int]:
        nodes = list(self._grid.get_node_ids())
        if self._owners is None:
            return nodes
        owners = self._owners()
        return [node for node in nodes if node in owners]

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
        return len(roster) if orders.names is None else sum(name in orders.names for name in roster)
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
