"""A device's answers: what it refuses, where it starts, what it keeps, and that the same task gives the same bytes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from subspaces import clean, delta, in_scope, point, same, space, task_for, weights
from torch import Tensor

from fedloom.client.data import Example
from fedloom.client.device import Device
from fedloom.client.evaluation import evaluate
from fedloom.client.model import Resident, load_model
from fedloom.client.place import Place
from fedloom.client.starting import starting_payload
from fedloom.client.store import DeviceStore, StaleVersion
from fedloom.protocols import config
from fedloom.protocols.directions import FAMILIES
from fedloom.protocols.initial import initial_a
from fedloom.protocols.messages import (
    Coefficients,
    Kind,
    LowRank,
    Patch,
    Payload,
    Scope,
    Start,
    Subspace,
    Task,
    Update,
)
from fedloom.protocols.seeds import derive_seed
from fedloom.server.intake import check_update
from fedloom.strategies.base import Scaling
from fedloom.strategies.coefficients import CoefficientLog, first_log
from fedloom.strategies.fedkseed import FedKSeed
from fedloom.strategies.ffa import drop_a
from fedloom.strategies.sketch import Sketch

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


# In a subspace


def _forward_device(resident: Resident, folder: Path, examples: list[Example], name: str = "a") -> Device:
    """A device that cannot backpropagate, with adapters of rank 4 at most."""
    return Device(
        name,
        resident=clean(resident),
        train=examples,
        test=examples,
        store=DeviceStore(folder / name / "patches", folder / name / "state"),
        rank=4,
        data_config=config.Data(),
        eval_config=config.Evaluation(),
        capability="forward",
    )


def test_a_forward_only_device_runs_forward_passes_alone(
    llama: Resident, examples: list[Example], tmp_path: Path
) -> None:
    device = _forward_device(llama, tmp_path, examples)
    assert device.hello().report.capabilities == ("forward",)
    for task in (task_for(space(), "subspace"), _task(), _task(tuner="subspace")):
        with pytest.raises(
            ValueError, match=r"a runs forward passes alone \(zeroth_order\), got tuner '(subspace|lora)'"
        ):
            device.handle(task)
    for family in FAMILIES:
        update = device.handle(task_for(space(family), nonce=9))
        assert (update.nonce, update.examples, update.run, update.kind) == (9, 4, "run", Kind.TRAIN)
        assert update.payload.scalars is not None
        assert not update.payload.factors
        assert not update.payload.dense
        assert len(update.payload.scalars.values) == 1
    assert device.handle(_task(kind=Kind.EVALUATE)).metrics["n"] == 4
    clean(llama)


def test_what_a_device_refuses_in_a_subspace(llama: Resident, examples: list[Example], tmp_path: Path) -> None:
    device, before = _forward_device(llama, tmp_path, examples), weights(llama)
    adapters = space(scope=Scope.LORA, rank=5)
    with pytest.raises(ValueError, match="a task for a must have rank <= 4, got 5"):
        device.handle(task_for(adapters))
    with pytest.raises(ValueError, match=r"rank must be in 1..16 for model.layers.0.self_attn.k_proj .*, got 20"):
        Device(
            "a",
            resident=llama,
            train=examples,
            test=examples,
            store=DeviceStore(tmp_path / "p", tmp_path / "s"),
            rank=64,
            data_config=config.Data(),
            eval_config=config.Evaluation(),
        ).handle(task_for(space(scope=Scope.LORA, rank=20)))
    other = Patch(base_hash="f" * 64, since=0, version=1, payload=Payload(coefficients=point(space())))
    with pytest.raises(ValueError, match=r"this device's base .*, got one for ffffffffffff"):
        device.handle(task_for(space(), patch=other))
    stale = Patch(base_hash=llama.spec.base_hash, since=2, version=3, payload=Payload(coefficients=point(space())))
    with pytest.raises(StaleVersion, match="got 2"):
        device.handle(task_for(space(), patch=stale))
    with pytest.raises(ValueError, match=r"must be of version 1 on this device, the server asks for version 9"):
        device.handle(task_for(replace(space(), directions=9)))
    patch = _patch(llama, Payload(coefficients=point(space(seed=3))), 0, 1)
    with pytest.raises(ValueError, match="coefficients must be of the task's subspace"):
        device.handle(task_for(space(), patch=patch))
    with pytest.raises(ValueError, match="the task's mask must be the one held here"):
        device.handle(task_for(space(scope=Scope.MASK, mask="a" * 64)))
    with pytest.raises(ValueError, match=r"must have a tuner of factors \(lora\), got 'zeroth_order'"):
        device.handle(_task(tuner="zeroth_order"))
    assert same(before, weights(clean(llama)))


def test_a_tuner_of_factors_does_not_work_in_a_subspace(llama: Resident, make_device: MakeDevice) -> None:
    with pytest.raises(ValueError, match=r"must have a tuner of scalars \(zeroth_order, subspace\), got 'lora'"):
        make_device(clean(llama)).handle(task_for(space(), "lora"))


@pytest.fixture(scope="module")
def bfloat16(tiny_llama: Path) -> Resident:
    return load_model(config.Model(path=str(tiny_llama), dtype="bfloat16"), config.Lora(), seed=0)


def _held_weights(device: Device, resident: Resident, subspace: Subspace, version: int) -> dict[str, Tensor]:
    """What the device's version is, rebuilt from what it has on disk."""
    held = device._store.take(_patch(resident, Payload(), version, version), resident.spec, "run")
    with Place(clean(resident), subspace, held.payload.coefficients, held.key) as place:
        place.rebuild()
        return {part.name: part.read().clone() for part in place.parts}


