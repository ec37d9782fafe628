"""The round loop: plan, send, take in, merge, checkpoint; the same on every engine, since it only knows a Courier.

One round:
  1. draw the cohort, and let the strategy plan a task for each of its devices;
  2. encode each task (bytes are counted here) and send it;
  3. hold each answer against its task as it arrives, and hand the good ones to the strategy one by one;
  4. evaluate the new state on the devices' held-out examples, where the recipe asks for it;
  5. write the checkpoint: only then does the round count.
"""

from __future__ import annotations

import errno
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedloom.protocols.config import RunConfig
from fedloom.protocols.messages import DeviceReport, Hello, Kind, ModelSpec, Task, Update
from fedloom.server.assigned import assigned
from fedloom.server.buffered import Buffer
from fedloom.server.checkpoint import Checkpoint, latest_checkpoint, write_checkpoint
from fedloom.server.collect import Collection, Desk, TooFew, at_least, largest_frame
from fedloom.server.complete import complete
from fedloom.server.courier import Courier
from fedloom.server.greeting import drop_unfit, greet, leave_out, muster, unfit
from fedloom.server.journal import Journal, close_journal
from fedloom.server.ledger import Ledger
from fedloom.server.pooling import pool
from fedloom.server.track import open_trackers
from fedloom.server.watch import Silent, Watcher
from fedloom.strategies.base import State, Strategy

log = logging.getLogger("fedloom.server")

