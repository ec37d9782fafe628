"""Tasks that prune, leave modules bare or hold the base in few bits, on a resident that many devices share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prunings import make_resident

from fedloom.client import store as store_module
from fedloom.client.adjusting import listening
from fedloom.client.cost import held
from fedloom.client.data import Example
from fedloom.client.device import Device, NoRoom
from fedloom.client.evaluation import evaluate
from fedloom.client.model import Resident, load_model
from fedloom.client.pruning.narrowing import apply_keep, masked
from fedloom.client.pruning.rounds import remembered
from fedloom.client.starting import pruned_start, starting_payload
from fedloom.client.store import DeviceStore, StaleVersion
from fedloom.client.training import tune
from fedloom.protocols import config
from fedloom.protocols.codec import decode, encode
from fedloom.protocols.initial import initial_a
from fedloom.protocols.messages import Kind, LowRank, Patch, Payload, Start, Task, Update
from fedloom.server.intake import check_update
from fedloom.simulations.fleet import EMBEDDED_MODEL
from fedloom.strategies.base import Workload
from fedloom.strategies.choosing import choose_keep
from fedloom.strategies.cost import memory
from fedloom.strategies.masked import check_within, indices, scatter_payload, slice_patch, slice_payload
from fedloom.strategies.patchlog import PatchLog, size
from fedloom.strategies.sparsity import narrowed, pruned_share
from fedloom.strategies.unit_order import UNIT_SCORES, split

RATIO = 0.25
KNOBS: dict[str, Any] = {"steps": 3, "lr": 0.01, "batch_size": 2}
Make = Callable[..., Device]


def all_units(resident: Resident) -> dict[str, Any]:
    return {group: np.ones(units, np.bool_) for group, units in resident.spec.groups.items()}


def plain(**fields: Any) -> Task:
    settings: dict[str, Any] = {"device": "a", "round": 1, "rank": 2, "alpha": 4.0, "start_from": Start.FRESH}
    settings |= {"seed": 5, "run": "run", "knobs": KNOBS}
    return Task(**(settings | fields))


def pruning(resident: Resident, ratio: float = RATIO, keep: Any = None, **fields: Any) -> Task:
    start = Payload(keep=all_units(resident) if keep is None else keep)
    fields = {"start_from": Start.PATCH, "knobs": {**KNOBS, "prune_ratio": ratio}, **fields}
    return plain(start=start, **fields)


def patch_for(resident: Resident, version: int = 1, since: int = 0) -> Patch:
    """Moves every matrix, along right singular vectors as a server's deltas do, and every head parameter."""
    spec = resident.spec
    factors = {}
    for name, matrix in spec.matrices.items():
        a = np.linalg.qr(initial_a(version, name, 3, matrix.d_in).T.astype(np.float64))[0].T.astype(np.float32)
        factors[name] = LowRank(b=initial_a(version, f"{name}/b", matrix.d_out, 3) * 0.6, a=a, alpha=3.0)
    dense = {name: np.full(shape, 0.01, np.float32) for name, shape in spec.dense.items()}
    return Patch(base_hash=spec.base_hash, since=since, version=version, payload=Payload(factors=factors, dense=dense))


def content(update: Update) -> tuple[Any, ...]:
    """All that an update says but what it took."""
    payload = update.payload
    factors = {name: (term.a.tobytes(), term.b.tobytes(), term.alpha) for name, term in payload.factors.items()}
    dense = {name: value.tobytes() for name, value in payload.dense.items()}
    keep = {name: bits.tobytes() for name, bits in payload.keep.items()}
    return factors, dense, keep, dict(update.metrics), update.cost.out_of_memory


@pytest.fixture(scope="module", params=["llama", "gpt2", "bert"])
def resident(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tiny_classifier: Path
) -> Resident:
    tokenizer = tiny_classifier if request.param == "bert" else tiny_llama
    return make_resident(request.param, tmp_path_factory.mktemp(request.param), tokenizer)


