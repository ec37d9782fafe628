"""A consortium on this machine: one server, devices with keys and TLS on loopback, each a process of its own.

Everything is started by the commands that a user types. Processes are found by what they run, and killed by their pid.
The recipe's pretend fleet is the same devices, so that a run in one process must end in the same bytes.
"""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from common import FEDLOOM, command_of, environment, events_of, free_port, kill, launch, of_run, wait_until

from fedloom.protocols.config import read_recipe
from fedloom.simulations.household.households import household
from fedloom.simulations.runs import run_recipe

PRETEND = tuple(f"device-{index:02d}" for index in range(5))  # how a simulation calls them
NAMES = ("clinic-a", "clinic-b", "clinic-c", "clinic-d", "clinic-e")
RANKS = (16, 8, 4, 4, 2)
TRAIN_SCALE, TEST_SIZE = 0.2, 6
RECIPE: dict[str, dict[str, Any]] = {
    "lora": {"alpha": 32.0},
    "train": {"steps": 2, "batch_size": 4, "lr": 0.002},
    "server": {"rounds": 2, "timeout": 90.0, "retries": 3, "retry_seconds": 1.0},
    "eval": {"every": 0},
    "data": {"train_scale": TRAIN_SCALE, "test_size": TEST_SIZE},
    "track": {"tensorboard": False},
}


