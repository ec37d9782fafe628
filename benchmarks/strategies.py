"""The demo's comparison over several seeds: each seed is another fleet, other data, other draws.

    python benchmarks/strategies.py --seeds 1 2 3 --out runs/strategies

Prints, for each strategy, the mean over seeds of the metric after tuning with a 95% t-interval, the mean difference to
the default with its interval, and megabytes down and up. Finished seeds are kept, so a run that was cut goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from fedloom.protocols.config import read_recipe
from fedloom.simulations.cookbook import find_recipe
from fedloom.simulations.runs import run_recipe
from fedloom.simulations.summary import SUMMARY_FILE


def summaries(recipe: str, seeds: Sequence[int], settings: Sequence[str], out: Path) -> list[dict[str, Any]]:
    """One summary per seed, from its folder where it has finished."""
    found = []
    for seed in seeds:
        folder = out / f"seed-{seed}"
        if not (folder / SUMMARY_FILE).exists():
            config = read_recipe(find_recipe(recipe), [*settings, f"seed={seed}", "track.tensorboard=false"])
            run_recipe(config, folder, resume=True)
        found.append(json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8")))
    return found


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of the 95% t-interval."""
    width = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)) if len(values) > 1 else float("nan")
    return float(np.mean(values)), width


def table(found: Sequence[dict[str, Any]], default: str) -> list[dict[str, Any]]:
    """A row per strategy."""
    by_name = {
        entry["name"]: [next(e for e in run["strategies"] if e["name"] == entry["name"]) for run in found]
        for entry in found[0]["strategies"]
    }
    rows = []
    for name, entries in by_name.items():
        after, before = ([entry[key] for entry in entries] for key in ("after", "before"))
        gap = [a - d["after"] for a, d in zip(after, by_name[default], strict=True)]
        rows.append(
            {
                "strategy": name,
                "before": float(np.mean(before)),
                "after": interval(after),
                "minus_default": interval(gap),
                "loss": float(np.mean([entry["loss_after"] for entry in entries])),
                "mb_down": float(np.mean([entry["bytes_down"] for entry in entries])) / 1e6,
                "mb_up": float(np.mean([entry["bytes_up"] for entry in entries])) / 1e6,
                "seconds": float(np.mean([entry["seconds"] for entry in entries])),
                "each_seed": after,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--default", default="fedloom")
    parser.add_argument("--out", type=Path, default=Path("runs/strategies"))
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    rows = table(summaries(asked.recipe, asked.seeds, asked.set, asked.out), asked.default)
    if asked.json:
        print(json.dumps(rows, indent=1))
        return
    print("| strategy | before | after (95%) | minus default (95%) | loss | MB down | MB up | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        (after, width), (gap, gap_width) = row["after"], row["minus_default"]
        print(
            f"| {row['strategy']} | {row['before']:.3f} | {after:.3f} ± {width:.3f} | {gap:+.3f} ± {gap_width:.3f} "
            f"| {row['loss']:.2f} | {row['mb_down']:.1f} | {row['mb_up']:.1f} | {row['seconds']:.0f} |"
        )


if __name__ == "__main__":
    main()
