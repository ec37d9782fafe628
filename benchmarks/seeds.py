"""Tuning for a few hundred bytes, honestly compared: accuracy over seeds, against bytes and against device seconds.

    python benchmarks/seeds.py demo --seeds 0 1 2 --out runs/seeds                     # the embedded task
    python benchmarks/seeds.py news --data ag_news.csv --model ENCODER --seeds 0 1 2   # real text, a real encoder
    python benchmarks/seeds.py halves --data ag_news.csv --model ENCODER               # a fleet of both kinds

`demo` and `news` give every method the same devices, data, cohorts and rounds. Forward-only methods make the same
number of forward passes; the table says what seconds devices spent. In `halves`, devices that can backpropagate hold
two of the labels and forward-only devices the other two. ag_news.csv has rows "class","title","text".
Finished runs are kept, so a benchmark that was cut goes on.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fedavg import full_fedavg
from scipy import stats

from fedloom.protocols.config import RunConfig, build_config, override
from fedloom.server.pooling import pool
from fedloom.server.track import METRICS_FILE
from fedloom.simulations.naming import main_metric
from fedloom.simulations.runs import run_recipe
from fedloom.simulations.summary import read_metrics

FAMILIES = {"FedKSeed gaussian": "gaussian", "FedKSeed rademacher": "rademacher"}
Settings = dict[str, Any]


def demo_task(asked: argparse.Namespace) -> tuple[Settings, dict[str, Settings]]:
    """The demo's fleet and data, nine rounds; see METHODS in docs/benchmarks.md."""
    table = {
        "fleet": {"devices": 20, "ranks": [32, 16, 16, 8, 8, 4, 4, 2]},
        "train": {"steps": 32, "batch_size": 4},
        "server": {"rounds": 9, "cohort": 5},
        "eval": {"every": 3},
    }
    return table, _methods(zo_lr=3e-4, fzoo_lr=6e-3, sketch_lr=3e-3, lora_lr=4e-3, full_lr=5e-4, steps=32, rounds=9)


def news_task(asked: argparse.Namespace) -> tuple[Settings, dict[str, Settings]]:
    """News topics on ten devices, non-IID by a Dirichlet over labels, the whole encoder and a new head tuned."""
    table = _news(asked, "news.csv", halves=False)
    table |= {"server": {"rounds": 6, "cohort": 5}, "eval": {"every": 3}}
    table["fleet"] |= {"partition": "dirichlet", "alpha": 0.5}
    table["train"] = {"steps": 10, "batch_size": 8}
    methods = _methods(zo_lr=1e-3, fzoo_lr=1e-2, sketch_lr=1e-3, lora_lr=1e-3, full_lr=1e-4, steps=10, rounds=6)
    for label in (*FAMILIES, *(name for name in methods if name.startswith("sketch ZO"))):
        methods[label]["train.steps"] = 10
    methods["sketch FZOO"] |= {"train.directions": 4, "train.steps": 4}
    methods["sketch mixed"] |= {"train.steps": 2, "strategy.server_lr": 1e-3}
    return table, methods


