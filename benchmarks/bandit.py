"""How much the bandit of (pruning ratio, rank) loses against the best fixed arm, on pretend devices that drift.

    python benchmarks/bandit.py                                    # 400 rounds, 8 devices, 6 seeds: some minutes
    python benchmarks/bandit.py --plot docs/bandit-regret.png      # and the regret curves
    python benchmarks/bandit.py --rounds 100 --seeds 5 --json

Every policy sees the same devices and the same noise. The regret is in expected reward, without the noise, against
the best arm of a 21 x 16 grid that fits in all rounds; intervals are 95%, over seeds. The devices are made up, and
so are their rewards: the figures compare policies, and say nothing about any model.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from fedloom.strategies.bandit import Box, DiscountedUCB, Limits, Policy
from fedloom.strategies.bandit_baselines import FixedArm, RandomArm
from fedloom.strategies.bandit_reward import Reward, best_fixed, regret

Floats = NDArray[np.float64]
BOX = Box(max_ratio=0.8, max_rank=64)
RATIOS = np.linspace(0.0, BOX.max_ratio, 21)
RANKS = np.unique(np.round(np.geomspace(1, BOX.max_rank, 16)).astype(int))
WORLDS = ("stationary", "drifting", "switching")
NOISE = 0.1  # standard deviation of a reward


SHARED = "tree UCB, shared"  # what fedspine does: devices learn from one another


def policies() -> dict[str, Policy]:
    """What is compared; each learns what runs out of memory, and none is told."""
    return {
        SHARED: DiscountedUCB(box=BOX),
        "tree UCB": DiscountedUCB(box=BOX),
        "E-UCB as published": DiscountedUCB(box=BOX, exploration=1.0, prior=0.0, theta=0.15, split_after=1),
        "grid UCB 4 x 4": DiscountedUCB(box=BOX, cells=(4, 4), split=False),
        "grid UCB 8 x 6": DiscountedUCB(box=BOX, cells=(8, 6), split=False),
        "random": RandomArm(box=BOX),
        "fixed at the middle": FixedArm(ratio=0.4, rank=8, box=BOX),
    }


@dataclass(frozen=True, kw_only=True)
class Device:
    """A pretend device: how its loss falls, how fast it is, and what it really can hold."""

    world: str
    pace: float  # seconds of the full model at rank 1, the cohort's median being 1
    appetite: float  # the rank that earns 63% of what rank can
    brittle: float  # how much pruning hurts
    phase: float
    memory: float  # GB that it says
    limit: float  # GB that it has

    @classmethod
    def draw(cls, world: str, seed: int, number: int) -> Device:
        """Some device, the same for the same numbers."""
        rng = np.random.default_rng([seed, number])
        memory = rng.uniform(7.0, 14.0)
        return cls(
            world=world,
            pace=float(rng.uniform(0.7, 2.5)),
            appetite=float(rng.uniform(2, 16)),
            brittle=float(rng.uniform(0.5, 1.5)),
            phase=float(rng.uniform(0, 1)),
            memory=float(memory),
            limit=float(memory * rng.uniform(0.85, 1.1)),
        )

    def outcome(self, round: int, rounds: int, ratio: Any, rank: Any) -> tuple[Any, Any, Any]:
        """Expected loss drop, pruning progress and seconds of a round with these arms (arrays broadcast)."""
        at, pace, fall = round / rounds, self.pace, 1.0
        if self.world == "drifting":
            pace = self.pace * (1 + 0.4 * np.sin(2 * np.pi * (at + self.phase)))
            fall = 1.0 - 0.4 * at
        elif self.world == "switching":
            pace = self.pace * (1.0, 2.0, 0.6, 1.4)[int((at + self.phase) * 4) % 4]
        drop = (
            0.95 * fall * (1 - np.exp(-np.asarray(rank) / self.appetite)) * (1 - self.brittle * np.asarray(ratio) ** 2)
        )
        return (
            np.clip(drop, 0, 1),
            np.asarray(ratio) / BOX.max_ratio,
            pace * (1.1 - ratio) * (1 + np.asarray(rank) / 64),
        )


def need(ratio: float, rank: int) -> float:
    """GB of an arm."""
    return 14.0 * (1 - 0.8 * ratio) + rank / 16


FULL = Reward()
ABLATIONS = {
    "full": FULL,
    "no loss": Reward(loss=False),
    "no progress": Reward(progress=False),
    "no time": Reward(time=False),
}


def reward_of(shape: Reward, drop: Any, progress: Any, seconds: Any) -> Floats:
    """`shape` over arrays."""
    values: Floats = np.vectorize(shape, otypes=[np.float64])(drop, progress, seconds, 1.0)
    return values


@dataclass(kw_only=True)
class Run:
    """One device's run: expected rewards (of the full reward), and what came of it."""

    earned: Floats
    outcomes: Floats
    crashes: int = 0


