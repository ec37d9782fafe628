"""What a message that leaves the device holds, for the outbox: names, shapes and counts, and no values."""

from __future__ import annotations

from typing import Any

from fedloom.protocols.messages import Hello, Update


def describe_update(update: Update, wire: str) -> dict[str, Any]:
    """The content of an update whose tensors travel as `wire`."""
    payload = update.payload
    tensors: dict[str, list[list[int]]] = {
        name: [list(factor.b.shape), list(factor.a.shape)] for name, factor in payload.factors.items()
    }
    tensors |= {name: [list(array.shape)] for name, array in payload.dense.items()}
    what: dict[str, Any] = {"examples": update.examples, "metrics": sorted(update.metrics)}
    if tensors:
        what |= {"tensors": tensors, "dtype": wire}
    if payload.scalars is not None:
        what |= {"scalars": len(payload.scalars.values), "of": str(payload.scalars.over), "k": payload.scalars.k}
    if payload.keep:
        what |= {"kept": {group: [int(bits.sum()), len(bits)] for group, bits in payload.keep.items()}}
    if update.cost.out_of_memory:
        what |= {"out_of_memory": True}
    return what


def describe_hello(hello: Hello) -> dict[str, Any]:
    """The content of a hello."""
    report = hello.report
    return {
        "examples": report.examples,
        "rank": report.rank,
        "version": report.version,
        "capabilities": list(report.capabilities),
        "software": report.software,
        "base": hello.spec.base_hash,
        **({"memory": report.memory} if report.memory else {}),
    }