def halves_task(asked: argparse.Namespace) -> tuple[Settings, dict[str, Settings]]:
    """Even devices backpropagate and hold labels 0 and 1; odd ones run forward passes and hold labels 2 and 3.

    What is tuned is the head on the pretrained encoder (`fedloom mask --share 1e-9`, given as --mask).
    """
    table = _news(asked, "halves.csv", halves=True)
    table |= {"server": {"rounds": 40}, "eval": {"every": 10}}
    table["model"]["mask"] = str(asked.mask)
    table["data"] |= {"max_length": 24, "test_share": 0.08}
    table["fleet"] |= {"partition": "key", "key": "owner", "capabilities": ["backprop", "forward"]}
    table["train"] = {"steps": 2, "batch_size": 8, "directions": 6, "lr": 1e-2, "zo_lr": 3e-2}
    sketch: Settings = {"strategy.name": "sketch", "strategy.scope": "mask", "strategy.k": 256, "wire.up": "int8"}
    adam = {
        "strategy.server_optimizer": "fedadam", "strategy.exchange": "gradient", "strategy.server_tau": 1e-8,
        "strategy.server_lr": 1e-2,
    }  # fmt: skip
    clean = {"strategy.precondition": "backprop", "strategy.server_lr": 7e-3}
    return table, {
        "all forward-only": {**sketch, **adam, "fleet.capabilities": ["forward"]},
        "forward-only dropped": {**sketch, **adam, "strategy.leave_out_forward": True},
        "mixed, deltas": sketch,
        "mixed, gradients": {**sketch, **adam},
        "mixed, clean second moment": {**sketch, **adam, **clean},
        "mixed, by variance": {**sketch, **adam, "strategy.combine": "variance"},
        "all backprop": {**sketch, **adam, "fleet.capabilities": ["backprop"]},
    }


TASKS = {"demo": demo_task, "news": news_task, "halves": halves_task}


def _methods(
    *, zo_lr: float, fzoo_lr: float, sketch_lr: float, lora_lr: float, full_lr: float, steps: int, rounds: int
) -> dict[str, Settings]:
    """Forward-only methods make 4 forward passes where a first-order one makes a forward and a backward, FZOO's too."""
    forward: Settings = {"train.tuner": "zeroth_order", "train.steps": 2 * steps, "wire.up": "int8", "train.lr": zo_lr}
    fzoo = {"train.estimator": "fzoo", "train.directions": 7, "train.steps": steps // 2, "train.lr": fzoo_lr}
    first: Settings = {"strategy.name": "sketch", "wire.up": "int8", "train.lr": sketch_lr}
    return {
        **{label: {**forward, "strategy.name": "fedkseed", "strategy.family": f} for label, f in FAMILIES.items()},
        "sketch ZO": {**forward, "strategy.name": "sketch"},
        "sketch ZO, 0 bits down": {**forward, "strategy.name": "sketch", "strategy.downlink_bits": 0},
        "sketch ZO, fp32 wire": {**forward, "strategy.name": "sketch", "wire.up": "fp32", "strategy.downlink_bits": 30},
        "sketch FZOO": {**forward, "strategy.name": "sketch", **fzoo},
        "sketch mixed": {  # a gradient a round, so more and shorter rounds for the same number of steps
            **first, "fleet.capabilities": ["backprop", "forward"], "strategy.exchange": "gradient", "strategy.k": 1024,
            "strategy.server_optimizer": "fedadam", "strategy.server_tau": 1e-8, "strategy.server_lr": 2e-3,
            "server.rounds": 4 * rounds, "train.steps": steps // 4, "train.directions": 4, "eval.every": 2 * rounds,
        },
        "sketch first-order": first,
        "sketch first-order 65536": {**first, "strategy.k": 65536},
        "LoRA default": {"strategy.name": "fedloom", "train.lr": lora_lr, "wire.up": "fp16", "wire.down": "fp16"},
        "full FedAvg": {"strategy.name": "fedloom", "train.lr": full_lr},
    }  # fmt: skip


def _news(asked: argparse.Namespace, name: str, *, halves: bool) -> Settings:
    """The file as columns text, label and, for halves, owner, shuffled by a fixed seed; and the recipe around it."""
    with Path(asked.data).open(encoding="utf-8", newline="") as file:
        rows = [(f"{title}. {text}", str(int(label) - 1)) for label, title, text in csv.reader(file)]
    random.Random(0).shuffle(rows)
    asked.out.mkdir(parents=True, exist_ok=True)
    with (asked.out / name).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "owner"])
        dealt = [0, 0]
        for text, label in rows:
            half = int(label) // 2
            writer.writerow([text, label, f"owner-{2 * (dealt[half] % 5) + half}"])
            dealt[half] += 1
    return {
        "model": {"path": asked.model, "task": "classify", "labels": 4},
        "data": {"source": str(asked.out / name), "max_length": 32, "test_share": 0.105},
        "fleet": {"devices": 10, "ranks": [16, 8, 4]},
    }


