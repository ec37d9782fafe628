"""The bandit of (ratio, rank): leaves partition the box, limits hold, runs resume exactly, and regret flattens."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.strategies.bandit import Arm, BanditState, Box, DiscountedUCB, Limits
from fedloom.strategies.bandit_baselines import FixedArm, RandomArm
from fedloom.strategies.bandit_reward import Reward, best_fixed, regret

BOX = Box(max_ratio=0.8, max_rank=64)
POLICIES = {
    "tree": DiscountedUCB(box=BOX),
    "published": DiscountedUCB(box=BOX, exploration=1.0, prior=0.0, theta=0.15, split_after=1),
    "grid": DiscountedUCB(box=BOX, cells=(4, 4), split=False),
    "random": RandomArm(box=BOX),
    "fixed": FixedArm(ratio=0.1, rank=48, box=BOX),
}


def need(ratio, rank):
    return 100 * (1 - ratio) + rank


def mean_reward(ratio, rank, at=0.0):
    """One smooth peak, at ratio 0.6 and rank 8 and then moving: 1 there, 0 far away."""
    far = ((ratio - 0.6 + 0.3 * at) / 0.35) ** 2 + (np.log2(rank / 8) / 3) ** 2
    return np.exp(-far)


def play(policy, seed, rounds, drift=0.0, state=None, start=0, limits=None):
    """The arms, the expected rewards and the state, with noise of 0.1 that depends on the round alone."""
    state = state or policy.init("d", seed)
    arms, earned = [], []
    for t in range(start, rounds):
        arm = policy.choose(state, t, limits or Limits(need=need, memory=200))
        mean = float(mean_reward(arm.ratio, arm.rank, drift * t / rounds))
        noise = 0.1 * np.random.default_rng([seed, t]).standard_normal()
        state = policy.observe(state, t, arm, float(np.clip(mean + noise, 0, 1)))
        arms.append(arm)
        earned.append(mean)
    return arms, np.array(earned), state


@pytest.mark.parametrize("name", POLICIES)
def test_a_run_that_stops_and_resumes_from_json_and_arrays_equals_one_that_does_not(name):
    policy = POLICIES[name]
    whole, _, end = play(policy, 3, 60)
    half, _, state = play(policy, 3, 30)
    restored = BanditState.restore(
        {k: v.copy() for k, v in state.tensors().items()}, json.loads(json.dumps(state.meta()))
    )
    rest, _, again = play(policy, 3, 60, state=restored, start=30)
    assert half + rest == whole
    assert again.meta() == end.meta()
    for key, value in end.tensors().items():
        np.testing.assert_array_equal(again.tensors()[key], value)
        assert again.tensors()[key].dtype == value.dtype


def test_choosing_is_a_function_of_seed_device_and_round():
    policy = POLICIES["random"]
    arms = {(d, s, t): policy.choose(policy.init(d, s), t, Limits()) for d in "ab" for s in (0, 1) for t in range(3)}
    assert len({(arm.ratio, arm.rank) for arm in arms.values()}) == len(arms)
    np.random.default_rng(0)
    assert policy.choose(policy.init("a", 1), 2, Limits()) == arms["a", 1, 2]


def count_inside(leaves, ratio, rank):
    top = np.where(leaves[:, 1] == BOX.max_ratio, ratio <= leaves[:, 1], ratio < leaves[:, 1])
    return int(((ratio >= leaves[:, 0]) & top & (rank >= leaves[:, 2]) & (rank <= leaves[:, 3])).sum())


STEPS = st.lists(
    st.tuples(st.floats(0, 0.8), st.integers(1, 64), st.floats(0, 1), st.booleans()), min_size=1, max_size=60
)


@settings(max_examples=60, deadline=None)
@given(STEPS, st.sampled_from(["tree", "published", "grid"]), st.floats(0, 0.8), st.integers(1, 64))
def test_leaves_are_disjoint_and_cover_the_box_after_any_arms(steps, name, ratio, rank):
    policy = POLICIES[name]
    state = policy.init("d", 0)
    for t, (at, r, reward, crashed) in enumerate(steps):
        state = policy.observe(state, t, Arm(ratio=at, rank=r, need=1e9), reward, out_of_memory=crashed)
    points = [(ratio, rank), *((at, r) for at, r, _, _ in steps)]
    points += [(x, k) for x in state.leaves[:, :2].ravel() for k in (1, 64, rank)]
    assert {count_inside(state.leaves, x, k) for x, k in points} == {1}
    area = (state.leaves[:, 1] - state.leaves[:, 0]) * (state.leaves[:, 3] - state.leaves[:, 2] + 1)
    assert area.sum() == pytest.approx(0.8 * 64)
    counts, _ = policy.statistics(state, len(steps))
    assert counts.sum() == pytest.approx(sum(policy.discount ** (len(steps) - t) for t in range(len(steps))))


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(list(POLICIES)),
    st.floats(22, 170),
    st.floats(0, 0.8),
    st.floats(0, 1),
    st.integers(0, 10**6),
    st.lists(st.booleans(), min_size=3, max_size=12),
)
def test_no_arm_breaks_a_limit(name, memory, floor, ceiling, seed, crashes):
    policy, ceiling = POLICIES[name], max(floor, ceiling)
    state = policy.init("phone", seed)
    limits = Limits(need=need, memory=memory, ratio_floor=floor, ratio_ceiling=ceiling, rank_ceiling=40)
    bound = math.inf
    for t, crashed in enumerate(crashes):
        smallest = need(min(0.8, ceiling), 1)
        if smallest > memory or smallest >= bound:
            with pytest.raises(ValueError, match="no arm fits device phone: the smallest need"):
                policy.choose(state, t, limits)
            return
        arm = policy.choose(state, t, limits)
        assert floor <= arm.ratio <= min(ceiling, 0.8)
        assert 1 <= arm.rank <= 40
        assert arm.need == need(arm.ratio, arm.rank) <= memory
        assert arm.need < bound
        bound = min(bound, arm.need) if crashed else bound
        state = policy.observe(state, t, arm, 0.5, out_of_memory=crashed)
        assert state.memory_bound == bound


def test_needs_in_steps_and_of_any_shape_are_respected():
    for shape in (
        lambda x, k: 10 * math.ceil(8 * (1 - x)) + 7 * (k // 8),
        lambda x, k: 50 * abs(x - 0.7) + abs(k - 20),
    ):
        for name, policy in POLICIES.items():
            state = policy.init("d", 1)
            for t in range(30):
                try:
                    arm = policy.choose(state, t, Limits(need=shape, memory=45))
                except ValueError:  # a shape that does not fall and grow may look like nothing fits
                    break
                assert shape(arm.ratio, arm.rank) <= 45, name
                state = policy.observe(state, t, arm, 0.5)


def test_running_out_of_memory_earns_nothing_and_is_learned():
    policy = DiscountedUCB(box=BOX)
    state = policy.observe(policy.init("d", 0), 0, Arm(ratio=0.1, rank=8, need=98.0), 1.0, out_of_memory=True)
    assert (state.rewards[0], state.memory_bound) == (0.0, 98.0)
    state = policy.observe(state, 1, Arm(ratio=0.5, rank=8, need=58.0), 1.0, out_of_memory=True)
    state = policy.observe(state, 2, Arm(ratio=0.3, rank=8, need=78.0), 1.0, out_of_memory=True)
    assert state.memory_bound == 58.0
    with pytest.raises(
        ValueError, match=r"device d: .* ratio 0\.4 with rank 1, is 61 bytes, its memory is 90, and it ran out at 58"
    ):
        policy.choose(state, 3, Limits(need=need, memory=90, ratio_ceiling=0.4))
    with pytest.raises(ValueError, match=r"device d must have a ratio in \[0\.9, 0\.8\]"):
        policy.choose(state, 3, Limits(need=need, memory=90, ratio_floor=0.9))


def test_the_fixed_arm_moves_as_little_as_fitting_needs():
    policy = FixedArm(ratio=0.1, rank=16, box=BOX)
    state = policy.init("d", 0)
    assert policy.choose(state, 0, Limits(need=need, memory=200)) == Arm(ratio=0.1, rank=16, need=106.0)
    arm = policy.choose(state, 0, Limits(need=need, memory=56))
    assert (arm.rank, arm.ratio) == (16, pytest.approx(0.6))
    arm = policy.choose(state, 0, Limits(need=need, memory=30))
    assert (arm.rank, arm.ratio) == (1, pytest.approx(0.71))
    state = policy.observe(state, 0, Arm(ratio=0.1, rank=16, need=100.0), 0.0, out_of_memory=True)
    assert policy.choose(state, 1, Limits(need=need, memory=200)).need == pytest.approx(95.0)


def test_the_index_is_the_equation():
    policy = DiscountedUCB(box=BOX, discount=0.9, exploration=1.0, cells=(2, 1), split=False)
    state = policy.init("d", 0)
    for t, (ratio, reward) in enumerate([(0.1, 0.2), (0.7, 0.9), (0.2, 0.4)]):
        state = policy.observe(state, t, Arm(ratio=ratio, rank=4), reward)
    n = [0.9**4 + 0.9**2, 0.9**3]
    r = [(0.9**4 * 0.2 + 0.9**2 * 0.4) / n[0], 0.9]
    want = [m + math.sqrt(2 * math.log(sum(n)) / c) for m, c in zip(r, n, strict=True)]
    np.testing.assert_allclose(policy.indices(state, 4), want, rtol=1e-12)
    assert policy.choose(state, 4, Limits()).ratio >= 0.4
    assert np.isinf(policy.indices(policy.init("d", 0), 0)).all()


def test_what_weighs_nothing_is_forgotten_and_the_leaves_stop_splitting():
    policy = DiscountedUCB(box=BOX, discount=0.9)
    _, _, state = play(policy, 0, 300)
    assert len(state.rounds) <= math.log(1e-6) / math.log(0.9) + 1
    widths = np.array([BOX.widths(leaf) for leaf in state.leaves])
    assert widths.max(1).min() > policy.theta / 4
    assert len(state.leaves) < 300


def lost(policy, seeds, rounds, drift):
    """Cumulative regret against the best fixed arm of a fine grid, a row for each seed."""
    ratio, rank = (x.ravel() for x in np.meshgrid(np.linspace(0, 0.8, 33), np.arange(1, 65), indexing="ij"))
    means = np.stack([mean_reward(ratio, rank, drift * t / rounds) for t in range(rounds)])
    return np.stack([regret(means, play(policy, seed, rounds, drift)[1]) for seed in range(seeds)])


@pytest.mark.parametrize("drift", [0.0, 1.0])
def test_regret_grows_sublinearly_and_below_random_and_fixed(drift):
    rounds = 240
    curves = {name: lost(POLICIES[name], 5, rounds, drift).mean(0) for name in ("tree", "random", "fixed", "grid")}
    tree = curves["tree"]
    assert tree[-1] < 0.5 * min(curves["random"][-1], curves["fixed"][-1])
    assert tree[-1] < (1.15 if drift else 0.9) * curves["grid"][-1]  # under drift about level
    assert tree[-1] - tree[rounds // 2] < 0.7 * tree[rounds // 2]
    t = np.arange(20, rounds)
    slope = np.polyfit(np.log(t), np.log(np.maximum(tree[t], 1e-3)), 1)[0]
    assert slope < 0.85
    random = curves["random"]
    assert np.polyfit(np.log(t), np.log(random[t]), 1)[0] > 0.9


def taught(policy, rounds, devices=8, good=lambda arm: 4 <= arm.rank <= 12):
    """A fleet's bandit after rounds in which an arm earned 0.9 where `good`, else 0.1."""
    fleet = policy.init("", 0)
    for t in range(rounds):
        evidence = policy.evidence(fleet, t)
        for device in range(devices):
            arm = policy.choose(policy.init(f"d{device}", 0), t, Limits(), evidence)
            fleet = policy.observe(fleet, t, arm, 0.9 if good(arm) else 0.1)
    return fleet


