"""OUT/plan.json: what `fedloom server` tells the ServerApp to do."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from fedloom.protocols.config import RunConfig, build_config
from fedloom.server.disk import write_whole

PLAN_FILE = "plan.json"


@dataclass(frozen=True, kw_only=True)
class Orders:
    """One run.

    Attributes:
        run: its name; a run of another name is not gone on with.
        wait_for: devices that must be connected before the first round, and `wait_seconds` for how long.
        rejoin_seconds: how long to wait, after a restart, for the devices that took part before.
        names: the devices that are let in, each by a key of its own; None where there are no keys and any may come.
    """

    config: RunConfig
    run: str
    wait_for: int = 1
    wait_seconds: float = 600.0
    rejoin_seconds: float = 60.0
    names: tuple[str, ...] | None = None


def write_orders(out: Path, orders: Orders) -> None:
    body = {
        "config": orders.config.model_dump(mode="json"),
        "run": orders.run,
        "wait_for": orders.wait_for,
        "wait_seconds": orders.wait_seconds,
        "rejoin_seconds": orders.rejoin_seconds,
        "names": None if orders.names is None else list(orders.names),
    }
    write_whole(out / PLAN_FILE, json.dumps(body, indent=1).encode())


def read_orders(out: Path) -> Orders:
    """What `write_orders` wrote.

    Raises:
        ValueError: when there is no plan.json, or not a good one.
    """
    path = out / PLAN_FILE
    try:
        table = json.loads(path.read_bytes())
        return Orders(
            config=build_config(table["config"]),
            run=str(table["run"]),
            wait_for=int(table["wait_for"]),
            wait_seconds=float(table["wait_seconds"]),
            rejoin_seconds=float(table["rejoin_seconds"]),
            names=None if table["names"] is None else tuple(map(str, table["names"])),
        )
    except (OSError, LookupError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error!r}): `fedloom server` writes it") from None