def play(
    chosen: Sequence[Policy],
    devices: Sequence[Device],
    seed: int,
    rounds: int,
    shape: Reward = FULL,
    *,
    shared: bool = False,
) -> list[Run]:
    """A fleet's runs, each device with its policy; with `shared`, all of one policy, they learn from one another."""
    states = [policy.init(f"d{i}", seed) for i, policy in enumerate(chosen)]
    runs = [Run(earned=np.zeros(rounds), outcomes=np.zeros((rounds, 3))) for _ in devices]
    noises = [np.random.default_rng([seed, 7]) for _ in devices]
    lead = chosen[0] if shared and isinstance(chosen[0], DiscountedUCB) else None
    fleet = lead.init("", seed) if lead else None
    for round in range(rounds):
        evidence = lead.evidence(fleet, round) if lead and fleet else None
        for i, (policy, device, run) in enumerate(zip(chosen, devices, runs, strict=True)):
            noise = NOISE * noises[i].standard_normal()
            arm = policy.choose(states[i], round, Limits(need=need, memory=device.memory), evidence)
            if arm.need >= device.limit:
                states[i] = policy.observe(states[i], round, arm, 0.0, out_of_memory=True)
                run.crashes += 1
                continue
            drop, progress, seconds = (float(x) for x in device.outcome(round, rounds, arm.ratio, arm.rank))
            run.outcomes[round] = drop, arm.ratio, seconds
            run.earned[round] = FULL(drop, progress, seconds, 1.0)
            reward = float(np.clip(shape(drop, progress, seconds, 1.0) + noise, 0, 1))
            states[i] = policy.observe(states[i], round, arm, reward)
            if lead and fleet:
                fleet = lead.observe(fleet, round, arm, reward)
    return runs


def truth(device: Device, rounds: int) -> Floats:
    """Expected rewards of the grid of arms, [T, A]; -inf for those that run out of memory."""
    ratio, rank = (x.ravel() for x in np.meshgrid(RATIOS, RANKS, indexing="ij"))
    means = np.stack([reward_of(FULL, *device.outcome(round, rounds, ratio, rank)) for round in range(rounds)])
    fits = np.array(
        [need(a, b) < min(device.limit, device.memory * (1 + 1e-9)) for a, b in zip(ratio, rank, strict=True)]
    )
    return np.where(fits, means, -np.inf)


def interval(values: Floats) -> tuple[float, float]:
    """Mean, and half the width of its 95% interval."""
    return float(values.mean()), float(student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))


def oracle(means: Floats) -> Policy:
    """The best fixed arm in hindsight."""
    best = divmod(best_fixed(means), len(RANKS))
    return FixedArm(ratio=float(RATIOS[best[0]]), rank=int(RANKS[best[1]]), box=BOX)


def compare(world: str, rounds: int, devices: int, seeds: int) -> dict[str, Any]:
    """Curves of regret a device, [seeds, rounds], of every policy, and its crashes a device."""
    curves: dict[str, list[Floats]] = {}
    crashes: dict[str, list[float]] = {}
    for seed in range(seeds):
        fleet = [Device.draw(world, seed, i) for i in range(devices)]
        truths = [truth(device, rounds) for device in fleet]
        for label, policy in (*policies().items(), ("oracle", None)):
            chosen = [policy or oracle(means) for means in truths]
            runs = play(chosen, fleet, seed, rounds, shared=label == SHARED)
            lost = [regret(means, run.earned) for means, run in zip(truths, runs, strict=True)]
            curves.setdefault(label, []).append(np.mean(lost, axis=0))
            crashes.setdefault(label, []).append(float(np.mean([run.crashes for run in runs])))
    return {
        "curves": {k: np.array(v) for k, v in curves.items()},
        "crashes": {k: float(np.mean(v)) for k, v in crashes.items()},
    }


