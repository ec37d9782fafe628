"""What every message must hold, checked on its way out and on its way in: bounded, typed, finite."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedloom.protocols.directions import check_k, known_family
from fedloom.protocols.messages import (
    Axis,
    Coefficients,
    Hello,
    Kind,
    ModelSpec,
    Over,
    Patch,
    Payload,
    Refusal,
    Scalars,
    Scope,
    Start,
    Subspace,
    Task,
    Update,
)
from fedloom.protocols.quantize import known_wire

MAX_TEXT: Final = 1024
MAX_ENTRIES: Final = 100_000
MAX_DIMS: Final = 4
COUNT_LIMIT: Final = 2**63
SEED_LIMIT: Final = 2**64
RANK_LIMIT: Final = 2**31
MAX_SCALARS: Final = 2**22
MAX_DIRECTIONS: Final = 2**20  # of a subspace, as in directions.check_k
STEP_LIMIT: Final = 2**53  # |steps| of coefficients stay below it
MAX_UNITS: Final = 2**24  # of all groups together
MAX_OFFSETS: Final = 16  # of an axis
EXPONENTS: Final = (-1074, 1024)  # powers of two that are finite float64, subnormal ones included
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def one_line(value: str) -> str:
    """A text as `text` takes it, whatever it was: in one line, without control characters, cut to MAX_TEXT."""
    return " ".join(_CONTROL.sub(" ", value.encode("utf-8", "replace").decode()).split())[:MAX_TEXT]


def text(where: str, value: object) -> None:
    """Raise ValueError unless `value` is one line of Unicode text, not longer than MAX_TEXT."""
    if not isinstance(value, str):
        raise ValueError(f"{where} must be a string, got {value!r}")
    if len(value) > MAX_TEXT:
        raise ValueError(f"{where} must be <= {MAX_TEXT} characters, got {len(value)}")
    if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        raise ValueError(f"{where} must be Unicode text, got a lone surrogate in {value!r}")
    if _CONTROL.search(value):  # names and reasons go into logs and onto screens as they are
        raise ValueError(f"{where} must be one line without control characters, got {value!r}")


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


def check_payload(where: str, payload: Payload) -> None:
    """Raise ValueError on the first part of a payload that breaks its bounds."""
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
    if payload.scalars is not None:
        _scalars(f"{where}.scalars", payload.scalars)
    if payload.coefficients is not None:
        _coefficients(f"{where}.coefficients", payload.coefficients)
    unit_counts(f"{where}.keep", {group: bits.size for group, bits in payload.keep.items()})
    for group, bits in payload.keep.items():
        _kept(f"{where}.keep[{group!r}]", bits)


def unit_counts(where: str, units: Mapping[str, int]) -> None:
    """Raise ValueError unless groups have good names, 1 unit or more each and MAX_UNITS at most in all."""
    names(where, units, len(units))
    for group, count in units.items():
        integer(f"units of {where}[{group!r}]", count, MAX_UNITS + 1, least=1)
    if sum(units.values()) > MAX_UNITS:
        raise ValueError(f"{where} must have <= {MAX_UNITS} units in all, got {sum(units.values())}")


def _kept(where: str, bits: NDArray[np.bool_]) -> None:
    if bits.dtype != np.bool_ or bits.ndim != 1:
        raise ValueError(f"{where} must be a vector of bool, got {bits.dtype} of shape {list(bits.shape)}")
    if not bits.any():
        raise ValueError(f"{where} must keep at least one unit, got none")


def check_keep(where: str, keep: Mapping[str, NDArray[np.bool_]], groups: Mapping[str, int]) -> None:
    """Raise ValueError unless keep-bitmaps are of these groups, a bit for each unit, at least one of them set."""
    for group, bits in keep.items():
        if group not in groups:
            raise ValueError(f"{where} must name groups of the model, got {group!r}")
        _kept(f"{where}[{group!r}]", bits)
        if len(bits) != groups[group]:
            raise ValueError(f"{where}[{group!r}] must have {groups[group]} units, got {len(bits)}")


def digest(where: str, value: object) -> None:
    """Raise ValueError unless `value` is a SHA-256 in lowercase hexadecimal, or empty."""
    if not isinstance(value, str) or not re.fullmatch("([0-9a-f]{64})?", value):
        raise ValueError(f"{where} must be 64 lowercase hexadecimal digits or empty, got {value!r}")


def check_subspace(where: str, subspace: Subspace) -> None:
    """Raise ValueError on the first field of a subspace that breaks its bounds, or does not go with its scope."""
    known_family(subspace.family)
    integer(f"{where}.k", subspace.k)
    check_k(subspace.k, subspace.family)
    one_of(f"{where}.scope", subspace.scope, Scope)
    integer(f"{where}.seed", subspace.seed, SEED_LIMIT)
    integer(f"{where}.rank", subspace.rank, RANK_LIMIT)
    integer(f"{where}.directions", subspace.directions)
    flag(f"{where}.rslora", subspace.rslora)
    real(f"{where}.alpha", subspace.alpha)
    digest(f"{where}.mask", subspace.mask)
    lora = subspace.scope == Scope.LORA
    if lora != (subspace.rank >= 1) or lora != (subspace.alpha > 0) or subspace.alpha < 0 or subspace.rslora > lora:
        raise ValueError(
            f"{where} must have a rank >= 1 and an alpha > 0 for scope lora and there alone, "
            f"got rank {subspace.rank}, alpha {subspace.alpha}, rslora {subspace.rslora} for {subspace.scope}"
        )
    if bool(subspace.mask) != (subspace.scope == Scope.MASK):
        raise ValueError(f"{where} must have a mask for scope mask and there alone, got {subspace.mask!r}")


def scalar_sizes(where: str, over: Over, k: int, count: int) -> None:
    """Raise ValueError unless `count` scalars may be sent over k directions."""
    integer(f"{where}.k", k, MAX_DIRECTIONS + 1, least=1)
    if not 1 <= count <= MAX_SCALARS or (over == Over.BASIS and count != k):
        wanted = f"k, {k}," if over == Over.BASIS else f"1..{MAX_SCALARS}"
        raise ValueError(f"{where} must have {wanted} values over {over}, got {count}")


def _scalars(where: str, scalars: Scalars) -> None:
    one_of(f"{where}.over", scalars.over, Over)
    scalar_sizes(where, scalars.over, scalars.k, len(scalars.values))
    integer(f"{where}.seed", scalars.seed, SEED_LIMIT)
    indices = scalars.indices
    if indices is None:
        return
    if not np.issubdtype(indices.dtype, np.integer):
        raise ValueError(f"indices of {where} must be integers, got {indices.dtype}")
    if not 0 <= int(indices.min()) <= int(indices.max()) < scalars.k:
        raise ValueError(f"indices of {where} must be in 0..{scalars.k - 1}, got {indices.min()} to {indices.max()}")


def _coefficients(where: str, coefficients: Coefficients) -> None:
    check_subspace(f"{where}.subspace", coefficients.subspace)
    steps, exponent = coefficients.steps, coefficients.exponent
    integer(f"{where}.exponent", exponent, EXPONENTS[1], least=EXPONENTS[0])
    if steps.dtype != np.int64:
        raise ValueError(f"steps of {where} must be int64, got {steps.dtype}")
    largest = max(int(steps.max()), -int(steps.min()))
    if largest >= STEP_LIMIT:
        raise ValueError(f"steps of {where} must lie within +-{STEP_LIMIT - 1}, got {largest}")
    if largest.bit_length() + exponent > EXPONENTS[1]:
        raise ValueError(f"{where} must be finite, got {largest} x 2^{exponent}")


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
    check_payload("patch.payload", patch.payload)


def check_task(task: Task) -> None:
    """Raise ValueError on the first field of a task that breaks its bounds."""
    for where, value in (
        ("device", task.device),
        ("strategy", task.strategy),
        ("tuner", task.tuner),
        ("run", task.run),
    ):
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
    names("task.ranks", task.ranks, len(task.ranks))
    for name, rank in task.ranks.items():
        integer(f"task.ranks[{name!r}]", rank, RANK_LIMIT, least=1)
    if task.ranks and not task.rank:
        raise ValueError("task.rank must be >= 1 where task.ranks are given, got 0")
    check_payload("task.start", task.start)
    if task.patch is not None:
        _patch(task.patch)
    if task.subspace is not None:
        check_subspace("task.subspace", task.subspace)
    real("task.scalar_limit", task.scalar_limit)
    if task.scalar_limit < 0:
        raise ValueError(f"task.scalar_limit must be >= 0, got {task.scalar_limit}")


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
    integer("update.cost.peak_tensor_bytes", update.cost.peak_tensor_bytes)
    flag("update.cost.out_of_memory", update.cost.out_of_memory)
    check_payload("update.payload", update.payload)


def _spec(spec: ModelSpec) -> None:
    text("spec.base_hash", spec.base_hash)
    names("spec.matrices", spec.matrices, len(spec.matrices))
    names("spec.dense", spec.dense, len(spec.dense))
    digest("spec.mask", spec.mask)
    unit_counts("spec.groups", spec.groups)
    for name, matrix in spec.matrices.items():
        text(f"kind of {name!r}", matrix.kind)
        integer(f"d_out of {name!r}", matrix.d_out, least=1)
        integer(f"d_in of {name!r}", matrix.d_in, least=1)
        for side, axis, size in (("rows", matrix.rows, matrix.d_out), ("columns", matrix.columns, matrix.d_in)):
            if axis is not None:
                _axis(f"{side} of {name!r}", axis, size, spec.groups)
    for name, dims in spec.dense.items():
        shape(f"dense {name!r}", dims)
        for length in dims:
            integer(f"a length of dense {name!r}", length)


def _axis(where: str, axis: Axis, size: int, groups: Mapping[str, int]) -> None:
    """Raise ValueError unless the units of an axis lie within `size` indices and none owns another's."""
    text(f"group of {where}", axis.group)
    if axis.group not in groups:
        raise ValueError(f"group of {where} must be one of spec.groups, got {axis.group!r}")
    integer(f"width of {where}", axis.width, least=1)
    if not 1 <= len(axis.offsets) <= MAX_OFFSETS:
        raise ValueError(f"{where} must have 1..{MAX_OFFSETS} offsets, got {len(axis.offsets)}")
    span, free = groups[axis.group] * axis.width, 0
    for offset in axis.offsets:
        integer(f"an offset of {where}", offset)
        if offset < free:
            raise ValueError(f"offsets of {where} must ascend by {span} or more, got {list(axis.offsets)}")
        free = offset + span
    if free > size:
        raise ValueError(f"units of {where} must lie within its {size} indices, got an end of {free}")


def check_hello(hello: Hello) -> None:
    """Raise ValueError on the first field of a greeting that breaks its bounds."""
    report = hello.report
    text("report.device", report.device)
    text("report.software", report.software)
    for where in ("examples", "rank", "version", "state_round", "memory"):
        integer(f"report.{where}", getattr(report, where), RANK_LIMIT if where == "rank" else COUNT_LIMIT)
    names("report.capabilities", report.capabilities, len(report.capabilities))
    _spec(hello.spec)


def check_refusal(refusal: Refusal) -> None:
    """Raise ValueError on the first field of a refusal that breaks its bounds."""
    text("refusal.device", refusal.device)
    text("refusal.reason", refusal.reason)
    text("refusal.run", refusal.run)
    integer("refusal.round", refusal.round)
    integer("refusal.nonce", refusal.nonce, SEED_LIMIT)
    integer("refusal.version", refusal.version)
