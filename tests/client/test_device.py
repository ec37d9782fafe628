"""A device's answers: what it refuses, where it starts, what it keeps, and that the same task gives the same bytes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedloom.client.data import Example
from fedloom.client.device import Device
from fedloom.client.model import Resident
from fedloom.client.starting import starting_payload
from fedloom.client.store import StaleVersion
from fedloom.protocols.initial import initial_a
from fedloom.protocols.messages import Kind, LowRank, Patch, Payload, Start, Task, Update
from fedloom.server.intake import check_update
from fedloom.strategies.ffa import drop_a

MakeDevice = Callable[..., Device]
PayloadFor = Callable[..., Payload]


def _task(**fields: Any) -> Task:
    settings: dict[str, Any] = {"device": "a", "round": 1, "rank": 4, "alpha": 8.0, "start_from": Start.FRESH}
    settings |= {"seed": 5, "run": "run", "knobs": {"steps": 2, "lr": 0.01, "batch_size": 2}}
    return Task(**(settings | fields))


def _patch(resident: Resident, payload: Payload, since: int, version: int) -> Patch:
    return Patch(base_hash=resident.spec.base_hash, since=since, version=version, payload=payload)


def _same(x: Payload, y: Payload) -> bool:
    factors = all(
        np.array_equal(f.a, y.factors[n].a) and np.array_equal(f.b, y.factors[n].b) for n, f in x.factors.items()
    )
    dense = all(np.array_equal(value, y.dense[name]) for name, value in x.dense.items())
    return factors and dense and x.factors.keys() == y.factors.keys() and x.dense.keys() == y.dense.keys()


def test_hello(llama: Resident, make_device: MakeDevice) -> None:
    hello = make_device(llama).hello()
    assert hello.spec == llama.spec
    assert (hello.report.device, hello.report.examples, hello.report.rank) == ("a", 4, 16)
    assert (hello.report.version, hello.report.state_round) == (0, 0)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "classifier"])
def test_an_answer_passes_the_server_and_repeats(
    kind: str, request: pytest.FixtureRequest, make_device: MakeDevice, payload_for: PayloadFor
) -> None:
    resident: Resident = request.getfixturevalue(kind)
    device = make_device(resident)
    task = _task(nonce=9, patch=_patch(resident, payload_for(resident.spec, 0), 0, 3))
    first = device.handle(task)
    check_update(first, task, resident.spec)
    device.handle(_task(rank=7, alpha=14.0, seed=1))
    again = device.handle(task)
    assert _same(first.payload, again.payload)
    assert first.metrics == again.metrics
    assert first.cost.seconds > 0
    assert first.cost.peak_rss_bytes > 2**24
    assert device.hello().report.version == 3


def test_what_a_device_refuses(llama: Resident, make_device: MakeDevice, payload_for: PayloadFor) -> None:
    device = make_device(llama)
    with pytest.raises(ValueError, match="a task must be for device 'a', got one for 'b'"):
        device.handle(_task(device="b"))
    with pytest.raises(ValueError, match="a task for a must have rank <= 16, got 17"):
        device.handle(_task(rank=17))
    with pytest.raises(
        ValueError, match=r"rank must be in 1..16 for model.layers.0.self_attn.k_proj \[16, 32\], got 20"
    ):
        make_device(llama, rank=64).handle(_task(rank=20))
    with pytest.raises(StaleVersion, match="got 2"):
        device.handle(_task(patch=_patch(llama, payload_for(llama.spec, 0), 2, 3)))
    with pytest.raises(ValueError, match=r"this device's base .*, got one for ffffffffffff"):
        device.handle(_task(patch=replace(_patch(llama, Payload(), 0, 1), base_hash="f" * 64)))
    with pytest.raises(ValueError, match="unknown tuner 'lorra': did you mean 'lora'"):
        device.handle(_task(tuner="lorra"))
    with pytest.raises(ValueError, match="factors must be given for each of 14 modules"):
        device.handle(_task(start_from=Start.GIVEN))
    with pytest.raises(ValueError, match="a's training data must have at least one example"):
        make_device(llama, train=[]).handle(_task())


def test_a_device_without_held_out_examples_measures_nothing(llama: Resident, make_device: MakeDevice) -> None:
    update = make_device(llama, test=[]).handle(_task(kind=Kind.EVALUATE))
    assert set(update.metrics.values()) == {0.0}
    assert {"n", "tokens", "loss_sum", "exact_match_sum"} <= update.metrics.keys()


def test_an_update_is_worth_what_it_says(llama: Resident, make_device: MakeDevice) -> None:
    """The trained adapter, merged as a patch or given as a start, is the model that the device ended with."""
    device = make_device(llama)
    payload = device.handle(_task(knobs={"steps": 30, "lr": 0.01})).payload
    plain = _task(kind=Kind.EVALUATE)
    merged = device.handle(replace(plain, patch=_patch(llama, payload, 0, 1))).metrics
    given = device.handle(replace(plain, start_from=Start.GIVEN, start=payload)).metrics
    assert merged == pytest.approx(given, rel=1e-5)
    assert merged["loss_sum"] < device.handle(plain).metrics["loss_sum"] - 3


def test_a_late_joiner_answers_like_an_early_one(
    llama: Resident, make_device: MakeDevice, payload_for: PayloadFor
) -> None:
    early, late = make_device(llama, "early"), make_device(llama, "late")
    one, two = payload_for(llama.spec, 1, 2), payload_for(llama.spec, 2, 2)
    task = _task(kind=Kind.EVALUATE, device="early")
    early.handle(replace(task, patch=_patch(llama, one, 0, 1)))
    first = early.handle(replace(task, patch=_patch(llama, two, 1, 2))).metrics
    whole = early._store.take(_patch(llama, Payload(), 2, 2), llama.spec, "run").payload
    second = late.handle(replace(task, device="late", patch=_patch(llama, whole, 0, 2))).metrics
    assert first == second
    stay = early.handle(replace(task, patch=_patch(llama, Payload(), 2, 2))).metrics
    assert stay == first
    assert early.handle(task).metrics != first


def test_fresh_starts_from_the_seed(llama: Resident, make_device: MakeDevice) -> None:
    update = make_device(llama).handle(_task(train_a=False))
    for name, factor in update.payload.factors.items():
        np.testing.assert_array_equal(factor.a, initial_a(5, name, 4, llama.spec.matrices[name].d_in))


def test_patch_starts_from_the_newest_directions(
    llama: Resident, make_device: MakeDevice, payload_for: PayloadFor
) -> None:
    newest = payload_for(llama.spec, 2, 3)
    device = make_device(llama)
    device.handle(_task(kind=Kind.EVALUATE, patch=_patch(llama, payload_for(llama.spec, 1, 5), 0, 1)))
    update = device.handle(_task(start_from=Start.PATCH, train_a=False, patch=_patch(llama, newest, 1, 2)))
    for name, factor in update.payload.factors.items():
        rows = newest.factors[name].a
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        np.testing.assert_allclose(factor.a[:3], unit * math.sqrt(1 / 3), rtol=1e-6)
        np.testing.assert_array_equal(factor.a[3], initial_a(5, name, 4, factor.a.shape[1])[3])


def test_warm_rows_of_zero_are_left_random(llama: Resident) -> None:
    task = _task(start_from=Start.PATCH)
    warm = {name: np.zeros((2, size.d_in), np.float32) for name, size in llama.spec.matrices.items()}
    start = starting_payload(task, llama.spec, warm, None)
    for name, factor in start.factors.items():
        np.testing.assert_array_equal(factor.a, initial_a(5, name, 4, factor.a.shape[1]))


def test_own_goes_on_where_it_ended(llama: Resident, make_device: MakeDevice) -> None:
    """Two rounds on the device's own adapter: nothing is sent, and the state is what an answer would have held."""
    device = make_device(llama)
    sent = device.handle(_task()).payload
    kept = device.handle(_task(start_from=Start.OWN, send=False))
    assert not kept.payload
    state = device._store.load_state(1, "run")
    assert state is not None
    assert _same(state, sent)
    second = _task(start_from=Start.OWN, send=False, round=2, state_round=1)
    device.handle(second)
    given = device.handle(replace(second, start_from=Start.GIVEN, start=sent, send=True)).payload
    state = device._store.load_state(2, "run")
    assert state is not None
    assert _same(state, given)
    own, plain = (
        device.handle(_task(kind=Kind.EVALUATE, start_from=Start.OWN, state_round=number)).metrics for number in (2, 0)
    )
    assert own["loss_sum"] < plain["loss_sum"]
    assert device.hello().report.state_round == 2


