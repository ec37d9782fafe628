"""Any of our strategies as one of Flower's, for people who already have a Flower ServerApp.

    FlowerStrategy("fedloom", {"rank_cap": 8}).start(grid=grid, num_rounds=10)

Flower's loop asks for a phase's messages, makes the trip itself and hands the replies back as one list, so memory grows
with the cohort; it begins at round 1 always and writes nothing down. What our own round loop has beyond that (resume, a
round that ends before its last device, one that is tried again) is not there; docs/flower.md lists it.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, Metadata, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result
from flwr.serverapp.strategy import Strategy as FlowerBase

from fedloom.protocols.codec import TaskEncoder
from fedloom.protocols.config import RunConfig, build_config, override, read_recipe
from fedloom.protocols.messages import Kind, Payload, Task
from fedloom.server.app import build_strategy
from fedloom.server.collect import Collection, Desk, at_least
from fedloom.server.complete import complete
from fedloom.server.courier import Courier, Parcel, Reply, to_message, to_reply
from fedloom.server.greeting import drop_unfit, greet, leave_out, muster, unfit
from fedloom.server.ledger import Ledger
from fedloom.server.pooling import pool
from fedloom.server.roster import Roster
from fedloom.server.snapshot import Snapshot, from_arrays, to_arrays
from fedloom.server.watch import Silent
from fedloom.strategies.base import Scaling, State, Strategy
from fedloom.strategies.registry import build, names

log = logging.getLogger("fedloom.server")
shown = logging.getLogger("flwr")  # where Flower's own strategies say what they do

PAUSE = 1.0  # seconds between looks at who is connected
UNUSED = ("mode", "over_select", "retries", "retry_seconds", "keep_checkpoints")  # keys of [server]

Recipe = RunConfig | Mapping[str, Any] | Path | str


class FlowerStrategy(FlowerBase):
    """One of our strategies for Flower's `start`, or for a loop of your own that calls what `start` calls.

    The arrays of a round are the strategy's whole state after it, the global model and the server's memory in one:
    `payload` takes the model out of them, and a later `start` goes on from them.
    """

    def __init__(
        self,
        strategy: Strategy | str = "",
        options: Mapping[str, Any] | None = None,
        *,
        recipe: Recipe | None = None,
        run: str = "",
        min_available_nodes: int = 1,
    ) -> None:
        """
        Args:
            strategy: a strategy, or the name of one with its `options`; left out, the recipe's.
            recipe: what else there is to say of a run ([train], [lora], [wire], [server], [eval], seed): parsed, as a
                table, or the path of a TOML file. Model, data and fleet are the devices' business.
            run: names the run in every message; left out, each `start` gets a new one.
            min_available_nodes: each round waits until so many are connected.

        Raises:
            ValueError: for an unknown strategy, option or recipe key, naming the nearest, or a bad value.
        """
        self._recipe, self._strategy = _configure(strategy, options, _read(recipe or {}))
        self._asked_run, self._least = run, min_available_nodes
        self._reset(self._recipe)

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int | None = None,
        timeout: float | None = None,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run Flower's loop, from round 1.

        Args:
            initial_arrays: empty or left out for the public base, which the devices hold; an earlier result's arrays to
                go on from its model, with the server's memory of it.
            num_rounds, timeout: left out, the recipe's `server.rounds` and `server.timeout`.
            train_config, evaluate_config: keys of the recipe's [train] and [eval] to set otherwise.
            evaluate_fn: gets each round's number and arrays; before the first round those are `initial_arrays`.

        Raises:
            ValueError: when the devices, the arrays and the recipe do not fit together.
        """
        rules = self._recipe.server
        rounds = rules.rounds if num_rounds is None else num_rounds
        seconds = rules.timeout if timeout is None else timeout
        rules = rules.model_copy(update={"rounds": rounds, "timeout": seconds})
        self._reset(self._recipe.model_copy(update={"server": rules}))
        arrays = ArrayRecord() if initial_arrays is None else initial_arrays
        return super().start(grid, arrays, rounds, seconds, train_config, evaluate_config, evaluate_fn)

    def payload(self, arrays: ArrayRecord) -> Payload:
        """The global model in a round's arrays, relative to the public base.

        Raises:
            ValueError: for arrays of another kind, or a strategy that has no global model.
        """
        return self._strategy.adapter(_unpack(arrays).state) if arrays else Payload()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Sequence[Message]:
        """One task for each device of the cohort; a list, since Flower goes over it twice.

        Raises:
            ValueError: at first, when no device says which model it holds or `arrays` are of another kind; later, when
                they are not those of the round before; for a key of `config` that [train] does not have.
        """
        recipe = _with(self._config, "train", config)
        run = self._meet(grid, arrays, server_round)
        cohort = run.roster.draw(recipe.server.cohort, seed=recipe.seed, round=server_round)
        return self._send(run, self._strategy.plan(run.state, cohort, server_round), recipe, Kind.TRAIN)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Merge the good updates, in the order of the tasks.

        Returns:
            the strategy's state, and the round's pooled `loss` (none where all ran out of memory), numbers of `updates`
            and `refused`, `device_seconds`, and the run's bytes so far; (None, None), the state being what it was, when
            too few updates were good.
        """
        run, answers = self._receive(replies)
        refused = run.ledger.refused
        try:
            run.state = self._strategy.aggregate(run.state, at_least(answers, answers, self._config.server.min_updates))
        except ValueError as error:
            log.error("round %d changes nothing: %s", server_round, error)
            return None, None
        pooled = pool([update.metrics for update in answers.seen])
        metrics = {
            **{name: value for name, value in pooled.items() if name == "loss"},
            "updates": len(answers.seen),
            "refused": run.ledger.refused - refused,
            "device_seconds": sum(update.cost.seconds for update in answers.seen),
            "bytes_up": run.ledger.up,
            "bytes_down": run.ledger.down,
        }
        held = Snapshot(strategy=self._config.strategy.name, spec=run.roster.spec, state=run.state)
        run.arrays = ArrayRecord({name: Array(array) for name, array in to_arrays(held).items()})
        return run.arrays, MetricRecord(dict(metrics))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Sequence[Message]:
        """A task for every device that is connected, in the rounds that `eval.every` asks for and in the last.

        Raises:
            ValueError: for other arrays than the round's, or a key of `config` that [eval] does not have.
        """
        recipe = _with(self._config, "eval", config)
        every = recipe.eval.every
        if server_round != recipe.server.rounds and (every == 0 or server_round % every):
            return []
        run = self._meet(grid, arrays, server_round)
        tasks = self._strategy.plan_evaluation(run.state, run.roster.reports(), server_round)
        return self._send(run, tasks, recipe, Kind.EVALUATE)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Metrics pooled over all held-out examples of the devices that answered well; None when there are none."""
        if self._trip is None:
            return None  # this round is not evaluated
        _, answers = self._receive(replies)
        for _ in answers:
            pass
        return MetricRecord(dict(pool([update.metrics for update in answers.seen]))) if answers.seen else None

    def summary(self) -> None:
        """Log what runs, and what of the recipe Flower's loop has no place for."""
        config = self._config
        shown.info("\t├──> Fedloom: %s %s", config.strategy.name, config.strategy.options or "")
        shown.info("\t├──> Cohort: %s of those connected, at least %d", config.server.cohort or "all", self._least)
        shown.info("\t├──> Seed %d, wire %s up, %s down", config.seed, config.wire.up, config.wire.down)
        shown.info("\t└──> Begins at round 1: nothing is resumed, no checkpoint is written")
        unused = [key for key in UNUSED if key in config.server.model_fields_set]
        if unused:
            log.warning("Flower's loop has no place for these keys of [server]: %s", ", ".join(unused))

    def _reset(self, config: RunConfig) -> None:
        """Forget the run before."""
        self._config, self._name = config, self._asked_run or secrets.token_hex(8)
        self._run: _Run | None = None
        self._trip: _Trip | None = None

    def _meet(self, grid: Grid, arrays: ArrayRecord, round: int) -> _Run:
        """See who is connected and take in the devices that came; the first time, begin."""
        courier = Courier(grid, timeout=self._config.server.timeout)
        nodes = _wait(courier, self._least)
        if self._run is None:
            self._run = self._begin(courier, nodes, arrays)
            return self._run
        run = self._run
        if not _equal(arrays, run.arrays):
            raise ValueError(
                "arrays must be those of the round before as they were: what changes them (Flower's wrappers for "
                "privacy, a loop of your own) does not change the model"
            )
        hellos, _ = greet(courier, run.roster.present(nodes), self._config, Silent())
        for node, hello in hellos.items():
            device = hello.report.device
            try:
                if problem := unfit(self._strategy, run.state, [hello.report], round).get(device):
                    raise ValueError(problem)
                run.roster.join(node, hello)
            except ValueError as error:
                leave_out(Silent(), device, str(error))
        return run

    def _begin(self, courier: Courier, nodes: Sequence[int], arrays: ArrayRecord) -> _Run:
        hellos, problems = greet(courier, nodes, self._config, Silent())
        if not hellos and problems:
            raise ValueError(problems[0])
        if not arrays:
            roster = muster(hellos, Silent())
            state = self._strategy.init(roster.spec, self._config.seed, roster.reports())
        else:
            # What devices hold is of another run, and no use here: they get the whole patch.
            fresh = {n: replace(h, report=replace(h.report, version=0, state_round=0)) for n, h in hellos.items()}
            earlier = _unpack(arrays)
            roster, state = muster(fresh, Silent(), prefer=earlier.spec), earlier.state
            earlier.must_fit(self._config.strategy.name, roster.spec)
        drop_unfit(roster, self._strategy, state, 1, Silent())
        return _Run(roster=roster, state=state, arrays=arrays)

    def _send(self, run: _Run, tasks: Sequence[Task], recipe: RunConfig, kind: Kind) -> Sequence[Message]:
        """Encode a phase's tasks, count their bytes, and keep what their answers are held against."""
        self._trip = trip = _Trip(kind)
        encoder = TaskEncoder(recipe.wire.down, seed=recipe.seed)
        messages = []
        for planned in tasks:
            task = complete(planned, recipe, run=self._name)
            trip.tasks.append(task)
            node = run.roster.node(task.device)
            if node is not None:
                frame = encoder.encode(task)
                run.ledger.count(task.device, down=len(frame), evaluation=kind == Kind.EVALUATE)
                messages.append(trip.message(Parcel(node=node, kind=kind, frame=frame), str(task.round)))
        return messages

    def _receive(self, replies: Iterable[Message]) -> tuple[_Run, Collection]:
        """The good answers to what was last sent, to be iterated over once."""
        run, trip, self._trip = self._run, self._trip, None
        if run is None or trip is None:
            raise ValueError("replies must follow the messages of their round, got some that nothing was sent for")
        trip.replies = replies
        desk = Desk(config=self._config, courier=trip, roster=run.roster, ledger=run.ledger, watcher=Silent())
        return run, Collection(desk, trip.tasks, trip.kind)


