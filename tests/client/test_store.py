"""Versions on disk: added up, pruned, shared, healed, refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedloom.client import store as store_module
from fedloom.client.patching import BASE
from fedloom.client.store import DeviceStore, StaleVersion
from fedloom.protocols.messages import MatrixSpec, ModelSpec, Patch, Payload

SPEC = ModelSpec(base_hash="b" * 64, matrices={"up": MatrixSpec(d_out=40, d_in=30)}, dense={"head.weight": (2, 3)})


@pytest.fixture
def store(tmp_path: Path) -> DeviceStore:
    store_module._cache.clear()
    return DeviceStore(tmp_path / "patches", tmp_path / "state")


def _patch(payload: Payload, since: int, version: int, base_hash: str = SPEC.base_hash) -> Patch:
    return Patch(base_hash=base_hash, since=since, version=version, payload=payload)


def _dense(payload: Payload) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    both = {name: factor.dense() for name, factor in payload.factors.items()}
    for name, array in payload.dense.items():
        both[name] = both.get(name, np.float32(0)) + array
    return both


def test_patches_add_up_and_survive_a_restart(store: DeviceStore, payload_for: Callable[..., Payload]) -> None:
    deltas = [payload_for(SPEC, seed, 2) for seed in range(3)]
    for number, delta in enumerate(deltas):
        held = store.take(_patch(delta, number, number + 1), SPEC, "run")
    store_module._cache.clear()
    again = DeviceStore(store.patch_dir, store.state_dir).take(_patch(Payload(), 3, 3), SPEC, "run")
    for got in (held, again):
        assert got.version == 3
        for name, value in _dense(got.payload).items():
            np.testing.assert_allclose(value, sum(_dense(delta)[name] for delta in deltas), atol=1e-6)
        np.testing.assert_array_equal(got.warm["up"], deltas[2].factors["up"].a)
    assert held.key == again.key != BASE


def test_no_patch_is_the_base(store: DeviceStore, payload_for: Callable[..., Payload]) -> None:
    store.take(_patch(payload_for(SPEC, 0), 0, 1), SPEC, "run")
    held = store.take(None, SPEC, "run")
    assert (held.version, bool(held.payload), held.key) == (0, False, BASE)


def test_warm_rows_are_limited(
    store: DeviceStore, monkeypatch: pytest.MonkeyPatch, payload_for: Callable[..., Payload]
) -> None:
    monkeypatch.setattr(store_module, "WARM_ROWS", 4)
    delta = payload_for(SPEC, 0, 9)
    held = store.take(_patch(delta, 0, 1), SPEC, "run")
    np.testing.assert_array_equal(held.warm["up"], delta.factors["up"].a[:4])


def test_a_version_that_is_not_held_is_refused(store: DeviceStore, payload_for: Callable[..., Payload]) -> None:
    store.take(_patch(payload_for(SPEC, 0), 0, 2), SPEC, "run")
    with pytest.raises(StaleVersion, match=r"a version held here \(2\), got 5") as caught:
        store.take(_patch(payload_for(SPEC, 1), 5, 6), SPEC, "run")
    assert caught.value.version == 2


def test_versions_of_another_run_are_not_held(store: DeviceStore, payload_for: Callable[..., Payload]) -> None:
    store.take(_patch(payload_for(SPEC, 0), 0, 2), SPEC, "monday")
    with pytest.raises(StaleVersion) as caught:
        store.take(_patch(payload_for(SPEC, 1), 2, 3), SPEC, "tuesday")
    assert caught.value.version == 0
    fresh = payload_for(SPEC, 2)
    held = store.take(_patch(fresh, 0, 2), SPEC, "tuesday")
    np.testing.assert_array_equal(held.payload.factors["up"].a, fresh.factors["up"].a)


def test_a_patch_of_another_base(store: DeviceStore, payload_for: Callable[..., Payload]) -> None:
    with pytest.raises(ValueError, match="this device's base bbbbbbbbbbbb, got one for cccccccccccc"):
        store.take(_patch(payload_for(SPEC, 0), 0, 1, "c" * 64), SPEC, "run")


def test_a_version_made_anew_by_a_server_that_went_back(
    store: DeviceStore, payload_for: Callable[..., Payload]
) -> None:
    one, old, new = (payload_for(SPEC, seed) for seed in range(3))
    store.take(_patch(one, 0, 1), SPEC, "run")
    before = store.take(_patch(old, 1, 2), SPEC, "run")
    after = store.take(_patch(new, 1, 2), SPEC, "run")
    assert before.key != after.key
    np.testing.assert_allclose(_dense(after.payload)["up"], _dense(one)["up"] + _dense(new)["up"], atol=1e-6)


def test_one_file_serves_all_devices_that_came_the_same_way(
    store: DeviceStore, payload_for: Callable[..., Payload]
) -> None:
    """And no device's bits depend on who was first: another way to a version is another file."""
    one, two = payload_for(SPEC, 0), payload_for(SPEC, 1)
    stores = [DeviceStore(store.patch_dir, store.state_dir / name) for name in "ab"]
    first = stores[0].take(_patch(one, 0, 1), SPEC, "run")
    assert stores[1].take(_patch(one, 0, 1), SPEC, "run") is first
    second = stores[0].take(_patch(two, 1, 2), SPEC, "run")
    late = stores[1].take(_patch(second.payload, 0, 2), SPEC, "run")
    assert late is not second
    again = stores[0].take(_patch(Payload(), 2, 2), SPEC, "run")
    assert again.key == second.key
    np.testing.assert_allclose(_dense(late.payload)["up"], _dense(second.payload)["up"], atol=1e-6)


