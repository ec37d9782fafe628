"""Devices for the server's own tests: real SuperNodes with real keys, and agents in this process that share one model.

Sockets lie in a short folder of their own: a Unix socket's path must not be longer than about 100 characters.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
from common import BIN, free_port, kill

from fedloom.client.chunks import cut, gather
from fedloom.protocols import agent_pb2 as pb
from fedloom.protocols.agent_pb2_grpc import AgentServicer, add_AgentServicer_to_server
from fedloom.protocols.bundle import JoinBundle
from fedloom.protocols.codec import decode, encode
from fedloom.protocols.config import RunConfig
from fedloom.protocols.messages import Refusal, Task
from fedloom.server.keys import Consortium
from fedloom.simulations.world import World

LIMIT = 2**29


class _Agent(AgentServicer):
    """Answers for one device of the world; devices share its model, so they take turns."""

    def __init__(self, fleet: Fleet, index: int) -> None:
        self._fleet, self._index = fleet, index

    def Hello(self, request: pb.HelloRequest, context: Any) -> Iterator[pb.Chunk]:  # noqa: N802 - gRPC's name
        with self._fleet.turn:
            frame = encode(self._fleet.world.device(self._index).hello())
        yield from cut(frame)

    def Perform(self, request: Iterator[pb.Chunk], context: Any) -> Iterator[pb.Chunk]:  # noqa: N802 - gRPC's name
        task = decode(gather(request, limit=LIMIT), Task, limit=LIMIT)
        with self._fleet.turn:
            device = self._fleet.world.device(self._index)
            self._fleet.tasks.append((task.round, task.kind, task.device))
            try:
                frame = encode(device.handle(task), wire=task.wire, seed=task.seed)
            except ValueError as error:
                asked = {"round": task.round, "run": task.run, "nonce": task.nonce}
                frame = encode(Refusal(device=device.name, reason=str(error), **asked))
        yield from cut(frame)


@dataclass
class Device:
    """One device's name, bundle, folder and SuperNode."""

    name: str
    bundle: JoinBundle | None
    folder: Path
    socket: Path
    process: subprocess.Popen[bytes] | None = None


class Fleet:
    """The devices of a recipe. Close it: it holds processes, threads and a folder."""

    def __init__(self, config: RunConfig, folder: Path, port: int, consortium: Consortium | None) -> None:
        """Without a consortium the SuperNodes speak no TLS and show no registered key."""
        self.world, self.turn, self._port = World(config, folder / "work"), threading.Lock(), port
        self.tasks: list[tuple[int, str, str]] = []
        self._sockets = Path(tempfile.mkdtemp(prefix="fedloom-"))
        self._folder, self._servers = folder, []
        self.devices = [self._add(index, consortium) for index in range(config.fleet.devices)]
        self._closing = threading.Event()
        self._keeper = threading.Thread(target=self._keep, daemon=True)
        self._keeper.start()

    def _add(self, index: int, consortium: Consortium | None) -> Device:
        name, path = f"device-{index:02d}", self._sockets / f"{index}.sock"
        folder = self._folder / name
        folder.mkdir(parents=True)
        device = Device(name=name, bundle=None, folder=folder, socket=path)
        if consortium is not None:
            self.renew(device, consortium)
        server = grpc.server(ThreadPoolExecutor(4))
        add_AgentServicer_to_server(_Agent(self, index), server)  # type: ignore[no-untyped-call]
        server.add_insecure_port(f"unix:{path}")
        server.start()
        self._servers.append(server)
        return device

    def renew(self, device: Device, consortium: Consortium) -> None:
        """Give it a new key."""
        device.bundle = consortium.add_device(device.name, f"127.0.0.1:{self._port}")
        (device.folder / "ca.crt").write_text(device.bundle.ca)
        (device.folder / "key").write_text(device.bundle.key)
        (device.folder / "key").chmod(0o600)

    def start(self, device: Device) -> None:
        """Start its SuperNode."""
        command = [str(BIN / "flower-supernode"), "--superlink", f"127.0.0.1:{self._port}", "--port", str(free_port())]
        if device.bundle is None:
            command.append("--insecure")
        else:
            command += ["--root-certificates", str(device.folder / "ca.crt")]
            command += ["--auth-supernode-private-key", str(device.folder / "key")]
        command += ["--node-config", f'agent="{device.socket}" name="{device.name}"']
        environment = os.environ | {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(device.folder / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        }
        with (device.folder / "supernode.log").open("ab") as log:
            device.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=device.folder
            )

    def _keep(self) -> None:
        """Start SuperNodes again that ended by themselves, as the agent does."""
        while not self._closing.wait(0.5):
            for device in self.devices:
                if device.process is not None and device.process.poll() is not None:
                    self.start(device)

    def start_all(self) -> None:
        for device in self.devices:
            self.start(device)

    def kill(self, device: Device) -> None:
        """Kill its SuperNode with -9, and what that started; it stays dead until it is started."""
        if (process := device.process) is not None:
            device.process = None
            try:
                children = psutil.Process(process.pid).children(recursive=True)
            except psutil.Error:
                children = []
            process.kill()
            process.wait()
            kill(children)

    def close(self) -> None:
        self._closing.set()
        self._keeper.join()
        for device in self.devices:
            self.kill(device)
        for server in self._servers:
            server.stop(grace=None)
        shutil.rmtree(self._sockets, ignore_errors=True)
