"""`fedloom client`: a device by one command, what its owner asks of it, and mistakes in one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedloom.cli.client import _settings
from fedloom.client.agent.calls import Away, calling
from fedloom.client.agent.home import Home
from fedloom.protocols.codec import decode, encode
from fedloom.protocols.messages import Start, Task, Update
from fedloom.server.keys import Consortium
from fedloom.simulations.fleet import EMBEDDED_MODEL
from fedloom.simulations.household.households import household

Fedloom = Callable[..., tuple[int, str, str]]


@dataclass(frozen=True)
class Running:
    """A device that runs in a process of its own, as a user starts it."""

    config: Path
    home: Home
    process: subprocess.Popen[bytes]
    out: Path


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("device")
    home_ = household(0, seed=0, train_scale=1.0, test_size=5)
    lines = [json.dumps({"prompt": r.prompt, "completion": r.completion}) for r in home_.train[:12]]
    (folder / "mine.jsonl").write_text("\n".join(lines))
    config, out = folder / "device.toml", folder / "out"
    config.write_text(
        'name = "kitchen"\nrecipe = "quick"\nstate = "state"\nrank = 4\n'
        '[data]\ntrain = "mine.jsonl"\n[model]\ndevice = "cpu"\n[rules]\nthreads = 1\n'
    )
    command = [str(Path(sys.executable).parent / "fedloom"), "client", "--config", str(config)]
    with out.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"})
    running = Running(config, Home(folder=folder / "state"), process, out)
    end = time.monotonic() + 120
    while state(running) != "idle":
        assert process.poll() is None, out.read_text()
        assert time.monotonic() < end
        time.sleep(0.1)
    yield running
    process.kill()
    process.wait()


def state(running: Running) -> str:
    try:
        with calling(running.home.socket) as agent:
            return agent.status().state
    except Away:
        return ""


def perform(running: Running, **fields: Any) -> Update:
    knobs = {"steps": 1, "lr": 0.01, "batch_size": 2}
    task = Task(device="kitchen", rank=2, alpha=4.0, start_from=Start.FRESH, run="ab" * 8, knobs=knobs, **fields)
    with calling(running.home.socket) as agent:
        return decode(agent.perform(encode(task)), Update, limit=2**29)


def test_status_of_a_device(device: Running, fedloom: Fedloom) -> None:
    perform(device, round=1)
    code, out, _ = fedloom("client", "status", "--config", device.config)
    assert code == 0
    told = " ".join(out.split())
    for part in ("kitchen", "state idle", "train, round 1, step 1/1", "1 answered, 0 refused", "may work now"):
        assert part in told
    code, out, _ = fedloom("client", "status", "--config", device.config, "--json")
    found = json.loads(out)
    assert (code, found["device"], found["state"], found["details"]["device"]["rank"]) == (0, "kitchen", "idle", 4)
    assert found["details"]["process"] == device.process.pid
    assert fedloom("client", "--config", device.config, "status")[0] == 0  # the option before the subcommand
    assert fedloom("client", "status", "--state", device.home.folder)[0] == 0


def test_pause_and_resume(device: Running, fedloom: Fedloom) -> None:
    assert fedloom("client", "pause", "--config", device.config) == (
        0,
        "kitchen is paused; `fedloom client resume` lets it work again\n",
        "",
    )
    assert state(device) == "paused"
    assert fedloom("client", "resume", "--config", device.config)[1] == "kitchen works again\n"
    assert state(device) == "idle"


def test_the_log_of_what_left(device: Running, fedloom: Fedloom, monkeypatch: pytest.MonkeyPatch) -> None:
    perform(device, round=2)
    with calling(device.home.socket) as agent:
        agent.hello()
        agent.perform(b"junk")
    code, out, _ = fedloom("client", "log", "--config", device.config, "--json", "--tail", 3)
    train, hello, refused = map(json.loads, out.splitlines())
    assert (code, train["kind"], train["round"], hello["kind"], refused["kind"]) == (0, "train", 2, "hello", "refusal")
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = fedloom("client", "log", "--config", device.config)
    assert code == 0
    assert "29,184 numbers of 28 tensors as fp32; metrics loss_sum, n, steps, tokens" in out
    assert "messages that left this device" in out


def test_the_agents_own_process_holds_no_model(device: Running) -> None:
    """Torch is in the model's process alone: the front stays small, and outlives whatever happens there."""
    front = psutil.Process(device.process.pid)
    libraries = {Path(mapped.path).name for mapped in front.memory_maps()}
    assert not [name for name in libraries if name.startswith("libtorch")]
    assert front.memory_info().rss < 200 * 2**20


def test_mistakes_are_one_line(
    fedloom: Fedloom, tmp_path: Path, device: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    both = "fedloom: a device needs --config device.toml or --join bundle.toml, got neither\n"
    assert fedloom("client") == (2, "", both)
    assert fedloom("client", "status") == (2, "", both)
    Consortium(tmp_path / "keys").init()
    Consortium(tmp_path / "keys").add_device("clinic", "127.0.0.1:1", out=tmp_path / "clinic.toml")
    assert fedloom("client", "--join", "clinic.toml") == (
        2,
        "",
        "fedloom: device settings key 'data.train' must name a file of examples (or use --data FILE), got none\n",
    )
    code, _, err = fedloom("client", "--join", "clinic.toml", "--data", "x.jsonl", "--recipe", "demoo")
    assert (code, err.startswith("fedloom: no recipe 'demoo': did you mean 'demo'?")) == (2, True)
    code, _, err = fedloom("client", "status", "--state", tmp_path / "nobody")
    assert (code, err) == (2, f"fedloom: no agent runs for {tmp_path}/nobody; `fedloom client` starts one\n")
    code, _, err = fedloom("client", "--config", device.config)
    runs = f"fedloom: an agent of {device.home.folder} runs already (process {device.process.pid})\n"
    assert (code, err) == (2, runs)
    code, _, err = fedloom("client", "--config", device.config, "--set", "rank=0")
    assert (code, "key 'rank': input should be greater than or equal to 1, got 0" in err) == (2, True)


def test_settings_are_found_where_they_usually_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fedloom: Fedloom
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("device.toml").write_text('name = "a"\nstate = "s"\nrecipe = "demo"\n')
    assert fedloom("client", "status")[2] == f"fedloom: no agent runs for {tmp_path}/s; `fedloom client` starts one\n"
    assert _settings(None, {}, []).model.path == str(EMBEDDED_MODEL)


def test_help_says_how_to_begin(fedloom: Fedloom) -> None:
    code, out, _ = fedloom("client", "--help")
    told = " ".join(out.replace("│", " ").split())
    assert code == 0
    for part in ("--join", "--config", "status", "pause", "resume", "log", "never leaves it"):
        assert part in told


def test_a_signal_ends_it_cleanly(device: Running) -> None:
    """Last, since it ends the device that the other tests use."""
    model = psutil.Process(device.process.pid).children(recursive=True)
    perform(device, round=7)
    device.process.send_signal(signal.SIGTERM)
    assert device.process.wait(30) == 0
    assert not psutil.wait_procs(model, timeout=10)[1]
    assert not device.home.socket.exists()
    told = device.out.read_text()
    for part in ("kitchen: loading", "rank 4, base", "no server is named", "round 7: trained in", "kitchen: stopped"):
        assert part in told
    assert "Traceback" not in told
