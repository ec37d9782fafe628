"""What a server lets in: an answer to a task, and a device's first words.

A refused answer changes nothing but what is counted. An accepted one is an answer to its task that the strategy can
merge beside a good one, into a state that goes out again; and merging leaves the state that it began with alone.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, cast

import corpus
import numpy as np
from mutation import parsed
from targets import MIB, Broken, Havoc, Target, one_line, same
from wire_targets import mutate_frame, repair, split

from fedloom.protocols import fedloom_pb2 as pb
from fedloom.protocols.codec import TaskEncoder, decode_answer, encode
from fedloom.protocols.config import RunConfig
from fedloom.protocols.messages import (
    NOT_NOW,
    Axis,
    Cost,
    DeviceReport,
    Hello,
    Kind,
    LowRank,
    MatrixSpec,
    ModelSpec,
    Over,
    Payload,
    Refusal,
    Scalars,
    Task,
    Update,
)
from fedloom.protocols.seeds import draw_indices
from fedloom.protocols.shapes import Block, Linear, Reads, Shapes
from fedloom.server.collect import Desk, Reception
from fedloom.server.courier import Courier, Reply
from fedloom.server.intake import check_update
from fedloom.server.ledger import Ledger
from fedloom.server.pooling import pool
from fedloom.server.roster import Roster
from fedloom.server.watch import Silent
from fedloom.strategies.base import Scaling, State, Strategy
from fedloom.strategies.ffa import drop_a
from fedloom.strategies.masked import Keep, slice_patch, slice_payload
from fedloom.strategies.registry import build
from fedloom.strategies.unequal import DROP, MEASURE, PRUNE_RATIO, RANK, RATIO, REPEATED, SCORE
from fedloom.strategies.unit_order import SCORES, UNIT_SCORES

SPEC: Final = ModelSpec(
    base_hash="5e" * 32,
    matrices={
        "q": MatrixSpec(d_out=6, d_in=5, rows=Axis(group="heads", width=1, offsets=(0, 3))),
        "c": MatrixSpec(d_out=5, d_in=7, kind="conv1d", columns=Axis(group="heads", width=2)),
    },
    dense={"head": (2, 3)},
    groups={"heads": 3},
)
_AXES: Final = {  # the sides of UNEQUAL's matrices, and the axis that can be pruned
    "0.q": ("attention", 6, 5, "rows", Axis(group="0.heads", width=2)),
    "0.down": ("channels", 5, 4, "columns", Axis(group="0.channels", width=1)),
    "1.o": ("mixed", 5, 6, "columns", Axis(group="1.heads", width=2)),
    "1.up": ("mlp", 4, 5, "rows", Axis(group="1.channels", width=1)),
}
UNEQUAL: Final = ModelSpec(  # a transformer of two blocks, for strategies that fit tasks to devices
    base_hash="5f" * 32,
    matrices={n: MatrixSpec(d_out=out, d_in=d_in, **{side: axis}) for n, (_, out, d_in, side, axis) in _AXES.items()},
    dense={"head": (2, 3)},
    groups={"0.heads": 3, "0.channels": 4, "1.heads": 3, "1.channels": 4},
    shapes=Shapes(
        family="llama",
        hidden=5,
        blocks=(Block(heads=3, kv_heads=3, head_dim=2, ffn=4),) * 2,
        linears={
            n: Linear(block=int(n[0]), reads=cast(Reads, reads), d_out=out, d_in=d_in)
            for n, (reads, out, d_in, _, _) in _AXES.items()
        },
        columns=7,
        other=100,
        head=6,
    ),
)
KEEP: Final = {"heads": np.array([True, False, True])}  # of the tasks to devices that prune
RUN: Final = "0123abcd"
DEVICES: Final = [DeviceReport(device=name, examples=9, rank=2) for name in ("hospital-a", "hospital-b")]
OPTIONS: Final[dict[str, dict[str, Any]]] = {  # small subspaces, so that an input costs little
    "fedloom": {},
    "flora": {},
    "flexlora": {},
    "hetlora": {},
    "fedit": {},
    "ffa": {},
    "local": {},
    "fedkseed": {"k": 32},
    "fedkseed_pro": {"k": 32},
    "decomfl": {"k": 32},
    "sketch": {"k": 32},
    "fedspine": {"target": 0.25, "ramp": 2, "max_rank": 2, "fixed_rank": 1},
    "fedpipe": {"ranks": [1, 2]},
}
_FITTED: Final = ("fedspine", "fedpipe")
# What an update may lie about, and how.
_TOLD: Final = (RATIO, RANK, DROP, *REPEATED, f"{SCORE}0.q", f"{SCORE}1.o", "n", "tokens")
_LIES: Final = (0.0, -1.0, 0.25, 1.0, 2.0, 1e-300, 1e15, -1e15, 1e16, 1e308, math.inf, math.nan)


def spec_for(name: str) -> ModelSpec:
    """The model that a strategy's cases are about."""
    return UNEQUAL if name in _FITTED else SPEC