@pytest.fixture
def make(tmp_path: Path, examples: list[Example]) -> Make:
    def made(resident: Resident, name: str = "a", folder: str = "", **fields: Any) -> Device:
        folder = folder or name
        return Device(
            name,
            resident=resident,
            train=fields.pop("train", examples),
            test=fields.pop("test", examples),
            store=DeviceStore(tmp_path / folder / "patches", tmp_path / folder / "state"),
            rank=8,
            data_config=config.Data(),
            eval_config=config.Evaluation(),
            **fields,
        )

    return made


def test_a_pruned_answer_is_of_its_keep_and_repeats(resident: Resident, make: Make) -> None:
    """Within the allowed units, at the ratio, of the kept shapes; the same after other devices' tasks, bit for bit."""
    device, other = make(resident), make(resident, "b")
    task = pruning(resident, patch=patch_for(resident))
    ordinary = plain(device="b", patch=patch_for(resident))
    before = content(other.handle(ordinary))
    first = device.handle(task)
    check_update(first, task, resident.spec)
    check_within("test", first.payload.keep, task.start.keep)
    most = len(resident.spec.groups) / sum(resident.spec.groups.values())  # a unit of each group, rounding down
    share = pruned_share(first.payload.keep, resident.spec.groups)
    assert RATIO - most <= share <= RATIO
    assert "drop" in first.metrics
    assert content(other.handle(ordinary)) == before
    other.handle(pruning(resident, 0.4, device="b", rank=7, alpha=14.0, seed=9))
    assert content(device.handle(task)) == content(first)
    assert content(other.handle(ordinary)) == before


def test_training_a_pruned_model_is_training_a_masked_one(resident: Resident, make: Make) -> None:
    """One step of a keep that is given: the gradients, and so the factors, of the whole model with masked units."""
    units = resident.spec.groups
    keep = {group: np.arange(count) % 3 > 0 for group, count in units.items()}
    knobs = {"steps": 1, "lr": 0.05, "batch_size": 4, "optimizer": "sgd", "clip": 0.0}
    task = pruning(resident, 0.0, keep=keep, knobs=knobs, patch=patch_for(resident))
    device = make(resident)
    got = scatter_payload(device.handle(task).payload, resident.spec)
    apply_keep(resident, {})
    resident.base.apply("test", patch_for(resident).payload)
    start = starting_payload(plain(start_from=Start.PATCH), resident.spec, _warm(resident), None)
    resident.adapters.set_factors(start.factors)
    with masked(resident.model, resident.prunable.structure, keep):  # type: ignore[union-attr]
        tune(resident, device._dataset(Kind.TRAIN), plain(knobs=knobs))
    wanted = resident.adapters.get_factors()
    for name, term in got.factors.items():
        np.testing.assert_allclose(term.b, wanted[name].b, atol=2e-5, err_msg=name)
    resident.base.restore()


@pytest.mark.parametrize("wire", ["fp32", "fp16"])
def test_a_device_that_is_sent_slices_answers_as_one_that_is_sent_all(
    resident: Resident, make: Make, wire: str
) -> None:
    """To the last bit, over rounds that prune further, one that it missed, a restart and a lost record of its units."""
    spec, log = resident.spec, PatchLog(spec=resident.spec)
    mine, twin = (make(resident, folder=folder) for folder in ("mine", "twin"))
    keep, version, sizes = all_units(resident), 0, []
    for round, ratio in enumerate((0.1, 0.2, 0.2, 0.3, 0.35), start=1):
        log = log.push(patch_for(resident, round).payload)
        if round == 3:
            continue
        if round == 4:
            store_module._cache.clear()
            mine = make(resident, folder="mine")
        patch = log.since(version)
        sliced = slice_patch(patch, spec, keep)
        assert patch is not None
        assert sliced is not None
        sizes.append(size(sliced.payload) / size(patch.payload))
        answers = []
        for device, sent in ((mine, sliced), (twin, patch)):
            known = 0 if round == 1 else device.hello().report.state_round
            training = pruning(resident, ratio, keep, patch=sent, round=round, state_round=known)
            trained = device.handle(decode(encode(training, wire=wire), Task, limit=1 << 26))
            stay = replace(sent, since=round, payload=Payload())
            judging = pruning(resident, ratio, trained.payload.keep, patch=stay, kind=Kind.EVALUATE, round=round,
                              state_round=round, start_from=Start.FRESH)  # fmt: skip
            answers.append((content(trained), content(device.handle(judging))))
        assert answers[0] == answers[1]
        keep, version = trained.payload.keep, round
    assert sizes[0] == 1
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 0.9