def test_a_new_device_starts_from_what_the_fleet_knows():
    policy = DiscountedUCB(box=BOX)
    evidence = policy.evidence(taught(policy, 12), 12)
    told = [policy.choose(policy.init(f"new{i}", 1), 12, Limits(), evidence).rank for i in range(40)]
    alone = [policy.choose(policy.init(f"new{i}", 1), 12, Limits()).rank for i in range(40)]
    assert sum(4 <= rank <= 12 for rank in told) > 30
    assert sum(4 <= rank <= 12 for rank in alone) < 20


def test_a_devices_own_arms_outweigh_the_fleets():
    policy = DiscountedUCB(box=BOX)
    evidence = policy.evidence(taught(policy, 12), 12)
    state = policy.init("odd", 3)
    for t in range(12, 40):
        arm = policy.choose(state, t, Limits(), evidence)
        state = policy.observe(state, t, arm, 0.9 if arm.rank > 24 else 0.1)
    assert np.mean(state.ranks[-10:] > 24) >= 0.8


def test_bounds_with_a_fleet_are_the_equation():
    policy = DiscountedUCB(box=BOX, cells=(2, 1), split=False, prior=0.5, share=0.25, most=1.5, exploration=0.2)
    fleet, state = policy.init("", 0), policy.init("d", 0)
    for reward in (0.2, 0.4, 0.6):
        fleet = policy.observe(fleet, 1, Arm(ratio=0.1, rank=4), reward)
    for _ in range(20):
        fleet = policy.observe(fleet, 1, Arm(ratio=0.7, rank=4), 0.3)
    state = policy.observe(state, 1, Arm(ratio=0.1, rank=9), 1.0)
    low, high = policy.indices(state, 2, policy.evidence(fleet, 2))
    own, others, far = 0.98, 0.25 * 3 * 0.98, 1.5  # the second is cut from 0.25 x 20 x 0.98
    spread = 2 * math.log(own + others + far)
    assert low == pytest.approx((own * 1.0 + others * 0.4) / (own + others) + 0.2 * math.sqrt(spread / (own + others)))
    assert high == pytest.approx(0.3 + 0.2 * math.sqrt(spread / far))
    lone = policy.indices(state, 2, policy.evidence(policy.init("", 0), 2))
    np.testing.assert_array_equal(lone, policy.indices(state, 2))