@dataclass(frozen=True, kw_only=True)
class Case:
    """A strategy in the middle of a run: its state, the task of one device, and good answers of both."""

    spec: ModelSpec
    strategy: Strategy
    state: State
    task: Task
    good: Update
    other: Update


def _complete(task: Task, number: int) -> Task:
    return replace(task, run=RUN, nonce=1000 + number, seed=2000 + number, strategy="x", wire="fp32")


def answer(task: Task, seed: int, spec: ModelSpec = SPEC) -> Update:
    """What a device that does what it is asked would send."""
    update = Update(
        device=task.device,
        round=task.round,
        examples=9,
        kind=task.kind,
        run=task.run,
        nonce=task.nonce,
        metrics={"loss_sum": 3.0, "tokens": 6.0, "exact_match_sum": 1.0, "n": 2.0},
    )
    if not task.send or task.kind != Kind.TRAIN:
        return update
    if task.subspace is not None:
        return replace(update, payload=Payload(scalars=_scalars(task, seed)))
    payload = corpus.model_payload(spec, task.rank, seed=seed)
    factors = {name: _of_rank(term, task, name) for name, term in payload.factors.items() if task.rank_of(name)}
    keep = pruned_keep(task)
    payload = slice_payload(replace(payload, factors=factors), spec, keep)
    if task.knobs.get(UNIT_SCORES):
        scores = {SCORES + name: np.full(count, 0.5 + seed, np.float32) for name, count in spec.groups.items()}
        payload = replace(payload, dense={**payload.dense, **scores})
    metrics = {**update.metrics, **_repeated(task)}
    metrics |= {SCORE + name: 1.0 + seed for name in factors} if MEASURE in task.knobs else {}
    metrics |= {DROP: 0.5} if keep else {}
    return replace(update, payload=payload if task.train_a else drop_a(payload), metrics=metrics)


def _of_rank(term: LowRank, task: Task, name: str) -> LowRank:
    rank = task.rank_of(name)
    return replace(term, b=term.b[:, :rank], a=term.a[:rank], alpha=task.alpha_of(name), rslora=task.rslora)


def _repeated(task: Task) -> dict[str, float]:
    return {name: float(task.knobs[name]) for name in REPEATED if name in task.knobs}


def pruned_keep(task: Task) -> Keep:
    """What a device keeps that takes the first units it has left, of those that its task wants gone."""
    keep = {group: bits.copy() for group, bits in task.start.keep.items()}
    for kind in ("heads", "channels"):
        own = [group for group in keep if group == f"0.{kind}"]
        units = sum(len(bits) for group, bits in keep.items() if group.endswith(f".{kind}"))
        for group in own:
            left = np.flatnonzero(keep[group])
            gone = int(float(task.knobs.get(PRUNE_RATIO, 0.0)) * units) - (len(keep[group]) - len(left))
            keep[group][left[: min(max(gone, 0), len(left) - 1)]] = False
    return keep