def test_heads_move_relative_to_the_round_start(
    classifier: Resident, make_device: MakeDevice, payload_for: PayloadFor
) -> None:
    device = make_device(classifier)
    patch = _patch(classifier, payload_for(classifier.spec, 3), 0, 1)
    update = device.handle(_task(patch=patch, knobs={"steps": 1, "lr": 1e-3}))
    for name, head in classifier.base.heads.items():
        start = classifier.base.pristine(name).numpy() + patch.payload.dense[name]
        np.testing.assert_allclose(update.payload.dense[name], head.detach().numpy() - start, atol=1e-6)
        assert 0 < np.abs(update.payload.dense[name]).max() < 2e-3


def test_own_heads_add_up_over_rounds(classifier: Resident, make_device: MakeDevice) -> None:
    device = make_device(classifier)
    knobs = {"steps": 1, "lr": 0.01, "batch_size": 4}
    for number in (1, 2, 3):
        task = _task(start_from=Start.OWN, send=False, round=number, state_round=number - 1, knobs=knobs)
        device.handle(task)
    state = device._store.load_state(3, "run")
    assert state is not None
    for name, head in classifier.base.heads.items():
        moved = head.detach().numpy() - classifier.base.pristine(name).numpy()
        np.testing.assert_allclose(state.dense[name], moved, atol=1e-6)
        assert np.abs(moved).max() > 0.015


