"""A short run of every fuzz target: its good inputs, changes of them drawn from a fixed seed, and what once broke it.

`make fuzz` is the long one.
"""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import pytest
from found import FOUND, found
from hypothesis import HealthCheck, given, settings
from meter import Meter
from mutation import havoc
from targets import divide, load, names

INPUTS = 50  # changes of each target's inputs
BUILT = 10  # inputs that hypothesis builds, where it can
FEW = {"rounds": 6, "page": 8, "recipe": 25}  # of targets that take milliseconds for one


@pytest.mark.parametrize("name", names())
def test_a_target_holds(name: str, tmp_path: Path) -> None:
    target = load(name, tmp_path)
    seeds = list(target.seeds())
    meter = Meter(target, "random", tmp_path)
    rng = random.Random(1)
    change = partial(havoc, rng=rng)
    for data in seeds:
        meter(data)
    assert meter.tally.accepted > 0
    for _ in range(FEW.get(name, INPUTS)):
        data = rng.choice(seeds)
        meter(change(data) if target.mutate is None else target.mutate(data, rng, change))
    meter.look()
    assert meter.tally.failures == {}


@pytest.mark.parametrize("name", ["task", "update", "hello", "refusal", "coefficients", "bits", "overrides"])
def test_inputs_that_are_built_hold(name: str, tmp_path: Path) -> None:
    target = load(name, tmp_path)
    meter = Meter(target, "hypothesis", tmp_path)
    assert target.inputs is not None

    @settings(max_examples=BUILT, database=None, suppress_health_check=list(HealthCheck))
    @given(target.inputs())
    def built(data: bytes) -> None:
        meter(data)

    built()
    assert meter.tally.failures == {}


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_is_mended(name: str, tmp_path: Path) -> None:
    target = load(name, tmp_path)
    inputs = found(name, list(target.seeds()))
    meter = Meter(target, "found", tmp_path)
    for data in inputs:
        meter(data)
    assert meter.tally.inputs == len(inputs) > 0
    assert meter.tally.failures == {}


def test_inputs_are_divided_by_shares() -> None:
    shares = divide(1_000_000, names())
    assert list(shares) == names()
    assert 1_000_000 <= sum(shares.values()) < 1_000_000 + len(shares)
    assert min(shares.values()) > 1000