def ran_out(task: Task) -> Update:
    """What a device says whose task was too much for it."""
    arm = {RATIO: float(task.knobs.get(PRUNE_RATIO, 0.0)), RANK: float(task.rank)}
    cost = Cost(seconds=0.5, peak_tensor_bytes=2**20, out_of_memory=True)
    return replace(answer(task, 0, UNEQUAL), payload=Payload(), metrics=arm | _repeated(task), cost=cost)


def _scalars(task: Task, seed: int) -> Scalars:
    subspace = task.subspace
    if subspace is None:
        raise ValueError("a task must have a subspace to be answered by scalars")
    values = np.linspace(-1, 1, 6).astype(np.float32) * np.float32(task.scalar_limit or 0.01)
    if subspace.family == "sketch":
        return Scalars(over=Over.STEPS, k=subspace.k, values=values, seed=task.seed)
    listed = task.start.scalars
    draw_seed = int(task.knobs.get("draw_seed", seed))
    indices = draw_indices(draw_seed, subspace.k, 6) if listed is None else listed.drawn()[:6]
    return Scalars(over=Over.POOL, k=subspace.k, values=values[: len(indices)], indices=indices)


@functools.cache
def cases() -> tuple[Case, ...]:
    """Training in every strategy, in the first round and in a later one, and an evaluation."""
    made: list[Case] = []
    for name, options in OPTIONS.items():
        strategy, spec = build(name, options, Scaling()), spec_for(name)
        state = strategy.init(spec, 0, DEVICES)
        for round in (1, 2):
            tasks = [_complete(task, number) for number, task in enumerate(strategy.plan(state, DEVICES, round))]
            good, other = (answer(task, seed, spec) for seed, task in enumerate(tasks))
            made.append(Case(spec=spec, strategy=strategy, state=state, task=tasks[0], good=good, other=other))
            state = strategy.aggregate(state, [good, other])
        evaluation = [_complete(task, 9) for task in strategy.plan_evaluation(state, DEVICES, 2)]
        if name == "fedloom":
            good, other = (answer(task, 0) for task in evaluation)
            made.append(Case(spec=spec, strategy=strategy, state=state, task=evaluation[0], good=good, other=other))
    pruning = [case for case in made if type(case.strategy).__name__ in ("Fedloom", "Flora") and case.good.payload]
    for case in pruning:
        start, patch = slice_payload(case.task.start, SPEC, KEEP), slice_patch(case.task.patch, SPEC, KEEP)
        task = replace(case.task, start=start, patch=patch)
        made.append(replace(case, task=task, good=answer(task, 0)))
    return tuple(made)


def digest(state: State) -> str:
    """Of all that a state holds."""
    whole = hashlib.sha256(json.dumps([state.version, state.meta], sort_keys=True, default=str).encode())
    for name, tensor in sorted(state.tensors.items()):
        whole.update(f"{name}|{tensor.dtype}|{tensor.shape}|".encode() + np.ascontiguousarray(tensor).tobytes())
    return whole.hexdigest()


def _desk(spec: ModelSpec = SPEC) -> Desk:
    roster = Roster({number: Hello(report=report, spec=spec) for number, report in enumerate(DEVICES)})
    courier = cast(Courier, None)  # answers are handed in, nothing is sent
    return Desk(config=RunConfig(), courier=courier, roster=roster, ledger=Ledger(), watcher=Silent())


def _check_intake(data: bytes) -> None:
    """The number of a case, then an answer to its task."""
    case, frame = cases()[data[0] % len(cases()) if data else 0], data[1:]
    desk, before = _desk(case.spec), digest(case.state)
    reception = Reception(desk, case.task.kind)
    standing = desk.roster.to_json()
    update = reception.receive(case.task, Reply(node=0, frame=frame))
    same("bytes counted", desk.ledger.up, len(frame))
    if update is None:
        _check_refused(desk, reception, case, standing, frame)
        same("the state after a refusal", digest(case.state), before)
        raise ValueError(reception.refusals[0])
    reception.accept(case.task, update, size=len(frame))
    _check_accepted(case, update)
    same("the state after a round", digest(case.state), before)


