"""An update is let in only if it is a whole, finite answer to the task that was asked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedloom.protocols.messages import Kind, LowRank, MatrixSpec, ModelSpec, Payload, Start, Task, Update
from fedloom.server.intake import check_update

SPEC = ModelSpec(
    base_hash="h",
    matrices={"m": MatrixSpec(d_out=4, d_in=3), "n": MatrixSpec(d_out=2, d_in=3)},
    dense={"head": (2,)},
)
TASK = Task(device="x", round=3, rank=2, alpha=4.0, start_from=Start.FRESH, run="r", nonce=7)


def factor(d_out: int, d_in: int, rank: int = 2, **other: Any) -> LowRank:
    values = {"b": np.ones((d_out, rank)), "a": np.ones((rank, d_in)), "alpha": 4.0} | other
    return LowRank(**values)


GOOD = Update(
    device="x",
    round=3,
    examples=5,
    run="r",
    nonce=7,
    payload=Payload(factors={"m": factor(4, 3), "n": factor(2, 3)}, dense={"head": np.zeros(2)}),
)


def with_factors(**factors: LowRank) -> Update:
    return replace(GOOD, payload=replace(GOOD.payload, factors=dict(GOOD.payload.factors) | factors))


def test_a_good_update_passes() -> None:
    check_update(GOOD, TASK, SPEC)
    check_update(replace(GOOD, payload=Payload()), replace(TASK, send=False), SPEC)
    check_update(replace(GOOD, kind=Kind.EVALUATE, payload=Payload()), replace(TASK, kind=Kind.EVALUATE), SPEC)


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (replace(GOOD, run="other"), "run must be its task's 'r', got 'other'"),
        (replace(GOOD, round=2), "round must be its task's 3, got 2"),
        (replace(GOOD, nonce=8), "nonce must be its task's 7, got 8"),
        (replace(GOOD, device="y"), "device must be"),
        (replace(GOOD, kind=Kind.EVALUATE), "kind must be"),
        (replace(GOOD, examples=-1), "examples >= 0, got -1"),
        (replace(GOOD, payload=Payload(dense=GOOD.payload.dense)), "each adapted module once"),
        (with_factors(extra=factor(4, 3)), "each adapted module once.*extra"),
        (with_factors(m=factor(3, 4)), r"must have b \[4, r\] and a \[r, 3\] for m"),
        (with_factors(m=factor(4, 3, rank=3)), "task's rank 2 and alpha 4, got rank 3"),
        (with_factors(m=factor(4, 3, alpha=5.0)), "got rank 2 and alpha 5"),
        (with_factors(m=factor(4, 3, rslora=True)), "task's rank"),
        (with_factors(m=factor(4, 3, b=np.full((4, 2), np.nan))), "must be finite for m"),
        (replace(GOOD, payload=replace(GOOD.payload, dense={})), "each trained head once"),
        (replace(GOOD, payload=replace(GOOD.payload, dense={"head": np.zeros(3)})), "for head, got"),
        (replace(GOOD, payload=replace(GOOD.payload, dense={"head": np.full(2, np.inf)})), "must be finite for head"),
    ],
)
def test_a_bad_update_is_refused(bad: Update, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        check_update(bad, TASK, SPEC)


def test_tensors_nobody_asked_for_are_refused() -> None:
    with pytest.raises(ValueError, match="asks for no tensors"):
        check_update(GOOD, replace(TASK, send=False), SPEC)
