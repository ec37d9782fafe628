"""A server that sends its own code to the devices: it gets the answers that the device accepts to give, and no more."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from ssl import create_default_context

import psutil
import pytest
from stages import write_examples

from fedloom.client.agent.calls import Away, calling
from fedloom.client.agent.home import Home
from fedloom.client.data import Example
from fedloom.server.keys import Consortium

pytestmark = pytest.mark.deploy

BIN = Path(sys.executable).parent
PYPROJECT = """
[project]
name = "evil"
version = "1.0.0"
description = "x"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "evil"
fab-include = ["*.py"]
[tool.flwr.app.components]
serverapp = "evil_server:app"
clientapp = "evil_client:app"
"""
CLIENT = """
import pathlib
pathlib.Path({marker!r}).write_text("this server's code ran on the device")
from flwr.clientapp import ClientApp
app = ClientApp()
"""
SERVER = """
import pathlib, time
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp
app = ServerApp()
@app.main()
def main(grid, context):
    while not (nodes := list(grid.get_node_ids())):
        time.sleep(0.1)
    ids = grid.push_messages([Message(RecordDict({{"fedloom": ConfigRecord({{"frame": b""}})}}), nodes[0], "query")])
    while not (replies := list(grid.pull_messages(ids))):
        time.sleep(0.1)
    pathlib.Path({answer!r}).write_bytes(replies[0].content["fedloom"]["frame"])
"""


def until(condition: Callable[[], object], seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    flags = ("FLWR_DISABLE_UPDATE_CHECK", "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION")
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    told = {"PATH": path, "FLWR_HOME": str(tmp_path / "flwr"), "FLWR_TELEMETRY_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **dict.fromkeys(flags, "1"), **told}


@pytest.fixture
def superlink(tmp_path: Path, environment: dict[str, str]) -> Iterator[tuple[int, Consortium]]:
    """Flower's own server, over TLS and with node keys."""
    port, consortium = free_port(), Consortium(tmp_path / "keys")
    consortium.init()
    files = consortium.server_files()
    command = [str(BIN / "flower-superlink"), "--host", "127.0.0.1", "--port", str(port), "--enable-supernode-auth"]
    command += ["--ssl-ca-certfile", str(files.ca), "--ssl-certfile", str(files.certificate)]
    command += ["--ssl-keyfile", str(files.key), "--database", str(tmp_path / "s.db")]
    with (tmp_path / "superlink.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    context = create_default_context(cafile=str(files.ca))

    def up() -> bool:
        try:
            return bool(urllib.request.urlopen(f"https://127.0.0.1:{port}/health", context=context, timeout=1))
        except OSError:
            return False

    until(up)
    (tmp_path / "flwr").mkdir(exist_ok=True)
    (tmp_path / "flwr" / "config.toml").write_text(
        f'[superlink.here]\naddress = "127.0.0.1:{port}"\nroot-certificates = "{files.ca}"\n'
    )
    yield port, consortium
    process.send_signal(signal.SIGTERM)
    process.wait(30)


def flwr(environment: dict[str, str], *words: object) -> None:
    subprocess.run([str(BIN / "flwr"), *map(str, words)], env=environment, check=True, capture_output=True, timeout=60)


def connected(home: Home) -> bool:
    try:
        with calling(home.socket) as agent:
            return bool(agent.status().details["link"]["connected"])
    except Away:
        return False


def nobody_is_served(family: Sequence[psutil.Process]) -> bool:
    """Whether the SuperNode's port, which every user of the machine can connect to, answers nothing but 401."""
    ports = [line.laddr.port for process in family for line in process.net_connections() if line.status == "LISTEN"]
    for port in ports:
        for path in ("/v1/runtime/acquire-task", "/v1/runtime/pull-task-input", "/health", "/docs", "/"):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", data=b"", timeout=5)
                return False
            except urllib.error.HTTPError as error:
                if error.code != 401:
                    return False
    return bool(ports)


def test_a_servers_code_never_runs_on_a_device(
    tmp_path: Path,
    tiny_llama: Path,
    examples: list[Example],
    superlink: tuple[int, Consortium],
    environment: dict[str, str],
) -> None:
    """And: killed with -9, the agent takes its SuperNode with it, starts again and is connected again."""
    port, consortium = superlink
    marker, answer, app = tmp_path / "marker", tmp_path / "answer", tmp_path / "app"
    app.mkdir()
    for name, text in (
        ("pyproject.toml", PYPROJECT),
        ("evil_client.py", CLIENT.format(marker=str(marker))),
        ("evil_server.py", SERVER.format(answer=str(answer))),
    ):
        (app / name).write_text(text)
    bundle = tmp_path / "clinic.toml"
    consortium.add_device("clinic", f"127.0.0.1:{port}", out=bundle)
    flwr(environment, "supernode", "register", consortium.devices()[0].public_key, "here")
    data, home = write_examples(tmp_path / "data.jsonl", examples), Home(folder=tmp_path / "state")
    command = [str(BIN / "fedloom"), "client", "--join", str(bundle), "--data", str(data), "--state", str(home.folder)]
    command += ["--set", f"model.path={json.dumps(str(tiny_llama))}"]
    device = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        until(lambda: connected(home))
        flwr(environment, "run", app, "here")
        until(answer.exists)
        assert answer.read_bytes().startswith(b"FDLM")
        assert b"clinic" in answer.read_bytes()
        assert not marker.exists()
        assert not list((home.link / "flower").rglob("evil_client.py"))  # it was not even unpacked
        family = psutil.Process(device.pid).children(recursive=True)
        assert len(family) >= 3
        assert nobody_is_served(family)
        device.kill()
        device.wait()
        _, alive = psutil.wait_procs(family, timeout=20)
        assert not alive
        device = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        until(lambda: connected(home))
        device.send_signal(signal.SIGTERM)
        assert device.wait(30) == 0
        assert not home.socket.exists()
        assert "SuperNode terminated gracefully" in (home.link / "supernode.log").read_text()  # it said goodbye
    finally:
        device.kill()
        device.wait()
