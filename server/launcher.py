"""What the server's SuperLink starts in place of Flower's commands: the same, with the run's password on each request.

The SuperLink finds SuperExec, and SuperExec the ServerApp, by their names in PATH. The folder that `write_commands`
fills goes first there.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Final

from fedloom.protocols.password import own, show

EXECUTOR: Final = "flower-superexec"
SERVER_APP: Final = "flwr-serverapp"


def write_commands(folder: Path) -> None:
    """Fill a folder with the commands that a SuperLink starts."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name in (EXECUTOR, SERVER_APP):
        path = folder / name
        run = f"exec {shlex.quote(sys.executable)} -P -m fedloom.server.launcher {name}"
        path.write_text(f'#!/bin/sh\n{run} "$@"\n', encoding="utf-8")
        path.chmod(0o700)


def main(arguments: list[str]) -> int:
    """Run one of the commands; the exit status."""
    from flwr.supercore.protobuf.client import ProtobufClient

    show(ProtobufClient, own())
    sys.argv = arguments
    if arguments[0] == SERVER_APP:
        from flwr.superlink.cli.flwr_serverapp import flwr_serverapp

        flwr_serverapp()
    elif arguments[0] == EXECUTOR:
        from flwr.supercore.cli.flower_superexec import flower_superexec

        flower_superexec()
    else:
        print(f"the server's SuperLink starts no {arguments[0]}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
