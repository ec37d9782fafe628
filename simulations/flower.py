"""What `flwr run .` starts: the same server loop and the same devices, on Flower's own simulation engine.

Run config: `recipe` names an embedded recipe or a TOML file, `settings` overrides its keys ("train.lr=0.01 seed=1"),
`out` is the folder for checkpoints and metrics (a new one in ~/.fedloom/flower if empty), `resume` goes on with the run
in it. There are as many devices as SuperNodes.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from flwr.app import Context

from fedloom.client.app import Handler
from fedloom.client.app import client_app as make_client_app
from fedloom.protocols.config import RunConfig, read_recipe
from fedloom.server.app import Plan
from fedloom.server.app import server_app as make_server_app
from fedloom.simulations.cookbook import find_recipe
from fedloom.simulations.naming import run_name
from fedloom.simulations.world import World


@lru_cache(maxsize=1)
def _config(recipe: str, settings: str) -> RunConfig:
    return read_recipe(find_recipe(recipe), settings.split())


@lru_cache(maxsize=1)
def _world(recipe: str, settings: str, out: str, devices: int) -> World:
    config = _config(recipe, settings)
    fleet = config.fleet.model_copy(update={"devices": devices})
    return World(config.model_copy(update={"fleet": fleet}), Path(out) / "devices")


def _asked(context: Context) -> tuple[str, str, str]:
    config = context.run_config
    out = str(config["out"]) or f"~/.fedloom/flower/run-{context.run_id}"
    return str(config["recipe"]), str(config["settings"]), str(Path(out).expanduser())


def _prepare(context: Context) -> Plan:
    recipe, settings, out = _asked(context)
    config = _config(recipe, settings)
    return Plan(config=config, out=Path(out), run=run_name(config), resume=bool(context.run_config["resume"]))


def _open_device(context: Context) -> Handler:
    node = context.node_config
    return _world(*_asked(context), int(node["num-partitions"])).device(int(node["partition-id"]))


server_app = make_server_app(_prepare)
client_app = make_client_app(_open_device)
