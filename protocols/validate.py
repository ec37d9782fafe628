"""What every message must hold, checked on its way out and on its way in: bounded, typed, finite."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Final

from fedloom.protocols.messages import Hello, Kind, ModelSpec, Patch, Payload, Refusal, Start, Task, Update
from fedloom.protocols.quantize import known_wire

MAX_TEXT: Final = 1024
MAX_ENTRIES: Final = 100_000
MAX_DIMS: Final = 4
COUNT_LIMIT: Final = 2**63
SEED_LIMIT: Final = 2**64
RANK_LIMIT: Final = 2**31


def text(where: str, value: object) -> None:
    """Raise ValueError unless `value` is a string of Unicode text, not longer than MAX_TEXT."""
    if not isinstance(value, str):
        raise ValueError(f"{where} must be a string, got {value!r}")
    if len(value) > MAX_TEXT:
        raise ValueError(f"{where} must be <= {MAX_TEXT} characters, got {len(value)}")
    if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        raise ValueError(f"{where} must be Unicode text, got a lone surrogate in {value!r}")


def integer(where: str, value: object, limit: int = COUNT_LIMIT, *, least: int = 0) -> None:
    """Raise ValueError unless `value` is an int in least..limit - 1."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < limit:
        raise ValueError(f"{where} must be an integer in {least}..{limit - 1}, got {value!r}")


def real(where: str, value: object) -> None:
    """Raise ValueError unless `value` is a finite number."""
    if not isinstance(value, float | int) or isinstance(value, bool) or not abs(value) <= sys.float_info.max:
        raise ValueError(f"{where} must be a finite number, got {value!r}")