def _check_refused(desk: Desk, reception: Reception, case: Case, standing: Mapping[str, Any], frame: bytes) -> None:
    not_now = reception.refusals[0].startswith(f"{case.task.device}: {NOT_NOW}")
    same("refusals", (len(reception.refusals), desk.ledger.refused), (1, int(not not_now)))
    one_line(ValueError(reception.refusals[0]))
    now = {name: values[:2] for name, values in desk.roster.to_json().items()}
    wanted = {name: values[:2] for name, values in standing.items()}
    if now != wanted:  # a device that says no tells which version it holds
        refusal = decode_answer(frame, (Update, Refusal), limit=len(frame))
        for name in ("device", "round", "run", "nonce"):
            same(f"a refusal's {name}", getattr(refusal, name), getattr(case.task, name))
        same("what a refusal may change", now, wanted | {case.task.device: [getattr(refusal, "version", None), 0]})


def _check_accepted(case: Case, update: Update) -> None:
    task = case.task
    for name in ("device", "round", "run", "kind", "nonce"):
        same(f"an accepted update's {name}", getattr(update, name), getattr(task, name))
    check_update(update, task, case.spec)
    metrics = pool([update.metrics, case.other.metrics])
    if not all(math.isfinite(value) for value in metrics.values()):
        raise Broken(f"pooled metrics must be finite, got {metrics} from {dict(update.metrics)}")
    if task.kind != Kind.TRAIN:
        return
    try:
        state = case.strategy.aggregate(case.state, [update, case.other])
        tasks = [_complete(task, 0) for task in case.strategy.plan(state, DEVICES, task.round + 1)]
        for coming in tasks:
            TaskEncoder("fp32").encode(coming)
    except ValueError as error:
        raise Broken(f"an accepted update must not stop a round, got {error}") from error
    check_finite(state)


_PRIOR: Final = 4  # the column of a bandit's leaves that is NaN where nothing was known before (bandit.py)


def check_finite(state: State) -> None:
    """Raise Broken for NaN or infinity in a state's tensors or numbers, but for leaves that never had a prior."""
    for name, tensor in state.tensors.items():
        leaves = name.startswith(("standing/", "fleet/")) and name.endswith("/leaves")
        values = tensor[:, :_PRIOR] if leaves else tensor
        if tensor.dtype.kind == "f" and not np.isfinite(values).all():
            raise Broken(f"tensors of a state must be finite, got NaN or infinity in {name}")
        if leaves and np.isinf(tensor).any():
            raise Broken(f"leaves must have a prior or none, got infinity in {name}")
    try:
        json.dumps(state.meta, allow_nan=False)
    except ValueError as error:
        raise Broken(f"what a state knows must be JSON of finite numbers, got {error}") from None


def _no(task: Task, reason: str) -> Refusal:
    named = {"device": task.device, "round": task.round, "run": task.run, "nonce": task.nonce}
    return Refusal(reason=reason, version=1, **named)


def _intake_seeds() -> list[bytes]:
    return [
        bytes([number]) + encode(answer, wire=wire, seed=1)
        for number, case in enumerate(cases())
        for answer in (*_said(case), _no(case.task, "no"), _no(case.task, f"{NOT_NOW}it is paused"))
        for wire in ("fp32", "int8")
    ]


