"""The device side: your own examples and limits, around Fedloom's device."""

from functools import cache
from pathlib import Path

from flwr.app import Context

from fedloom.client.app import client_app
from fedloom.client.data import Example
from fedloom.client.device import Device
from fedloom.client.model import Resident, load_model
from fedloom.client.store import DeviceStore
from fedloom.protocols.config import Data, Evaluation, Lora, Model
from fedloom.simulations.fleet import EMBEDDED_MODEL
from fedloom.simulations.household.households import household

RANKS = (16, 8, 4, 2)  # the largest adapter that each device can train: they need not be equal


@cache
def resident() -> Resident:
    """The base model, once in a process, for all devices that take turns on it."""
    return load_model(Model(path=str(EMBEDDED_MODEL)), Lora(), seed=0)


@cache
def device(index: int, work: Path) -> Device:
    """A device: here a pretend household, in your app whatever its node may read."""
    home, name = household(index, seed=0), f"device-{index:02d}"
    return Device(
        name,
        resident=resident(),
        train=[Example(prompt=request.prompt, completion=request.completion) for request in home.train],
        test=[Example(prompt=request.prompt, completion=request.completion) for request in home.test],
        store=DeviceStore(work / "patches", work / name),
        rank=RANKS[index % len(RANKS)],
        data_config=Data(),
        eval_config=Evaluation(),
    )


def open_device(context: Context) -> Device:
    """The device that a message is for."""
    return device(int(context.node_config["partition-id"]), Path(str(context.run_config["work"])).expanduser())


app = client_app(open_device)