class _Trip(Courier):
    """A phase's messages out and their replies in: the courier of an exchange that Flower's loop makes."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.tasks: list[Task] = []
        self.replies: Iterable[Message] = ()
        self._sent: list[tuple[Metadata, int]] = []  # it gets its message's id when that is sent; and the node

    def message(self, parcel: Parcel, group: str) -> Message:
        """A message whose reply is waited for; its bytes are not kept here, only its metadata."""
        message = to_message(parcel, group)
        self._sent.append((message.metadata, parcel.node))
        return message

    def exchange(self, parcels: Iterable[Parcel], group: str) -> Generator[Reply, None, None]:
        """The replies in the order of Flower's list, then an error for each node without one."""
        asked = {metadata.message_id: node for metadata, node in self._sent}
        silent = {node for _, node in self._sent}
        for message in self.replies:
            # Flower's error replies carry a wrong source node: the message they answer tells who failed.
            node = asked.get(message.metadata.reply_to_message_id)
            if node in silent:
                silent.discard(node)
                yield to_reply(message, node)
        for node in sorted(silent):
            yield Reply(node=node, error="no answer came in time")


@dataclass(kw_only=True)
class _Run:
    """What is known after some rounds."""

    roster: Roster
    state: State
    arrays: ArrayRecord  # as given to Flower's loop
    ledger: Ledger = field(default_factory=Ledger)


