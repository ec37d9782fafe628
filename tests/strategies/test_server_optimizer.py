"""FedAvgM and FedAdam against their closed forms."""

from dataclasses import replace

import numpy as np
import pytest
from toy_fleet import SPEC, answers, close, dense_of, exact_mean, merge, noise_payload, reports, update_of

from fedloom.protocols.messages import Payload
from fedloom.strategies.fedit import FedIT
from fedloom.strategies.fedloom import Fedloom
from fedloom.strategies.ffa import FFA
from fedloom.strategies.flexlora import FlexLoRA
from fedloom.strategies.flora import Flora
from fedloom.strategies.hetlora import HetLoRA
from fedloom.strategies.server_optimizer import step

BETA, ETA = 0.8, 0.5
MOMENTUM = {"server_optimizer": "fedavgm", "server_lr": ETA, "server_momentum": BETA}


@pytest.mark.parametrize("strategy", [Flora(**MOMENTUM), Fedloom(rank_cap=24, **MOMENTUM)])
def test_fedavgm_on_products_is_its_closed_form(strategy):
    """After T rounds: x_T = eta sum_t (1 + beta + ... + beta^(T - t)) D_t."""
    rng, state, means = np.random.default_rng(0), strategy.init(SPEC, 0), []
    for round in range(6):
        updates = answers(strategy, state, reports([6, 2, 1]), SPEC, rng, round)
        means.append(exact_mean(updates))
        state = strategy.aggregate(state, updates)
    wanted = {
        name: ETA * sum((1 - BETA ** (6 - t)) / (1 - BETA) * mean[name] for t, mean in enumerate(means))
        for name in means[0]
    }
    close(dense_of(strategy.adapter(state)), wanted, 1e-9)


def test_fedavgm_under_a_cap_still_conserves_the_sum():
    strategy, free = Fedloom(rank_cap=2, **MOMENTUM), Flora(**MOMENTUM)
    rng, s, f = np.random.default_rng(0), Fedloom().init(SPEC, 0), Fedloom().init(SPEC, 0)
    for round in range(5):
        updates = answers(strategy, s, reports([6, 2, 1]), SPEC, rng, round)
        s, f = strategy.aggregate(s, updates), free.aggregate(f, updates)
    residual = {
        name[len("residual/dense/") :]: x for name, x in s.tensors.items() if name.startswith("residual/dense/")
    }
    assert residual.keys() == {"q", "c"}
    close(merge(dense_of(strategy.adapter(s)), Payload(dense=residual)), dense_of(free.adapter(f)), 1e-9)


@pytest.mark.parametrize("kind", [FedIT, FFA, HetLoRA])
@pytest.mark.parametrize("optimizer", ["fedavgm", "fedadam"])
def test_server_optimisers_work_entry_by_entry_on_means(kind, optimizer):
    extra = {"weights": "examples"} if kind is HetLoRA else {}
    plain = kind(rank=3, **extra)
    strategy = replace(
        plain, server_optimizer=optimizer, server_lr=ETA, server_momentum=BETA, server_beta2=0.9, server_tau=0.01
    )
    rng, state = np.random.default_rng(0), strategy.init(SPEC, 0)
    m, v = 0.0, 0.01**2
    for round in range(4):
        updates = answers(strategy, state, reports([3, 3]), SPEC, rng, round)
        x = state.tensors["global/b/q"].astype(float)
        change = plain.aggregate(state, updates).tensors["global/b/q"] - x
        state = strategy.aggregate(state, updates)
        if optimizer == "fedavgm":
            m = BETA * m + change
            x = x + ETA * m
        else:
            m, v = BETA * m + (1 - BETA) * change, 0.9 * v + 0.1 * change**2
            x = x + ETA * m / (np.sqrt(v) + 0.01)
        np.testing.assert_allclose(state.tensors["global/b/q"], x, rtol=1e-10, atol=1e-12)


def test_heads_take_the_same_step():
    strategy = FedIT(rank=2, **MOMENTUM)
    rng, state, wanted, m = np.random.default_rng(0), strategy.init(SPEC, 0), 0.0, 0.0
    for round in range(3):
        updates = answers(strategy, state, reports([2, 2]), SPEC, rng, round)
        m = BETA * m + exact_mean(updates)["head.weight"]
        wanted = wanted + ETA * m
        state = strategy.aggregate(state, updates)
    np.testing.assert_allclose(strategy.adapter(state).dense["head.weight"], wanted, rtol=1e-12)


def test_flexlora_momentum_is_on_the_change_of_the_product():
    strategy = FlexLoRA(rank=20, **MOMENTUM)
    rng, state, x, m = np.random.default_rng(0), strategy.init(SPEC, 0, ()), 0.0, 0.0
    for _ in range(4):
        updates = [update_of(noise_payload(rng, SPEC, r, 2.0), f"d{r}", r) for r in (2, 1)]
        m = BETA * m + exact_mean(updates)["q"] - x
        x = x + ETA * m
        state = strategy.aggregate(state, updates)
        close({"q": strategy.adapter(state).factors["q"].dense()}, {"q": x}, 1e-9)


@pytest.mark.parametrize("kind", [Fedloom, Flora, FlexLoRA])
def test_fedadam_on_products_is_refused(kind):
    with pytest.raises(ValueError, match="must be used with fedit, ffa, hetlora"):
        kind(server_optimizer="fedadam")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"clip_norm": -1.0}, "clip_norm must be >= 0"),
        ({"server_lr": 0.0}, "server_lr and server_tau must be > 0"),
        ({"server_tau": 0.0}, "server_lr and server_tau must be > 0"),
        ({"server_momentum": 1.0}, "must be in \\[0, 1\\)"),
        ({"server_beta2": -0.1}, "must be in \\[0, 1\\)"),
        ({"server_optimizer": "sgd"}, "must be none, fedavgm or fedadam"),
    ],
)
def test_options_out_of_range_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        FedIT(rank=1, **options)


def test_no_optimiser_is_one_step_of_the_mean_change():
    change = {"x": np.ones(3)}
    steps, moments = step(Flora(), change, {})
    assert not moments
    np.testing.assert_array_equal(steps["x"], change["x"])