def summary(found: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Figures of every policy: regret a round, in the first and the second half, and the log-log slope of the tail."""
    table = {}
    for label, curve in found["curves"].items():
        rounds = curve.shape[1]
        half = rounds // 2
        mean, wide = interval(curve[:, -1] / rounds)
        first, second = curve[:, half - 1].mean() / half, (curve[:, -1] - curve[:, half - 1]).mean() / (rounds - half)
        tail = np.arange(rounds // 10, rounds)
        typical = np.maximum(curve.mean(0), 1e-9)
        slope = np.polyfit(np.log(tail + 1.0), np.log(typical[tail]), 1)[0]
        table[label] = {
            "regret": mean,
            "half_width": wide,
            "first_half": float(first),
            "second_half": float(second),
            "slope": float(slope),
            "crashes": found["crashes"][label],
        }
    return table


def ablate(world: str, rounds: int, devices: int, seeds: int) -> dict[str, dict[str, tuple[float, float]]]:
    """What the tree chooses when it is paid by part of the reward: means over the second half, with intervals."""
    table = {}
    for label, shape in ABLATIONS.items():
        rows = []
        for seed in range(seeds):
            fleet = [Device.draw(world, seed, i) for i in range(devices)]
            cells = []
            for run in play([policies()[SHARED]] * devices, fleet, seed, rounds, shape, shared=True):
                drop, ratio, seconds = run.outcomes[rounds // 2 :].mean(0)
                late = np.abs(run.outcomes[rounds // 2 :, 2] - 1).mean()
                cells.append((run.earned[rounds // 2 :].mean(), drop, ratio, seconds, late))
            rows.append(np.mean(cells, axis=0))
        columns = ("full_reward", "loss_drop", "ratio", "seconds", "off_median")
        table[label] = dict(zip(columns, map(interval, np.array(rows).T), strict=True))
    return table


def draw(results: Mapping[str, Mapping[str, Any]], to: Path) -> None:
    """The regret curves, a panel for each world, with the interval as a band."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from fedloom.simulations.plots import DASHES, PALETTE, SETTINGS

    to.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(4.2 * len(results) + 2, 4), layout="constrained")
        FigureCanvasAgg(figure)
        for axes, (world, found) in zip(np.ravel(figure.subplots(1, len(results))), results.items(), strict=True):
            for i, (label, curve) in enumerate(found["curves"].items()):
                x, y = np.arange(1, curve.shape[1] + 1), curve.mean(0)
                wide = student.ppf(0.975, len(curve) - 1) * curve.std(0, ddof=1) / np.sqrt(len(curve))
                axes.plot(x, y, DASHES[i % len(DASHES)], color=PALETTE[i % len(PALETTE)], label=label)
                axes.fill_between(x, y - wide, y + wide, color=PALETTE[i % len(PALETTE)], alpha=0.15, lw=0)
            axes.set_title(world, loc="left", fontsize=10)
            axes.set_xlabel("round")
            axes.grid(True, axis="y")
        figure.axes[0].set_ylabel("regret a device")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
        figure.savefig(to, dpi=130)


def main() -> None:
    """Parse, play, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=6, help="at least 2")
    parser.add_argument("--worlds", nargs="+", choices=WORLDS, default=list(WORLDS))
    parser.add_argument("--plot", type=Path, help="where to save the regret curves (.png)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    results = {world: compare(world, args.rounds, args.devices, args.seeds) for world in args.worlds}
    tables = {world: summary(found) for world, found in results.items()}
    ablation = ablate(args.worlds[-1], args.rounds, args.devices, args.seeds)
    if args.plot:
        draw(results, args.plot)
    if args.json:
        print(json.dumps({"regret": tables, "ablation": ablation}, indent=1))
        return
    print(f"{args.rounds} rounds, {args.devices} devices, {args.seeds} seeds; regret is a device's, a round")
    for world, table in tables.items():
        print(
            f"\n| {world} | regret | 1st half | 2nd half | log-log slope | out of memory |\n|---|---|---|---|---|---|"
        )
        for label, row in table.items():
            print(
                f"| {label} | {row['regret']:.3f} ± {row['half_width']:.3f} | {row['first_half']:.3f} | "
                f"{row['second_half']:.3f} | {row['slope']:.2f} | {row['crashes']:.1f} |"
            )
    print(f"\n| {args.worlds[-1]}, shared tree paid by | full reward | loss drop | ratio | seconds | off the median |")
    print("|---|---|---|---|---|---|")
    for label, cells in ablation.items():
        print(f"| {label} | " + " | ".join(f"{mean:.3f} ± {wide:.3f}" for mean, wide in cells.values()) + " |")


if __name__ == "__main__":
    main()
