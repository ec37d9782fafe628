"""A pruned device's store: slices add up to the bits of whole patches, and what they lack is never taken for known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from fedloom.client import store as store_module
from fedloom.client.store import DeviceStore, Held, StaleVersion
from fedloom.client.tensorfile import digest_payload
from fedloom.protocols.codec import decode, encode
from fedloom.protocols.messages import (
    Axis,
    Coefficients,
    LowRank,
    MatrixSpec,
    ModelSpec,
    Patch,
    Payload,
    Start,
    Subspace,
    Task,
)
from fedloom.strategies.masked import slice_patch, slice_payload
from fedloom.strategies.patchlog import PatchLog, size

Bitmaps = Mapping[str, Any]

HEADS, CHANNELS = 4, 12
SPEC = ModelSpec(
    base_hash="5" * 64,
    matrices={
        "qkv": MatrixSpec(d_out=48, d_in=18, kind="conv1d", rows=Axis(group="heads", width=4, offsets=(0, 16, 32))),
        "o": MatrixSpec(d_out=18, d_in=16, columns=Axis(group="heads", width=4)),
        "up": MatrixSpec(d_out=24, d_in=18, rows=Axis(group="channels", width=2)),
        "down": MatrixSpec(d_out=18, d_in=12, columns=Axis(group="channels", width=1)),
        "both": MatrixSpec(
            d_out=12, d_in=16, rows=Axis(group="channels", width=1), columns=Axis(group="heads", width=4)
        ),
        "plain": MatrixSpec(d_out=18, d_in=18),
    },
    dense={"head.weight": (2, 3)},
    groups={"heads": HEADS, "channels": CHANNELS},
)
WHOLE = {"heads": np.ones(HEADS, np.bool_), "channels": np.ones(CHANNELS, np.bool_)}
LESS = {"heads": np.array([True, True, True, False]), "channels": np.arange(CHANNELS) > 2}
LEAST = {"heads": np.array([True, False, True, False]), "channels": np.arange(CHANNELS) > 5}


@pytest.fixture
def stores(tmp_path: Path) -> Callable[[str], DeviceStore]:
    store_module._cache.clear()
    return lambda name: DeviceStore(tmp_path / "patches", tmp_path / name)


def patch_of(payload: Payload, since: int, version: int) -> Patch:
    return Patch(base_hash=SPEC.base_hash, since=since, version=version, payload=payload)


def arrived(patch: Patch | None, keep: Bitmaps, wire: str = "fp32") -> tuple[Patch | None, Bitmaps]:
    """A task's patch and keep as they come off the wire."""
    task = Task(device="a", round=1, rank=2, alpha=4.0, start_from=Start.PATCH, patch=patch, start=Payload(keep=keep))
    got = decode(encode(task, wire=wire), Task, limit=1 << 20)
    return got.patch, got.start.keep


def send(store: DeviceStore, patch: Patch | None, keep: Bitmaps, wire: str = "fp32", *, sliced: bool = True) -> Held:
    """What a store makes of a patch for a device that may keep these units."""
    patch, allowed = arrived(slice_patch(patch, SPEC, keep) if sliced else patch, keep, wire)
    return store.take(patch, SPEC, "run", allowed)


def used(held: Held, keep: Bitmaps) -> dict[str, Any]:
    """All that a device which keeps these units reads of a version."""
    mine = slice_payload(held.payload, SPEC, keep)
    arrays = {f"dense {name}": value for name, value in mine.dense.items()}
    for name, term in mine.factors.items():
        arrays |= {f"b {name}": term.b, f"a {name}": term.a, f"scale {name}": np.array(term.scale)}
    rows = {name: LowRank(b=np.ones((SPEC.matrices[name].d_out, len(a)), np.float32), a=a, alpha=1.0)
            for name, a in held.warm.items()}  # fmt: skip
    warm = slice_payload(Payload(factors=rows), SPEC, keep)
    return arrays | {f"warm {name}": term.a for name, term in warm.factors.items()}


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)