def _said(case: Case) -> list[Update]:
    """A good answer; of a task that was fitted to its device, also that it ran out, and some that are stretched."""
    good, task = case.good, case.task
    if task.kind != Kind.TRAIN or not (task.ranks or PRUNE_RATIO in task.knobs):
        return [good]
    spent = ran_out(task)
    made = [good, spent, replace(spent, examples=0), replace(good, examples=0), replace(spent, metrics={})]
    made += [replace(good, cost=replace(good.cost, seconds=seconds)) for seconds in (0.0, 5e-324, 1e8)]
    made += [replace(good, metrics=dict(good.metrics) | {DROP: drop}) for drop in (1e15, -1e15)]
    few = dict(list(good.payload.factors.items())[:2])
    made.append(replace(good, payload=replace(good.payload, factors=few)))
    if task.start.keep:
        least = {group: np.arange(len(bits)) == bits.argmax() for group, bits in task.start.keep.items()}
        whole = corpus.model_payload(case.spec, task.rank)
        factors = {name: _of_rank(term, task, name) for name, term in whole.factors.items()}
        made.append(replace(good, payload=slice_payload(replace(whole, factors=factors), case.spec, least)))
    return made


def _mutate_intake(data: bytes, rng: random.Random, havoc: Havoc) -> bytes:
    """Mostly the fields that an attacker would change; now and then another case's answer."""
    if rng.random() < 0.03:
        return bytes([rng.randrange(len(cases()))]) + data[1:]
    kind = Refusal if len(data) > 7 and data[7] == 4 else Update
    if kind is Update and rng.random() < 0.3:
        data = data[:1] + _lying(data[1:], rng)
    return data[:1] + mutate_frame(data[1:], rng, havoc, kind)


def _lying(frame: bytes, rng: random.Random) -> bytes:
    """The same update, with other numbers for what its device was asked and did."""
    body, data = split(frame)
    record = parsed(pb.Update, body)
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice(_TOLD)
        told = [metric for metric in record.metrics if metric.name == name] or [record.metrics.add(name=name)]
        told[0].value = rng.choice(_LIES)
    if rng.random() < 0.2:
        record.cost.out_of_memory = not record.cost.out_of_memory
    if rng.random() < 0.2:
        record.ClearField("payload")
    return repair(record, data, rng, resize=True)


def _check_greeting(data: bytes) -> None:
    """A device's first words to a run that has begun: whoever is let in can be sent tasks."""
    answer = decode_answer(data, (Hello, Refusal), limit=1 << 20)
    if isinstance(answer, Refusal):
        raise ValueError(answer.reason.replace("\n", " ") or "no")
    roster = _desk().roster
    before = (roster.reports(), roster.spec)
    try:
        roster.join(7, answer)
    except ValueError:
        same("a roster that refuses", (roster.reports(), roster.spec), before)
        raise
    for case in cases()[::2]:
        round = case.task.round
        case.strategy.plan(case.state, [answer.report], round)  # may say no to this one
        tasks = case.strategy.plan(case.state, roster.reports(), round)
        for task in (*tasks, *case.strategy.plan_evaluation(case.state, roster.reports(), round)):
            try:
                TaskEncoder("fp32").encode(_complete(task, 0))
            except ValueError as error:
                raise Broken(f"a task for a device that was let in must travel, got {error}") from error


def _greetings() -> list[bytes]:
    newcomer = replace(DEVICES[0], device="hospital-c")
    ours = [Hello(report=replace(newcomer, rank=rank, version=rank), spec=SPEC) for rank in (1, 2)]
    return corpus.frames([*ours, *corpus.hellos(), *corpus.refusals()])


def targets(folder: Path) -> dict[str, Target]:
    """Nothing here touches files."""
    logging.getLogger("fedloom.server").setLevel(logging.ERROR)
    logging.getLogger("fedloom.strategies").setLevel(logging.ERROR)
    made = [
        Target(
            name="intake",
            check=_check_intake,
            seeds=_intake_seeds,
            mutate=_mutate_intake,
            seconds=3.0,
            memory=280 * MIB,
        ),
        Target(
            name="greeting",
            check=_check_greeting,
            seeds=_greetings,
            mutate=functools.partial(mutate_frame, kind=Hello),
            seconds=2.0,
            memory=64 * MIB,
        ),
    ]
    return {target.name: target for target in made}
