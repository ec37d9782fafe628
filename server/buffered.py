"""Rounds without waiting: buffered asynchronous aggregation (FedBuff; Nguyen et al., AISTATS 2022).

Every device that is here has a task under way. Whenever `buffer` good updates are in, they are merged into the next
version, which the devices that answered then go on from; the others finish what they began.

    weight of an update = n_k s(tau_k),    s(tau) = (1 + tau)^-1/2

tau is how many versions were made since the one that the update started from. The strategies that allow it merge
changes relative to where a device started, so an old change still makes sense; averages of weights do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from fedloom.protocols.messages import Kind, Task, Update
from fedloom.server.collect import Desk, Reception
from fedloom.server.intake import without_tensors
from fedloom.strategies.base import State, Strategy

ALLOWED = ("fedloom", "flora", "fedkseed", "sketch")  # strategies that merge changes
FINE = 1000  # examples are whole numbers: weights are kept to a thousandth of an example


@dataclass(frozen=True, kw_only=True)
class _Flight:
    """A task under way, and the version that it started from."""

    task: Task
    version: int


class Buffer:
    """Collects updates across rounds; one `fill` is one round.

    Attributes:
        seen: the updates of the last fill, without their tensors.
        staleness: how many versions old each of them was.
    """

    def __init__(self, desk: Desk, strategy: Strategy, complete: Callable[[Task], Task]) -> None:
        """
        Raises:
            ValueError: for a strategy that averages weights.
        """
        name = desk.config.strategy.name
        if name not in ALLOWED:
            raise ValueError(f"server.mode 'buffered' needs a strategy of changes ({', '.join(ALLOWED)}), got {name!r}")
        self._desk, self._strategy, self._complete = desk, strategy, complete
        self._reception = Reception(desk, Kind.TRAIN)
        self._mail = desk.courier.mail("buffered")
        self._flying: dict[int, _Flight] = {}  # by node
        self._asked: dict[str, int] = {}  # device: the last round that it was asked in
        self.seen: list[Update] = []
        self.staleness: list[int] = []

    @property
    def refusals(self) -> list[str]:
        """A line for each answer that was not taken."""
        return self._reception.refusals

    def fill(self, state: State, round: int) -> Iterator[Update]:
        """Good updates as they arrive, weighted by their age, until the buffer is full or nobody is left to ask."""
        self.seen, self.staleness = [], []
        self._reception.refusals.clear()
        config = self._desk.config
        self._send(state, round)
        flying = [flight.task.device for flight in self._flying.values()]
        self._desk.watcher.began(round=round, rounds=config.server.rounds, phase=Kind.TRAIN, devices=flying)
        while len(self.seen) < config.server.buffer and self._flying:
            for reply in self._mail.poll():
                flight = self._flying.pop(reply.node)
                update = self._reception.receive(flight.task, reply)
                if update is None:
                    continue
                self._reception.accept(flight.task, update, size=len(reply.frame))
                age = state.version - flight.version
                self.seen.append(without_tensors(update))
                self.staleness.append(age)
                yield replace(update, examples=int(FINE * update.examples * (1 + age) ** -0.5))

    def _send(self, state: State, round: int) -> None:
        """A task for every device that is here, fit and idle; one that was asked in this round already waits."""
        desk, busy = self._desk, {flight.task.device for flight in self._flying.values()}
        idle = [
            report
            for report in desk.roster.draw(0, seed=desk.config.seed, round=round)
            if report.device not in busy and self._asked.get(report.device) != round
        ]
        tasks = [self._complete(task) for task in self._strategy.plan(state, idle, round)] if idle else []
        addressed = [(node, task) for task in tasks if (node := desk.roster.node(task.device)) is not None]
        for node, task in addressed:
            self._flying[node] = _Flight(task=task, version=state.version)
            self._asked[task.device] = round
        for lost in self._mail.send(self._reception.parcels(addressed)):
            self._reception.receive(self._flying.pop(lost.node).task, lost)
