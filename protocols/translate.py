"""Each message as its record of fedloom.proto, and back: every field of messages.py by name, once in each direction."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Any, Protocol, TypeVar

from fedloom.protocols import fedloom_pb2 as pb
from fedloom.protocols import validate
from fedloom.protocols.enums import DTYPES, KINDS, STARTS, member
from fedloom.protocols.framing import Buffer
from fedloom.protocols.messages import (
    Axis,
    Cost,
    DeviceReport,
    Hello,
    MatrixSpec,
    ModelSpec,
    Patch,
    Payload,
    Refusal,
    Task,
    Update,
)
from fedloom.protocols.shapes_wire import read_shapes, write_shapes
from fedloom.protocols.subspace_wire import read_subspace, write_subspace
from fedloom.protocols.tensors import PackedPayload, unpack_payload

Pack = Callable[[Payload], PackedPayload]
Data = tuple[Buffer, ...]

V = TypeVar("V")


class _Named(Protocol):
    name: str


E = TypeVar("E", bound=_Named)


def write_task(task: Task, pack: Pack) -> tuple[pb.Task, Data]:
    """A task's record and its tensor data: the start's, then the patch's."""
    start = pack(task.start)
    record, data = (
        pb.Task(
            device=task.device,
            round=task.round,
            rank=task.rank,
            alpha=task.alpha,
            start_from=STARTS[task.start_from],
            kind=KINDS[task.kind],
            tuner=task.tuner,
            rslora=task.rslora,
            train_a=task.train_a,
            shared_a_seed=task.shared_a_seed,
            send=task.send,
            start=start.header,
            nonce=task.nonce,
            seed=task.seed,
            state_round=task.state_round,
            wire=DTYPES[task.wire],
            knobs=[_knob(name, value) for name, value in task.knobs.items()],
            subspace=None if task.subspace is None else write_subspace(task.subspace),
            scalar_limit=task.scalar_limit,
            strategy=task.strategy,
            ranks=[pb.ModuleRank(name=name, rank=rank) for name, rank in task.ranks.items()],
        ),
        start.data,
    )
    _put_text(record, "run", task.run)
    if task.patch is not None:
        patch = pack(task.patch.payload)
        _put_text(record.patch, "base_hash", task.patch.base_hash)
        record.patch.since = task.patch.since
        record.patch.version = task.patch.version
        record.patch.payload.CopyFrom(patch.header)
        data += patch.data
    return record, data


def read_task(record: pb.Task, data: memoryview) -> tuple[Task, memoryview]:
    """The task of a record, and the tensor data that it leaves."""
    _present("task", record, "start")
    start, data = unpack_payload(record.start, data, "task.start")
    patch = None
    if record.HasField("patch"):
        _present("task.patch", record.patch, "payload")
        payload, data = unpack_payload(record.patch.payload, data, "task.patch.payload")
        patch = Patch(
            base_hash=_text(record.patch, "base_hash", "task.patch.base_hash"),
            since=record.patch.since,
            version=record.patch.version,
            payload=payload,
        )
    task = Task(
        device=record.device,
        round=record.round,
        rank=record.rank,
        alpha=record.alpha,
        start_from=member(STARTS, record.start_from, "task.start_from"),
        kind=member(KINDS, record.kind, "task.kind"),
        tuner=record.tuner,
        rslora=record.rslora,
        train_a=record.train_a,
        shared_a_seed=record.shared_a_seed if record.HasField("shared_a_seed") else None,
        send=record.send,
        start=start,
        patch=patch,
        run=_text(record, "run", "task.run"),
        nonce=record.nonce,
        seed=record.seed,
        state_round=record.state_round,
        wire=member(DTYPES, record.wire, "dtype of task.wire"),
        knobs=_table("task.knobs", record.knobs, _knob_value),
        subspace=read_subspace(record.subspace, "task.subspace") if record.HasField("subspace") else None,
        scalar_limit=record.scalar_limit,
        strategy=record.strategy,
        ranks=_table("task.ranks", record.ranks, lambda entry: entry.rank),
    )
    return task, data


def write_update(update: Update, pack: Pack) -> tuple[pb.Update, Data]:
    """An update's record and its tensor data."""
    payload = pack(update.payload)
    record = pb.Update(
        device=update.device,
        round=update.round,
        examples=update.examples,
        kind=KINDS[update.kind],
        nonce=update.nonce,
        metrics=[pb.Metric(name=name, value=value) for name, value in update.metrics.items()],
        cost=_cost(update.cost),
        payload=payload.header,
    )
    _put_text(record, "run", update.run)
    return record, payload.data


def read_update(record: pb.Update, data: memoryview) -> tuple[Update, memoryview]:
    """The update of a record, and the tensor data that it leaves."""
    _present("update", record, "cost", "payload")
    payload, data = unpack_payload(record.payload, data, "update.payload")
    update = Update(
        device=record.device,
        round=record.round,
        examples=record.examples,
        kind=member(KINDS, record.kind, "update.kind"),
        run=_text(record, "run", "update.run"),
        nonce=record.nonce,
        metrics=_table("update.metrics", record.metrics, lambda metric: metric.value),
        cost=Cost(
            seconds=record.cost.seconds,
            peak_rss_bytes=record.cost.peak_rss_bytes,
            out_of_memory=record.cost.out_of_memory,
            peak_tensor_bytes=record.cost.peak_tensor_bytes,
        ),
        payload=payload,
    )
    return update, data