@pytest.mark.parametrize("scope", [Scope.ALL, Scope.LORA])
@pytest.mark.parametrize("family", ["sketch", "rademacher"])
@pytest.mark.parametrize("kind", ["llama", "bfloat16"])
def test_however_a_device_came_to_a_version_it_holds_the_same_bits(
    kind: str, family: str, scope: Scope, request: pytest.FixtureRequest, make_device: MakeDevice
) -> None:
    """Round by round, at once from the base, or with rounds missed: the same weights, answers and figures.

    The first trains in between, on the model that all of them share. The rounds' steps are of very unequal size.
    """
    resident: Resident = clean(request.getfixturevalue(kind))
    subspace, last = space(family, 16, scope), 6
    devices = {name: make_device(resident, name) for name in ("each", "once", "some")}
    log = first_log(resident.spec.base_hash, subspace)
    generator = np.random.Generator(np.random.Philox(key=7))
    calls = {"each": {*range(1, last + 1)}, "once": {last}, "some": {2, 3, last}}
    held, metrics = dict.fromkeys(devices, 0), {}
    for version in range(1, last + 1):
        log = log.push(generator.normal(size=16) * 10.0 ** -(version % 4 + 1), bits=2)
        for name, device in devices.items():
            if version not in calls[name]:
                continue
            patch = log.since(held[name])
            assert patch is not None
            assert patch.since == held[name]
            if name == "each":
                device.handle(task_for(subspace, device=name, round=version, patch=patch, knobs={"lr": 1e-3}))
                patch = log.since(version)
            task = task_for(subspace, "", device=name, kind=Kind.EVALUATE, patch=patch)
            metrics[name] = device.handle(task).metrics
            held[name] = device.hello().report.version
            assert held[name] == version
    found = {name: _held_weights(device, resident, subspace, last) for name, device in devices.items()}
    assert same(found["each"], found["once"])
    assert same(found["each"], found["some"])
    assert metrics["each"] == metrics["once"] == metrics["some"]
    totals = [
        device._store.take(_patch(resident, Payload(), last, last), resident.spec, "run").payload.coefficients
        for device in devices.values()
    ]
    for total in totals:
        assert total is not None
        np.testing.assert_array_equal(total.values(), log.total.values())
    clean(resident)


@pytest.mark.parametrize("scope", list(Scope))
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["llama", "classifier"])
def test_a_device_evaluates_at_the_version(
    kind: str, family: str, scope: Scope, request: pytest.FixtureRequest, make_device: MakeDevice
) -> None:
    """Its figures are those of W0 + sum written into the model by hand; without a patch, those of the base."""
    resident, subspace = in_scope(request.getfixturevalue(kind), scope, family)
    device, held = make_device(resident), point(subspace, exponent=-34, only=5)
    task = task_for(subspace, "", kind=Kind.EVALUATE)
    patch = _patch(resident, Payload(coefficients=held), 0, 1)
    base, got = device.handle(task).metrics, device.handle(replace(task, patch=patch)).metrics
    assert device.handle(task).metrics == base
    with Place(resident, subspace, None, "by hand") as place:
        place.rebuild()
        for part in place.parts:
            value = part.read().numpy() + delta(subspace, part.name, part.size, held.values())
            part.write(lambda out, value=value: out.copy_(torch.from_numpy(value)))
        place._rebuilt.dirty(place.parts)
        wanted = evaluate(resident, device._dataset(Kind.EVALUATE), config.Evaluation())
    clean(resident)
    plain = device.handle(_task(kind=Kind.EVALUATE)).metrics
    assert base == pytest.approx(plain, rel=1e-6)
    assert got == pytest.approx(wanted, rel=1e-5)
    assert abs(got["loss_sum"] - base["loss_sum"]) > 1e-3
    clean(resident)


def test_rouge_is_measured_at_the_version_too(llama: Resident, make_device: MakeDevice) -> None:
    """Generation, layer by layer, gives what a rebuilt model gives."""
    device, held = make_device(clean(llama)), point(space())
    knobs: dict[str, Any] = {"rouge": 1, "max_new_tokens": 3}
    patch = _patch(llama, Payload(coefficients=held), 0, 1)
    found = []
    for layerwise in (None, False):
        clean(llama).rebuilt.layerwise = layerwise
        found.append(device.handle(task_for(space(), "", kind=Kind.EVALUATE, patch=patch, knobs=knobs)).metrics)
    clean(llama)
    assert found[0] == found[1]
    assert "rouge_l_sum" in found[0]


