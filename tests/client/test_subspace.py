"""Backpropagation in a sketch: the folded gradient, the steps it makes, and that no gradient outlives its layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from subspaces import (
    clean,
    data_of,
    delta,
    fold,
    gradients,
    in_scope,
    point,
    same,
    space,
    task_for,
    values_of,
    weights,
)
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fedloom.client.data import Dataset, Example
from fedloom.client.model import Resident, load_model
from fedloom.client.place import Place
from fedloom.client.subspace import folding, lone_tables, subspace
from fedloom.client.training import forward_logits, loss_sum
from fedloom.client.zeroth_order import zeroth_order
from fedloom.protocols import config
from fedloom.protocols.directions import sign_vector
from fedloom.protocols.messages import Coefficients, Over, Scalars, Scope, Task
from fedloom.strategies.subspace import contribution

SCOPES = list(Scope)
KINDS = ["llama", "gpt2", "classifier", "untied"]


@pytest.fixture(scope="module")
def untied(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Resident:
    """A Llama whose embedding is no other module's weight: its gradient is sparse."""
    folder = tmp_path_factory.mktemp("untied")
    for file in tiny_llama.glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    settings = LlamaConfig.from_pretrained(tiny_llama)
    settings.tie_word_embeddings = False
    with torch.random.fork_rng():
        torch.manual_seed(1)
        LlamaForCausalLM(settings).save_pretrained(folder)
    return load_model(config.Model(path=str(folder)), config.Lora(), seed=0)


def _run(
    resident: Resident, task: Task, examples: list[Example], held: Coefficients | None = None
) -> tuple[Scalars, Mapping[str, float]]:
    assert task.subspace is not None
    with Place(resident, task.subspace, held, ("test", object())) as place:
        return subspace(place, data_of(resident, examples), task)


def _mean_gradient(
    resident: Resident, task: Task, data: Dataset, c: np.ndarray[Any, Any], scope: Scope
) -> np.ndarray[Any, Any]:
    """S' grad of all examples' mean loss at coefficients c, [K], from a float64 copy."""
    assert task.subspace is not None
    with Place(resident, task.subspace, None, "reference") as place:
        place.rebuild(c)
        return fold(task.subspace, gradients(resident, scope, data.batch(range(4))))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_folded_gradient_is_s_transposed_times_the_gradient(
    kind: str, scope: Scope, request: pytest.FixtureRequest, examples: list[Example]
) -> None:
    """To 1e-5 of its norm, tied tables, sparse embeddings, packed masks and factors alike; at a version."""
    resident, space_ = in_scope(request.getfixturevalue(kind), scope)
    held, data = point(space_), data_of(resident, examples)
    batch, into = data.batch(range(4)), torch.zeros(64)
    with Place(resident, space_, held, "v") as place:
        place.rebuild()
        wanted = fold(space_, gradients(resident, scope, batch))
        with folding(place, into):
            for _ in range(2):  # passes add up
                (loss_sum(forward_logits(resident, batch), batch.labels) / batch.tokens).backward()
        forward = into.numpy() / 2
    clean(resident)
    size = np.linalg.norm(wanted)
    assert np.abs(forward - wanted).max() < 1e-5 * size
    assert np.abs(wanted).max() > 1e-2
    got = _run(resident, task_for(space_, "subspace", knobs={"exchange": "gradient"}), examples, held)[0]
    clean(resident)
    assert np.abs(-got.values - wanted).max() < 1e-5 * size