def test_a_pruned_adapter_starts_along_what_is_kept_of_singular_vectors(resident: Resident) -> None:
    """As the whole one does, cut: what a slice lacks cannot count. A row that keeps nothing is left random."""
    spec = resident.spec
    keep = {group: np.arange(count) % 3 > 0 for group, count in spec.groups.items()}
    task, warm = pruning(resident, 0.0, keep=keep, rank=4), _warm(resident)
    whole = slice_payload(starting_payload(plain(start_from=Start.PATCH, rank=4), spec, warm, None), spec, keep)
    random = slice_payload(starting_payload(plain(rank=4), spec, {}, None), spec, keep)
    for name, term in pruned_start(task, spec, warm, keep).factors.items():
        np.testing.assert_allclose(term.a, whole.factors[name].a, atol=1e-6, err_msg=name)
        np.testing.assert_array_equal(term.a[3:], random.factors[name].a[3:])
        assert not term.b.any()
    columns = {name: indices(matrix.columns, keep, matrix.d_in) for name, matrix in spec.matrices.items()}
    cut = {name: np.zeros_like(rows) for name, rows in warm.items()}
    for name, rows in warm.items():
        cut[name][:, columns[name]] = rows[:, columns[name]]
        cut[name][1] = 0
    one, other = (pruned_start(task, spec, rows, keep).factors for rows in (cut, warm))
    for name, term in one.items():
        np.testing.assert_array_equal(term.a[[0, 2, 3]], other[name].a[[0, 2, 3]])
        np.testing.assert_array_equal(term.a[1], random.factors[name].a[1])
    long = pruned_start(task, spec, {name: 100 * rows for name, rows in warm.items()}, keep).factors
    assert all(np.linalg.norm(term.a[:3], axis=1).max() < 0.6 for term in long.values())
    fresh = pruned_start(replace(task, start_from=Start.FRESH), spec, warm, keep).factors
    for name, term in fresh.items():
        np.testing.assert_array_equal(term.a, random.factors[name].a)


def test_a_device_that_lost_its_record_looks_at_what_it_was_sent(resident: Resident, make: Make) -> None:
    device = make(resident)
    first = device.handle(pruning(resident, patch=patch_for(resident)))
    patch = slice_patch(patch_for(resident, 2, 1), resident.spec, first.payload.keep)
    task = pruning(resident, 0.4, keep=first.payload.keep, patch=patch, round=2, state_round=0)
    update = device.handle(task)
    check_update(update, task, resident.spec)
    check_within("test", update.payload.keep, first.payload.keep)
    with pytest.raises(StaleVersion, match=r"must build on the base \(0\)") as caught:
        device.handle(plain(patch=patch_for(resident, 3, 2)))
    assert caught.value.version == 0


def _warm(resident: Resident) -> dict[str, Any]:
    return {name: term.a for name, term in patch_for(resident).payload.factors.items()}


