"""A device's settings: device.toml, or a join bundle and a few options, as one frozen table.

    name = "hospital-a"                  # all three from a join bundle: join = "bundle.toml"
    server = "fl.example.org:9092"
    recipe = "demo"                      # takes its model, lora, eval and data tables; keys given here go before it
    rank = 8

    [data]
    train = "notes.jsonl"

    [rules]
    hours = ["22:00-06:00"]

Paths are relative to the file that names them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from fedloom.client.agent.hours import parse_hours
from fedloom.protocols.bundle import check_name
from fedloom.protocols.config import Evaluation, Lora, Model, RunConfig
from fedloom.protocols.sections import Section, build_section, read_toml

WHAT: Final = "device settings"
_PATHS: Final = (("state",), ("join",), ("ca",), ("key",), ("data", "train"), ("data", "test"), ("model", "mask"))


class OwnData(Section):
    """The private data. It never leaves this machine, and neither does anything that names it."""

    train: str = ""
    """A JSONL or CSV file of examples to train on."""
    test: str = ""
    """A file of examples to be judged by; without one, a share of `train` is held out."""
    test_share: float = Field(default=0.2, ge=0, lt=1)
    """The share of `train` that is held out when there is no `test`; 0 holds none out."""
    max_length: int = Field(default=128, ge=8)
    """Longest sequence in tokens, as in the recipe."""
    limit: int = Field(default=0, ge=0)
    """Read at most this many examples of each file; 0 reads all."""


class Rules(Section):
    """When this device works, and how much of the machine it may use. 0 sets no limit."""

    hours: tuple[str, ...] = ()
    """Local times at which it may work, such as `22:00-06:00`; none means at any time."""
    plugged_in: bool = False
    """Work on mains power alone; a machine without a battery is always on it."""
    idle_cpu: float = Field(default=1.0, gt=0, le=1)
    """Begin a task when others use at most this share of the processors; 1 does not look."""
    threads: int = Field(default=0, ge=0)
    """Processor threads to compute with; 0 takes one for each core."""
    max_memory_mb: int = Field(default=0, ge=0)
    """Memory for the model and its training, in MB; a task that needs more is refused. Servers that fit their tasks to
    devices are told what of it is left for tensors."""
    max_disk_mb: int = Field(default=0, ge=0)
    """Disk for what it keeps between tasks, in MB."""
    max_traffic_mb: int = Field(default=0, ge=0)
    """Bytes of messages both ways in one day, in MB."""


class Accept(Section):
    """What a server may ask for; an empty list leaves the choice to it, out of what is installed here."""

    strategies: tuple[str, ...] = ()
    """Names of strategies, such as `["fedloom", "fedit"]`."""
    tuners: tuple[str, ...] = ()
    """Names of local algorithms, such as `["lora"]`."""
    bases: tuple[Annotated[str, Field(pattern="^[0-9a-f]{8,64}$")], ...] = ()
    """Hashes of base models, or their first 8 hexadecimal digits or more."""


class DeviceSettings(Section):
    """All that a device is told by its owner."""

    name: str = ""
    """What the server knows this device as."""
    server: str = ""
    """Where the server listens, `host:port`; without one the agent runs, but joins nobody."""
    join: str = ""
    """A join bundle, which holds `name`, `server`, `ca` and `key`."""
    ca: str = ""
    """The file of the consortium's CA certificate."""
    key: str = ""
    """The file of this device's private key."""
    insecure: bool = False
    """No TLS and no key: for trials on one machine."""
    state: str = ""
    """The folder that the device keeps between rounds. [default: ~/.local/state/fedloom/NAME]"""
    recipe: str = ""
    """A recipe file, or the name of an embedded one."""
    seed: int = Field(default=0, ge=0)
    """Draws what a checkpoint lacks (a new head), as the recipe's `seed` does."""
    rank: int = Field(default=8, ge=1)
    """The largest adapter rank to train."""
    capability: Literal["backprop", "forward"] = "backprop"
    """`forward` for a device that can only run forward passes."""
    limit_mb: int = Field(default=512, ge=1)
    """A message larger than this is refused before it is read."""
    model: Model = Model()
    lora: Lora = Lora()
    data: OwnData = OwnData()
    eval: Evaluation = Evaluation()
    rules: Rules = Rules()
    accept: Accept = Accept()

    @property
    def limit(self) -> int:
        """Bytes of the largest message."""
        return self.limit_mb * 2**20

    @property
    def folder(self) -> Path:
        """Where the device keeps what it keeps."""
        return Path(self.state) if self.state else Path.home() / ".local/state/fedloom" / self.name


def device_settings(
    path: Path | None, changes: Mapping[str, Any], find_recipe: Callable[[str], RunConfig]
) -> DeviceSettings:
    """A device's settings from its file, if it has one, and `changes` to it, such as options of the command line.

    Args:
        changes: a nested table, whose paths are relative to the folder we are in.
        find_recipe: the recipe that a name or a path stands for.

    Raises:
        ValueError: one line that names the key, what it must be and what was got.
    """
    table = _absolute(read_toml(path, WHAT), path.absolute().parent) if path else {}
    table = _merged(table, _absolute(changes, Path.cwd()))
    recipe = table.get("recipe")
    if isinstance(recipe, str) and recipe:
        table = _merged(_of_recipe(find_recipe(recipe)), table)
    return build_section(DeviceSettings, table, WHAT)


def check_ready(settings: DeviceSettings) -> None:
    """Raise ValueError, naming the key, for settings that an agent cannot start with."""
    if not settings.name:
        raise ValueError(f"{WHAT} key 'name' must be given, or a join bundle, got neither")
    check_name(settings.name)
    if not settings.data.train:
        raise ValueError(f"{WHAT} key 'data.train' must name a file of examples (or use --data FILE), got none")
    parse_hours(settings.rules.hours)


def _of_recipe(config: RunConfig) -> dict[str, Any]:
    """What a device takes from a recipe."""
    data = {key: getattr(config.data, key) for key in ("max_length", "limit", "test_share")}
    tables = {key: getattr(config, key).model_dump() for key in ("model", "lora", "eval")}
    return {"seed": config.seed, "limit_mb": config.wire.limit_mb, "data": data, **tables}


def _merged(table: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`table` with the keys of `above` put over it, table by table."""
    merged = dict(table)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _absolute(table: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A copy of a table whose paths stand in `folder`."""
    copy: dict[str, Any] = {k: dict(v) if isinstance(v, Mapping) else v for k, v in table.items()}
    for *sections, key in _PATHS:
        inner = copy
        for section in sections:
            inner = inner.get(section) or {}
        if isinstance(inner, dict) and isinstance(inner.get(key), str) and inner[key]:
            inner[key] = _placed(inner[key], folder)
    model = copy.get("model")
    if isinstance(model, dict) and str(model.get("path", "")).startswith(("./", "../")):
        model["path"] = str(folder / model["path"])
    if str(copy.get("recipe", "")).endswith(".toml"):
        copy["recipe"] = _placed(copy["recipe"], folder)
    return copy


def _placed(text: str, folder: Path) -> str:
    try:
        return str(folder / Path(text).expanduser())
    except RuntimeError:
        raise ValueError(f"{WHAT}: the home folder in {text[:80]!r} must be one of this machine's") from None
