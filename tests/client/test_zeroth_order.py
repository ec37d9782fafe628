"""Zeroth-order tuning: its scalars against gradients, its estimators against theory, and that no step is ever lost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from subspaces import (
    Vector,
    clean,
    data_of,
    delta,
    fold,
    gradients,
    in_scope,
    masked,
    point,
    same,
    slope,
    space,
    task_for,
    values_of,
    weights,
    z,
)

from fedloom.client import zeroth_order as module
from fedloom.client.data import Batch, Example
from fedloom.client.model import Resident, load_model
from fedloom.client.place import Place, version_fill
from fedloom.client.subspace import subspace as subspace_tuner
from fedloom.client.training import forward_logits, loss_sum
from fedloom.client.tuners import ScalarTuner
from fedloom.client.zeroth_order import zeroth_order
from fedloom.protocols import config
from fedloom.protocols.directions import FAMILIES, pool_keys, sign_vector
from fedloom.protocols.messages import Coefficients, Over, Payload, Scalars, Scope, Subspace, Task
from fedloom.protocols.seeds import derive_seed, draw_indices
from fedloom.strategies.coefficients import plus, rounded, zero
from fedloom.strategies.subspace import contribution

POOLS = ["gaussian", "rademacher"]
SCOPES = list(Scope)
SIXTEEN = ["bfloat16", "float16"]


@pytest.fixture(scope="module", params=SIXTEEN)
def sixteen(request: pytest.FixtureRequest, tiny_llama: Path) -> Resident:
    return load_model(config.Model(path=str(tiny_llama), dtype=request.param), config.Lora(), seed=0)


def _run(
    resident: Resident, task: Task, examples: list[Example], held: Coefficients | None = None
) -> tuple[Scalars, Mapping[str, float]]:
    assert task.subspace is not None
    with Place(resident, task.subspace, held, ("test", object())) as place:
        return zeroth_order(place, data_of(resident, examples), task)


def _listed(indices: list[int], k: int = 64, values: list[float] | None = None) -> Payload:
    """The directions of a task, as DeComFL's server lists them."""
    given = np.array([1.0] * len(indices) if values is None else values, np.float32)
    return Payload(scalars=Scalars(over=Over.POOL, k=k, values=given, indices=np.array(indices)))


def _direction(scalars: Scalars, n: int, subspace: Subspace) -> Vector:
    """The n-th step's direction as coefficients of the subspace."""
    if scalars.indices is None:
        return sign_vector(scalars.seed, n, subspace.k).astype(np.float64)
    one = np.zeros(subspace.k)
    one[scalars.indices[n]] = 1
    return one


def _loss_at(resident: Resident, batch: Batch, subspace: Subspace, c: Vector) -> float:
    """The mean loss with float32(W0 + sum) written into the model by hand."""
    with Place(resident, subspace, None, "by hand") as place:
        place.rebuild()
        for part in place.parts:
            value = torch.from_numpy(
                (part.read().numpy() + delta(subspace, part.name, part.size, c)).astype(np.float32)
            )
            part.write(lambda out, value=value: out.copy_(value))
        place._rebuilt.dirty(place.parts)
        with torch.inference_mode():
            return loss_sum(forward_logits(resident, batch), batch.labels).item() / batch.tokens