def to_toml(table: Mapping[str, Mapping[str, Any]]) -> str:
    """Flat sections of numbers, texts, flags and lists."""
    lines = []
    for section, keys in table.items():
        lines += [f"[{section}]"] + [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
    return "\n".join(lines) + "\n"


def run(*command: object, expect: int = 0) -> str:
    """A command to its end; its output and errors together."""
    words = [str(FEDLOOM), *(str(word) for word in command)]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    if done.returncode != expect:
        raise RuntimeError(
            f"{' '.join(words)} must exit with {expect}, got {done.returncode}:\n{done.stdout}{done.stderr}"
        )
    return done.stdout + done.stderr


@dataclass
class Stand:
    """The folder of one consortium, and the processes that run in it."""

    folder: Path
    devices: int = 3
    strategy: str = "fedloom"
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    known: tuple[str, ...] = NAMES  # what devices are called; a pretend fleet's names make the same run
    out: Path = Path()
    host: str = "127.0.0.1"  # what devices dial
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.out = self.out if self.out.name else self.folder / "run"
        self.names = self.known[: self.devices]
        recipe = {key: dict(value) for key, value in RECIPE.items()} | {"strategy": {"name": self.strategy}}
        recipe["fleet"] = {"devices": self.devices, "ranks": RANKS}
        for section, keys in self.changes.items():
            recipe.setdefault(section, {}).update(keys)
        (self.folder / "recipe.toml").write_text(f'name = "stand"\n{to_toml(recipe)}')
        server = {
            "link": {"host": self.host if self.host == "127.0.0.1" else "0.0.0.0", "port": self.port},
            "keys": {"folder": str(self.folder / "keys")},
            "fleet": {"wait_for": self.devices, "wait_seconds": 600.0},
        }
        (self.folder / "server.toml").write_text(to_toml(server))
        run("keys", "init", "--keys", self.folder / "keys", "--host", self.host)
        for index, name in enumerate(self.names):
            self.add_device(index, name)

    def add_device(self, index: int, name: str) -> None:
        bundle = self.folder / f"{name}.bundle.toml"
        keys = ("--keys", self.folder / "keys")
        run("keys", "add-device", name, "--server", f"{self.host}:{self.port}", "--out", bundle, *keys)
        home = household(index, seed=0, train_scale=TRAIN_SCALE, test_size=TEST_SIZE)
        for what, requests in (("train", home.train), ("test", home.test)):
            rows = [{"prompt": r.prompt, "completion": r.completion} for r in requests]
            (self.folder / f"{name}.{what}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        text = (
            f"join = {json.dumps(str(bundle))}\nrecipe = {json.dumps(str(self.folder / 'recipe.toml'))}\n"
            f"state = {json.dumps(str(self.folder / 'state' / name))}\nrank = {RANKS[index % 5]}\n"
        )
        data = {what: str(self.folder / f"{name}.{what}.jsonl") for what in ("train", "test")}
        rules = {"threads": 1}  # as in a simulation: more would round differently
        (self.folder / f"{name}.toml").write_text(text + to_toml({"data": data, "rules": rules}))

    def __enter__(self) -> Stand:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start_server(self) -> None:
        config = ("--config", self.folder / "server.toml", "--out", self.out)
        self._start("server", "server", self.folder / "recipe.toml", *config)

    def start_client(self, name: str) -> None:
        self._start(name, "client", "--config", self.folder / f"{name}.toml")

    def start(self) -> None:
        self.start_server()
        for name in self.names:
            self.start_client(name)

    def around(self, label: str) -> tuple[list[str], dict[str, str]]:
        """What comes before a command, and in its environment: some stands put it on a network or clock of its own."""
        return [], {}

    def _start(self, label: str, *command: object) -> None:
        before, extra = self.around(label)
        self.processes[label] = launch(self.folder / f"{label}.log", *command, before=before, extra=extra)

    def stop(self) -> None:
        """End everything that was started, children too."""
        tree = [child for process in self.processes.values() for child in _tree(process.pid)]
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 15
        for process in self.processes.values():
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for child in tree:
            if child.is_running():
                child.kill()

    def events(self) -> list[dict[str, Any]]:
        """The whole lines of events.jsonl."""
        return events_of(self.out)

    def wait(self, what: Callable[[], Any], *, seconds: float = 180.0, pause: float = 0.05, label: str = "") -> Any:
        """Poll until `what` gives something true, and give it back."""
        return wait_until(what, seconds=seconds, pause=pause, label=label, said=lambda: self.log("server"))

    def log(self, label: str, lines: int = 40) -> str:
        path = self.folder / f"{label}.log"
        return (
            "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]) if path.exists() else ""
        )

    def wait_to_finish(self, seconds: float = 300.0) -> None:
        code = self.wait(
            lambda: (self.processes["server"].poll() is not None) and [self.processes["server"].poll()],
            seconds=seconds,
            label="the server to finish",
        )
        if code != [0]:
            raise RuntimeError(f"the server must end well, got {code}:\n{self.log('server')}")

    def find(self, target: str) -> list[psutil.Process]:
        """Processes of the server's side (server, serverapp, superlink) or a device's (NAME, NAME/supernode)."""
        words = {"serverapp": "flwr-serverapp", "superlink": "fedloom.server.door", "supernode": "flower-supernode"}
        label, _, part = target.rpartition("/")
        if part in ("serverapp", "superlink"):
            return of_run(self.out, words[part])
        if label:
            children = _tree(self.processes[label].pid)[1:]
            return [child for child in children if words[part] in command_of(child)]
        return [psutil.Process(self.processes[target].pid)]

    def kill(self, target: str) -> int:
        """SIGKILL to all that `find` finds; what was started here is started again, as systemd would."""
        killed = kill(self.find(target))
        if target in self.processes:
            self.processes[target].wait()
            if target == "server":
                self.start_server()
            else:
                self.start_client(target)
        return killed

    def final_state(self) -> bytes:
        return final_state(self.out)

    def simulated(self, folder: Path) -> bytes:
        """The final state of the same devices in this process, with nothing in between; for `known=PRETEND`."""
        run_recipe(read_recipe(self.folder / "recipe.toml"), folder)
        return final_state(folder)

    def is_out(self, round: int) -> bool:
        """Whether the tasks of a round are out. Where a test gets no turn for seconds, the answers may be in, too."""
        return any(e["event"] == "phase" and (e["round"], e["phase"]) == (round, "train") for e in self.events())

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines() if line]


def _tree(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def final_state(out: Path) -> bytes:
    """The tensors of a run's newest checkpoint."""
    newest = sorted((out / "checkpoints").glob("round-*"))[-1]
    return (newest / "state.safetensors").read_bytes()


def answers(events: list[dict[str, Any]], round: int, phase: str) -> Iterator[dict[str, Any]]:
    """Good answers of a phase."""
    for event in events:
        if event["event"] == "answer" and event["round"] == round and event["phase"] == phase and not event["refused"]:
            yield event
