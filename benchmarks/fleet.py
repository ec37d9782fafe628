"""Eighty unequal devices on a virtual clock: who gets how far, how fast, and within which memory.

    python benchmarks/fleet.py demo --seeds 0 1 2 --out runs/fleet                      # the embedded task
    python benchmarks/fleet.py news --data ag_news.csv --model ENCODER --seeds 0 1 2    # real text, a real encoder

30 Jetson TX2, 40 Xavier NX and 10 AGX Xavier, whose speed drifts from round to round. What lends less than a step on
the whole model needs keeps to it in `fedspine` and `fedpipe`, and in the rows that say so; the other rows are as if
memory were enough, which flatters them. Seconds are the virtual clock's: a round lasts as long as its slowest device,
and evaluation costs nothing. Each device is judged on its own held-out examples, by the model that it holds: a pruned
one where it prunes. ag_news.csv has rows "class","title","text". Finished runs are kept, so a benchmark that was cut
goes on. Set OMP_NUM_THREADS=1 where several run at once.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
from collections.abc import Mapping, Sequence
from itertools import cycle, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from seeds import interval

from fedloom.protocols.config import RunConfig, build_config, override
from fedloom.protocols.messages import Kind, Patch, Payload, Start, Task
from fedloom.server.app import build_strategy
from fedloom.server.checkpoint import latest_checkpoint
from fedloom.server.pooling import pool
from fedloom.server.track import METRICS_FILE
from fedloom.simulations.naming import main_metric
from fedloom.simulations.runs import run_recipe
from fedloom.simulations.summary import read_metrics
from fedloom.simulations.world import World
from fedloom.strategies.unequal import PRUNE_RATIO

Settings = dict[str, Any]
TX2, NX, AGX = "jetson-tx2", "jetson-xavier-nx", "jetson-agx-xavier"
KINDS = [TX2, NX, NX, TX2, NX, AGX, TX2, NX]  # 3 : 4 : 1, as FedSpine's 30 : 40 : 10
BY_KIND = {TX2: 4, NX: 8, AGX: 16}  # ranks of the strategies that are told them
BASELINE = "fixed pruning"  # one rank, one schedule, own masks: its last accuracy is the goal that all are timed by


def demo_task(asked: argparse.Namespace) -> Settings:
    """The demo's household requests on eighty devices."""
    return {
        "model": {"describe": "units"},
        "data": {"max_length": 52, "test_size": 10},
        "fleet": _fleet({TX2: 20.0, NX: 24.0, AGX: 64.0}),
        "train": {"lr": 4e-3, "steps": 10, "batch_size": 4},
        "server": {"rounds": 16, "cohort": 12},
        "eval": {"every": 4},
    }


def news_task(asked: argparse.Namespace) -> Settings:
    """News topics, non-IID by a Dirichlet over labels."""
    source = asked.out / "news.csv"
    if not source.exists():
        with Path(asked.data).open(encoding="utf-8", newline="") as file:
            rows = [(f"{title}. {text}", str(int(label) - 1)) for label, title, text in csv.reader(file)]
        random.Random(0).shuffle(rows)
        asked.out.mkdir(parents=True, exist_ok=True)
        with source.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *rows])
    return {
        "model": {"path": asked.model, "task": "classify", "labels": 4, "describe": "units"},
        "data": {"source": str(source), "max_length": 32, "test_share": 0.12},
        "fleet": {**_fleet({TX2: 100.0, NX: 115.0, AGX: 300.0}), "partition": "dirichlet", "alpha": 1.0},
        "train": {"lr": 1e-3, "steps": 10, "batch_size": 4, "schedule": "linear"},
        "server": {"rounds": 9, "cohort": 12},
        "eval": {"every": 3},
    }


TASKS = {"demo": demo_task, "news": news_task}
RAMPS = {"demo": 8, "news": 5}  # rounds until the target is reached


def _fleet(lent: Mapping[str, float]) -> Settings:
    return {
        "devices": 80,
        "ranks": [32],
        "profiles": KINDS,
        "memory_mb": [lent[kind] for kind in KINDS],
        "drift": 0.2,
    }