def _only(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def test_a_corrupted_patch_is_named_and_healed_by_a_whole_one(
    store: DeviceStore, payload_for: Callable[..., Payload]
) -> None:
    delta = payload_for(SPEC, 0)
    store.take(_patch(delta, 0, 1), SPEC, "run")
    path = _only(store.patch_dir, "v1-*.safetensors")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"v1-.*safetensors is .*corrupted"):
        store.take(_patch(payload_for(SPEC, 1), 1, 2), SPEC, "run")
    held = store.take(_patch(delta, 0, 1), SPEC, "run")
    np.testing.assert_array_equal(held.payload.factors["up"].b, delta.factors["up"].b)


def test_a_corrupted_note_of_what_is_held_is_named(store: DeviceStore, payload_for: Callable[..., Payload]) -> None:
    store.take(_patch(payload_for(SPEC, 0), 0, 1), SPEC, "run")
    (store.state_dir / "held.json").write_text('{"run": "run"')
    with pytest.raises(ValueError, match=r"held.json is corrupted"):
        store.take(_patch(payload_for(SPEC, 1), 1, 2), SPEC, "run")


def test_a_version_whose_file_is_gone_is_not_held(store: DeviceStore, payload_for: Callable[..., Payload]) -> None:
    store.take(_patch(payload_for(SPEC, 0), 0, 1), SPEC, "run")
    _only(store.patch_dir, "v1-*.safetensors").unlink()
    assert store.newest_version("run") == 0
    with pytest.raises(StaleVersion, match=r"held here \(0\), got 1"):
        store.take(_patch(Payload(), 1, 1), SPEC, "run")


def test_a_corrupted_state_is_named(store: DeviceStore, payload_for: Callable[..., Payload]) -> None:
    store.save_state(1, "run", payload_for(SPEC, 0))
    (store.state_dir / "r1.safetensors").write_bytes(b"{}")
    with pytest.raises(ValueError, match=r"r1.safetensors is .*corrupted"):
        store.load_state(1, "run")


def test_old_patches_are_pruned(store: DeviceStore, payload_for: Callable[..., Payload]) -> None:
    for version in range(1, 13):
        store.take(_patch(payload_for(SPEC, version, 1), version - 1, version), SPEC, "run")
    kept = sorted(int(path.stem[1:].partition("-")[0]) for path in store.patch_dir.iterdir())
    assert kept == list(range(4, 13))
    assert store.newest_version() == 12


def test_states_keep_the_last_two_and_forget_an_abandoned_future(
    store: DeviceStore, payload_for: Callable[..., Payload]
) -> None:
    for round in (3, 9, 17):
        store.save_state(round, "run", payload_for(SPEC, round))
    assert store.load_state(3, "run") is None
    nine = store.load_state(9, "run")
    assert nine is not None
    np.testing.assert_array_equal(nine.dense["head.weight"], payload_for(SPEC, 9).dense["head.weight"])
    assert nine.factors["up"].alpha == 6.0
    store.save_state(10, "run", payload_for(SPEC, 10))
    assert sorted(path.stem for path in store.state_dir.glob("r*")) == ["r10", "r9"]
    assert store.load_state(9, "another") is None
    assert store.newest_state() == 10


def test_a_write_that_fails_leaves_nothing_behind(
    store: DeviceStore, payload_for: Callable[..., Payload], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("fedloom.client.tensorfile.os.replace", full)
    with pytest.raises(OSError, match="no space left"):
        store.save_state(1, "run", payload_for(SPEC, 0))
    assert list(store.state_dir.iterdir()) == []