CHECKPOINTS = "checkpoints"
JOURNAL = "journal"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a finished run leaves behind."""

    state: State
    spec: ModelSpec
    history: list[dict[str, Any]] = field(default_factory=list)


class Coordinator:
    """One run of one recipe on one grid."""

    def __init__(
        self,
        courier: Courier,
        config: RunConfig,
        strategy: Strategy,
        out: Path,
        *,
        run: str,
        durable: bool = False,
        owners: Callable[[], Mapping[int, str]] | None = None,
    ) -> None:
        """
        Args:
            run: names the run in every message; the same name resumes it, another refuses its checkpoints.
            durable: keep accepted answers on disk until their round's checkpoint is written, so that a server which is
                killed in a round does not ask for them again.
            owners: gives the device that each node's key was given to; a node that calls itself another is left out.
        """
        self._courier, self._config, self._strategy, self._out, self._run = courier, config, strategy, out, run
        self._durable, self._owners = durable, owners
        self._ledger = Ledger()
        self._watcher: Watcher = Silent()
        self._buffer: Buffer | None = None

    def go(self, *, resume: bool = False, watcher: Watcher | None = None) -> Outcome:
        """Run to the last round.

        Args:
            resume: go on from the newest checkpoint in the run's folder, if there is one.

        Raises:
            ValueError: when devices, checkpoint and recipe do not fit together, a round gets too few updates, or the
                disk takes no checkpoint.
        """
        self._watcher = watcher or self._watcher
        self._out.mkdir(parents=True, exist_ok=True)
        state, done = self._begin(resume)
        if self._config.server.mode == "buffered":
            self._buffer = Buffer(self._desk(), self._strategy, self._complete)
        config, known = self._config, [report.device for report in self._roster.reports()]
        self._watcher.started(
            run=self._run,
            name=config.name,
            strategy=config.strategy.name,
            round=done,
            rounds=config.server.rounds,
            devices=known,
        )
        trackers = open_trackers(config, self._out, self._run, after_round=done if done >= 0 else None)
        history: list[dict[str, Any]] = []
        try:
            for round in range(done + 1, config.server.rounds + 1):
                self._admit(state, round)
                state, record = self._round(state, round)
                for tracker in trackers:  # before the checkpoint: on resume, lines past it are dropped and come again
                    tracker.log(record)
                self._save(state, round)
                history.append(record)
                self._watcher.ended(record=record)
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            raise ValueError(
                f"{self._out} must have room for the run's files, got {error.strerror}: make room and start again, "
                "nothing that was finished is lost"
            ) from None
        finally:
            for tracker in trackers:
                tracker.close()
        return Outcome(state=state, spec=self._roster.spec, history=history)

    def _begin(self, resume: bool) -> tuple[State, int]:
        """Meet the devices; the state to start from and the round it stands after, -1 before anything was evaluated."""
        checkpoint, complaints = latest_checkpoint(self._out / CHECKPOINTS)
        if checkpoint is not None and not resume:
            raise ValueError(f"{self._out} already holds a run: resume it or choose another folder")
        if checkpoint is not None and checkpoint.run != self._run:
            raise ValueError(f"a run resumes with the recipe it began with ({checkpoint.run}), got {self._run}")
        for complaint in complaints:
            log.warning("%s; going back to the one before", complaint)
        hellos, problems = self._greet(self._courier.nodes())
        if not hellos and problems:
            raise ValueError(problems[0])
        roster = self._roster = muster(hellos, self._watcher, prefer=checkpoint.spec if checkpoint else None)
        if checkpoint is None:
            fleet = roster.reports()
            _check_size(roster.spec, fleet, largest_frame(self._config))
            state, done = self._strategy.init(roster.spec, self._config.seed, fleet), -1
        elif checkpoint.spec == roster.spec:
            state, done = checkpoint.state, checkpoint.round
            self._ledger = Ledger.restore(checkpoint.ledger, checkpoint.refused)
        else:
            raise ValueError(
                f"the checkpoint is for base {checkpoint.spec.base_hash[:12]}, "
                f"the devices hold {roster.spec.base_hash[:12]}"
            )
        drop_unfit(roster, self._strategy, state, max(done, 0) + 1, self._watcher)
        for device in roster.restore(checkpoint.roster) if checkpoint else ():
            log.warning("%s lost its model since the checkpoint; it gets the whole patch again", device)
        for report in roster.reports():
            self._watcher.joined(report=report)
        return state, done

    def _admit(self, state: State, round: int) -> None:
        """See who is connected, and take in the devices that came since; one that no task fits stays out."""
        hellos, _ = self._greet(self._roster.present(self._courier.nodes()))
        for node, hello in hellos.items():
            device = hello.report.device
            try:
                if problem := unfit(self._strategy, state, [hello.report], round).get(device):
                    raise ValueError(problem)
                self._roster.join(node, hello)
                self._watcher.joined(report=hello.report)
            except ValueError as error:
                leave_out(self._watcher, device, str(error))

    def _greet(self, nodes: Sequence[int]) -> tuple[dict[int, Hello], list[str]]:
        owners = self._owners() if self._owners else None
        return greet(self._courier, nodes, self._config, self._watcher, owners)

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
        """Collect and merge; a round that gets too few good updates is tried again, as often as the recipe says."""
        rules = self._config.server
        for attempt in range(rules.retries + 1):
            try:
                return self._merge(state, round, record, again=attempt > 0)
            except TooFew as error:
                if attempt == rules.retries:
                    raise
                log.warning("round %d is tried again: %s", round, error)
                time.sleep(rules.retry_seconds)
                self._admit(state, round)
        raise ValueError(f"retries must be >= 0, got {rules.retries}")

    def _merge(self, state: State, round: int, record: dict[str, Any], *, again: bool) -> State:
        rules = self._config.server
        if self._buffer is not None:
            buffer = self._buffer
            state = self._strategy.aggregate(state, at_least(buffer.fill(state, round), buffer, rules.min_updates))
            record["staleness"] = sum(buffer.staleness) / len(buffer.staleness)
            _add_up(record, buffer.seen)
            return state
        journal = self._journal(round, Kind.TRAIN)
        noted = journal.planned() if journal else None
        cohort = self._cohort(noted, round) if again or noted is None else noted
        tasks = [self._complete(task) for task in self._strategy.plan(state, cohort, round)]
        if len(tasks) < rules.min_updates:
            raise TooFew(f"a round needs {rules.min_updates} updates, its cohort is {len(tasks)}")
        if journal is not None and cohort != noted:
            journal.plan(cohort)
        enough = rules.cohort if rules.over_select > 1 else 0
        answers = Collection(self._desk(), tasks, Kind.TRAIN, journal=journal, enough=enough, again=again)
        state = self._strategy.aggregate(state, at_least(answers, answers, rules.min_updates))
        _add_up(record, answers.seen)
        if given := assigned(tasks, answers.seen):
            record["assigned"] = given
        return state

    def _cohort(self, noted: Sequence[DeviceReport] | None, round: int) -> list[DeviceReport]:
        """Who is asked in a round; when it is tried again, those who were `noted` and whoever may stand in for them."""
        rules = self._config.server
        size = math.ceil(rules.cohort * rules.over_select)
        drawn = self._roster.draw(size, seed=self._config.seed, round=round)
        known = {report.device: report for report in [*drawn, *(noted or ())]}
        return [known[device] for device in sorted(known)]

    def _evaluate(self, state: State, round: int, record: dict[str, Any]) -> None:
        journal = self._journal(round, Kind.EVALUATE)
        noted = journal.planned() if journal else None
        fleet = self._roster.reports() if noted is None else noted
        if journal is not None and noted is None:
            journal.plan(fleet)
        tasks = [self._complete(task) for task in self._strategy.plan_evaluation(state, fleet, round)]
        answers = Collection(self._desk(), tasks, Kind.EVALUATE, journal=journal)
        for _ in answers:
            pass
        seen = answers.seen
        record["evaluation"] = pool([update.metrics for update in seen])
        record["devices"] = {update.device: dict(update.metrics) for update in seen}
        if seen:
            peak = max(update.cost.peak_rss_bytes for update in seen) / 2**20
            record["device_peak_mb"] = max(record.get("device_peak_mb", 0.0), peak)

    def _desk(self) -> Desk:
        return Desk(
            config=self._config,
            courier=self._courier,
            roster=self._roster,
            ledger=self._ledger,
            watcher=self._watcher,
        )

    def _journal(self, round: int, kind: Kind) -> Journal | None:
        return Journal(self._out / JOURNAL, round=round, kind=kind) if self._durable else None

    def _complete(self, task: Task) -> Task:
        return complete(task, self._config, run=self._run)

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
        close_journal(self._out / JOURNAL)


def _add_up(record: dict[str, Any], seen: Sequence[Update]) -> None:
    """What a round's training measured and cost, into its record."""
    pooled = pool([update.metrics for update in seen])
    if "loss" in pooled:  # nobody measured one where all ran out of memory
        record["train_loss"] = pooled["loss"]
    record["updates"] = len(seen)
    record["device_seconds"] = sum(update.cost.seconds for update in seen)
    record["slowest_seconds"] = max(update.cost.seconds for update in seen)
    record["idle_seconds"] = len(seen) * record["slowest_seconds"] - record["device_seconds"]
    if any(update.cost.peak_tensor_bytes for update in seen):
        record["device_tensor_mb"] = max(update.cost.peak_tensor_bytes for update in seen) / 2**20
        record["out_of_memory"] = sum(update.cost.out_of_memory for update in seen)
    record["device_peak_mb"] = max(update.cost.peak_rss_bytes for update in seen) / 2**20


def _check_size(spec: ModelSpec, fleet: Sequence[DeviceReport], limit: int) -> None:
    """Raise ValueError for a model whose smallest adapter no message could carry: before a state is made for it."""
    rank = max(1, min(report.rank for report in fleet))
    numbers = rank * sum(matrix.d_out + matrix.d_in for matrix in spec.matrices.values())
    numbers += sum(math.prod(shape) for shape in spec.dense.values())
    if numbers > limit:
        raise ValueError(
            f"an adapter of rank {rank} for the devices' model has {numbers} numbers, "
            f"more than a message of wire.limit_mb can carry ({limit} bytes)"
        )