def test_evaluating_a_keep_is_evaluating_the_masked_patched_model(resident: Resident, make: Make) -> None:
    """With the biases that the device remembers."""
    device = make(resident)
    update = device.handle(pruning(resident, patch=patch_for(resident)))
    memory = remembered(device._store.load_state(1, "run"))
    assert memory.biases
    later = replace(patch_for(resident), since=1, payload=Payload())
    task = pruning(
        resident, 0.0, keep=update.payload.keep, kind=Kind.EVALUATE, patch=later, state_round=1, start_from=Start.FRESH
    )
    got = device.handle(task).metrics
    apply_keep(resident, {})
    resident.base.apply("test", patch_for(resident).payload)
    structure = resident.prunable.structure  # type: ignore[union-attr]
    with resident.adapters.disabled(), masked(resident.model, structure, update.payload.keep, memory.biases):
        wanted = evaluate(resident, device._dataset(Kind.EVALUATE), config.Evaluation())
    assert got["loss_sum"] == pytest.approx(wanted["loss_sum"], rel=1e-4)
    assert got["n"] == wanted["n"]
    resident.base.restore()


def test_importance_and_biases_are_remembered(resident: Resident, make: Make) -> None:
    """Round 2 prunes by what round 1 measured; biases stay; without its state the device answers all the same."""
    device = make(resident)
    first = device.handle(pruning(resident, 0.2, patch=patch_for(resident)))
    one = remembered(device._store.load_state(1, "run"))
    assert set(one.scores) == set(resident.spec.groups)
    stay = replace(patch_for(resident), since=1, payload=Payload())
    task = pruning(resident, 0.4, keep=first.payload.keep, patch=stay, round=2, state_round=1)
    second = device.handle(task)
    check_update(second, task, resident.spec)
    two = remembered(device._store.load_state(2, "run"))
    for name, bias in one.biases.items():
        torch.testing.assert_close(two.biases[name], bias, rtol=0, atol=0)
    for name, scores in one.scores.items():
        gone = ~second.payload.keep.get(name, np.ones(len(scores), np.bool_))
        np.testing.assert_array_equal(two.scores[name][gone], scores[gone])
        assert (two.scores[name][~gone] != scores[~gone]).any()
    lost = device.handle(replace(task, state_round=0))
    check_update(lost, task, resident.spec)
    (device._store.state_dir / "r1.safetensors").write_bytes(b"nonsense")
    assert content(device.handle(task)) == content(lost)
    share = pruned_share(lost.payload.keep, resident.spec.groups)
    assert share == pytest.approx(pruned_share(second.payload.keep, resident.spec.groups))


def test_a_server_that_chose_the_units_is_followed_and_told_their_scores_where_it_asks(
    resident: Resident, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(4)
    assert resident.prunable is not None
    structure = resident.prunable.structure
    scores = {name: rng.uniform(size=count) for name, count in structure.units.items()}
    keep = choose_keep(structure, scores, RATIO)

    def never(*_: object) -> None:
        raise AssertionError("nothing is left to choose")

    monkeypatch.setattr("fedloom.client.pruning.rounds.calibrate", never)
    asking = pruning(resident, keep=keep, knobs={**KNOBS, "prune_ratio": RATIO, UNIT_SCORES: True})
    update = make(resident).handle(asking)
    check_update(update, asking, resident.spec)
    for name, bits in keep.items():
        np.testing.assert_array_equal(update.payload.keep.get(name, np.ones(len(bits), np.bool_)), bits)
    payload, told = split(update.payload)
    assert told.keys() == structure.units.keys()
    assert all((told[name][bits] > 0).any() for name, bits in keep.items())
    silent = make(resident).handle(pruning(resident, keep=keep))
    assert split(silent.payload) == (silent.payload, {})
    for name, term in silent.payload.factors.items():
        np.testing.assert_array_equal(term.b, payload.factors[name].b)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"keep": {"nowhere": np.ones(4, np.bool_)}}, "nowhere"),
        ({"ratio": 0.99}, "can be pruned by 0"),
        ({"ratio": 1.5}, r"the knob prune_ratio must be in \[0, 1\), got 1.5"),
        ({"knobs": {"prune_ratio": "much"}}, "prune_ratio must be in"),
        ({"knobs": {"bits": 8}}, "one rank and a base in 16 bits"),
        ({"knobs": {"bits": 5}}, "the knob bits must be one of"),
        ({"start_from": Start.OWN}, "must start from new factors"),
        ({"send": False}, "must ask for its factors"),
    ],
)
def test_what_a_pruning_task_gets_wrong_is_one_error(
    resident: Resident, make: Make, fields: dict[str, Any], why: str
) -> None:
    device = make(resident)
    before = content(device.handle(plain()))
    fields = dict(fields)
    with pytest.raises(ValueError, match=why) as caught:
        device.handle(pruning(resident, fields.pop("ratio", RATIO), **fields))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="must carry the units that may be kept"):
        device.handle(plain(knobs={**KNOBS, "prune_ratio": 0.2}))
    assert content(device.handle(plain())) == before