def test_a_bandit_remembers_its_newest_arms_alone(monkeypatch):
    monkeypatch.setattr("fedloom.strategies.bandit.REMEMBERED", 5)
    state = RandomArm(box=BOX).init("d", 0)
    for rank in range(1, 9):
        state = DiscountedUCB(box=BOX).observe(state, 3, Arm(ratio=0.1, rank=rank), 0.5)
    np.testing.assert_array_equal(state.ranks, [4, 5, 6, 7, 8])


@given(st.floats(-2, 3), st.floats(0, 1), st.floats(0.01, 50), st.floats(0.01, 50), st.floats(0, 4))
def test_a_reward_is_the_equation_within_its_bounds(drop, progress, seconds, median, rho):
    value = Reward(rho=rho, scale=2.0)(drop, progress, seconds, median)
    gain = min(max(drop / 2, 0), 1)
    assert value == pytest.approx(gain * (1 + rho * progress) / (1 + rho) / (1 + abs(seconds - median) / median))
    assert 0 <= value <= 1


def test_every_term_of_the_reward_can_be_left_out():
    args = (0.5, 0.5, 2.0, 1.0)
    full = Reward()(*args)
    assert full == pytest.approx(0.5 * 0.75 * 0.5)
    assert Reward(loss=False)(*args) == pytest.approx(0.75 * 0.5)
    assert Reward(progress=False)(*args) == pytest.approx(0.5 * 0.5)
    assert Reward(time=False)(*args) == pytest.approx(0.5 * 0.75)
    assert Reward(loss=False, progress=False, time=False)(*args) == 1.0
    assert Reward()(math.nan, 0.5, 1.0, 1.0) == 0.0


