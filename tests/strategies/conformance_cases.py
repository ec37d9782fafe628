"""The table of strategies that conformance is checked of, and a run of each to check it on."""

import numpy as np
from toy_fleet import PRUNABLE, SPEC, STEPS, K, answers, dense_of, reports

from fedloom.strategies.base import Scaling
from fedloom.strategies.registry import build

FINE = {"k": K, "downlink_bits": 40}  # rounding is tested in test_coefficients.py
MIXED, EQUAL = (8, 4, 2, 1, 6), (4, 4, 4, 4, 4)
CASES = {
    "fedloom": ("fedloom", {"rank_cap": 20}, MIXED),
    "fedloom capped": ("fedloom", {"rank_cap": 3}, MIXED),
    "fedloom momentum": ("fedloom", {"rank_cap": 3, "server_optimizer": "fedavgm"}, MIXED),
    "fedloom energy, residual cut": ("fedloom", {"rank_cap": 8, "energy": 0.8, "residual_rank": 4}, MIXED),
    "flora": ("flora", {}, MIXED),
    "flora clipped": ("flora", {"clip_norm": 3.0}, MIXED),
    "flora momentum": ("flora", {"server_optimizer": "fedavgm"}, MIXED),
    "flexlora": ("flexlora", {}, MIXED),
    "flexlora clipped, momentum": ("flexlora", {"clip_norm": 3.0, "server_optimizer": "fedavgm"}, MIXED),
    "hetlora": ("hetlora", {}, MIXED),
    "hetlora by examples": ("hetlora", {"weights": "examples"}, MIXED),
    "hetlora fedadam": ("hetlora", {"server_optimizer": "fedadam", "weights": "examples"}, MIXED),
    "fedit": ("fedit", {}, EQUAL),
    "fedit fedadam": ("fedit", {"server_optimizer": "fedadam"}, EQUAL),
    "fedit clipped": ("fedit", {"clip_norm": 2.0}, EQUAL),
    "ffa": ("ffa", {}, EQUAL),
    "ffa fedavgm": ("ffa", {"server_optimizer": "fedavgm"}, EQUAL),
    "fedkseed": ("fedkseed", FINE, MIXED),
    "fedkseed gaussian, adapters": ("fedkseed", FINE | {"family": "gaussian", "scope": "lora"}, MIXED),
    "fedkseed clipped, momentum": ("fedkseed", FINE | {"clip_norm": 1.0, "server_optimizer": "fedavgm"}, MIXED),
    "fedkseed_pro": ("fedkseed_pro", FINE | {"draws": STEPS}, MIXED),
    "fedkseed_pro corrected": ("fedkseed_pro", FINE | {"draws": STEPS, "correct": True}, MIXED),
    "decomfl": ("decomfl", FINE, MIXED),
    "sketch": ("sketch", FINE, MIXED),
    "sketch mixed fleet": ("sketch", FINE | {"exchange": "gradient"}, MIXED),
    "sketch fedadam": ("sketch", FINE | {"exchange": "gradient", "server_optimizer": "fedadam"}, MIXED),
    "fedspine": ("fedspine", {"rank_cap": 20, "ramp": 2, "target": 0.35, "masks": "own"}, MIXED),
    "fedspine clipped, momentum": (
        "fedspine",
        {"clip_norm": 3.0, "server_optimizer": "fedavgm", "masks": "own"},
        MIXED,
    ),
    "fedspine fixed": ("fedspine", {"policy": "fixed", "ramp": 1, "error_feedback": False, "masks": "own"}, MIXED),
    "fedpipe": ("fedpipe", {"rank_cap": 20}, MIXED),
    "fedpipe clipped, momentum": ("fedpipe", {"clip_norm": 3.0, "server_optimizer": "fedavgm"}, MIXED),
    "local": ("local", {}, MIXED),
}
SEEDS = {name for name in CASES if name.startswith(("fedkseed", "decomfl", "sketch"))}
UNEQUAL = {name for name in CASES if name.startswith(("fedspine", "fedpipe"))}
FORWARD = {"sketch mixed fleet": (1, 3), "sketch fedadam": (0, 1)}
MERGING = {name: case for name, case in CASES.items() if name != "local"}
FACTORS = [name for name in MERGING if name not in SEEDS]
ONE_IS_ALL = ["fedloom", "flora", "flexlora", "hetlora", "fedit", "ffa", "fedspine", "fedpipe"]
ONE_IS_ALL_SEEDS = ["fedkseed", "fedkseed_pro", "decomfl", "sketch"]
WEIGHTED = [name for name in MERGING if name not in ("hetlora", "decomfl")]


def make(case):
    name, options, ranks = CASES[case]
    return build(name, options, Scaling()), ranks


def spec_for(case):
    """The toy model; where devices differ in what they train, the one that says what it costs and can be pruned."""
    return PRUNABLE if case in UNEQUAL else SPEC


def fleet(case, version=0):
    """The devices of a case."""
    return reports(CASES[case][2], version=version, forward=FORWARD.get(case, ()))


def begin(case, rounds=2, dtype=np.float64, seed=0):
    """A strategy, its devices and its state after a few rounds."""
    strategy, _ = make(case)
    spec = spec_for(case)
    rng = np.random.default_rng(seed)
    state = strategy.init(spec, seed, fleet(case))
    for round in range(rounds):
        devices = fleet(case, version=state.version)
        state = strategy.aggregate(state, answers(strategy, state, devices, spec, rng, round, dtype))
    return strategy, fleet(case, version=state.version), state, rng


def model(strategy, state, spec=SPEC):
    return dense_of(strategy.adapter(state), spec)


def same(x, y):
    assert (x.version, x.meta) == (y.version, y.meta)
    assert x.tensors.keys() == y.tensors.keys()
    for name in x.tensors:
        np.testing.assert_array_equal(x.tensors[name], y.tensors[name], err_msg=name)