def _unpack(arrays: ArrayRecord) -> Snapshot:
    """The state in a round's arrays.

    Raises:
        ValueError: for other arrays, a base model's among them.
    """
    try:
        return from_arrays({name: array.numpy() for name, array in arrays.items()})
    except (TypeError, ValueError) as error:
        what = "empty, for the base that the devices hold, or an earlier round's"
        raise ValueError(f"initial_arrays must be {what}: {error}") from None


def _equal(one: ArrayRecord, other: ArrayRecord) -> bool:
    return one is other or (
        one.keys() == other.keys() and all(array.data == other[name].data for name, array in one.items())
    )


def _read(recipe: Recipe) -> RunConfig:
    if isinstance(recipe, str | Path):
        recipe = read_recipe(Path(recipe))
    if not isinstance(recipe, RunConfig):
        recipe = build_config(recipe)
    if recipe.compare:
        raise ValueError(f"a recipe must be one run, got a comparison of {len(recipe.compare)}")
    return recipe


def _configure(
    strategy: Strategy | str, options: Mapping[str, Any] | None, config: RunConfig
) -> tuple[RunConfig, Strategy]:
    """The recipe with the strategy's name and options in it, and the strategy."""
    if isinstance(strategy, str):
        name = {"name": strategy} if strategy else {}
        config = _with(config, "strategy", {**name, **(options or {})}, anew=bool(strategy))
        return config, build_strategy(config)
    if not isinstance(strategy, Strategy):
        raise ValueError(f"strategy must be a name or answer the Strategy protocol, got {strategy!r}")
    if options:
        raise ValueError(f"options must come with a strategy's name, got {dict(options)} with one that is built")
    return _with(config, "strategy", {"name": _name_of(strategy)}, anew=True), strategy


def _name_of(strategy: Strategy) -> str:
    """The name by which the registry builds strategies of this kind; its class's for one that it does not know."""
    for name in names():
        try:
            if type(build(name, {}, Scaling())) is type(strategy):
                return name
        except ValueError:
            continue
    return type(strategy).__name__


def _with(config: RunConfig, section: str, changes: Mapping[str, Any], *, anew: bool = False) -> RunConfig:
    """The recipe with keys of a section set otherwise (or that section made anew), checked as a recipe's are."""
    if not changes:
        return config
    table = config.model_dump(exclude_unset=True)
    if anew:
        table.pop(section, None)
    return build_config(override(table, {section: dict(changes)}))


def _wait(courier: Courier, least: int) -> list[int]:
    """The nodes that are connected, once there are at least so many."""
    nodes, told = courier.nodes(), -1
    while len(nodes) < least:
        if len(nodes) != told:
            shown.info("Waiting for nodes to connect: %d of %d", len(nodes), least)
            told = len(nodes)
        time.sleep(PAUSE)
        nodes = courier.nodes()
    return nodes
