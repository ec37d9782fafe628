"""The round loop: plan, send, take in, merge, checkpoint; the same on every engine, since it only knows a Courier.

One round:
  1. draw the cohort, and let the strategy plan a task for each of its devices;
  2. encode each task (bytes are counted here) and send it;
  3. hold each answer against its task as it arrives, and hand the good ones to the strategy one by one;
  4. evaluate the new state on the devices' held-out examples, where the recipe asks for it;
  5. write the checkpoint: only then does the round count.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from fedloom.protocols.codec import TaskEncoder, decode_answer
from fedloom.protocols.config import RunConfig
from fedloom.protocols.messages import Hello, Kind, ModelSpec, Refusal, Task, Update
from fedloom.protocols.seeds import derive_seed
from fedloom.server.checkpoint import Checkpoint, latest_checkpoint, write_checkpoint
from fedloom.server.courier import Courier, Parcel
from fedloom.server.intake import check_update, without_tensors
from fedloom.server.ledger import Ledger
from fedloom.server.pooling import pool
from fedloom.server.roster import Roster
from fedloom.server.track import open_trackers
from fedloom.strategies.base import State, Strategy

log = logging.getLogger("fedloom.server")

CHECKPOINTS = "checkpoints"


class Watcher(Protocol):
    """Told what happens, to show it: the loop never waits for it."""

    def began(self, *, round: int, rounds: int, phase: str, tasks: int) -> None: ...

    def answered(self, *, device: str, refused: str) -> None: ...

    def ended(self, *, record: Mapping[str, Any]) -> None: ...


class Silent:
    """A watcher that shows nothing."""

    def began(self, *, round: int, rounds: int, phase: str, tasks: int) -> None: ...

    def answered(self, *, device: str, refused: str) -> None: ...

    def ended(self, *, record: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a finished run leaves behind."""

    state: State
    spec: ModelSpec
    history: list[dict[str, Any]] = field(default_factory=list)