def test_a_shared_a_never_travels(llama: Resident, make_device: MakeDevice) -> None:
    """FFA-LoRA: the factors come and go without A, which both sides make from the shared seed."""
    device = make_device(llama)
    factors = {}
    for name, size in llama.spec.matrices.items():
        b = initial_a(1, name, size.d_out, 4)
        factors[name] = LowRank(b=b, a=initial_a(77, name, 4, size.d_in), alpha=8.0)
    full = Payload(factors=factors)
    task = _task(start_from=Start.GIVEN, start=full, train_a=False)
    slim = replace(task, start=drop_a(full), shared_a_seed=77)
    wanted, got = device.handle(task).payload, device.handle(slim).payload
    assert {factor.a.shape for factor in got.factors.values()} == {(4, 0)}
    assert _same(got, drop_a(wanted))
    evaluations = [device.handle(replace(one, kind=Kind.EVALUATE)).metrics for one in (task, slim)]
    assert evaluations[0] == evaluations[1]


def test_devices_take_turns_on_one_model(llama: Resident, make_device: MakeDevice, payload_for: PayloadFor) -> None:
    """Two devices at different versions, with different ranks and data, answer as each would alone."""
    one = make_device(llama, "one", train=[Example(prompt="a", completion="b")], patches="shared")
    two = make_device(llama, "two", patches="shared")
    tasks = [
        (one, _task(device="one", rank=2, alpha=4.0, patch=_patch(llama, payload_for(llama.spec, 1), 0, 1))),
        (two, _task(device="two", rank=8, alpha=16.0)),
    ]
    alone = [device.handle(task).payload for device, task in tasks]
    turns: list[Update] = [device.handle(task) for _ in range(2) for device, task in tasks]
    assert all(_same(update.payload, alone[number % 2]) for number, update in enumerate(turns))


def test_evaluation_knobs_of_the_task_go_first(llama: Resident, make_device: MakeDevice) -> None:
    device = make_device(llama)
    metrics = device.handle(_task(kind=Kind.EVALUATE, knobs={"rouge": 1, "max_new_tokens": 3, "batch_size": 2})).metrics
    assert "rouge_l_sum" in metrics
    assert "rouge_l_sum" not in device.handle(_task(kind=Kind.EVALUATE, knobs={})).metrics