def methods(target: float, ramp: int) -> dict[str, Settings]:
    """What is compared, in the order of the table."""
    spine: Settings = {"strategy.name": "fedspine", "strategy.target": target, "strategy.ramp": ramp}
    fixed: Settings = {**spine, "strategy.policy": "fixed"}
    own: Settings = {"strategy.masks": "own"}
    free: Settings = {"fleet.memory_mb": []}
    ranks: Settings = {"fleet.ranks": [BY_KIND[kind] for kind in KINDS]}
    return {
        "FedSpine": spine,
        BASELINE: {**fixed, **own},
        "HetLoRA": {**free, **ranks, "strategy.name": "hetlora"},
        "FLoRA": {**free, **ranks, "strategy.name": "flora"},
        "rank 8 for all": {**free, "fleet.ranks": [8], "strategy.name": "fedloom"},
        "FedPipe": {"strategy.name": "fedpipe"},
        "Fedloom's default": {**free, **ranks, "strategy.name": "fedloom"},
        "rank 8 for all, memory kept": {"fleet.ranks": [8], "strategy.name": "fedloom"},
        "FedSpine, own masks": {**spine, **own},
        "fixed schedule, the fleet's masks": fixed,
        "pruned at once": {**fixed, **own, "strategy.ramp": 1},
        "FedSpine, at random": {**spine, "strategy.policy": "random"},
        "FedSpine, each alone": {**spine, "strategy.share": 0.0},
        "FedSpine, no loss": {**spine, "strategy.reward_loss": False},
        "FedSpine, no progress": {**spine, "strategy.reward_progress": False},
        "FedSpine, no time": {**spine, "strategy.reward_time": False},
    }


def measure(config: RunConfig, folder: Path) -> dict[str, Any]:
    """One run's curve and costs, from its folder where it has finished."""
    done = folder / "curve.json"
    if not done.exists():
        run_recipe(config, folder, resume=True)
        records = read_metrics(folder / METRICS_FILE)
        done.write_text(json.dumps(_curve(records, config)), encoding="utf-8")
    curve: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
    return curve


def pruned_after(config: RunConfig, folder: Path, target: float) -> float:
    """The metric where what was tuned whole is pruned at the end: each device by the fluctuation on its own texts."""
    done = folder / "pruned.json"
    if not done.exists():
        checkpoint, _ = latest_checkpoint(folder / "checkpoints")
        if checkpoint is None:
            raise ValueError(f"{folder} must have a checkpoint, got none")
        with TemporaryDirectory() as work:
            world = World(override_config(config, {"fleet.memory_mb": []}), Path(work))
            spec = world.resident.spec
            payload = build_strategy(config).adapter(checkpoint.state)
            patch = Patch(base_hash=spec.base_hash, since=0, version=1, payload=payload)
            whole = {name: np.ones(count, np.bool_) for name, count in spec.groups.items()}
            found = []
            for index in range(config.fleet.devices):
                device = world.device(index)
                task = Task(
                    device=device.hello().report.device, round=1, kind=Kind.EVALUATE, rank=1, alpha=2.0, run="pruned",
                    start_from=Start.FRESH, patch=patch, start=Payload(keep=whole), knobs={PRUNE_RATIO: target},
                )  # fmt: skip
                found.append(device.handle(task).metrics)
        done.write_text(json.dumps(pool(found)), encoding="utf-8")
    metric: float = json.loads(done.read_text(encoding="utf-8"))[main_metric(config)]
    return metric


def override_config(config: RunConfig, changes: Settings) -> RunConfig:
    """The recipe with other settings."""
    return build_config(override(config.model_dump(), changes))


def _curve(records: Sequence[dict[str, Any]], config: RunConfig) -> dict[str, Any]:
    """Points (round, metric, loss, virtual seconds so far) and what the run cost.

    broken: answers whose tensors were larger than what the device lends.
    """
    points, clock = [], 0.0
    lent = dict(zip((f"device-{at:02d}" for at in range(config.fleet.devices)), cycle(config.fleet.memory_mb or [0.0])))
    broken = 0
    for record in records:
        clock += record.get("slowest_seconds", 0.0)
        if "evaluation" in record:
            judged = record["evaluation"]
            points.append([record["round"], judged[main_metric(config)], judged["loss"], clock])
        for device, line in record.get("assigned", {}).items():
            broken += not line.get("out_of_memory") and line["tensor_mb"] > lent[device]
    trained = [record for record in records if "slowest_seconds" in record]
    busy = sum(record["device_seconds"] for record in trained)
    idle = sum(record["idle_seconds"] for record in trained)
    return {
        "points": points,
        "idle": idle / (idle + busy),
        "peak_mb": max(record["device_tensor_mb"] for record in trained),
        "out_of_memory": sum(record.get("out_of_memory", 0) for record in trained),
        "broken": broken,
        "mb": sum(r["bytes_up"] + r["bytes_down"] - r.get("bytes_evaluation", 0) for r in records) / 1e6,
        "ratio": _last_ratio(records),
        "assigned": [record.get("assigned", {}) for record in trained],
    }