class Coordinator:
    """One run of one recipe on one grid."""

    def __init__(self, courier: Courier, config: RunConfig, strategy: Strategy, out: Path, *, run: str) -> None:
        """`run` names the run in every message; the same name resumes it, another refuses its checkpoints."""
        self._courier, self._config, self._strategy, self._out, self._run = courier, config, strategy, out, run
        self._limit = config.wire.limit_mb * 2**20
        self._ledger = Ledger()

    def go(self, *, resume: bool = False, watcher: Watcher | None = None) -> Outcome:
        """Run to the last round.

        Args:
            resume: go on from the newest checkpoint in the run's folder, if there is one.

        Raises:
            ValueError: when devices, checkpoint and recipe do not fit together, or a round gets too few updates.
        """
        self._watcher = watcher or Silent()
        self._out.mkdir(parents=True, exist_ok=True)
        self._roster = Roster(self._greet())
        state, done = self._begin(resume)
        trackers = open_trackers(self._config, self._out, self._run, after_round=done if done >= 0 else None)
        history: list[dict[str, Any]] = []
        try:
            for round in range(done + 1, self._config.server.rounds + 1):
                state, record = self._round(state, round)
                for tracker in trackers:  # before the checkpoint: on resume, lines past it are dropped and come again
                    tracker.log(record)
                self._save(state, round)
                history.append(record)
                self._watcher.ended(record=record)
        finally:
            for tracker in trackers:
                tracker.close()
        return Outcome(state=state, spec=self._roster.spec, history=history)

    def _greet(self) -> dict[int, Hello]:
        """Ask every node who it is and which model it holds."""
        nodes = self._courier.nodes()
        self._watcher.began(round=0, rounds=self._config.server.rounds, phase="hello", tasks=len(nodes))
        hellos: dict[int, Hello] = {}
        problems: list[str] = []
        parcels = [Parcel(node=node, kind="query", frame=b"") for node in nodes]
        for reply in self._courier.exchange(parcels, "0"):
            try:
                if reply.error:
                    raise ValueError(reply.error)
                answer = decode_answer(reply.frame, (Hello, Refusal), limit=self._limit)
                if isinstance(answer, Refusal):
                    raise ValueError(answer.reason)
                hellos[reply.node] = answer
            except ValueError as error:
                problems.append(str(error))
                log.warning("node %d is left out: %s", reply.node, error)
            self._watcher.answered(device=str(reply.node), refused=problems[-1] if problems else "")
        if not hellos and problems:
            raise ValueError(problems[0])
        return hellos

    def _begin(self, resume: bool) -> tuple[State, int]:
        """The state to start from and the round it stands after; -1 before anything was evaluated."""
        checkpoint, complaints = latest_checkpoint(self._out / CHECKPOINTS)
        if checkpoint is not None and not resume:
            raise ValueError(f"{self._out} already holds a run: resume it or choose another folder")
        for complaint in complaints:
            log.warning("%s; going back to the one before", complaint)
        if checkpoint is None:
            fleet = self._roster.reports()
            state = self._strategy.init(self._roster.spec, self._config.seed, fleet)
            self._strategy.plan(state, fleet, 1)  # a device that cannot be planned for is an error now, not later
            return state, -1
        if checkpoint.run != self._run:
            raise ValueError(f"a run resumes with the recipe it began with ({checkpoint.run}), got {self._run}")
        if checkpoint.spec != self._roster.spec:
            raise ValueError(
                f"the checkpoint is for base {checkpoint.spec.base_hash[:12]}, "
                f"the devices hold {self._roster.spec.base_hash[:12]}"
            )
        for device in self._roster.restore(checkpoint.roster):
            log.warning("%s lost its model since the checkpoint; it gets the whole patch again", device)
        self._ledger = Ledger.restore(checkpoint.ledger, checkpoint.refused)
        return checkpoint.state, checkpoint.round

    def _round(self, state: State, round: int) -> tuple[State, dict[str, Any]]:
        """Round 0 only evaluates the base."""
        began = time.monotonic()
        record: dict[str, Any] = {"round": round}
        if round > 0:
            state = self._train(state, round, record)
        record["train_seconds"] = time.monotonic() - began
        if self._evaluation_is_due(round):
            self._evaluate(state, round, record)
        ledger = self._ledger
        record |= {"seconds": time.monotonic() - began, "bytes_up": ledger.up, "bytes_down": ledger.down}
        record |= {"bytes_evaluation": ledger.evaluation, "refused": ledger.refused}
        return state, record

    def _train(self, state: State, round: int, record: dict[str, Any]) -> State:
        cohort = self._roster.draw(self._config.server.cohort, seed=self._config.seed, round=round)
        tasks = [self._complete(task) for task in self._strategy.plan(state, cohort, round)]
        seen: list[Update] = []
        refusals: list[str] = []
        updates = self._ask(tasks, Kind.TRAIN, seen, refusals)
        if len(tasks) < self._config.server.min_updates:
            raise ValueError(f"a round needs {self._config.server.min_updates} updates, its cohort is {len(tasks)}")
        state = self._strategy.aggregate(state, _at_least(updates, self._config.server.min_updates, refusals))
        record["train_loss"] = pool([update.metrics for update in seen]).get("loss", 0.0)
        record["updates"] = len(seen)
        record["device_seconds"] = sum(update.cost.seconds for update in seen)
        record["device_peak_mb"] = max(update.cost.peak_rss_bytes for update in seen) / 2**20
        return state

    def _evaluate(self, state: State, round: int, record: dict[str, Any]) -> None:
        fleet = self._roster.reports()
        tasks = [self._complete(task) for task in self._strategy.plan_evaluation(state, fleet, round)]
        seen: list[Update] = []
        for _ in self._ask(tasks, Kind.EVALUATE, seen, []):
            pass
        record["evaluation"] = pool([update.metrics for update in seen])
        record["devices"] = {update.device: dict(update.metrics) for update in seen}
        if seen:
            peak = max(update.cost.peak_rss_bytes for update in seen) / 2**20
            record["device_peak_mb"] = max(record.get("device_peak_mb", 0.0), peak)

    def _ask(self, tasks: Sequence[Task], kind: Kind, seen: list[Update], refusals: list[str]) -> Iterator[Update]:
        """Send tasks; yield the good updates as they arrive; note their metrics in `seen`, the others in `refusals`."""
        self._watcher.began(
            round=tasks[0].round if tasks else 0, rounds=self._config.server.rounds, phase=kind, tasks=len(tasks)
        )
        by_node = {self._roster.node(task.device): task for task in tasks}
        parcels = self._parcels(by_node, kind)
        for reply in self._courier.exchange(parcels, str(tasks[0].round if tasks else 0)):
            task = by_node[reply.node]
            self._ledger.count(task.device, up=len(reply.frame), evaluation=kind == Kind.EVALUATE)
            problem = ""
            try:
                if reply.error:
                    raise ValueError(reply.error)
                update = self._take_in(reply.frame, task)
            except ValueError as error:
                problem = f"{task.device}: {error}"
                refusals.append(problem)
                self._ledger.refused += 1
                log.warning("round %d: refused %s", task.round, problem)
            else:
                seen.append(without_tensors(update))
                self._note(task)
                yield update
            self._watcher.answered(device=task.device, refused=problem)

    def _parcels(self, by_node: Mapping[int, Task], kind: Kind) -> Iterator[Parcel]:
        """Encode each task as its turn comes, and count its bytes."""
        encoder = TaskEncoder(self._config.wire.down, seed=self._config.seed)
        for node, task in by_node.items():
            frame = encoder.encode(task)
            self._ledger.count(task.device, down=len(frame), evaluation=kind == Kind.EVALUATE)
            yield Parcel(node=node, kind=kind, frame=frame)

    def _take_in(self, frame: bytes, task: Task) -> Update:
        """Decode and check one answer."""
        answer = decode_answer(frame, (Update, Refusal), limit=self._limit)
        if isinstance(answer, Refusal):
            self._roster.saw(task.device, version=answer.version)
            raise ValueError(f"the device declined: {answer.reason}")
        check_update(answer, task, self._roster.spec)
        return answer

    def _note(self, task: Task) -> None:
        """A device that answered holds the version it was brought to, and the state it ended the round with."""
        version = task.patch.version if task.patch else 0
        self._roster.saw(task.device, version=version, trained_in=task.round if task.kind == Kind.TRAIN else None)

    def _complete(self, task: Task) -> Task:
        """Fill in what is not the strategy's business."""
        config = self._config
        evaluation = {"batch_size": config.eval.batch_size, "rouge": int(config.eval.rouge)}
        evaluation["max_new_tokens"] = config.eval.max_new_tokens
        knobs = training_knobs(config, task.round) if task.kind == Kind.TRAIN else evaluation
        return replace(
            task,
            run=self._run,
            nonce=derive_seed(self._run, "nonce", task.kind, task.round, task.device),
            seed=derive_seed(config.seed, "task", task.round, task.device),
            tuner=task.tuner if config.train.tuner == "auto" else config.train.tuner,
            wire=config.wire.up,
            knobs={**knobs, **task.knobs},
        )

    def _evaluation_is_due(self, round: int) -> bool:
        every, last = self._config.eval.every, self._config.server.rounds
        return round in (0, last) or (every > 0 and round % every == 0)

    def _save(self, state: State, round: int) -> None:
        checkpoint = Checkpoint(
            run=self._run,
            round=round,
            state=state,
            spec=self._roster.spec,
            roster=self._roster.to_json(),
            ledger=self._ledger.entries,
            refused=self._ledger.refused,
        )
        write_checkpoint(self._out / CHECKPOINTS, checkpoint, keep=self._config.server.keep_checkpoints)


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


def _at_least(updates: Iterator[Update], least: int, refusals: Sequence[str]) -> Iterator[Update]:
    """Pass updates on; raise at the end when there were too few, so that the old state stands."""
    count = 0
    for update in updates:
        count += 1
        yield update
    if count < least:
        first = f"; the first refusal: {refusals[0]}" if refusals else ""
        raise ValueError(f"a round needs at least {least} good updates, got {count}{first}")