# What a scalar is


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", ["llama", "classifier"])
def test_a_scalar_is_minus_lr_times_the_projected_gradient(
    kind: str, scope: Scope, family: str, request: pytest.FixtureRequest, examples: list[Example]
) -> None:
    """rho_j = -lr z_j . grad / q, at a version: two-sided differences against autograd on a float64 copy."""
    resident, subspace = in_scope(request.getfixturevalue(kind), scope, family)
    held = point(subspace, only=5)
    batch = data_of(resident, examples).batch(range(4))
    with Place(resident, subspace, held, "v") as place:
        place.rebuild()
        gradient = gradients(resident, scope, batch)
    eps = 1e-3 if scope == Scope.MASK else 2e-4
    task = task_for(subspace, knobs={"directions": 3, "lr": 0.5, "eps": eps})
    got, measured = _run(resident, task, examples, held)
    clean(resident)
    slopes = np.array([slope(subspace, gradient, _direction(got, n, subspace)) for n in range(3)])
    assert got.over == (Over.STEPS if family == "sketch" else Over.POOL)
    size = np.sqrt(sum(float(g @ g) for g in gradient.values()))
    np.testing.assert_allclose(got.values, -0.5 * slopes / 3, rtol=5e-3, atol=5e-3 * size)
    assert np.abs(got.values).max() > 0.05 * size
    assert measured["n"] == 4
    assert measured["tokens"] == batch.tokens
    assert measured["steps"] == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_fzoo_divides_by_the_spread_of_the_losses(llama: Resident, examples: list[Example], family: str) -> None:
    """rho_j = -lr d_j / (q sigma), d_j and sigma from weights written by hand."""
    subspace = space(family)
    task = task_for(subspace, knobs={"estimator": "fzoo", "directions": 5, "lr": 0.3, "eps": 1e-2})
    got, measured = _run(clean(llama), task, examples)
    batch = data_of(clean(llama), examples).batch(range(4))
    at = [_loss_at(llama, batch, subspace, 1e-2 * _direction(got, n, subspace)) for n in range(5)]
    rise = np.array(at) - _loss_at(llama, batch, subspace, np.zeros(64))
    clean(llama)
    wanted = -0.3 * rise / (5 * np.std(rise, ddof=1))
    np.testing.assert_allclose(got.values, wanted, rtol=2e-3, atol=2e-3 * np.abs(wanted).max())
    assert measured["loss_sum"] == pytest.approx(_loss_at(llama, batch, subspace, np.zeros(64)) * batch.tokens)
    clean(llama)