def narrower(keep: Bitmaps, rng: np.random.Generator) -> dict[str, Any]:
    """A unit or none less of each group."""
    left = {group: bits.copy() for group, bits in keep.items()}
    for bits in left.values():
        if bits.sum() > 1 and rng.random() < 0.6:
            bits[rng.choice(np.flatnonzero(bits))] = False
    return left


@pytest.mark.parametrize("wire", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("seed", range(1, 5))
def test_slices_add_up_to_the_bits_of_whole_patches(
    stores: Callable[[str], DeviceStore], payload_for: Callable[..., Payload], wire: str, seed: int
) -> None:
    """Over rounds in which units go, some of them missed, past the rank from which sums are dense; over restarts."""
    rng, log = np.random.default_rng(seed), PatchLog(spec=SPEC)
    mine, twin, keep, version = stores("mine"), stores("twin"), dict(WHOLE), 0
    forms: set[str] = set()
    ways: set[tuple[bool, bool]] = set()
    for round in range(1, 13):
        log = log.push(payload_for(SPEC, 100 * seed + round, 1 + round % 3))
        if rng.random() < 0.3:
            continue
        patch = log.since(version)
        assert patch is not None
        got = send(mine, patch, keep, wire)
        if rng.random() < 0.3:
            store_module._cache.clear()
            got = send(stores("mine"), patch_of(Payload(), round, round), keep, wire)
        wanted = send(twin, patch, keep, wire, sliced=False)
        same(used(got, keep), used(wanted, keep))
        forms |= set(used(got, keep))
        assert got.version == round
        sliced = slice_patch(patch, SPEC, keep)
        assert sliced is not None
        assert (size(sliced.payload) < size(patch.payload)) != all(bits.all() for bits in keep.values())
        ways.add((patch.since > 0, round - version > 1))
        version, keep = round, narrower(keep, rng)
        same(used(got, keep), used(wanted, keep))  # what a device prunes by itself is less of the same
    assert {"b qkv", "a o", "dense qkv", "dense o", "dense both", "warm down", "dense head.weight"} <= forms
    assert {(True, False), (True, True)} <= ways


def test_what_is_not_sent_is_not_on_disk(
    stores: Callable[[str], DeviceStore], payload_for: Callable[..., Payload]
) -> None:
    mine, twin, delta = stores("mine"), stores("twin"), payload_for(SPEC, 0)
    got = send(mine, patch_of(delta, 0, 1), LEAST)
    (path,) = mine.patch_dir.glob("v1-*")
    with safe_open(path, framework="numpy") as file:
        assert file.get_tensor("b/qkv").shape == (24, 3)
        assert file.get_tensor("a/down").shape == (3, 6)
        np.testing.assert_array_equal(file.get_tensor("keep/heads"), LEAST["heads"])
    assert not got.payload.factors["qkv"].b[4:8].any()
    for group, bits in LEAST.items():
        np.testing.assert_array_equal(got.keep[group], bits)
    send(twin, patch_of(delta, 0, 1), WHOLE)
    (other,) = set(twin.patch_dir.glob("v1-*")) - {path}
    with safe_open(other, framework="numpy") as file:
        assert not [name for name in file.keys() if name.startswith("keep/")]  # noqa: SIM118 - not a mapping
    assert path.stat().st_size < other.stat().st_size


def test_the_name_of_a_way_depends_on_the_units_where_there_are_some() -> None:
    """And is what it always was for a whole patch: devices go on from files of before."""
    term = LowRank(b=np.ones((2, 1), np.float32), a=np.ones((1, 2), np.float32), alpha=2.0)
    whole = Payload(factors={"w": term}, dense={"h": np.zeros(3, np.float32)})
    assert digest_payload(whole) == "5f7a34b5ca54febdabf55f29c587c7dd"
    names = {digest_payload(replace(whole, keep=keep)) for keep in ({}, LESS, LEAST, {"heads": LESS["heads"]})}
    assert len(names) == 4


def test_devices_of_one_keep_share_a_file_and_no_others(
    stores: Callable[[str], DeviceStore], payload_for: Callable[..., Payload]
) -> None:
    delta = payload_for(SPEC, 0)
    keeps = {"a": LESS, "b": LESS, "c": LEAST, "d": WHOLE, "e": WHOLE}
    held = {name: send(stores(name), patch_of(delta, 0, 1), keep) for name, keep in keeps.items()}
    assert held["a"] is held["b"]
    assert held["d"] is held["e"]
    assert len({held[name].key for name in "acd"}) == 3


def listing(store: DeviceStore) -> dict[Path, bytes]:
    return {path: path.read_bytes() for folder in (store.patch_dir, store.state_dir) for path in folder.iterdir()}


@pytest.mark.parametrize("keep", [WHOLE, {}, LESS, {"heads": LEAST["heads"]}])
@pytest.mark.parametrize("missed", [0, 1])
def test_a_version_without_a_task_s_units_is_asked_for_anew(
    stores: Callable[[str], DeviceStore], payload_for: Callable[..., Payload], keep: Bitmaps, missed: int
) -> None:
    """As of a server that lost what it knew of the device: it hears that the next patch must build on the base."""
    store, log = stores("mine"), PatchLog(spec=SPEC).push(payload_for(SPEC, 1)).push(payload_for(SPEC, 2))
    for version in (1, 2):
        send(store, patch_of(log.recent[2 - version], version - 1, version), LEAST)
    if missed:
        log = log.push(payload_for(SPEC, 3))
    before, patch = listing(store), log.since(2)
    with pytest.raises(StaleVersion, match=r"must build on the base \(0\): version 2 is held here without") as caught:
        send(store, patch, keep)
    assert caught.value.version == 0
    assert listing(store) == before
    wanted = log.since(caught.value.version)
    assert wanted is not None
    same(used(send(store, wanted, keep), keep), used(Held(version=1, payload=wanted.payload, warm={
        name: term.a for name, term in wanted.payload.factors.items()}), keep))  # fmt: skip
    assert send(store, patch_of(Payload(), wanted.version, wanted.version), LEAST).version == wanted.version


def test_a_whole_patch_does_not_bring_back_what_an_older_slice_lacked(
    stores: Callable[[str], DeviceStore], payload_for: Callable[..., Payload]
) -> None:
    store = stores("mine")
    send(store, patch_of(payload_for(SPEC, 0), 0, 1), LEAST)
    held = send(store, patch_of(payload_for(SPEC, 1), 1, 2), LEAST, sliced=False)
    for group, bits in LEAST.items():
        np.testing.assert_array_equal(held.keep[group], bits)
    with pytest.raises(StaleVersion, match="version 2 is held here without units of the task"):
        send(store, patch_of(Payload(), 2, 2), LESS)


def test_a_server_that_went_back_is_followed(
    stores: Callable[[str], DeviceStore], payload_for: Callable[..., Payload]
) -> None:
    """It knows of fewer pruned units then, and of all that it once sent patches for."""
    mine, twin = stores("mine"), stores("twin")
    deltas = [payload_for(SPEC, seed) for seed in range(4)]
    for store, sliced in ((mine, True), (twin, False)):
        for version, (delta, keep) in enumerate(zip(deltas, (WHOLE, LESS, LEAST), strict=False), start=1):
            send(store, patch_of(delta, version - 1, version), keep, sliced=sliced)
    again = [send(s, patch_of(deltas[3], 2, 3), LESS, sliced=sliced) for s, sliced in ((mine, True), (twin, False))]
    same(*(used(held, LESS) for held in again))
    stay = [send(s, patch_of(Payload(), 1, 1), WHOLE, sliced=sliced) for s, sliced in ((mine, True), (twin, False))]
    same(*(used(held, WHOLE) for held in stay))


def test_another_run_in_between_begins_at_the_base(
    stores: Callable[[str], DeviceStore], payload_for: Callable[..., Payload]
) -> None:
    store = stores("mine")
    send(store, patch_of(payload_for(SPEC, 0), 0, 1), LESS)
    store.take(patch_of(payload_for(SPEC, 1), 0, 1), SPEC, "another")
    with pytest.raises(StaleVersion, match="got 1") as caught:
        send(store, patch_of(payload_for(SPEC, 2), 1, 2), LESS)
    assert caught.value.version == 0
    assert send(store, patch_of(payload_for(SPEC, 2), 0, 2), LESS).version == 2


def forged(payload: Payload, cut: Bitmaps, **other: Any) -> Payload:
    return replace(slice_payload(payload, SPEC, cut), **other)


@pytest.mark.parametrize(
    ("change", "keep", "match"),
    [
        (lambda p: forged(p, LEAST), LESS, "must have all units that its task may keep, got a slice without some"),
        (lambda p: forged(p, LEAST), {}, "must have all units that its task may keep, got a slice without some"),
        (lambda p: forged(p, LEAST), {"heads": np.ones(5, np.bool_)}, "must have 4 units, got 5"),
        (lambda p: forged(p, LEAST), {"legs": np.ones(4, np.bool_)}, "must name groups of the model, got 'legs'"),
        (lambda p: forged(p, LEAST, keep={"legs": np.ones(4, np.bool_)}), LEAST, "must name groups of the model"),
        (lambda p: forged(p, LEAST, keep={"heads": np.ones(5, np.bool_)}), LEAST, "must have 4 units, got 5"),
        (lambda p: forged(p, LEAST, keep=LESS), LEAST, r"a patch of \w+ must have shape"),
        (lambda p: replace(p, keep=LEAST), LEAST, r"a patch of \w+ must have shape"),
        (lambda p: forged(p, LEAST, keep={}), LEAST, r"a patch of \w+ must have shape"),
        (lambda p: forged(p, LEAST, dense={"o": np.ones((18, 16))}), LEAST, r"of o must have shape \[18, 8\]"),
        (lambda p: forged(p, LEAST, dense={"x": np.ones(2)}), LEAST, "must name what the model has, got 'x'"),
    ],
)
def test_a_slice_that_does_not_fit_is_refused(
    stores: Callable[[str], DeviceStore], payload_for: Callable[..., Payload], change: Any, keep: Bitmaps, match: str
) -> None:
    store = stores("mine")
    send(store, patch_of(payload_for(SPEC, 0), 0, 1), WHOLE)
    before = listing(store)
    for since in (0, 1):
        with pytest.raises(ValueError, match=match) as caught:
            store.take(patch_of(change(payload_for(SPEC, 1)), since, 2), SPEC, "run", keep)
        assert not isinstance(caught.value, StaleVersion)
        assert listing(store) == before


def test_a_small_slice_is_not_blown_up(stores: Callable[[str], DeviceStore]) -> None:
    """One row of a high rank would be a matrix of that rank at full size."""
    one = {"heads": np.arange(HEADS) == 0, "channels": np.arange(CHANNELS) == 0}
    for rank, fits in ((18, True), (19, False)):
        term = LowRank(b=np.ones((2, rank), np.float32), a=np.ones((rank, 18), np.float32), alpha=1.0)
        patch = patch_of(Payload(factors={"up": term}, keep=one), 0, 1)
        if fits:
            assert stores("mine").take(patch, SPEC, "run", one).payload.factors["up"].b.shape == (24, 18)
            continue
        with pytest.raises(ValueError, match="a slice of a patch of up must have rank <= 18, got 19"):
            stores("mine").take(patch, SPEC, "run", one)


def test_coefficients_are_of_the_whole_model(stores: Callable[[str], DeviceStore]) -> None:
    pool = Subspace(family="rademacher", k=3, seed=0)
    moved = Coefficients(subspace=pool, exponent=0, steps=np.ones(3, np.int64))
    with pytest.raises(ValueError, match="in a subspace must be of the whole model, got a slice"):
        stores("mine").take(patch_of(Payload(coefficients=moved, keep=LEAST), 0, 1), SPEC, "run", LEAST)