def measure(label: str, config: RunConfig, folder: Path) -> dict[str, Any]:
    """One run's curve, from its folder where it has finished."""
    done = folder / "curve.json"
    if not done.exists():
        if label == "full FedAvg":
            records = full_fedavg(config)
        else:
            run_recipe(config, folder, resume=True)
            records = read_metrics(folder / METRICS_FILE)
        done.parent.mkdir(parents=True, exist_ok=True)
        done.write_text(json.dumps(_curve(records, main_metric(config))), encoding="utf-8")
    curve: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
    return curve


def _curve(records: Sequence[dict[str, Any]], metric: str) -> dict[str, Any]:
    """Points (round, metric, loss, training bytes so far, device seconds so far), and the metric by half at the end."""
    points, seconds = [], 0.0
    for record in records:
        seconds = record["seconds"] if "bytes" in record else seconds + record.get("device_seconds", 0.0)
        if "evaluation" in record:
            sent = record.get("bytes")
            if sent is None:
                sent = record["bytes_up"] + record["bytes_down"] - record["bytes_evaluation"]
            judged = record["evaluation"]
            points.append([record["round"], judged[metric], judged["loss"], sent, seconds])
    devices = sorted(records[-1]["devices"].items())
    halves = [pool([table for _, table in devices[half::2]])[metric] for half in (0, 1)]
    return {"metric": metric, "points": points, "halves": halves}


def interval(values: Sequence[float]) -> str:
    """Mean and half width of the 95% t-interval over seeds."""
    width = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values) if len(values) > 1 else float("nan")
    return f"{np.mean(values):.3f} ± {width:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="*", help="Only these.")
    parser.add_argument("--data", default="ag_news.csv")
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--mask", type=Path, default=Path("head.safetensors"), help="For halves.")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--plot", type=Path, help="Write PLOT-bytes.png and PLOT-seconds.png.")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    table, methods = TASKS[asked.task](asked)
    fixed: Settings = {
        "track.tensorboard": False,
        "simulation.workers": asked.workers,
        "simulation.keep_devices": False,
    }
    curves: dict[str, list[dict[str, Any]]] = {}
    for seed in asked.seeds:
        for label, settings in methods.items():
            if not asked.methods or label in asked.methods:
                config = build_config(override(table, {**fixed, **settings, "seed": seed}))
                folder = asked.out / asked.task / f"seed-{seed}" / label.replace(" ", "-").replace(",", "")
                curves.setdefault(label, []).append(measure(label, config, folder))
                print(f"seed {seed} {label}: {curves[label][-1]['points'][-1]}", flush=True)
    devices = build_config(table).fleet.devices
    rows = [_row(label, found, devices) for label, found in curves.items()]
    if asked.plot:
        from seeds_plot import draw

        draw(curves, devices, asked.plot)
    print(json.dumps(rows, indent=1) if asked.json else _table(rows))


def _row(label: str, found: Sequence[dict[str, Any]], devices: int) -> dict[str, Any]:
    last = [curve["points"][-1] for curve in found]
    return {
        "method": label,
        "before": interval([curve["points"][0][1] for curve in found]),
        "after": interval([point[1] for point in last]),
        "loss": interval([point[2] for point in last]),
        "halves": [interval([curve["halves"][half] for curve in found]) for half in (0, 1)],
        "kB a device": float(np.mean([point[3] for point in last])) / devices / 1e3,
        "device seconds": float(np.mean([point[4] for point in last])),
    }


def _table(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| method | before | after (95%) | loss | even devices | odd devices | kB a device | device seconds |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in rows:
        first, second = row["halves"]
        lines.append(
            f"| {row['method']} | {row['before']} | {row['after']} | {row['loss']} | {first} | {second} "
            f"| {row['kB a device']:.1f} | {row['device seconds']:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