def test_a_model_that_was_not_loaded_to_be_pruned_says_so(make: Make, tiny_llama: Path) -> None:
    bare = load_model(config.Model(path=str(tiny_llama)), config.Lora(), seed=0)
    keep = {"model.layers.0.mlp": np.ones(64, np.bool_)}
    with pytest.raises(ValueError, match=r'must have model\.describe = "units"'):
        make(bare).handle(plain(start=Payload(keep=keep)))


def test_modules_without_a_rank_stay_bare_for_one_task(resident: Resident, make: Make) -> None:
    device = make(resident)
    before = content(device.handle(plain()))
    names = list(resident.spec.matrices)[1::3]
    task = plain(ranks={name: 1 + at % 2 for at, name in enumerate(names)}, knobs={**KNOBS, "measure_modules": 1})
    seen: list[set[str]] = []

    def watched(adapters: Any) -> None:
        trained = {n for n, layer in adapters.layers.items() if layer.lora_B["default"].weight.grad is not None}
        seen.append(trained)

    update = device.handle(task)
    check_update(update, task, resident.spec)
    assert {name: term.rank for name, term in update.payload.factors.items()} == dict(task.ranks)
    scores = {name.removeprefix("score/") for name in update.metrics if name.startswith("score/")}
    assert scores == set(names)
    with listening(resident, watched):
        tune(resident, device._dataset(Kind.TRAIN), task)
    assert seen == [set(names)] * 3
    assert content(device.handle(plain())) == before
    with pytest.raises(ValueError, match=r"ranks must be of the model's adapted modules, got 'nowhere'"):
        device.handle(plain(ranks={"nowhere": 2}))


@pytest.mark.parametrize("bits", [8, 4])
def test_bits_hold_for_a_task(resident: Resident, make: Make, bits: int) -> None:
    device = make(resident)
    patch = patch_for(resident)
    before, judged = (content(device.handle(plain(patch=patch, kind=kind))) for kind in Kind)
    task = plain(patch=patch, knobs={**KNOBS, "bits": bits, "measure_modules": 1})
    first = device.handle(task)
    assert resident.bits.bits == bits
    assert sum(name.startswith("score/") for name in first.metrics) == len(resident.spec.matrices)
    assert first.metrics["bits"] == bits
    low = device.handle(plain(patch=patch, kind=Kind.EVALUATE, knobs={"bits": bits}))
    assert low.metrics["loss_sum"] == pytest.approx(judged[3]["loss_sum"], rel=0.5)
    assert low.metrics["loss_sum"] != judged[3]["loss_sum"]
    assert content(device.handle(plain(patch=patch))) == before
    assert resident.bits.bits == 16
    assert content(device.handle(plain(patch=patch, kind=Kind.EVALUATE))) == judged
    device.handle(pruning(resident, patch=patch))
    assert content(device.handle(task)) == content(first)


def peak(device: Device, task: Task) -> int:
    return device.handle(task).cost.peak_tensor_bytes


