"""Seconds of a round with three SuperNodes: Fedloom's courier, journal, relay and agent socket beside plain Flower.

    python benchmarks/overhead.py --megabytes 10 100 --rounds 3

Both sides send the same bytes to three SuperNodes on one SuperLink and get as many back; nobody trains. Plain Flower's
ClientApp answers itself, and its ServerApp uses `send_and_receive`. Fedloom's goes through the relay to a gRPC service
on a Unix socket (which echoes), its courier takes answers as they come and its journal writes each to disk.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc

from fedloom.client.chunks import CHUNK, cut, gather
from fedloom.protocols.agent_pb2_grpc import AgentServicer, add_AgentServicer_to_server

BIN = Path(sys.executable).parent
NODES = 3
APPS = """
import json, time
from pathlib import Path
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from fedloom.protocols.framing import MAGIC
from fedloom.server.courier import Courier, Parcel
from fedloom.server.journal import Entry, Journal

echo = ClientApp()

@echo.train()
def train(message, context):
    return Message(message.content, reply_to=message)

app = ServerApp()

@app.main()
def main(grid: Grid, context: Context) -> None:
    asked = json.loads(Path(context.run_config["plan"]).read_text())
    while len(list(grid.get_node_ids())) < asked["nodes"]:
        time.sleep(0.2)
    nodes, found = sorted(grid.get_node_ids()), {}
    for megabytes in asked["megabytes"]:
        frame = MAGIC + bytes(int(megabytes * 1e6))
        found[megabytes] = [one(grid, nodes, frame, asked, number) for number in range(asked["rounds"])]
    Path(asked["out"]).write_text(json.dumps(found))

def one(grid, nodes, frame, asked, number):
    began = time.perf_counter()
    if asked["side"] == "flower":
        content = [RecordDict({"fedloom": ConfigRecord({"frame": frame})}) for _ in nodes]
        messages = [Message(c, n, "train", group_id=str(number)) for c, n in zip(content, nodes)]
        assert len(list(grid.send_and_receive(messages))) == len(nodes)
    else:
        journal = Journal(Path(asked["out"] + "-journal"), round=number, kind="train")
        journal.plan([])
        parcels = [Parcel(node=node, kind="train", frame=frame) for node in nodes]
        for reply in Courier(grid, timeout=600, window=10**6, pause=0.5).exchange(parcels, str(number)):
            assert len(reply.frame) == len(frame), reply.error
            journal.put(str(reply.node), Entry(down=len(frame), frame=reply.frame))
    return time.perf_counter() - began
"""
PROJECT = """
[project]
name = "overhead-{side}"
version = "0.1.0"
description = "x"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "fedloom"
fab-include = ["README.md"]
[tool.flwr.app.components]
serverapp = "overhead_apps:app"
clientapp = "{client}"
[tool.flwr.app.config]
plan = ""
"""


class Echo(AgentServicer):  # type: ignore[misc]
    """An agent that gives every frame back."""

    def Perform(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC's name
        yield from cut(gather(request, limit=1 << 31))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def started(command: list[str], environment: dict[str, str], log: Path) -> Iterator[None]:
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
        try:
            yield
        finally:
            os.killpg(process.pid, 15)
            process.wait()


def agents(folder: Path, stack: ExitStack) -> list[Path]:
    paths = []
    for number in range(NODES):
        server = grpc.server(ThreadPoolExecutor(2), options=[("grpc.max_receive_message_length", 2 * CHUNK)])
        add_AgentServicer_to_server(Echo(), server)
        paths.append(folder / f"agent-{number}.sock")
        server.add_insecure_port(f"unix:{paths[-1]}")
        server.start()
        stack.callback(server.stop, 0)
    return paths


def measure(folder: Path, asked: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    (folder / "overhead_apps.py").write_text(APPS)
    port, home = free_port(), folder / "home"
    home.mkdir()
    (home / "config.toml").write_text(f'[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n')
    environment = os.environ | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(folder), "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "OMP_NUM_THREADS": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }  # fmt: skip
    found = {}
    with ExitStack() as stack:
        link = [str(BIN / "flower-superlink"), "--insecure", "--host", "127.0.0.1", "--port", str(port)]
        stack.enter_context(started([*link, "--database", str(folder / "s.db")], environment, folder / "link.log"))
        _until_healthy(port)
        for number, path in enumerate(agents(folder, stack)):
            node = [str(BIN / "flower-supernode"), "--insecure", "--superlink", f"127.0.0.1:{port}"]
            node += ["--port", str(free_port()), "--node-config", f'agent="{path}" name="n{number}"']
            stack.enter_context(started(node, environment, folder / f"node-{number}.log"))
        for side, client in (("flower", "overhead_apps:echo"), ("fedloom", "fedloom.client.relay:app")):
            app, out = folder / side, folder / f"{side}.json"
            app.mkdir()
            (app / "README.md").write_text("x")
            (app / "pyproject.toml").write_text(PROJECT.format(side=side, client=client))
            plan = {"nodes": NODES, "megabytes": asked.megabytes, "rounds": asked.rounds, "out": str(out), "side": side}
            (app / "plan.json").write_text(json.dumps(plan))
            command = [str(BIN / "flwr"), "run", str(app), "here", "-c", f'plan="{app / "plan.json"}"']
            subprocess.run(command, env=environment, check=True, capture_output=True)
            until = time.monotonic() + 560
            while not out.exists() and time.monotonic() < until:
                time.sleep(0.5)
            time.sleep(0.5)
            found[side] = json.loads(out.read_text())
    return found


def _until_healthy(port: int) -> None:
    for _ in range(300):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise SystemExit("the SuperLink did not start")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, nargs="+", default=[0.001, 10, 100])
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), asked)
    print("| MB each way | plain Flower, s a round | Fedloom, s a round | ratio of medians |\n|---|---|---|---|")
    for megabytes in found["flower"]:
        one, other = (sorted(found[side][megabytes]) for side in ("flower", "fedloom"))
        middle = len(one) // 2
        ranges = [f"{values[middle]:.1f} ({values[0]:.1f} to {values[-1]:.1f})" for values in (one, other)]
        print(f"| {float(megabytes):g} | {ranges[0]} | {ranges[1]} | {other[middle] / one[middle]:.2f} |")


if __name__ == "__main__":
    main()