def _last_ratio(records: Sequence[dict[str, Any]]) -> float:
    """The mean ratio that the last cohort was pruned to."""
    lines = next((record["assigned"].values() for record in reversed(records) if record.get("assigned")), [])
    return float(np.mean([line.get("ratio", 0.0) for line in lines])) if lines else 0.0


def reached(points: Sequence[Sequence[float]], goal: float) -> float:
    """Virtual seconds until the metric is at the goal, on a line between evaluations; inf where it never is."""
    for (_, before, _, start), (_, after, _, end) in pairwise(points):
        if after >= goal:
            return float(start + (end - start) * max(goal - before, 0.0) / max(after - before, 1e-12))
    return float("inf")


def row(label: str, found: Mapping[int, dict[str, Any]], goals: Mapping[int, float]) -> dict[str, Any]:
    """A method over its seeds; seconds to the goal are inf where a seed never reached it."""
    curves = list(found.values())
    return {
        "method": label,
        "before": interval([curve["points"][0][1] for curve in curves]),
        "after": interval([curve["points"][-1][1] for curve in curves]),
        "loss": interval([curve["points"][-1][2] for curve in curves]),
        "pruned": float(np.mean([curve["ratio"] for curve in curves])),
        "then pruned": interval([curve["then pruned"] for curve in curves]) if "then pruned" in curves[0] else "",
        "to goal": [reached(curve["points"], goals[seed]) for seed, curve in found.items() if seed in goals],
        "seconds": float(np.mean([curve["points"][-1][3] for curve in curves])),
        "idle": float(np.mean([curve["idle"] for curve in curves])),
        "MB": float(np.mean([curve["mb"] for curve in curves])),
        "peak": max(curve["peak_mb"] for curve in curves),
        "out of memory": sum(curve["out_of_memory"] for curve in curves),
        "broken": sum(curve["broken"] for curve in curves),
        "seeds": len(curves),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| method | after (95%) | loss | pruned | then pruned | s to goal | s in all | idle | MB | peak MB "
        "| out of memory | seeds |",
        "|" + "---|" * 12,
    ]
    for one in rows:
        goal = ", ".join(f"{seconds:.1f}" if np.isfinite(seconds) else "never" for seconds in one["to goal"])
        lines.append(
            f"| {one['method']} | {one['after']} | {one['loss']} | {one['pruned']:.2f} | {one['then pruned']} | {goal} "
            f"| {one['seconds']:.1f} | {one['idle']:.0%} | {one['MB']:.0f} | {one['peak']:.1f} "
            f"| {one['out of memory']} ({one['broken']} broken) | {one['seeds']} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="*", help="Only these.")
    parser.add_argument("--target", type=float, default=0.3, help="Share of heads and channels pruned at the end.")
    parser.add_argument("--prune", action="store_true", help="Also prune what was tuned whole, at the end.")
    parser.add_argument("--goal", type=float, help="The accuracy to time; default: where the fixed schedule ends.")
    parser.add_argument("--data", default="ag_news.csv")
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="As of `fedloom run`, for all.")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/fleet"))
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    settings = TASKS[asked.task](asked)
    common: Settings = {
        "wire.up": "fp16", "wire.down": "fp16", "track.tensorboard": False,
        "simulation.workers": asked.workers, "simulation.keep_devices": False,
        **{key: json.loads(value) for key, value in (pair.split("=", 1) for pair in asked.set)},
    }  # fmt: skip
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for seed in asked.seeds:
        for label, chosen in methods(asked.target, RAMPS[asked.task]).items():
            if not asked.methods or label in asked.methods:
                config = build_config(override(settings, {**common, **chosen, "seed": seed}))
                folder = asked.out / asked.task / f"seed-{seed}" / label.replace(" ", "-").replace(",", "")
                curve = found.setdefault(label, {})[seed] = measure(config, folder)
                if asked.prune and chosen["strategy.name"] not in ("fedspine", "fedpipe"):
                    curve["then pruned"] = pruned_after(config, folder, asked.target)
                print(f"seed {seed} {label}: {curve['points'][-1]} {curve.get('then pruned', '')}", flush=True)
    ends = {seed: curve["points"][-1][1] for seed, curve in found.get(BASELINE, {}).items()}
    goals = dict.fromkeys(asked.seeds, asked.goal) if asked.goal is not None else ends
    rows = [row(label, curves, goals) for label, curves in found.items()]
    print(json.dumps(rows, indent=1) if asked.json else table(rows))


if __name__ == "__main__":
    main()