def test_regret_and_idle_time():
    means = np.array([[0.5, 1.0, 0.9], [0.5, 0.0, 0.6], [0.5, -np.inf, 0.2]])
    assert best_fixed(means) == 2
    np.testing.assert_allclose(regret(means, np.array([0.5, 0.6, 0.0])), [0.4, 0.4, 0.6])
    with pytest.raises(ValueError, match="an arm must fit in every round"):
        regret(np.full((2, 2), -np.inf), np.zeros(2))
    with pytest.raises(ValueError, match=r"means must be \[T, A\]"):
        regret(means, np.zeros(2))


def test_nonsense_is_refused():
    policy = DiscountedUCB(box=BOX)
    state = policy.observe(policy.init("d", 0), 5, Arm(ratio=0.1, rank=2), 0.5)
    for make, message in (
        (lambda: Box(max_ratio=0), r"max_ratio must be in \(0, 1\]"),
        (lambda: DiscountedUCB(discount=1.1), r"discount and theta must be in \(0, 1\], got 1\.1"),
        (lambda: DiscountedUCB(split_after=0), "split_after and cells >= 1"),
        (lambda: DiscountedUCB(share=1.5), r"share must be in \[0, 1\], got 1\.5"),
        (lambda: FixedArm(ratio=0.9, rank=1), "ratio and rank must be in"),
        (lambda: Reward(scale=0), "scale must be > 0"),
        (lambda: Reward()(0.1, 2.0, 1.0, 1.0), r"progress must be in \[0, 1\] and seconds > 0, got 2\.0"),
        (lambda: policy.observe(state, 6, Arm(ratio=0.1, rank=2), 1.5), r"a reward must be in \[0, 1\], got 1\.5"),
        (lambda: policy.observe(state, 6, Arm(ratio=0.9, rank=2), 0.5), "an arm must be in the box"),
        (lambda: policy.choose(state, 4, Limits()), "round must be >= 5, the last one observed, got 4"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
