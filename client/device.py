"""One device: its private examples, its limits and its store, around the process's resident model."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version

import torch

from fedloom.client import tuners
from fedloom.client.adjusting import (
    adjusts,
    asked_bits,
    check_adjusted,
    clean_up,
    given_up,
    keeps_own,
    listening,
    repeated,
)
from fedloom.client.bits import hold
from fedloom.client.cost import Trial, attempt
from fedloom.client.cost import held as tensors_held
from fedloom.client.data import Dataset, Example
from fedloom.client.evaluation import evaluate, nothing
from fedloom.client.lora import check_rank
from fedloom.client.memory import peak_rss, reset_peak
from fedloom.client.model import Resident
from fedloom.client.module_scores import ModuleScores
from fedloom.client.place import Place
from fedloom.client.pruning.narrowing import apply_keep
from fedloom.client.pruning.rounds import measure, probe, remembered, settle
from fedloom.client.starting import pruned_start, starting_payload, starts_at_zero
from fedloom.client.store import DeviceStore, Held
from fedloom.client.training import forward_logits
from fedloom.protocols import config
from fedloom.protocols.messages import Array, Cost, DeviceReport, Hello, Kind, Payload, Subspace, Task, Update
from fedloom.strategies.ffa import drop_a
from fedloom.strategies.unequal import DROP, MEASURE
from fedloom.strategies.unit_order import SCORES, UNIT_SCORES


class NoRoom(ValueError):  # noqa: N818 - a refusal, named for its reason
    """A task needs more memory than the device has, and leaves it nothing to make smaller."""


class Device:
    """Answers tasks; devices of one process take turns on its resident model, one task at a time."""

    def __init__(
        self,
        name: str,
        *,
        resident: Resident,
        train: Sequence[Example],
        test: Sequence[Example],
        store: DeviceStore,
        rank: int,
        data_config: config.Data,
        eval_config: config.Evaluation,
        capability: str = "backprop",
        limit: int = 512 * 2**20,
        memory: int = 0,
        metered: bool = False,
    ) -> None:
        """
        Args:
            rank: the largest adapter rank that this device trains.
            capability: `backprop`, or `forward` for a device that runs forward passes alone.
            limit: bytes; a larger message is refused before it is read.
            memory: bytes lent to the model and its training, as the server is told; 0 says nothing.
            metered: count the bytes of tensors, and give a task up where they pass `memory` (a pretend device's way to
                run out); else only what the machine refuses is out of memory.
        """
        self.name, self.limit = name, limit
        self._resident, self._store, self._rank, self._capability = resident, store, rank, capability
        self._examples = {Kind.TRAIN: train, Kind.EVALUATE: test}
        self._data, self._evaluation = data_config, eval_config
        self._memory, self._metered = memory, metered
        self._datasets: dict[Kind, Dataset] = {}

    def hello(self) -> Hello:
        """Who this device is and which model it holds."""
        report = DeviceReport(
            device=self.name,
            examples=self.examples,
            rank=self._rank,
            version=self._store.newest_version(),
            state_round=self._store.newest_state(),
            capabilities=(self._capability,),
            software=f"fedloom {version('fedloom')}, torch {torch.__version__}, {platform.machine()}",
            memory=self._memory,
        )
        return Hello(report=report, spec=self._resident.spec)

    def version(self, run: str) -> int:
        """The newest version of a run's model that this device holds; 0 for the base."""
        return self._store.newest_version(run)

    @property
    def examples(self) -> int:
        """How many examples it trains on."""
        return len(self._examples[Kind.TRAIN])

    def prepare(self) -> None:
        """Tokenise the examples now: what is wrong with them is then said here, and not to a server.

        Raises:
            ValueError: for an example that cannot be used.
        """
        for kind in (kind for kind, examples in self._examples.items() if examples):
            self._dataset(kind)

    def handle(self, task: Task) -> Update:
        """Do a task: bring the model up to date, set the adapter, train or evaluate, and answer.

        The same task gives the same answer, bit for bit, on one machine.

        Raises:
            NoRoom: for a task that needs too much memory and cannot be answered with that alone.
            StaleVersion: when the task's patch builds on what this device does not hold.
            ValueError: for a task that is not for this device or beyond its limits, bad data, or a diverged training.
        """
        self._check(task)
        reset_peak()
        began = time.perf_counter()
        held = self._store.take(task.patch, self._resident.spec, task.run, task.start.keep)
        if task.subspace is None and held.payload.coefficients is not None:
            raise ValueError("a task on coefficients must name their subspace, got none")
        if task.subspace is not None and (held.payload.factors or held.payload.dense):
            raise ValueError("a task in a subspace must stand on coefficients alone, got factors or dense tensors")
        own = self._own(task) if keeps_own(task) else None
        prunable = self._resident.prunable
        if prunable is not None and not task.start.keep and not prunable.is_at({}):
            apply_keep(self._resident, {})
        hold(self._resident, asked_bits(task))
        if self._metered and task.subspace is None:
            clean_up(self._resident)  # what is counted must not depend on whose turn was before
        result, trial = self._try(task, held, own)
        if trial.oom and not adjusts(task):
            raise NoRoom(f"the task needs more memory than there is, and {self.name} has nothing to make smaller")
        metrics, payload = result or (given_up(task), Payload())
        return Update(
            device=self.name,
            round=task.round,
            examples=self.examples,
            kind=task.kind,
            run=task.run,
            nonce=task.nonce,
            metrics=metrics,
            cost=Cost(
                seconds=time.perf_counter() - began,
                peak_rss_bytes=peak_rss(),
                out_of_memory=trial.oom,
                peak_tensor_bytes=trial.peak_bytes,
            ),
            payload=payload,
        )

    def _own(self, task: Task) -> Payload | None:
        """What the device ended a round with; a record of units that cannot be read is as good as none."""
        try:
            return self._store.load_state(task.state_round, task.run)
        except ValueError:
            if not task.start.keep:
                raise
            return None

    def _try(
        self, task: Task, held: Held, own: Payload | None
    ) -> tuple[tuple[Mapping[str, float], Payload] | None, Trial]:
        """Do a task within the device's memory; an evaluation that runs out of it goes on with half as many texts."""
        batch = self._settings(task).batch_size if task.kind is Kind.EVALUATE else 1
        while True:
            result, trial = attempt(
                partial(self._answer, task, held, own, batch),
                limit=self._memory if self._metered else 0,
                metered=self._metered,
                watch=tensors_held(self._resident) if self._metered else (),
            )
            if not trial.oom:
                return result, trial
            clean_up(self._resident)
            if batch == 1:
                return None, trial
            batch //= 2

    def _answer(self, task: Task, held: Held, own: Payload | None, batch: int) -> tuple[Mapping[str, float], Payload]:
        if task.kind is Kind.EVALUATE:
            return self._evaluate(task, held, own, batch), Payload()
        return self._train_pruned(task, held, own) if task.start.keep else self._train(task, held, own)

    def _check(self, task: Task) -> None:
        if task.device != self.name:
            raise ValueError(f"a task must be for device {self.name!r}, got one for {task.device!r}")
        check_adjusted(task, self._resident.spec)
        if task.kind is not Kind.TRAIN:
            return
        if self._capability == "forward" and task.tuner not in tuners.FORWARD_ONLY:
            raise ValueError(
                f"{self.name} runs forward passes alone ({', '.join(tuners.FORWARD_ONLY)}), got tuner {task.tuner!r}"
            )
        rank = task.rank if task.subspace is None else task.subspace.rank
        if rank > self._rank:
            raise ValueError(f"a task for {self.name} must have rank <= {self._rank}, got {rank}")
        if (rank or task.subspace is None) and not task.ranks:
            check_rank(rank, self._resident.spec.matrices)

    def _train(self, task: Task, held: Held, own: Payload | None) -> tuple[Mapping[str, float], Payload]:
        dataset = self._dataset(Kind.TRAIN)
        if task.subspace is not None:
            run = tuners.get_scalar(task.tuner)
            with self._place(task.subspace, held) as place:
                scalars, measured = run(place, dataset, task)
            return measured, Payload(scalars=scalars)
        tuner = tuners.get(task.tuner)
        resident = self._resident
        resident.rebuilt.restore()
        start = starting_payload(task, resident.spec, held.warm, own)
        resident.base.apply(held.key, held.payload, start.dense)
        resident.adapters.set_factors(start.factors, train_a=task.train_a, partial=bool(task.ranks))
        before, scores = self._heads(), ModuleScores()
        with listening(resident, scores.observe if MEASURE in task.knobs else None):
            metrics = {**tuner(resident, dataset, task), **scores.metrics(), **repeated(task)}
        factors = resident.adapters.get_factors()
        moved = {name: value - before[name] for name, value in self._heads().items()}
        if task.send:
            sent = Payload(factors=factors, dense=moved)
            return metrics, sent if task.shared_a_seed is None else drop_a(sent)
        total = {name: value + start.dense[name] if name in start.dense else value for name, value in moved.items()}
        self._store.save_state(task.round, task.run, Payload(factors=factors, dense=total))
        return metrics, Payload()

    def _train_pruned(self, task: Task, held: Held, own: Payload | None) -> tuple[Mapping[str, float], Payload]:
        """Prune as far as the task says, tune what is left, and remember which units mattered."""
        resident, dataset = self._resident, self._dataset(Kind.TRAIN)
        keep, memory = settle(resident, task, held, remembered(own), lambda: dataset)
        start = pruned_start(task, resident.spec, held.warm, keep)
        resident.adapters.set_factors(start.factors, train_a=task.train_a)
        before, importance, loss = self._heads(), measure(resident, memory), probe(resident, dataset, task)
        with listening(resident, importance.observe):
            metrics = {**tuners.get(task.tuner)(resident, dataset, task), **repeated(task)}
        moved = {name: value - before[name] for name, value in self._heads().items()}
        metrics = {**metrics, DROP: loss - probe(resident, dataset, task)}
        memory = replace(memory, scores=importance.scores)
        self._store.save_state(task.round, task.run, memory.payload())
        if task.knobs.get(UNIT_SCORES):
            moved |= {SCORES + name: value.astype("f4") for name, value in importance.scores.items()}
        return metrics, Payload(factors=resident.adapters.get_factors(), dense=moved, keep=keep)

    def _settings(self, task: Task) -> config.Evaluation:
        known = {name: value for name, value in task.knobs.items() if name in config.Evaluation.model_fields}
        return config.Evaluation.model_validate({**self._evaluation.model_dump(), **known})

    def _evaluate(self, task: Task, held: Held, own: Payload | None, batch: int) -> Mapping[str, float]:
        if not self._examples[Kind.EVALUATE]:
            return nothing(self._resident.config.task)
        settings = self._settings(task).model_copy(update={"batch_size": batch})
        resident, dataset = self._resident, self._dataset(Kind.EVALUATE)
        if task.subspace is not None:
            with self._place(task.subspace, held) as place:
                return self._evaluate_at(place, dataset, settings)
        if task.start.keep:
            settle(resident, task, held, remembered(own), lambda: self._dataset(Kind.TRAIN))
            with resident.adapters.disabled():
                return evaluate(resident, dataset, settings)
        resident.rebuilt.restore()
        if starts_at_zero(task, own):
            resident.base.apply(held.key, held.payload, task.start.dense)
            with resident.adapters.disabled():
                return evaluate(resident, dataset, settings)
        start = starting_payload(task, resident.spec, held.warm, own)
        resident.base.apply(held.key, held.payload, start.dense)
        resident.adapters.set_factors(start.factors)
        return evaluate(resident, dataset, settings)

    def _evaluate_at(self, place: Place, dataset: Dataset, settings: config.Evaluation) -> Mapping[str, float]:
        with torch.inference_mode():
            place.prepare(lambda: forward_logits(self._resident, dataset.batch([0])))
            with place.serving():
                return evaluate(self._resident, dataset, settings)

    def _place(self, subspace: Subspace, held: Held) -> Place:
        return Place(self._resident, subspace, held.payload.coefficients, held.key)

    def _dataset(self, kind: Kind) -> Dataset:
        if kind not in self._datasets:
            what = "training" if kind is Kind.TRAIN else "held-out"
            self._datasets[kind] = Dataset(
                self._examples[kind],
                self._resident,
                max_length=self._data.max_length,
                name=f"{self.name}'s {what} data",
            )
        return self._datasets[kind]

    def _heads(self) -> dict[str, Array]:
        """Copies of the head's parameters, float32."""
        return {name: head.detach().cpu().numpy().copy() for name, head in self._resident.base.heads.items()}