def test_a_task_beyond_the_memory_is_given_up(resident: Resident, make: Make) -> None:
    """At whatever moment memory runs out, the next task finds the model unharmed."""
    patch = patch_for(resident)
    free = make(resident, metered=True)
    ordinary, tight = plain(patch=patch), pruning(resident, patch=patch)
    wanted, pruned = content(free.handle(ordinary)), content(free.handle(tight))
    most, least = peak(free, tight), sum({t.untyped_storage()._cdata: t.nbytes for t in held(resident)}.values())
    for share in (-0.1, 0.01, 0.05, 0.2, 0.5, 0.8, 0.99):
        limit = int(least + share * (most - least))
        device = make(resident, "b", metered=True, memory=limit)
        task = replace(tight, device="b")
        update = device.handle(task)
        check_update(update, task, resident.spec)
        assert content(update)[0] == {}
        assert update.cost.out_of_memory
        assert update.metrics["ratio"] == RATIO
        assert update.metrics["rank"] == 2
        assert content(free.handle(ordinary)) == wanted
        device.handle(task)
        assert content(free.handle(tight)) == pruned
        with pytest.raises(NoRoom, match="the task needs more memory than there is, and b has nothing to make smaller"):
            device.handle(replace(ordinary, device="b", knobs={**KNOBS, "batch_size": 4}))
        assert content(free.handle(ordinary)) == wanted
    enough = make(resident, metered=True, memory=most)
    assert content(enough.handle(tight)) == pruned
    assert not make(resident, metered=False, memory=1).handle(tight).cost.out_of_memory


def test_an_evaluation_makes_do_with_smaller_batches(resident: Resident, make: Make, examples: list[Example]) -> None:
    free = make(resident, metered=True, test=examples * 8)
    task = plain(kind=Kind.EVALUATE, patch=patch_for(resident), knobs={})
    whole = free.handle(task)
    tight = make(resident, "b", metered=True, memory=int(whole.cost.peak_tensor_bytes * 0.8), test=examples * 8)
    less = tight.handle(replace(task, device="b"))
    assert less.cost.peak_tensor_bytes < whole.cost.peak_tensor_bytes * 0.8
    assert less.metrics["n"] == whole.metrics["n"]
    assert less.metrics["loss_sum"] == pytest.approx(whole.metrics["loss_sum"], rel=1e-5)


@pytest.fixture(scope="module")
def embedded() -> Resident:
    settings = config.Model(path=str(EMBEDDED_MODEL), describe="units")
    return load_model(settings, config.Lora(), seed=0)


@pytest.mark.parametrize(("ratio", "bits", "rank", "batch"), [(0.3, 16, 8, 4), (0.1, 16, 32, 2), (0.0, 8, 8, 4)])
def test_predicted_memory_is_what_a_task_takes(
    embedded: Resident, make: Make, ratio: float, bits: int, rank: int, batch: int
) -> None:
    """All of a task, its preparation too, on texts that are as long as it was predicted for."""
    texts = [Example(prompt="light on " * 60, completion="lamp(on) " * 6)] * 8
    device = make(embedded, train=texts, metered=True)
    device._rank = 64
    knobs: dict[str, Any] = {"steps": 2, "batch_size": batch}  # the optimiser has states from the second on
    task = pruning(embedded, ratio, rank=rank, alpha=2.0 * rank, patch=patch_for(embedded))
    task = replace(task, knobs={**task.knobs, **knobs})
    if bits != 16:
        task = plain(rank=rank, alpha=2.0 * rank, patch=patch_for(embedded), knobs={**knobs, "bits": bits})
    length, width = (max(len(one.ids), 0) for one in device._dataset(Kind.TRAIN).encoded[:1]), 0
    step = Workload(batch=batch, length=next(length)).step(
        dict.fromkeys(embedded.spec.matrices, rank), causal=True, bits=bits
    )
    width = device._dataset(Kind.TRAIN).encoded[0].answer
    shapes = embedded.spec.shapes
    assert shapes is not None
    predicted = memory(narrowed(shapes, ratio), replace(step, width=width, padded=False)).total
    assert peak(device, task) == pytest.approx(predicted, rel=0.1)
