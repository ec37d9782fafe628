"""What a SuperNode runs in place of Flower's `flwr-clientapp`: the relay that is installed here, and nothing else.

A server sends every node an app bundle, and Flower would unpack and import it: whoever controls the server could run
any code on every device. Here the bundle is not even unpacked. A server can only ask for what the agent accepts.

The folder that `write_commands` fills goes first in the PATH of the SuperNode. It has every command that Flower starts
for a task; all but one of them refuse. The SuperNode itself and its SuperExec are started through it, too: between the
three every request shows the device's password (protocols/password.py), since other users of the machine can connect
to the SuperNode's port, and read its commands' lines.
"""

from __future__ import annotations

import os
import shlex
import socket
import sys
from pathlib import Path
from typing import Any, Final

from fedloom.protocols.password import VARIABLE, is_shown, own, show

SUPERNODE: Final = "flower-supernode"
EXECUTOR: Final = "flower-superexec"
CLIENT_APP: Final = "flwr-clientapp"
_REFUSED: Final = ("flwr-agentapp", "flwr-connector", "flwr-model", "flwr-serverapp", "flwr-simulation")


def write_commands(folder: Path) -> None:
    """Fill a folder with the commands that a SuperNode may start."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    run = f"exec {shlex.quote(sys.executable)} -P -m fedloom.client.agent.launcher"
    for name in (SUPERNODE, EXECUTOR, CLIENT_APP, *_REFUSED):
        path = folder / name
        path.write_text(f'#!/bin/sh\n{run} {name} "$@"\n', encoding="utf-8")
        path.chmod(0o700)


class Guard:
    """Middleware around the API that a SuperNode serves to this machine: nothing without the password."""

    def __init__(self, app: Any, *, password: str) -> None:
        self._app, self._password = app, password

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan" or is_shown(scope["headers"], self._password):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await send({"type": "http.response.start", "status": 401, "headers": [(b"connection", b"close")]})
            await send({"type": "http.response.body", "body": b"not without the device's password"})


def main(arguments: list[str]) -> int:
    """Run one of the commands, or refuse; the exit status."""
    name = Path(arguments[0]).name
    sys.argv = arguments
    if name == SUPERNODE:
        return _supernode()
    if name not in (EXECUTOR, CLIENT_APP):
        print(f"this device runs no {name}", file=sys.stderr)
        return 1
    from flwr.supercore.protobuf.client import ProtobufClient

    show(ProtobufClient, os.environ.get(VARIABLE, ""))
    return _executor() if name == EXECUTOR else _relay()


def _supernode() -> int:
    """Flower's SuperNode, with a guard before what it serves. It alone talks to the server, without the password.

    It serves on a port that is held before anyone can know it: who took it first would be given the password.
    """
    import uvicorn
    from flwr.supernode import main as api
    from flwr.supernode.cli.flower_supernode import flower_supernode

    password, create = own(), api.create_app

    def guarded(*arguments: Any, **options: Any) -> Any:
        app = create(*arguments, **options)
        app.add_middleware(Guard, password=password)  # the last one added is the outermost
        return app

    held = socket.create_server(("127.0.0.1", 0))
    serve = uvicorn.Server.run

    def run(self: uvicorn.Server, sockets: list[socket.socket] | None = None) -> None:
        serve(self, [held])

    api.create_app = guarded
    uvicorn.Server.run = run  # type: ignore[method-assign]
    sys.argv += ["--host", "127.0.0.1", "--port", str(held.getsockname()[1])]  # the last of two counts
    flower_supernode()
    return 0


def _executor() -> int:
    from flwr.supercore.cli.flower_superexec import flower_superexec

    flower_superexec()
    return 0


def _relay() -> int:
    """The relay, as Flower runs a ClientApp."""
    from flwr.supernode.cli.flwr_clientapp import flwr_clientapp
    from flwr.supernode.runtime import run_clientapp

    from fedloom.client.relay import app

    def leave_packed(*_: Any, **__: Any) -> None:
        """Does not unpack the bundle."""

    def installed(*_: Any, **__: Any) -> Any:
        """Gives a function that loads the relay, whatever the bundle names."""
        return lambda *_: app

    for name, replacement in (("install_from_fab", leave_packed), ("get_load_client_app_fn", installed)):
        if not hasattr(run_clientapp, name):  # another version of Flower: better no relay than the server's code
            print(f"this version of Flower has no {name}; it may not run apps here", file=sys.stderr)
            return 1
        setattr(run_clientapp, name, replacement)
    flwr_clientapp()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
