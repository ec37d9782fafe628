"""The server's memory and time for one round, by number of devices: answers of a given size come in the worst order.

    python benchmarks/server_memory.py --devices 3 20 200 --megabytes 5

The round loop, codec, journal, checks and default strategy are the real ones; only the devices are pretend: each
answers with random factors of the size asked for, the last asked first. Each number of devices is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedloom.protocols.codec import decode, encode
from fedloom.protocols.config import build_config
from fedloom.protocols.messages import (
    DeviceReport,
    Hello,
    Kind,
    LowRank,
    MatrixSpec,
    ModelSpec,
    Payload,
    Task,
    Update,
)
from fedloom.server.app import Plan, coordinate
from fedloom.simulations.grid import InProcessGrid, pretend_nodes

WIDTH, RANK = 512, 16


class Answers(InProcessGrid):
    """Nodes that answer with random factors, those that were asked last first."""

    def __init__(self, devices: int, spec: ModelSpec) -> None:
        super().__init__(pretend_nodes(devices), lambda: None)
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self._spec, self._waiting, self._pushed = spec, {}, 0
        self.sizes: list[int] = []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            self._pushed += 1
            id_ = str(self._pushed)
            message.metadata.__dict__["_message_id"] = id_
            frame, message.content = message.content["fedloom"]["frame"], RecordDict()  # a SuperLink keeps it on disk
            task = None
            if message.metadata.message_type != "query":
                task = replace(decode(bytes(frame), Task, limit=1 << 30), patch=None)
            self._waiting[id_] = (message, task)
            ids.append(id_)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        last = next(reversed(self._waiting), None)
        return [self._answer(*self._waiting.pop(last))] if last in set(message_ids) else []

    def _answer(self, message: Message, task: Task | None) -> Message:
        node = message.metadata.dst_node_id
        name = f"device-{node:04d}"
        if task is None:
            answer = encode(Hello(report=DeviceReport(device=name, examples=10, rank=RANK), spec=self._spec))
        else:
            answer = encode(self._update(task, node))
        self.sizes.append(len(answer))
        return Message(RecordDict({"fedloom": ConfigRecord({"frame": answer})}), reply_to=message)

    def _update(self, task: Task, node: int) -> Update:
        rng = np.random.default_rng(node)
        factors = {}
        if task.kind == Kind.TRAIN:
            for module, matrix in self._spec.matrices.items():
                b = rng.normal(size=(matrix.d_out, RANK)).astype(np.float32)
                a = rng.normal(size=(RANK, matrix.d_in)).astype(np.float32)
                factors[module] = LowRank(b=b, a=a, alpha=task.alpha)
        metrics = {"loss_sum": 1.0, "tokens": 1.0, "n": 1.0}
        echo = {"kind": task.kind, "run": task.run, "nonce": task.nonce, "metrics": metrics}
        return Update(device=task.device, round=task.round, examples=10, payload=Payload(factors=factors), **echo)


def one(devices: int, megabytes: float) -> None:
    matrices = max(1, round(megabytes * 1e6 / (4 * 2 * RANK * WIDTH)))
    spec = ModelSpec(
        base_hash="0" * 64, matrices={f"m{i:03d}": MatrixSpec(d_out=WIDTH, d_in=WIDTH) for i in range(matrices)}
    )
    config = build_config(
        {"server": {"rounds": 1, "timeout": 600.0}, "eval": {"every": 0}, "track": {"tensorboard": False}}
    )
    grid = Answers(devices, spec)
    with tempfile.TemporaryDirectory() as folder:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = time.perf_counter()
        coordinate(grid, Plan(config=config, out=Path(folder), run="r", durable=True, window=10**6, pause=0.0))
        seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {"devices": devices, "update_mb": max(grid.sizes) / 1e6, "model_mb": matrices * WIDTH * WIDTH * 4 / 1e6}
    print(json.dumps(found | {"rss_before_mb": before / 1024, "peak_mb": peak / 1024, "seconds": seconds}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[3, 20, 200])
    parser.add_argument("--megabytes", type=float, default=5.0)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        one(asked.one, asked.megabytes)
        return
    print("| devices | MB an update | MB in all | peak MB of the server | seconds a round |\n|---|---|---|---|---|")
    for devices in asked.devices:
        command = [sys.executable, __file__, "--one", str(devices), "--megabytes", str(asked.megabytes)]
        found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
        whole = devices * found["update_mb"]
        print(
            f"| {devices} | {found['update_mb']:.1f} | {whole:.0f} | {found['peak_mb']:.0f} "
            f"({found['rss_before_mb']:.0f} before) | {found['seconds']:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
