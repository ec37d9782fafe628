"""What a task may have a device make smaller, and what the device says when that was not enough."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedloom.client.adjusting import adjusts, asked_bits, check_adjusted, given_up, keeps_own, repeated, surrendered
from fedloom.client.agent.describe import describe_hello, describe_update
from fedloom.client.agent.owned import lent_memory
from fedloom.protocols.messages import (
    Cost,
    DeviceReport,
    Hello,
    Kind,
    LowRank,
    MatrixSpec,
    ModelSpec,
    Payload,
    Start,
    Subspace,
    Task,
    Update,
)
from fedloom.server.intake import check_update

SPEC = ModelSpec(base_hash="a" * 64, matrices={"up": MatrixSpec(d_out=8, d_in=4)}, groups={"mlp": 8})
KEEP = Payload(keep={"mlp": np.ones(8, np.bool_)})


def task(**fields: Any) -> Task:
    return Task(**({"device": "a", "round": 1, "rank": 2, "alpha": 4.0, "start_from": Start.FRESH} | fields))


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"knobs": {"bits": 3}}, r"one of \(16, 8, 4\), got 3"),
        ({"knobs": {"bits": 8.0}}, r"got 8\.0"),
        ({"knobs": {"bits": "8"}}, "got '8'"),
        ({"knobs": {"prune_ratio": -0.1}}, r"must be in \[0, 1\), got -0.1"),
        ({"knobs": {"prune_ratio": float("nan")}}, "got nan"),
        ({"knobs": {"prune_ratio": 0.1}}, "must carry the units that may be kept"),
        ({"ranks": {"down": 2}}, "of the model's adapted modules, got 'down'"),
        ({"ranks": {"up": 5}}, r"rank must be in 1..4 for up \[8, 4\], got 5"),
        ({"start": KEEP, "ranks": {"up": 1}}, "one rank and a base in 16 bits"),
        ({"start": KEEP, "start_from": Start.GIVEN}, "new factors of the device's own"),
        ({"start": KEEP, "shared_a_seed": 3}, "new factors of the device's own"),
        ({"start": KEEP, "subspace": Subspace(family="sketch", k=8, seed=1)}, "in a subspace must be on the whole"),
        ({"knobs": {"bits": 4}, "subspace": Subspace(family="sketch", k=8, seed=1)}, "on the whole model in 16 bits"),
    ],
)
def test_what_cannot_be_asked_for(fields: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why) as caught:
        check_adjusted(task(**fields), SPEC)
    assert "\n" not in str(caught.value)


def test_what_can_be_asked_for() -> None:
    check_adjusted(task(), SPEC)
    check_adjusted(task(ranks={"up": 3}, knobs={"bits": 4}), SPEC)
    check_adjusted(task(start=KEEP, knobs={"prune_ratio": 0.3, "bits": 16}), SPEC)
    assert asked_bits(task()) == 16
    assert not adjusts(task())
    assert not adjusts(task(start=KEEP, kind=Kind.EVALUATE))
    assert not adjusts(task(start=KEEP))
    assert adjusts(task(start=KEEP, knobs={"prune_ratio": 0.3}))
    assert adjusts(task(ranks={"up": 1}))
    assert keeps_own(task(start=KEEP))
    assert keeps_own(task(start_from=Start.OWN))
    assert not keeps_own(task())


def test_running_out_repeats_the_arm_and_passes_the_server() -> None:
    """Also where it is found out at the end, when the process has grown beyond its owner's limit."""
    asked = task(start=KEEP, knobs={"prune_ratio": 0.25, "need": 1000, "flops": 2.5e9, "lr": 0.1})
    assert repeated(asked) == {"need": 1000.0, "flops": 2.5e9}
    assert given_up(asked) == {"ratio": 0.25, "rank": 2.0, "need": 1000.0, "flops": 2.5e9}
    factors = {"up": LowRank(b=np.zeros((8, 2), np.float32), a=np.zeros((2, 4), np.float32), alpha=4.0)}
    done = Update(
        device="a",
        round=1,
        examples=3,
        metrics=repeated(asked),
        cost=Cost(seconds=1.0, peak_rss_bytes=5),
        payload=Payload(factors=factors, keep=KEEP.keep),
    )
    check_update(done, asked, SPEC)
    assert describe_update(done, "fp32")["kept"] == {"mlp": [8, 8]}
    over = surrendered(done, asked)
    check_update(over, asked, SPEC)
    assert over.cost.out_of_memory
    assert over.cost.seconds == 1.0
    assert describe_update(over, "fp32")["out_of_memory"] is True


def test_a_device_lends_what_its_owner_s_limit_leaves_beside_the_process() -> None:
    assert lent_memory(0, 10**6) == 0
    assert lent_memory(10**12, 10**6) > lent_memory(10**12, 0) > 0.99 * 10**12
    assert lent_memory(10**6, 0) == 1  # less than the interpreter takes: nothing fits, and 0 would say "no limit"
    report = DeviceReport(device="a", examples=1, rank=2, memory=5)
    assert describe_hello(Hello(report=report, spec=SPEC))["memory"] == 5
