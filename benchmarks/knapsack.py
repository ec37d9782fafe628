"""How long the allocator's knapsack takes against scipy's exact solver (HiGHS), both in one run.

    python benchmarks/knapsack.py                       # 300 modules x 8 ranks, one budget and two
    python benchmarks/knapsack.py --modules 64 --json

Instances: `ranks`, layers of a few widths whose worth is an importance x sqrt(rank), costs in proportion (the real
case); `noisy`, the same with every cost and worth its own; `uncorrelated`, all drawn alone (the hardest for two
budgets). Costs are whole bytes; HiGHS holds its budgets to a tolerance, so values may differ by a millionth.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from statistics import median
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from fedloom.strategies.knapsack import Choice, solve

WIDTHS = (2048, 5120, 8192, 15104)  # d_in + d_out of a matrix
KINDS = ("ranks", "noisy", "uncorrelated")
Groups = list[list[Choice]]


def instance(kind: str, modules: int, choices: int, seed: int) -> tuple[Groups, float, float]:
    """Groups and budgets: two fifths of the most memory, a third of the most seconds."""
    rng = np.random.default_rng(seed)
    groups = []
    for _ in range(modules):
        score, width = float(rng.lognormal()), int(rng.choice(WIDTHS))
        group = [Choice(0.0, 0.0)]
        for rank in range(4, 4 * choices, 4):
            if kind == "uncorrelated":
                worth, memory, seconds = rng.uniform(), float(rng.integers(1, 10**9)), rng.uniform()
            else:
                shake = rng.uniform(0.8, 1.2, 3) if kind == "noisy" else np.ones(3)
                worth, memory = score * math.sqrt(rank) * shake[0], float(round(16 * rank * width * shake[1]))
                seconds = (1e-7 * width + 1e-9 * rank * width) * shake[2]
            group.append(Choice(float(worth), memory, round(float(seconds), 9)))
        groups.append(group)
    most = [sum(max(getattr(c, cost) for c in group) for group in groups) for cost in ("memory", "seconds")]
    return groups, 0.4 * most[0], most[1] / 3


def milp_value(groups: Groups, memory: float, seconds: float | None, limit: float) -> float:
    """The value that HiGHS finds; nan when it finds none in the time."""
    flat = [choice for group in groups for choice in group]
    owner = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    one = csr_array((np.ones(len(flat)), (owner, np.arange(len(flat)))))
    rules = [LinearConstraint(one, 1, 1)]
    for cost, budget in (("memory", memory), ("seconds", seconds)):
        if budget is not None:
            rules.append(LinearConstraint(np.array([[getattr(c, cost) / budget for c in flat]]), -np.inf, 1))
    values = np.array([choice.value for choice in flat])
    options = {"mip_rel_gap": 0.0, "time_limit": limit}
    found = milp(-values, constraints=rules, integrality=np.ones(len(flat)), bounds=Bounds(0, 1), options=options)
    return math.nan if found.x is None else -float(found.fun)


def measure(kind: str, timed: bool, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of both on the same instances, in turn."""
    ours, theirs, apart, gaps, exact = [], [], [], [], 0
    for seed in range(args.seeds):
        groups, memory, seconds = instance(kind, args.modules, args.choices, seed)
        start = time.perf_counter()
        solution = solve(groups, memory, seconds if timed else None)
        middle = time.perf_counter()
        value = milp_value(groups, memory, seconds if timed else None, args.limit)
        ours.append(middle - start)
        theirs.append(time.perf_counter() - middle)
        apart.append(solution.value / value - 1)
        gaps.append(solution.bound / solution.value - 1)
        exact += solution.exact
    return {
        "kind": kind,
        "budgets": 1 + timed,
        "seconds": median(ours),
        "worst": max(ours),
        "milp_seconds": median(theirs),
        "times_faster": median(b / a for a, b in zip(ours, theirs, strict=True)),
        "proven": f"{exact}/{args.seeds}",
        "largest_gap": max(gaps),
        "value_over_milp": [min(apart), max(apart)],
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--modules", type=int, default=300)
    parser.add_argument("--choices", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=20.0, help="seconds that HiGHS may take")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    rows = [measure(kind, timed, args) for timed in (False, True) for kind in KINDS]
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    print(f"{args.modules} modules x {args.choices} choices, {args.seeds} seeds, HiGHS stopped at {args.limit:g} s\n")
    print("| instances | budgets | DP median | DP worst | HiGHS median | ratio | proven | gap | DP / HiGHS - 1 |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        low, high = row["value_over_milp"]
        print(
            f"| {row['kind']} | {row['budgets']} | {row['seconds']:.3f} s | {row['worst']:.3f} s | "
            f"{row['milp_seconds']:.2f} s | {row['times_faster']:.0f}x | {row['proven']} | {row['largest_gap']:.1e} | "
            f"{low:.1e} .. {high:.1e} |"
        )


if __name__ == "__main__":
    main()