def _cost(cost: Cost) -> pb.Cost:
    return pb.Cost(
        seconds=cost.seconds,
        peak_rss_bytes=cost.peak_rss_bytes,
        out_of_memory=cost.out_of_memory,
        peak_tensor_bytes=cost.peak_tensor_bytes,
    )


def write_hello(hello: Hello, pack: Pack) -> tuple[pb.Hello, Data]:
    """A greeting's record; it has no tensor data."""
    report, spec = hello.report, hello.spec
    record = pb.Hello(
        report=pb.DeviceReport(
            device=report.device,
            examples=report.examples,
            rank=report.rank,
            version=report.version,
            state_round=report.state_round,
            capabilities=report.capabilities,
            software=report.software,
            memory=report.memory,
        ),
        spec=pb.ModelSpec(
            base_hash=spec.base_hash,
            matrices=[
                pb.Matrix(
                    name=name,
                    d_out=matrix.d_out,
                    d_in=matrix.d_in,
                    kind=matrix.kind,
                    rows=_axis(matrix.rows),
                    columns=_axis(matrix.columns),
                )
                for name, matrix in spec.matrices.items()
            ],
            dense=[pb.DenseShape(name=name, shape=shape) for name, shape in spec.dense.items()],
            mask=bytes.fromhex(spec.mask),
            groups=[pb.Group(name=name, units=units) for name, units in spec.groups.items()],
            shapes=write_shapes(spec.shapes),
        ),
    )
    return record, ()


def read_hello(record: pb.Hello, data: memoryview) -> tuple[Hello, memoryview]:
    """The greeting of a record, and the data that it leaves: all of it."""
    _present("hello", record, "report", "spec")
    report = DeviceReport(
        device=record.report.device,
        examples=record.report.examples,
        rank=record.report.rank,
        version=record.report.version,
        state_round=record.report.state_round,
        capabilities=tuple(record.report.capabilities),
        software=record.report.software,
        memory=record.report.memory,
    )
    spec = ModelSpec(
        base_hash=record.spec.base_hash,
        matrices=_table("spec.matrices", record.spec.matrices, _matrix),
        dense=_table("spec.dense", record.spec.dense, lambda entry: tuple(entry.shape)),
        mask=record.spec.mask.hex(),
        groups=_table("spec.groups", record.spec.groups, lambda entry: entry.units),
        shapes=read_shapes(record.spec.shapes) if record.spec.HasField("shapes") else None,
    )
    return Hello(report=report, spec=spec), data


def _axis(axis: Axis | None) -> pb.Axis | None:
    return None if axis is None else pb.Axis(group=axis.group, width=axis.width, offsets=axis.offsets)


def _matrix(record: pb.Matrix) -> MatrixSpec:
    rows, columns = (
        Axis(group=axis.group, width=axis.width, offsets=tuple(axis.offsets)) if record.HasField(side) else None
        for side, axis in (("rows", record.rows), ("columns", record.columns))
    )
    return MatrixSpec(d_out=record.d_out, d_in=record.d_in, kind=record.kind, rows=rows, columns=columns)


def write_refusal(refusal: Refusal, pack: Pack) -> tuple[pb.Refusal, Data]:
    """A refusal's record; it has no tensor data."""
    record = pb.Refusal(
        device=refusal.device,
        round=refusal.round,
        reason=refusal.reason,
        version=refusal.version,
        nonce=refusal.nonce,
    )
    _put_text(record, "run", refusal.run)
    return record, ()


def read_refusal(record: pb.Refusal, data: memoryview) -> tuple[Refusal, memoryview]:
    """The refusal of a record, and the data that it leaves: all of it."""
    refusal = Refusal(
        device=record.device,
        round=record.round,
        reason=record.reason,
        version=record.version,
        run=_text(record, "run", "refusal.run"),
        nonce=record.nonce,
    )
    return refusal, data


def _is_hex(value: str) -> bool:
    return re.fullmatch("([0-9a-f]{2})+", value) is not None


def _put_text(record: Any, field: str, value: str) -> None:
    """Write text to a record, hexadecimal as bytes: half as many."""
    if _is_hex(value):
        setattr(record, f"{field}_hex", bytes.fromhex(value))
    else:
        setattr(record, field, value)


def _text(record: Any, field: str, where: str) -> str:
    value, raw = str(getattr(record, field)), bytes(getattr(record, f"{field}_hex"))
    if (value and raw) or _is_hex(value):
        raise ValueError(f"{where} must travel as bytes if it is hexadecimal and as text if not, got {value!r}")
    return raw.hex() or value


def _knob(name: str, value: float | int | str) -> pb.Knob:
    if isinstance(value, bool):
        return pb.Knob(name=name, flag=value)
    if isinstance(value, int):
        return pb.Knob(name=name, integer=value)
    return pb.Knob(name=name, text=value) if isinstance(value, str) else pb.Knob(name=name, real=value)


def _knob_value(knob: pb.Knob) -> float | int | str:
    chosen = knob.WhichOneof("value")
    if chosen is None:
        raise ValueError(f"knob {knob.name!r} must have a value")
    value: float | int | str = getattr(knob, chosen)
    return value


def _present(where: str, record: Any, *fields: str) -> None:
    for field in fields:
        if not record.HasField(field):
            raise ValueError(f"{where} must carry its {field}")


def _table(where: str, entries: Collection[E], value: Callable[[E], V]) -> dict[str, V]:
    validate.names(where, (entry.name for entry in entries), len(entries))
    return {entry.name: value(entry) for entry in entries}
