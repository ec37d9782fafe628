"""Enumerations as their numbers of fedloom.proto, and back."""

from __future__ import annotations

from typing import Final, TypeVar

from fedloom.protocols import fedloom_pb2 as pb
from fedloom.protocols.messages import Kind, Over, Scope, Start

K = TypeVar("K")
V = TypeVar("V", bound=int)

KINDS: Final = {Kind.TRAIN: pb.KIND_TRAIN, Kind.EVALUATE: pb.KIND_EVALUATE}
STARTS: Final = {
    Start.FRESH: pb.START_FRESH,
    Start.PATCH: pb.START_PATCH,
    Start.GIVEN: pb.START_GIVEN,
    Start.OWN: pb.START_OWN,
}
DTYPES: Final = {"fp32": pb.DTYPE_FP32, "fp16": pb.DTYPE_FP16, "bf16": pb.DTYPE_BF16, "int8": pb.DTYPE_INT8}
FAMILIES: Final = {
    "gaussian": pb.FAMILY_GAUSSIAN,
    "rademacher": pb.FAMILY_RADEMACHER,
    "sketch": pb.FAMILY_SKETCH,
}
SCOPES: Final = {Scope.ALL: pb.SCOPE_ALL, Scope.LORA: pb.SCOPE_LORA, Scope.MASK: pb.SCOPE_MASK}
OVERS: Final = {Over.POOL: pb.OVER_POOL, Over.STEPS: pb.OVER_STEPS, Over.BASIS: pb.OVER_BASIS}


def member(members: dict[K, V], number: int, where: str) -> K:
    """The member that a number of fedloom.proto stands for.

    Raises:
        ValueError: for a number that stands for none.
    """
    for known, own in members.items():
        if own == number:
            return known
    raise ValueError(f"{where} must be one of {', '.join(map(str, members))}, got number {number}")