def flag(where: str, value: object) -> None:
    """Raise ValueError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{where} must be True or False, got {value!r}")


def one_of(where: str, value: object, members: type[StrEnum]) -> None:
    """Raise ValueError unless `value` is one of `members`."""
    if value not in list(members):
        raise ValueError(f"{where} must be one of {', '.join(members)}, got {value!r}")


def shape(where: str, dims: Sequence[int], *, least_last: int = 1) -> None:
    """Raise ValueError unless `dims` are 1..MAX_DIMS positive lengths; the last may be 0 where `least_last` is."""
    if not 1 <= len(dims) <= MAX_DIMS or any(length < 1 for length in dims[:-1]) or dims[-1] < least_last:
        got = list(dims[: MAX_DIMS + 1])
        raise ValueError(f"{where} must have 1..{MAX_DIMS} dimensions, each >= 1, got {got}")


def names(where: str, entries: Iterable[str], count: int) -> None:
    """Raise ValueError unless `count` <= MAX_ENTRIES and the names of `entries` are good and differ."""
    if count > MAX_ENTRIES:
        raise ValueError(f"{where} must have <= {MAX_ENTRIES} entries, got {count}")
    seen: set[str] = set()
    for name in entries:
        text(f"a name in {where}", name)
        if name in seen:
            raise ValueError(f"names in {where} must differ, got {name!r} twice")
        seen.add(name)


def _payload(where: str, payload: Payload) -> None:
    tensors = 2 * len(payload.factors) + len(payload.dense)
    if tensors > MAX_ENTRIES:
        raise ValueError(f"{where} must have <= {MAX_ENTRIES} tensors, got {tensors}")
    names(f"{where}.factors", payload.factors, len(payload.factors))
    names(f"{where}.dense", payload.dense, len(payload.dense))
    for name, factor in payload.factors.items():
        positive(f"alpha of {name!r}", factor.alpha)
        flag(f"rslora of {name!r}", factor.rslora)
        shape(f"b of {name!r}", factor.b.shape)
        shape(f"a of {name!r}", factor.a.shape, least_last=0)
    for name, tensor in payload.dense.items():
        shape(f"dense {name!r}", tensor.shape)


def positive(where: str, value: object) -> None:
    """Raise ValueError unless `value` is finite and positive."""
    real(where, value)
    if not value > 0:  # type: ignore[operator]
        raise ValueError(f"{where} must be > 0, got {value!r}")


def _knobs(where: str, knobs: Mapping[str, float | int | str]) -> None:
    names(where, knobs, len(knobs))
    for name, value in knobs.items():
        if isinstance(value, str):
            text(f"{where}[{name!r}]", value)
        elif isinstance(value, int):
            integer(f"{where}[{name!r}]", int(value), COUNT_LIMIT, least=-COUNT_LIMIT)
        elif isinstance(value, float):
            real(f"{where}[{name!r}]", value)
        else:
            raise ValueError(f"{where}[{name!r}] must be an int, a float, a bool or a string, got {value!r}")


def _patch(patch: Patch) -> None:
    text("patch.base_hash", patch.base_hash)
    integer("patch.since", patch.since)
    integer("patch.version", patch.version)
    if patch.since > patch.version:
        raise ValueError(f"patch.since must be <= patch.version, got {patch.since} and {patch.version}")
    _payload("patch.payload", patch.payload)


def check_task(task: Task) -> None:
    """Raise ValueError on the first field of a task that breaks its bounds."""
    for where, value in (("device", task.device), ("tuner", task.tuner), ("run", task.run)):
        text(f"task.{where}", value)
    one_of("task.kind", task.kind, Kind)
    one_of("task.start_from", task.start_from, Start)
    for where in ("rslora", "train_a", "send"):
        flag(f"task.{where}", getattr(task, where))
    integer("task.round", task.round)
    integer("task.rank", task.rank, RANK_LIMIT)
    integer("task.state_round", task.state_round)
    integer("task.nonce", task.nonce, SEED_LIMIT)
    integer("task.seed", task.seed, SEED_LIMIT)
    if task.shared_a_seed is not None:
        integer("task.shared_a_seed", task.shared_a_seed, SEED_LIMIT)
    positive("task.alpha", task.alpha)
    known_wire(task.wire)
    _knobs("task.knobs", task.knobs)
    _payload("task.start", task.start)
    if task.patch is not None:
        _patch(task.patch)


def check_update(update: Update) -> None:
    """Raise ValueError on the first field of an update that breaks its bounds."""
    text("update.device", update.device)
    text("update.run", update.run)
    one_of("update.kind", update.kind, Kind)
    integer("update.round", update.round)
    integer("update.examples", update.examples)
    integer("update.nonce", update.nonce, SEED_LIMIT)
    names("update.metrics", update.metrics, len(update.metrics))
    for name, value in update.metrics.items():
        real(f"update.metrics[{name!r}]", value)
    real("update.cost.seconds", update.cost.seconds)
    if update.cost.seconds < 0:
        raise ValueError(f"update.cost.seconds must be >= 0, got {update.cost.seconds}")
    integer("update.cost.peak_rss_bytes", update.cost.peak_rss_bytes)
    _payload("update.payload", update.payload)


def _spec(spec: ModelSpec) -> None:
    text("spec.base_hash", spec.base_hash)
    names("spec.matrices", spec.matrices, len(spec.matrices))
    names("spec.dense", spec.dense, len(spec.dense))
    for name, matrix in spec.matrices.items():
        text(f"kind of {name!r}", matrix.kind)
        integer(f"d_out of {name!r}", matrix.d_out, least=1)
        integer(f"d_in of {name!r}", matrix.d_in, least=1)
    for name, dims in spec.dense.items():
        shape(f"dense {name!r}", dims)
        for length in dims:
            integer(f"a length of dense {name!r}", length)


def check_hello(hello: Hello) -> None:
    """Raise ValueError on the first field of a greeting that breaks its bounds."""
    report = hello.report
    text("report.device", report.device)
    text("report.software", report.software)
    for where in ("examples", "rank", "version", "state_round"):
        integer(f"report.{where}", getattr(report, where), RANK_LIMIT if where == "rank" else COUNT_LIMIT)
    names("report.capabilities", report.capabilities, len(report.capabilities))
    _spec(hello.spec)


def check_refusal(refusal: Refusal) -> None:
    """Raise ValueError on the first field of a refusal that breaks its bounds."""
    text("refusal.device", refusal.device)
    text("refusal.reason", refusal.reason)
    integer("refusal.round", refusal.round)
    integer("refusal.version", refusal.version)
