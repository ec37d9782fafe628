"""The pretend world in one process: one resident model, and the devices that take turns on it."""

from __future__ import annotations

from pathlib import Path

import torch
from flwr.app import Context
from flwr.clientapp import ClientApp

from fedloom.client.app import Handler, client_app
from fedloom.client.device import Device
from fedloom.client.model import Resident, load_model
from fedloom.client.store import DeviceStore
from fedloom.protocols.config import Model, RunConfig
from fedloom.simulations.clock import Clocked
from fedloom.simulations.fleet import EMBEDDED_MODEL, Fleet


def base_model(config: RunConfig) -> Model:
    """The recipe's model table with `embedded` resolved to the folder that ships with the package."""
    if config.model.path == "embedded":
        return config.model.model_copy(update={"path": str(EMBEDDED_MODEL)})
    return config.model


class World:
    """Devices by number; the model is loaded once, when the first device needs it."""

    def __init__(self, config: RunConfig, work: Path) -> None:
        """`work` is the folder for what devices keep between rounds."""
        self._config, self._work = config, work
        self._fleet = Fleet(config)
        self._resident: Resident | None = None
        self._devices: dict[int, Handler] = {}

    @property
    def resident(self) -> Resident:
        if self._resident is None:
            torch.set_num_threads(self._config.simulation.threads)
            self._resident = load_model(base_model(self._config), self._config.lora, seed=self._config.seed)
        return self._resident

    def device(self, index: int) -> Handler:
        if index not in self._devices:
            name, holding = self._fleet.name(index), self._fleet.holding(index)
            device = Device(
                name,
                resident=self.resident,
                train=holding.train,
                test=holding.test,
                store=DeviceStore(self._work / "patches", self._work / "state" / name),
                rank=self._fleet.rank(index),
                capability=self._fleet.capability(index),
                data_config=self._config.data,
                eval_config=self._config.eval,
                limit=self._config.wire.limit_mb * 2**20,
                memory=self._fleet.memory(index),
                metered=self._fleet.memory(index) > 0,
            )
            kind = self._fleet.profile(index)
            self._devices[index] = device if kind is None else Clocked(device, kind, index, self._config, self.resident)
        return self._devices[index]


def pretend_app(config: RunConfig, work: Path) -> ClientApp:
    """A ClientApp whose nodes are the recipe's devices, by partition id."""
    world = World(config, work)

    def open_device(context: Context) -> Handler:
        return world.device(int(context.node_config["partition-id"]))

    return client_app(open_device)
