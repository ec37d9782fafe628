"""An agent that is killed with -9, whatever it is doing, starts again and gives the answers it would have given."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from stages import make_settings, make_task

from fedloom.client.agent.calls import Away, calling
from fedloom.client.agent.home import Home
from fedloom.client.agent.outbox import entries
from fedloom.client.data import Example
from fedloom.client.device import Device
from fedloom.client.model import Resident
from fedloom.protocols.codec import decode, decode_answer, encode
from fedloom.protocols.messages import Kind, Patch, Payload, Refusal, Task, Update

LIMIT = 2**29
MAIN = "from fedloom.cli.client import app; app()"


def to_toml(folder: Path, model: Path, examples: list[Example]) -> Path:
    settings = make_settings(folder, model, examples)
    path = folder / "device.toml"
    path.write_text(
        f'name = "a"\nstate = {json.dumps(settings.state)}\nrank = 16\n'
        f'[model]\npath = {json.dumps(settings.model.path)}\ndevice = "cpu"\n'
        f"[data]\ntrain = {json.dumps(settings.data.train)}\ntest = {json.dumps(settings.data.test)}\n"
        f"[rules]\nthreads = 1\n"
    )
    return path


def start(config: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", MAIN, "--config", str(config)]
    with (config.parent / "agent.out").open("ab") as out:
        return subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | {"OMP_NUM_THREADS": "1"})


def perform(home: Home, frame: bytes, seconds: float = 120.0) -> bytes:
    """As the relay does it: again, until the agent is there."""
    end = time.monotonic() + seconds
    while True:
        try:
            with calling(home.socket) as agent:
                return agent.perform(frame)
        except Away:
            assert time.monotonic() < end
            time.sleep(0.05)


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on(
    tmp_path: Path,
    tiny_llama: Path,
    examples: list[Example],
    llama: Resident,
    make_device: Callable[..., Device],
    payload_for: Callable[..., Payload],
) -> None:
    """Rounds of patches, training and evaluation, and an agent that dies meanwhile, its model's process with it."""
    config, home = to_toml(tmp_path, tiny_llama, examples), Home(folder=tmp_path / "state")
    knobs = {"steps": 30, "lr": 0.01, "batch_size": 4}
    tasks: list[Task] = []
    for number in range(1, 6):
        delta = payload_for(llama.spec, number)
        patch = Patch(base_hash=llama.spec.base_hash, since=number - 1, version=number, payload=delta)
        tasks += [make_task(round=number, patch=patch, knobs=knobs)]
        stay = replace(patch, since=number, payload=Payload())
        tasks += [make_task(round=number, patch=stay, kind=Kind.EVALUATE, knobs={})]
    device, generator, process = make_device(llama), random.Random(3), start(config)
    answers: list[tuple[bytes, bytes]] = []
    for task in tasks:
        frame = encode(task)
        perform(home, encode(make_task(round=99)))  # it is up
        worker = psutil.Process(process.pid).children()
        killer = threading.Timer(generator.uniform(0.0, 1.0), process.send_signal, (signal.SIGKILL,))
        killer.start()
        try:
            with calling(home.socket) as agent:
                first = agent.perform(frame)
        except Away:
            first = b""
        killer.join()
        process.wait()
        psutil.wait_procs(worker, timeout=20)
        assert not any(child.is_running() for child in worker)  # the model's process does not outlive its agent
        process = start(config)
        answer = perform(home, frame)
        assert first in (b"", answer)  # an answer that got out before is sent again, to the byte
        assert not isinstance(said := decode_answer(answer, (Update, Refusal), limit=LIMIT), Refusal), said
        answers.append((frame, answer))
    for task, (_, answer) in zip(tasks, answers, strict=True):
        got, wanted = decode(answer, Update, limit=LIMIT), device.handle(task)
        assert got.metrics == wanted.metrics
        for name, factor in wanted.payload.factors.items():
            np.testing.assert_array_equal(got.payload.factors[name].b, factor.b)
            np.testing.assert_array_equal(got.payload.factors[name].a, factor.a)
    logged = [entry["bytes"] for entry in entries(home.folder) if entry["kind"] != "refusal"]
    assert len(logged) >= len(tasks)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert not home.socket.exists()