@pytest.mark.parametrize("tuner", ["zeroth_order", "subspace"])
@pytest.mark.parametrize("scope", list(Scope))
def test_an_answer_in_a_subspace_passes_the_server_and_repeats(
    classifier: Resident, make_device: MakeDevice, scope: Scope, tuner: str
) -> None:
    resident, subspace = in_scope(classifier, scope)
    device = make_device(resident)
    patch = _patch(resident, Payload(coefficients=point(subspace)), 0, 3)
    task = task_for(subspace, tuner, patch=patch, scalar_limit=0.5, knobs={"steps": 2})
    first = device.handle(task)
    check_update(first, task, resident.spec)
    device.handle(task_for(subspace, tuner, seed=1))
    again = device.handle(task)
    assert first.payload.scalars is not None
    assert again.payload.scalars is not None
    np.testing.assert_array_equal(first.payload.scalars.values, again.payload.scalars.values)
    assert first.metrics == again.metrics
    clean(resident)


@pytest.mark.parametrize("strategy", ["fedkseed", "sketch"])
def test_rounds_of_a_strategy_reach_every_device(
    llama: Resident, make_device: MakeDevice, examples: list[Example], tmp_path: Path, strategy: str
) -> None:
    """Three rounds of two devices; a third one that joins after them holds the same model, and the loss fell."""
    clean(llama)
    able = Sketch(scaling=Scaling(), k=256) if strategy == "sketch" else FedKSeed(scaling=Scaling(), k=256)
    devices = {name: make_device(llama, name) for name in ("a", "b", "late")}
    if strategy == "sketch":
        devices["b"] = _forward_device(llama, tmp_path, examples, "b")
    state = able.init(llama.spec, 1, [device.hello().report for device in devices.values()])
    knobs: dict[str, float | int | str] = {"steps": 10, "lr": 3e-3, "zo_lr": 1e-3, "batch_size": 4}

    def losses(names: list[str]) -> list[float]:
        reports = [devices[name].hello().report for name in names]
        tasks = [replace(task, run="run", knobs={}) for task in able.plan_evaluation(state, reports, 1)]
        return [devices[task.device].handle(task).metrics["loss_sum"] for task in tasks]

    before = losses(["a", "b"])
    for round in (1, 2, 3):
        reports = [devices[name].hello().report for name in ("a", "b")]
        tasks = [
            replace(task, run="run", seed=derive_seed(1, "task", round, task.device), knobs={**knobs, **task.knobs})
            for task in able.plan(state, reports, round)
        ]
        assert [task.tuner for task in tasks] == (
            ["subspace", "zeroth_order"] if strategy == "sketch" else ["zeroth_order"] * 2
        )
        state = able.aggregate(state, [devices[task.device].handle(task) for task in tasks])
    after = losses(["a", "b", "late"])
    assert after[0] == after[1] == after[2]  # they hold the same examples
    assert after[0] < before[0]
    subspace = tasks[0].subspace
    assert subspace is not None
    found = [_held_weights(device, llama, subspace, 3) for device in devices.values()]
    assert same(found[0], found[1])
    assert same(found[0], found[2])
    clean(llama)


def test_a_log_s_window_does_not_matter(llama: Resident, make_device: MakeDevice) -> None:
    """A device that missed more rounds than the log keeps is sent the whole; it starts at its base and ends there."""
    subspace = space(k=16)
    device, log = make_device(clean(llama)), first_log(llama.spec.base_hash, subspace)
    generator = np.random.Generator(np.random.Philox(key=2))
    log = log.push(generator.normal(size=16), bits=4)
    device.handle(task_for(subspace, patch=log.since(0)))
    for _ in range(70):
        log = log.push(generator.normal(size=16) * 1e-3, bits=4)
    patch = log.since(1)
    assert patch is not None
    assert patch.since == 0
    device.handle(task_for(subspace, patch=patch))
    other = make_device(llama, "other")
    other.handle(task_for(subspace, device="other", patch=_whole(log)))
    assert same(_held_weights(device, llama, subspace, 71), _held_weights(other, llama, subspace, 71))
    clean(llama)


def _whole(log: CoefficientLog) -> Patch:
    return Patch(base_hash=log.base_hash, since=0, version=log.version, payload=Payload(coefficients=log.total))


def test_a_task_and_its_patch_must_be_of_one_kind(
    llama: Resident, make_device: MakeDevice, payload_for: PayloadFor
) -> None:
    plane = Subspace(family="sketch", k=8, seed=1)
    c = Coefficients(subspace=plane, exponent=-10, steps=np.ones(8, np.int64))
    base = {"base_hash": llama.spec.base_hash, "since": 0, "version": 1}
    task = Task(device="a", round=1, rank=2, alpha=4.0, start_from=Start.FRESH, run="r")
    for payload, subspace, why in (
        (Payload(coefficients=c), None, "must name their subspace, got none"),
        (payload_for(llama.spec, 1), plane, "must stand on coefficients alone, got factors"),
    ):
        bad = replace(task, patch=Patch(**base, payload=payload), subspace=subspace, tuner="subspace")
        with pytest.raises(ValueError, match=why):
            make_device(llama).handle(bad)
