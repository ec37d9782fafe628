"""What a SuperNode runs in place of Flower's `flwr-clientapp`: the relay that is installed here, and nothing else.

A server sends every node an app bundle, and Flower would unpack and import it: whoever controls the server could run
any code on every device. Here the bundle is not even unpacked. A server can only ask for what the agent accepts.

The folder that `write_commands` fills goes first in the PATH of the SuperNode. It has every command that Flower starts
for a task; all but one of them refuse.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any, Final

_REFUSED: Final = ("flwr-agentapp", "flwr-connector", "flwr-model", "flwr-serverapp", "flwr-simulation")


def write_commands(folder: Path) -> None:
    """Fill a folder with the commands that a SuperNode may start."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    run = f"exec {shlex.quote(sys.executable)} -P -m fedloom.client.agent.launcher"
    for name in ("flwr-clientapp", *_REFUSED):
        path = folder / name
        path.write_text(f'#!/bin/sh\n{run} {name} "$@"\n', encoding="utf-8")
        path.chmod(0o700)


def main(arguments: list[str]) -> int:
    """Run the relay as Flower runs a ClientApp, or refuse; the exit status."""
    name = Path(arguments[0]).name
    if name != "flwr-clientapp":
        print(f"this device runs no {name}", file=sys.stderr)
        return 1
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
    sys.argv = arguments
    flwr_clientapp()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