def test_fzoo_does_not_see_the_loss_s_scale(
    llama: Resident, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten times the loss: the same scalars; SPSA's are ten times as large. A flat loss moves nothing."""
    found: dict[tuple[str, float], NDArray[Any]] = {}
    for estimator in ("fzoo", "spsa"):
        for scale in (1.0, 10.0, 0.0):
            monkeypatch.setattr(module, "loss_sum", lambda x, y, scale=scale: loss_sum(x, y) * scale)
            task = task_for(space(), knobs={"estimator": estimator, "directions": 4, "eps": 1e-2})
            found[estimator, scale] = _run(clean(llama), task, examples)[0].values
    np.testing.assert_allclose(found["fzoo", 10.0], found["fzoo", 1.0], rtol=1e-3)
    np.testing.assert_allclose(found["spsa", 10.0], 10 * found["spsa", 1.0], rtol=1e-3)
    assert not found["fzoo", 0.0].any()
    assert not found["spsa", 0.0].any()


def test_fzoo_needs_two_directions(llama: Resident, examples: list[Example]) -> None:
    with pytest.raises(ValueError, match=r"train.directions must be at least 2 for fzoo, got 1"):
        _run(clean(llama), task_for(space(), knobs={"estimator": "fzoo"}), examples)


@pytest.mark.parametrize("tuner", [zeroth_order, subspace_tuner])
def test_an_unknown_exchange_is_refused(llama: Resident, examples: list[Example], tuner: ScalarTuner) -> None:
    task = task_for(space(), knobs={"exchange": "gradients"})
    with (
        Place(clean(llama), space(), None, "v") as place,
        pytest.raises(ValueError, match="exchange must be delta, gradient or path, got 'gradients'"),
    ):
        tuner(place, data_of(llama, examples), task)


def test_a_learning_rate_of_its_own_goes_first(llama: Resident, examples: list[Example]) -> None:
    plain = _run(clean(llama), task_for(space(), knobs={"lr": 1e-2}), examples)[0].values
    own = _run(clean(llama), task_for(space(), knobs={"lr": 1e-2, "zo_lr": 3e-2}), examples)[0].values
    np.testing.assert_allclose(own, 3 * plain, rtol=1e-6)


@pytest.mark.parametrize("estimator", ["spsa", "fzoo"])
def test_accumulation_equals_one_big_batch(llama: Resident, examples: list[Example], estimator: str) -> None:
    """The mean is over all tokens of a step's batches, which are of unequal lengths."""
    many = [Example(prompt=e.prompt, completion=e.completion * times) for e in examples for times in (1, 3)]
    found = []
    for batch, accumulate in ((8, 1), (2, 4), (1, 8)):
        knobs = {"batch_size": batch, "accumulate": accumulate, "directions": 3, "estimator": estimator, "steps": 2}
        found.append(_run(clean(llama), task_for(space(), knobs=knobs | {"lr": 1e-3}), many))
    whole, measured = found[0]
    for scalars, counted in found[1:]:
        np.testing.assert_allclose(scalars.values, whole.values, rtol=5e-3, atol=5e-3 * np.abs(whole.values).max())
        assert counted["loss_sum"] == pytest.approx(measured["loss_sum"], rel=1e-5)
        assert {k: counted[k] for k in ("n", "tokens", "steps")} == {"n": 16, "tokens": measured["tokens"], "steps": 2}


# What is sent


@pytest.mark.parametrize("estimator", ["spsa", "fzoo"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gradient_is_measured_where_the_model_is(
    llama: Resident, examples: list[Example], family: str, estimator: str
) -> None:
    """`gradient`: every step at the same point, -g_j / (T q), whatever lr is; W0 stays in memory where it can."""
    subspace = space(family)
    held, before = point(subspace, only=3), weights(clean(llama))
    knobs = {"exchange": "gradient", "steps": 3, "directions": 2, "estimator": estimator, "eps": 5e-4}
    got = _run(llama, task_for(subspace, knobs=knobs | {"lr": 1e-2}), examples, held)[0]
    if family == "sketch":
        assert same(before, weights(llama))
    again = _run(clean(llama), task_for(subspace, knobs=knobs | {"lr": 7.0}), examples, held)[0]
    np.testing.assert_array_equal(got.values, again.values)
    batch = data_of(clean(llama), examples).batch(range(4))
    with Place(llama, subspace, held, "v") as place:
        place.rebuild()
        gradient = gradients(llama, Scope.ALL, batch)
    clean(llama)
    wanted = np.array([-slope(subspace, gradient, _direction(got, n, subspace)) / 6 for n in range(6)])
    tolerance = 1e-2 if estimator == "spsa" else 0.25  # a one-sided difference has half the curvature in it
    np.testing.assert_allclose(got.values, wanted, rtol=tolerance, atol=tolerance * np.abs(wanted).max())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_path_moves_and_sends_its_mean(llama: Resident, examples: list[Example], family: str) -> None:
    """`path`: the steps of `delta`, divided by lr T, so that sum_j rho_j z_j / (lr T) is the mean along the way."""
    subspace = space(family)
    knobs = {"steps": 4, "directions": 2, "lr": 3e-3, "zo_lr": 2e-3}
    moved = _run(clean(llama), task_for(subspace, knobs=knobs), examples)[0]
    path = _run(clean(llama), task_for(subspace, knobs=knobs | {"exchange": "path"}), examples)[0]
    clean(llama)
    np.testing.assert_allclose(path.values, moved.values / (2e-3 * 4), rtol=1e-6)
    change, mean = contribution(moved, subspace), contribution(path, subspace)
    np.testing.assert_allclose(mean, change / 8e-3, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_scalars_are_clipped_before_the_model_moves(
    llama: Resident, examples: list[Example], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """The device goes where its answer says: its last weights are those of the clipped scalars."""
    subspace = space(family)
    knobs = {"steps": 3, "lr": 0.1, "draw_seed": 9}
    free = _run(clean(llama), task_for(subspace, knobs=knobs), examples)[0].values
    limit = float(np.abs(free).min()) / 2
    task = task_for(subspace, knobs=knobs, scalar_limit=limit)
    with _walk_of(monkeypatch) as walks, Place(clean(llama), subspace, None, "v") as place:
        got, _ = zeroth_order(place, data_of(llama, examples), task)
        trained = values_of(llama, Scope.ALL)
    assert got.values.dtype == np.float32
    np.testing.assert_array_equal(np.abs(got.values), np.full(3, limit, np.float32))
    assert got.values[0] == np.sign(free[0]) * np.float32(limit)
    c = contribution(got, subspace)
    if walks:
        np.testing.assert_allclose(walks[0].c, c, rtol=0, atol=1e-12)
    else:
        with Place(clean(llama), subspace, None, "v") as place:
            place.rebuild(c)
            for name, value in values_of(llama, Scope.ALL).items():
                np.testing.assert_allclose(trained[name], value, rtol=0, atol=1e-6)
    for exchange in ("path", "gradient"):
        sent = _run(clean(llama), replace(task, knobs=task.knobs | {"exchange": exchange}), examples)[0]
        assert np.abs(sent.values).max() <= np.float32(limit)
    clean(llama)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_diverged_loss_is_refused(classifier: Resident, examples: list[Example], family: str) -> None:
    before = weights(clean(classifier))
    with pytest.raises(ValueError, match=r"training diverged: a loss is not finite, with lr 1e\+30"):
        _run(classifier, task_for(space(family), knobs={"lr": 1e30, "steps": 4}), examples)
    assert same(before, weights(clean(classifier)))


def test_a_list_of_directions_is_taken_as_it_is(llama: Resident, examples: list[Example]) -> None:
    """With what each step is multiplied by; one that is too short, or of another pool, is refused."""
    subspace = space("rademacher")
    knobs = {"steps": 2, "directions": 2, "lr": 1e-3, "exchange": "gradient"}
    plain = _run(clean(llama), task_for(subspace, start=_listed([3, 60, 3, 1]), knobs=knobs), examples)[0]
    np.testing.assert_array_equal(plain.indices, [3, 60, 3, 1])
    given = _listed([3, 60, 3, 1, 8], values=[1.0, 0.5, 2.0, 0.0, 9.0])
    scaled = _run(clean(llama), task_for(subspace, start=given, knobs=knobs), examples)[0]
    np.testing.assert_allclose(scaled.values, plain.values * np.array([1.0, 0.5, 2.0, 0.0]), rtol=1e-6)
    assert plain.values[0] == pytest.approx(plain.values[2], rel=1e-2)
    for start in (_listed([3, 60, 3]), _listed([3, 60, 3, 1], k=128)):
        with pytest.raises(ValueError, match="a task must list 4 directions out of 64, got"):
            _run(clean(llama), task_for(subspace, start=start, knobs=knobs), examples)


# What theory says of the estimators


@contextmanager
def _linear_loss(monkeypatch: pytest.MonkeyPatch, gradient: Mapping[str, Vector]) -> Iterator[None]:
    """A loss g . w over masked places, in float64, in place of a model's."""

    def forward(resident: Resident, batch: Batch) -> torch.Tensor:
        read = values_of(resident, Scope.MASK)
        return torch.tensor(
            batch.tokens * sum(float(g @ read[name].astype(np.float64)) for name, g in gradient.items())
        )

    with monkeypatch.context() as patch:
        patch.setattr(module, "forward_logits", forward)
        patch.setattr(module, "loss_sum", lambda value, labels: value)
        yield


def _sample(
    llama: Resident, examples: list[Example], monkeypatch: pytest.MonkeyPatch, family: str, d: int, k: int, count: int
) -> tuple[Subspace, dict[str, Vector], Scalars]:
    """`count` scalars of one linear loss over d masked weights."""
    half = {"model.norm.weight": torch.arange(d // 2), "model.layers.1.mlp.up_proj.weight": torch.arange(d // 2) * 7}
    resident = masked(llama, half)
    subspace = space(family, k, Scope.MASK, mask=resident.spec.mask)
    generator = np.random.Generator(np.random.Philox(key=3))
    gradient = {f"{name}#mask": generator.normal(size=d // 2) for name in resident.mask}
    with _linear_loss(monkeypatch, gradient):
        knobs = {"exchange": "gradient", "steps": count, "eps": 2.0**-6, "batch_size": 1}
        scalars = _run(resident, task_for(subspace, knobs=knobs), examples[:1])[0]
    clean(resident)
    return subspace, gradient, scalars


def _within(samples: NDArray[np.float64], wanted: Vector | float, errors: float = 4.5) -> None:
    """The mean of samples [n, ...] lies within so many of its standard errors."""
    error = samples.std(0, ddof=1) / np.sqrt(len(samples))
    assert (np.abs(samples.mean(0) - wanted) <= errors * error).all()


@pytest.mark.parametrize("family", POOLS)
def test_a_pool_s_estimate_is_unbiased_with_the_variance_of_its_family(
    llama: Resident, examples: list[Example], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """E[(z.g) z] = g, E|(z.g) z|^2 = d |g|^2 for signs and (d + 2) |g|^2 for normals, within 4.5 standard errors."""
    d, count = 8, 1500
    subspace, gradient, scalars = _sample(llama, examples, monkeypatch, family, d, 2**16, count)
    g = np.concatenate(list(gradient.values()))
    assert scalars.indices is not None
    directions = np.array([np.concatenate([z(subspace, int(i), n, d // 2) for n in gradient]) for i in scalars.indices])
    slopes = -count * scalars.values.astype(np.float64)
    np.testing.assert_allclose(slopes, directions @ g, atol=1e-3)
    estimates = slopes[:, None] * directions
    _within(estimates, g)
    _within(np.square(estimates).sum(1), (d if family == "rademacher" else d + 2) * float(g @ g))
    spread = np.square(estimates).sum(1).mean() / float(g @ g)
    assert abs(spread - (d if family == "rademacher" else d + 2)) < abs(
        spread - (d + 2 if family == "rademacher" else d)
    )


def test_a_sketch_s_estimate_is_unbiased_with_the_variance_of_k(
    llama: Resident, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """E[(v.S'g) v] = S'g and E|(v.S'g) v|^2 = K |S'g|^2, K = 16 buckets for 64 weights."""
    k, count = 16, 1500
    subspace, gradient, scalars = _sample(llama, examples, monkeypatch, "sketch", 64, k, count)
    folded = fold(subspace, gradient)
    vectors = np.array([sign_vector(scalars.seed, t, k) for t in range(count)]).astype(np.float64)
    slopes = -count * scalars.values.astype(np.float64)
    np.testing.assert_allclose(slopes, vectors @ folded, atol=1e-2)
    estimates = slopes[:, None] * vectors
    _within(estimates, folded)
    _within(np.square(estimates).sum(1), k * float(folded @ folded))
    np.testing.assert_allclose(-contribution(scalars, subspace), estimates.mean(0), rtol=1e-5, atol=1e-5)


# Faults of published code


@contextmanager
def _watch(monkeypatch: pytest.MonkeyPatch, seen: list[list[list[int]]]) -> Iterator[None]:
    """Note the ids of every forward pass."""

    def forward(resident: Resident, batch: Batch) -> torch.Tensor:
        seen.append(batch.ids.tolist())
        return forward_logits(resident, batch)

    with monkeypatch.context() as patch:
        patch.setattr(module, "forward_logits", forward)
        yield


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_task_gives_the_same_bits(llama: Resident, examples: list[Example], family: str) -> None:
    task = task_for(space(family), knobs={"steps": 3, "directions": 2, "batch_size": 2})
    found = [_run(llama, task, examples)[0] for _ in range(2)]
    found.append(_run(clean(llama), task, examples)[0])
    for other in found[1:]:
        np.testing.assert_array_equal(found[0].values, other.values)
        np.testing.assert_array_equal(found[0].indices, other.indices)
        assert other.seed == found[0].seed
    clean(llama)


@pytest.mark.parametrize("family", FAMILIES)
def test_data_and_directions_are_drawn_apart(
    llama: Resident, examples: list[Example], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Fault 4, a shared generator: here no global state moves, and neither draw depends on the other's seeds."""
    knobs = {"steps": 4, "batch_size": 2, "exchange": "gradient", "draw_seed": 7}
    task, order = task_for(space(family), knobs=knobs), {}
    torch.manual_seed(3)
    np.random.seed(3)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index]
    others = {
        "same": task,
        "another device": replace(task, device="b"),
        "another round": replace(task, round=2),
        "another subspace": replace(task, subspace=space(family, seed=12)),
        "another draw": replace(task, knobs=knobs | {"draw_seed": 8}),
        "more directions": replace(task, knobs=knobs | {"directions": 3}),
    }
    drawn: dict[str, Scalars] = {}
    for name, other in others.items():
        seen: list[list[list[int]]] = []
        clean(llama).rebuilt.layerwise = True  # known to run so: no trial pass
        with _watch(monkeypatch, seen):
            drawn[name] = _run(llama, other, examples)[0]
        order[name] = [ids for ids, before in zip(seen, [None, *seen], strict=False) if ids != before]
    clean(llama)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]  # type: ignore[index]
    for name in ("another subspace", "another draw", "more directions"):
        assert order[name] == order["same"]
    for name in ("another device", "another round"):
        assert order[name] != order["same"]
        np.testing.assert_array_equal(drawn[name].indices, drawn["same"].indices)
        assert drawn[name].seed == drawn["same"].seed
        assert not np.array_equal(drawn[name].values, drawn["same"].values)
    if family != "sketch":
        assert drawn["more directions"].indices is not None
        np.testing.assert_array_equal(drawn["more directions"].indices[:4], drawn["same"].indices)
        assert not np.array_equal(drawn["another draw"].indices, drawn["same"].indices)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_round_and_device_has_directions_of_its_own(family: str) -> None:
    """Fault 5: with the seeds that a server deals out, two lists agree no more than chance says."""
    k, count = 4096, 200
    seeds = [derive_seed(1, "task", round, device) for round in (1, 2, 3) for device in ("a", "b", "c")]
    if family == "sketch":
        vectors = [np.concatenate([sign_vector(seed, t, 64) for t in range(20)]) for seed in seeds]
        assert all(abs(float(x @ y)) < 4.5 * np.sqrt(x.size) for x, y in combinations(vectors, 2))
        return
    subspace = space(family, k)
    lists = [module.listed(task_for(subspace, seed=seed), k, count)[0] for seed in seeds]
    assert len({tuple(one.tolist()) for one in lists}) == 9
    for x, y in combinations(lists, 2):
        assert int((x == y).sum()) <= 3  # of 200, each with a chance of 1 / 4096
        assert len(np.intersect1d(x, y)) < 30  # about 200^2 / 4096 = 10 are expected
    pooled = np.concatenate(lists)
    assert abs(pooled.mean() - (k - 1) / 2) < 4.5 * k / np.sqrt(12 * pooled.size)
    np.testing.assert_array_equal(lists[0], draw_indices(derive_seed(seeds[0], "directions"), k, count))


def test_tiny_steps_are_not_lost(sixteen: Resident) -> None:
    """Fault 1: 500 steps of 3e-7 in 16 bits. In place, more than half of the way rounds away; here nothing does.

    The master is within 500 float32 roundings of the exact sum, and the model rebuilt from the coefficients is the
    exact sum rounded once (and, where that is a tie to a few parts in 2^24, its neighbour).
    """
    subspace, steps, rho = space("rademacher"), 500, np.float32(3e-7)
    base = values_of(clean(sixteen), Scope.ALL)
    dtype = getattr(torch, sixteen.config.dtype)
    keys, c = pool_keys(subspace.seed, np.array([7])), np.zeros(64)
    c[7] = steps * float(rho)
    with torch.inference_mode(), Place(sixteen, subspace, None, "v") as place:
        place.begin()
        for _ in range(steps):
            place.step(keys, np.array([rho]))
        masters = {name: master.numpy().copy() for name, master in place.masters.items()}
        place._rebuilt.write(place.parts, version_fill(subspace, c))
        rebuilt = values_of(sixteen, Scope.ALL)
    clean(sixteen)
    way = lost_in_place = lost_here = 0.0
    for name, start in base.items():
        direction = z(subspace, 7, name, start.size)
        exact = start.astype(np.float64) + c[7] * direction
        naive, step = torch.from_numpy(start).to(dtype), torch.from_numpy((rho * direction).astype(np.float32))
        for _ in range(steps):
            naive = (naive.float() + step).to(dtype)
        way += float(np.abs(exact - start).sum())
        lost_in_place += float(np.abs(naive.float().numpy() - exact).sum())
        lost_here += float(np.abs(masters[name] - exact).sum())
        largest = np.abs(exact).max()
        assert np.abs(masters[name] - exact).max() <= steps * 2.0**-24 * largest
        wanted = torch.from_numpy(exact).to(torch.float32).to(dtype).float().numpy()
        odd = rebuilt[name] != wanted
        assert odd.mean() < 2e-3
        np.testing.assert_allclose(rebuilt[name][odd], wanted[odd], rtol=2.0**-7)
    assert lost_in_place > 0.5 * way
    assert lost_here < 5e-3 * way


@pytest.mark.parametrize("family", FAMILIES)
def test_a_16_bit_model_trains_to_what_its_scalars_say(sixteen: Resident, examples: list[Example], family: str) -> None:
    """The rebuilt model is round(W0 + sum of the steps), one rounding for all of them."""
    subspace = space(family)
    knobs = {"steps": 12, "lr": 1e-6, "eps": 1e-2, "batch_size": 2}
    got = _run(clean(sixteen), task_for(subspace, knobs=knobs), examples)[0]
    c = contribution(got, subspace)
    base = values_of(clean(sixteen), Scope.ALL)
    with Place(sixteen, subspace, None, "v") as place:
        place.rebuild(c)
    rebuilt = values_of(sixteen, Scope.ALL)
    clean(sixteen)
    assert 0 < np.abs(got.values).max() < 1e-3
    for name, start in base.items():
        exact = start.astype(np.float64) + delta(subspace, name, start.size, c)
        wanted = torch.from_numpy(exact).float().to(getattr(torch, sixteen.config.dtype)).float().numpy()
        odd = rebuilt[name] != wanted
        assert odd.mean() < 2e-3
        np.testing.assert_allclose(rebuilt[name][odd], wanted[odd], rtol=2.0**-7)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_two_hundred_passes_leave_no_drift(
    classifier: Resident, examples: list[Example], family: str, scope: Scope
) -> None:
    """Fault 3: perturbing and taking away again moves float32 weights; here they come back in every bit."""
    resident, subspace = in_scope(classifier, scope, family)
    before, count = weights(resident), 100 if scope == Scope.ALL else 10
    start = next(iter(values_of(resident, Scope.ALL).values()))
    knobs = {"exchange": "gradient", "steps": count, "batch_size": 1}
    with Place(resident, subspace, None, "v") as place:
        place.rebuild()
        version = {part.name: part.read().clone() for part in place.parts}
        zeroth_order(place, data_of(resident, examples), task_for(subspace, knobs=knobs))
        place.rebuild()
        assert same(version, {part.name: part.read().clone() for part in place.parts})
    clean(resident)
    assert same(before, weights(resident))
    drifted, shift = start.copy(), np.float32(1e-3) * z(space("gaussian"), 0, "w", start.size).astype(np.float32)
    for _ in range(count):
        drifted += shift
        drifted -= np.float32(2) * shift
        drifted += shift
    assert np.abs(drifted - start).max() > 1e-9


# What is rebuilt from scalars


@contextmanager
def _walk_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[module.SketchWalk]]:
    walks: list[module.SketchWalk] = []

    class Kept(module.SketchWalk):
        def __init__(self, place: Place, task: Task) -> None:
            super().__init__(place, task)
            walks.append(self)

    with monkeypatch.context() as patch:
        patch.setattr(module, "SketchWalk", Kept)
        yield walks


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", ["llama", "classifier"])
def test_a_sketch_is_rebuilt_to_the_bits_that_a_device_had(
    kind: str,
    scope: Scope,
    request: pytest.FixtureRequest,
    examples: list[Example],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """W0 + S (c_v + sum_t rho_t v_t), from the scalars alone, in float32."""
    resident, subspace = in_scope(request.getfixturevalue(kind), scope)
    held, found = point(subspace), []
    task = task_for(subspace, knobs={"steps": 7, "directions": 2, "lr": 1e-2})
    with _walk_of(monkeypatch) as walks, Place(resident, subspace, held, "v") as place:
        scalars, _ = zeroth_order(place, data_of(resident, examples), task)
    np.testing.assert_array_equal(place.start, held.values())
    for c in (walks[0].c, held.values() + contribution(scalars, subspace)):
        with Place(resident, subspace, None, "v") as place:
            place.rebuild(c)
            found.append({part.name: part.read().clone() for part in place.parts})
        clean(resident)
    assert same(found[0], found[1])
    assert np.abs(walks[0].c - held.values()).max() > 1e-4


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("family", POOLS)
def test_a_pool_is_rebuilt_within_a_rounding_for_each_step(
    classifier: Resident, examples: list[Example], family: str, scope: Scope
) -> None:
    """|trained - rebuilt| <= T roundings of the weights on the way + K + 1 of the sum's, each 2^-24 of its size."""
    resident, subspace = in_scope(classifier, scope, family, 16)
    steps = 10
    held = point(subspace, only=3)
    with Place(resident, subspace, held, "v") as place:
        scalars, _ = zeroth_order(
            place, data_of(resident, examples), task_for(subspace, knobs={"steps": steps, "lr": 1e-2})
        )
        trained = {part.name: place.masters.get(part.name, part.read()).numpy().copy() for part in place.parts}
    clean(resident)
    c = held.values() + contribution(scalars, subspace)
    with Place(resident, subspace, None, "v") as place:
        place.rebuild(c)
        rebuilt = {part.name: part.read().numpy().copy() for part in place.parts}
    clean(resident)
    moved = 0.0
    for name, value in trained.items():
        reach = np.abs(value) + 5.8 * (np.abs(held.values()).sum() + np.abs(scalars.values).sum())
        assert (np.abs(value - rebuilt[name]) <= (steps + 2 * 16 + 1) * 2.0**-24 * reach).all()
        moved = max(moved, float(np.abs(delta(subspace, name, value.size, c)).max()))
    assert moved > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_scalars_carry_the_learning_rate(llama: Resident, examples: list[Example], family: str) -> None:
    """Fault 6: two rounds at two rates. Their sum rebuilds what was trained; one rate for both would not."""
    subspace = space(family, 16)
    first = _run(clean(llama), task_for(subspace, knobs={"steps": 3, "lr": 2e-2}), examples)[0]
    sent, left = rounded(contribution(first, subspace), subspace, 30, zero(subspace))
    assert np.abs(left).max() < 1e-9
    total = plus(sent, zero(subspace))
    task = task_for(subspace, round=2, seed=6, knobs={"steps": 3, "lr": 2e-3})
    with Place(clean(llama), subspace, total, "v1") as place:
        second, _ = zeroth_order(place, data_of(llama, examples), task)
        trained = values_of(llama, Scope.ALL)
    c = contribution(first, subspace) + contribution(second, subspace)
    wrong = contribution(first, subspace) / 10 + contribution(second, subspace)
    found = []
    for coefficients in (c, wrong):
        with Place(clean(llama), subspace, None, "v") as place:
            place.rebuild(coefficients)
        found.append(values_of(llama, Scope.ALL))
    if family == "sketch":  # a sketch's model in memory is W0: trained is where its scalars lead
        with Place(clean(llama), subspace, None, "v") as place:
            place.rebuild(total.values() + contribution(second, subspace))
        trained = values_of(llama, Scope.ALL)
    clean(llama)
    for name, value in trained.items():
        np.testing.assert_allclose(found[0][name], value, atol=1e-6)
    assert max(float(np.abs(found[1][name] - value).max()) for name, value in trained.items()) > 1e-4