def _flags(resident: Resident) -> dict[str, Any]:
    model = resident.model
    flags = {name: (p.requires_grad, p.grad is None) for name, p in model.named_parameters()}
    flags |= {name: module.sparse for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    return flags | {f"hooks {name}": len(p._post_accumulate_grad_hooks or {}) for name, p in model.named_parameters()}


def _name_of(resident: Resident, wanted: nn.Parameter) -> str:
    return next(name for name, parameter in resident.model.named_parameters() if parameter is wanted)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", ["classifier", "untied"])
def test_flags_and_gradients_are_left_as_they_were(
    kind: str, scope: Scope, request: pytest.FixtureRequest, examples: list[Example]
) -> None:
    """After a block that ends well and one that fails between two layers' gradients."""
    resident, space_ = in_scope(request.getfixturevalue(kind), scope)
    batch, model = data_of(resident, examples).batch([0, 1]), resident.model
    assert len(lone_tables(model)) == (3 if kind == "classifier" else 1)
    with Place(resident, space_, None, "v") as place:
        before = _flags(resident)
        with folding(place, torch.zeros(64)):
            assert all(part.parameter.requires_grad for part in place.parts)
            assert all(table.sparse for table in model.modules() if isinstance(table, nn.Embedding))
            loss_sum(forward_logits(resident, batch), batch.labels).backward()
            assert all(part.parameter.grad is None for part in place.parts)
        assert _flags(resident) == before

        def stop(*_: Any) -> None:
            raise ZeroDivisionError

        place.parts[0].parameter.requires_grad_(True)
        first = place.parts[0].parameter.register_post_accumulate_grad_hook(stop)
        with suppress(ZeroDivisionError), folding(place, torch.zeros(64)):
            loss_sum(forward_logits(resident, batch), batch.labels).backward()
            pytest.fail("the backward pass must have stopped")
        first.remove()
        place.parts[0].parameter.requires_grad_(before[_name_of(resident, place.parts[0].parameter)][0])
        assert _flags(resident) == before
        assert all(none for _, none in (flag for flag in before.values() if isinstance(flag, tuple)))
    clean(resident)


def test_tied_tables_are_not_alone(llama: Resident, gpt2: Resident) -> None:
    assert not lone_tables(llama.model)
    assert [table.num_embeddings for table in lone_tables(gpt2.model)] == [128]  # positions; words are tied


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", ["llama", "classifier"])
def test_a_step_of_sgd_is_minus_lr_s_s_transposed_g(
    kind: str, scope: Scope, request: pytest.FixtureRequest, examples: list[Example]
) -> None:
    """W0 - lr S S' g in the model, and -lr S' g in the answer."""
    resident, space_ = in_scope(request.getfixturevalue(kind), scope)
    task = task_for(space_, "subspace", knobs={"optimizer": "sgd", "lr": 1e-3, "clip": 0.0})
    step = -1e-3 * _mean_gradient(resident, task, data_of(resident, examples), np.zeros(64), scope)
    with Place(resident, space_, None, "w0") as place:
        place.rebuild()
        start = values_of(resident, scope)
    clean(resident)
    with Place(resident, space_, None, "v") as place:
        scalars, measured = subspace(place, data_of(resident, examples), task)
        after = values_of(resident, scope)
    clean(resident)
    assert (scalars.over, scalars.k, scalars.values.dtype) == (Over.BASIS, 64, np.float32)
    np.testing.assert_allclose(scalars.values, step, rtol=1e-4, atol=1e-5 * np.abs(step).max())
    assert measured["n"] == 4
    for name, value in start.items():
        np.testing.assert_allclose(after[name], value + delta(space_, name, value.size, step), rtol=0, atol=3e-7)
    assert np.abs(step).max() > 1e-5


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_steps_are_torch_s_on_the_vector_of_coefficients(
    llama: Resident, examples: list[Example], optimizer: str
) -> None:
    """Five steps at a version, clipped, with decay: torch's optimiser on c [K], gradients from a float64 copy."""
    space_ = space()
    held, data = point(space_), data_of(clean(llama), examples)
    knobs = {"optimizer": optimizer, "steps": 5, "lr": 3e-3, "clip": 0.5, "weight_decay": 0.1}
    task = task_for(space_, "subspace", knobs=knobs | ({"momentum": 0.9} if optimizer == "sgd" else {}))
    got, measured = _run(llama, task, examples, held)
    c = nn.Parameter(torch.zeros(64, dtype=torch.float64))
    made: torch.optim.Optimizer = (
        torch.optim.AdamW([c], lr=3e-3, weight_decay=0.1)
        if optimizer == "adamw"
        else torch.optim.SGD([c], lr=3e-3, momentum=0.9, weight_decay=0.1)
    )
    for _ in range(5):
        clean(llama)
        at = held.values() + c.detach().numpy()
        c.grad = torch.from_numpy(_mean_gradient(llama, task, data, at, Scope.ALL))
        assert c.grad.norm() > 0.5
        nn.utils.clip_grad_norm_([c], 0.5)
        made.step()
    clean(llama)
    wanted = c.detach().numpy()
    np.testing.assert_allclose(got.values, wanted, rtol=2e-3, atol=2e-3 * np.abs(wanted).max())
    assert measured["steps"] == 5


@pytest.mark.parametrize("scope", SCOPES)
def test_the_model_is_rebuilt_from_the_answer(classifier: Resident, examples: list[Example], scope: Scope) -> None:
    """The weights after the last step are those of c_v plus what is sent, bit for bit."""
    resident, space_ = in_scope(classifier, scope)
    held = point(space_)
    task = task_for(space_, "subspace", knobs={"steps": 4, "batch_size": 2})
    with Place(resident, space_, held, "v") as place:
        scalars, _ = subspace(place, data_of(resident, examples), task)
        trained = {part.name: part.read().clone() for part in place.parts}
    clean(resident)
    with Place(resident, space_, None, "v") as place:
        place.rebuild(held.values() + contribution(scalars, space_))
        assert same(trained, {part.name: part.read().clone() for part in place.parts})
    clean(resident)


def test_a_gradient_is_the_mean_where_the_model_is(llama: Resident, examples: list[Example]) -> None:
    """-(1/T) sum of the batches' gradients at the version, unclipped, whatever the learning rate."""
    space_ = space()
    held, data = point(space_), data_of(clean(llama), examples)
    knobs = {"exchange": "gradient", "steps": 2, "batch_size": 2, "clip": 1e-3}
    got = _run(llama, task_for(space_, "subspace", knobs=knobs | {"lr": 5.0}), examples, held)[0]
    other = _run(clean(llama), task_for(space_, "subspace", knobs=knobs | {"optimizer": "sgd"}), examples, held)[0]
    np.testing.assert_array_equal(got.values, other.values)
    order = torch.randperm(4, generator=_generator(task_for(space_, "subspace"))).tolist()
    total = np.zeros(64)
    with Place(clean(llama), space_, held, "v") as place:
        place.rebuild()
        for chosen in (order[:2], order[2:]):
            total += fold(space_, gradients(llama, Scope.ALL, data.batch(chosen)))
    clean(llama)
    np.testing.assert_allclose(got.values, -total / 2, rtol=1e-4, atol=1e-5 * np.abs(total).max())


def _generator(task: Task) -> torch.Generator:
    from fedloom.protocols.seeds import derive_seed

    return torch.Generator().manual_seed(derive_seed(task.seed, "train", task.round, task.device))


@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_a_path_is_the_mean_of_local_sgd_steps(llama: Resident, examples: list[Example], clip: float) -> None:
    """(c_T - c_v) / (lr T), by SGD whatever the recipe says."""
    knobs = {"steps": 5, "lr": 2e-3, "clip": clip, "batch_size": 2}
    moved = _run(clean(llama), task_for(space(), "subspace", knobs=knobs | {"optimizer": "sgd"}), examples)[0]
    path = _run(clean(llama), task_for(space(), "subspace", knobs=knobs | {"exchange": "path"}), examples)[0]
    clean(llama)
    np.testing.assert_allclose(path.values, moved.values / (2e-3 * 5), rtol=1e-5)
    if clip:
        assert np.linalg.norm(path.values) <= clip * 1.001


def test_both_kinds_of_devices_estimate_the_same_numbers(llama: Resident, examples: list[Example]) -> None:
    """`gradient`: the mean over forward-only directions of a whole batch, against S' grad of the same batch.

    The relative error of T random directions in K dimensions is sqrt(K / T): here within 4 of its deviations.
    """
    space_, count = space(k=16), 320
    exact = _run(clean(llama), task_for(space_, "subspace", knobs={"exchange": "gradient"}), examples)[0]
    knobs = {"exchange": "gradient", "directions": count, "eps": 3e-4}
    with Place(clean(llama), space_, None, "v") as place:
        estimate, _ = zeroth_order(place, data_of(llama, examples), task_for(space_, knobs=knobs))
    clean(llama)
    truth, got = contribution(exact, space_), contribution(estimate, space_)
    vectors = np.array([sign_vector(estimate.seed, t, 16) for t in range(count)])
    np.testing.assert_allclose(got, vectors.T @ (vectors @ truth) / count, atol=1e-2 * np.abs(truth).max())
    error = np.linalg.norm(got - truth) / np.linalg.norm(truth)
    assert error < np.sqrt(16 / count) * (1 + 4 / np.sqrt(2 * 16))


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_equals_one_big_batch(llama: Resident, examples: list[Example], accumulate: int) -> None:
    knobs = {"steps": 2, "optimizer": "sgd", "lr": 1e-2}
    whole, counted = _run(clean(llama), task_for(space(), "subspace", knobs=knobs), examples)
    small = knobs | {"accumulate": accumulate, "batch_size": 4 // accumulate}
    parts, also = _run(clean(llama), task_for(space(), "subspace", knobs=small), examples)
    clean(llama)
    np.testing.assert_allclose(parts.values, whole.values, rtol=1e-4, atol=1e-5 * np.abs(whole.values).max())
    assert also == pytest.approx(counted, rel=1e-5)


def test_what_is_sent_is_clipped(llama: Resident, examples: list[Example]) -> None:
    for exchange in ("delta", "gradient", "path"):
        knobs = {"exchange": exchange, "steps": 2, "lr": 0.1}
        free = _run(clean(llama), task_for(space(), "subspace", knobs=knobs), examples)[0].values
        limit = float(np.median(np.abs(free)))
        task = task_for(space(), "subspace", knobs=knobs, scalar_limit=limit)
        got = _run(clean(llama), task, examples)[0].values
        np.testing.assert_array_equal(got, np.clip(free, -limit, limit).astype(np.float32))
    clean(llama)


def test_the_same_task_gives_the_same_bits(llama: Resident, examples: list[Example]) -> None:
    task = task_for(space(), "subspace", knobs={"steps": 3, "batch_size": 2})
    found = [_run(llama, task, examples)[0].values for _ in range(2)]
    found.append(_run(clean(llama), task, examples)[0].values)
    clean(llama)
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


@pytest.mark.parametrize("family", ["gaussian", "rademacher"])
def test_a_pool_is_refused(llama: Resident, examples: list[Example], family: str) -> None:
    with pytest.raises(ValueError, match=f"must have a sketch, got directions of family '{family}'"):
        _run(clean(llama), task_for(space(family), "subspace"), examples)


def test_a_diverged_loss_is_refused(classifier: Resident, examples: list[Example]) -> None:
    before, flags = weights(clean(classifier)), _flags(classifier)
    with pytest.raises(ValueError, match=r"training diverged: the loss of step 2 is not finite, with lr 1e\+30"):
        _run(classifier, task_for(space(), "subspace", knobs={"steps": 3, "lr": 1e30}), examples)
    assert _flags(clean(classifier)) == flags
    assert same(before, weights(classifier))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_weights_are_rounded_once_after_every_step(
    tiny_llama: Path, examples: list[Example], dtype: str
) -> None:
    """Steps far below a weight's last place add up in c, and the model is round(W0 + S c)."""
    resident = load_model(config.Model(path=str(tiny_llama), dtype=dtype), config.Lora(), seed=0)
    base = values_of(resident, Scope.ALL)
    with Place(resident, space(), None, "v") as place:
        task = task_for(space(), "subspace", knobs={"steps": 6, "lr": 1e-6})
        scalars, _ = subspace(place, data_of(resident, examples), task)
        after = values_of(resident, Scope.ALL)
    c = scalars.values.astype(np.float64)
    assert np.abs(c).max() == pytest.approx(6e-6, rel=0.05)  # six of AdamW's steps
    for name, value in after.items():
        exact = base[name].astype(np.float32) + delta(space(), name, value.size, c).astype(np.float32)
        wanted = torch.from_numpy(exact).to(getattr(torch, dtype)).float().numpy()
        np.testing.assert_array_equal(value.astype(np.float32), wanted)


def _bytes(gradient: Tensor) -> int:
    if gradient.is_sparse:
        values, indices = gradient._values(), gradient._indices()
        return values.numel() * values.element_size() + indices.numel() * indices.element_size()
    return gradient.numel() * gradient.element_size()


@pytest.mark.parametrize("kind", KINDS)
def test_no_two_gradients_are_alive_at_once(
    kind: str, request: pytest.FixtureRequest, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever a gradient is there, it is the only one: the largest parameter's at most; of tables, a batch's rows."""
    resident: Resident = clean(request.getfixturevalue(kind))
    parameters = dict(resident.model.named_parameters())
    alive: list[int] = []
    sparse: list[int] = []

    def count(parameter: Tensor) -> None:
        held = [p.grad for p in parameters.values() if p.grad is not None]
        alive.append(sum(_bytes(gradient) for gradient in held))
        sparse.extend(len(gradient._indices()[0]) for gradient in held if gradient.is_sparse)

    trained = {name: p for name, p in parameters.items() if ".lora_" not in name}
    before = {name: p.requires_grad for name, p in trained.items()}
    hooks = []
    for parameter in trained.values():
        parameter.requires_grad_(
            True
        )  # so that a hook can be put on; it runs before the tuner's, which is put on later
        hooks.append(parameter.register_post_accumulate_grad_hook(count))
    try:
        _run(resident, task_for(space(), "subspace", knobs={"steps": 2, "batch_size": 2}), examples)
    finally:
        for hook in hooks:
            hook.remove()
        for name, parameter in trained.items():
            parameter.requires_grad_(before[name])
    clean(resident)
    assert len(alive) == 2 * len(trained)
    assert max(alive) <= max(p.numel() * p.element_size() for p in trained.values())
    tokens = 2 * max(len(one.ids) for one in data_of(resident, examples).encoded)
    assert all(rows <= tokens for rows in sparse)
    assert len(sparse) == 2 * len(lone_tables(resident.model))


def test_learning_lowers_the_loss(llama: Resident, examples: list[Example]) -> None:
    task = task_for(space(k=1024), "subspace", knobs={"steps": 40, "lr": 3e-3})
    _, measured = _run(clean(llama), task, examples)
    first = _run(clean(llama), task_for(space(k=1024), "subspace"), examples)[1]
    clean(llama)
    assert measured["loss_sum"] / measured["tokens"] < 0.9 * first["loss_sum"] / first["tokens"]


def test_a_forward_only_device_s_tuner_follows(
    llama: Resident, examples: list[Example], make_device: Callable[..., Any]
) -> None:
    """Backpropagation after zeroth order on one resident, and the other way round, each as alone."""
    device = make_device(clean(llama))
    tasks = [task_for(space(), tuner, knobs={"steps": 2}) for tuner in ("zeroth_order", "subspace")]
    alone = []
    for task in tasks:
        clean(llama)
        alone.append(device.handle(task).payload.scalars.values)
    for number in (0, 1, 0, 1, 1, 0):
        np.testing.assert_array_equal(device.handle(tasks[number]).payload.scalars.values, alone[number])
    clean(llama)
