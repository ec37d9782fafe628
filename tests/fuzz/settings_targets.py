"""Texts that people write: recipes, settings of servers and devices, join bundles, and `key=value` on a command line.

What is accepted is a table that survives its way through JSON, and whose every run can be built.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from file_targets import mutate_text
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from targets import MIB, Broken, Havoc, Target, same

from fedloom.client.agent.hours import parse_hours
from fedloom.client.settings import DeviceSettings, check_ready, device_settings
from fedloom.protocols.bundle import JoinBundle, read_bundle, write_bundle
from fedloom.protocols.config import (
    RunConfig,
    build_config,
    contenders,
    override,
    parse_settings,
    read_recipe,
)
from fedloom.server.keys import Consortium
from fedloom.server.orders import Orders, read_orders, write_orders
from fedloom.server.settings import read_settings
from fedloom.strategies.base import Scaling
from fedloom.strategies.registry import build

_LONGEST: Final = 1 << 14
_VALUES: Final = (
    *("0", "1", "-1", "2", "0.0", "0.5", "-0.5", "0x10", "1e308", "1e400", "inf", "nan", "true", "false"),
    *("9223372036854775807", "99999999999999999999", "1979-05-27", "1979-05-27T07:32:00Z", "07:32:00"),
    *('""', '"fp32"', '"auto"', '"demo"', '"x"', '"fedit"', '"sketch"', '"../x"', '"a:1"', "'''a'''"),
    *('"\\u0000"', '"~nosuchuser/x"', "[]", "[1,2]", '["a"]', '[["a"]]', "[true]", '["22:00-06:00"]', "{}", "{x=1}"),
)


def mutate_toml(data: bytes, rng: random.Random, havoc: Havoc) -> bytes:
    """A value replaced, a line moved, dropped or doubled, deep nesting, or bytes changed."""
    chance = rng.random()
    if chance < 0.25:
        return havoc(data)
    lines = data.split(b"\n")
    place = rng.randrange(len(lines))
    if chance < 0.75:
        keyed = [number for number, line in enumerate(lines) if b"=" in line] or [place]
        place = rng.choice(keyed)
        key = lines[place].partition(b"=")[0]
        lines[place] = key + b"= " + rng.choice(_VALUES).encode()
    elif chance < 0.8:
        del lines[place]
    elif chance < 0.9:
        lines.insert(rng.randrange(len(lines) + 1), lines[place])
    elif chance < 0.99:
        lines[place] = lines[place].swapcase()
    else:
        deep = (
            b"x = " + b"[" * 3000,
            b"x" + b".x" * 400 + b" = 1",
            b"x = " + b"{a=" * 2000,
            b"[" + b"x." * 400 + b"x]",
        )
        lines[place] = rng.choice(deep)
    return b"\n".join(lines)


def survives(what: str, config: Any, make: Callable[[dict[str, Any]], Any]) -> None:
    """Raise Broken unless a table comes back equal from JSON."""
    text = json.dumps(config.model_dump(mode="json"), allow_nan=False)
    same(what, make(json.loads(text)), config)


def _check_config(config: RunConfig) -> None:
    """Every run that a recipe stands for can be built, or is refused in one line."""
    for _, run in contenders(config):
        scaling = Scaling(alpha=run.lora.alpha, rslora=run.lora.rslora)
        build(run.strategy.name, run.strategy.options, scaling)
        survives("a recipe", run, build_config)
    survives("a recipe", config, build_config)


class Texts:
    """The targets of one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "settings"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._path = self._folder / "written.toml"
        self._bundle = ""

    def check_recipe(self, data: bytes) -> None:
        self._path.write_bytes(data)
        _check_config(read_recipe(self._path))

    def check_overrides(self, data: bytes) -> None:
        """Lines of `key=value` over a recipe of three contenders."""
        settings = parse_settings(data.decode("utf-8", "surrogateescape").splitlines())
        table = {"compare": [{"label": "a"}, {"label": "b", "set": {"strategy.name": "flora"}}], "seed": 1}
        _check_config(build_config(override(table, settings)))

    def check_server(self, data: bytes) -> None:
        self._path.write_bytes(data)
        settings = read_settings(self._path)
        survives("server settings", settings, type(settings).model_validate)

    def check_device(self, data: bytes) -> None:
        self._path.write_bytes(data)
        settings = device_settings(self._path, {"rank": 4}, _find_recipe)
        survives("device settings", settings, DeviceSettings.model_validate)
        parse_hours(settings.rules.hours)
        check_ready(settings)

    def check_bundle(self, data: bytes) -> None:
        """What is accepted is a bundle that can be written and read again; no error tells what the key is."""
        self._path.write_bytes(data)
        try:
            bundle = read_bundle(self._path)
        except ValueError as error:
            if "b3BlbnNzaC1rZXk" in str(error):
                raise Broken(f"no error may quote a key, got {error}") from error
            raise
        again = self._folder / "again.toml"
        write_bundle(again, bundle, replace=True)
        same("a bundle", _stripped(read_bundle(again)), _stripped(bundle))

    def check_orders(self, data: bytes) -> None:
        """plan.json."""
        (self._folder / "plan.json").write_bytes(data)
        orders = read_orders(self._folder)
        write_orders(self._folder, orders)
        same("orders", read_orders(self._folder), orders)

    def seeds_of_bundles(self) -> list[bytes]:
        consortium = Consortium(self._folder / "keys")
        consortium.init(["fl.example.org"], force=True)
        made = []
        for name, server in (("hospital-a", "fl.example.org:9092"), ("b", "127.0.0.1:1")):
            path = self._folder / f"{name}.toml"
            consortium.add_device(name, server, out=path, force=True)
            made.append(path.read_bytes())
        return made

    def seeds_of_orders(self) -> list[bytes]:
        made = []
        for orders in (Orders(config=RunConfig(), run="0123abcd"), Orders(config=RunConfig(), run="r", names=("a",))):
            write_orders(self._folder, orders)
            made.append((self._folder / "plan.json").read_bytes())
        return made


def _stripped(bundle: JoinBundle) -> tuple[str, ...]:
    return bundle.name, bundle.server, bundle.ca.strip(), bundle.key.strip()


def _find_recipe(name: str) -> RunConfig:
    if name == "demo":
        return build_config({"seed": 3, "data": {"max_length": 64}})
    raise ValueError(f"there is no recipe {name!r}")


def _recipes() -> list[bytes]:
    folder = files("fedloom.simulations") / "recipes"
    return [path.read_bytes() for path in sorted(folder.iterdir(), key=str) if path.name.endswith(".toml")]


_SERVER: Final = b"""[link]
host = "127.0.0.1"
port = 9092
insecure = true
join = ""
[keys]
folder = "keys"
[fleet]
wait_for = 3
wait_seconds = 600.0
[dashboard]
enabled = true
host = "127.0.0.1"
port = 8080
"""
_DEVICE: Final = b"""name = "hospital-a"
server = "fl.example.org:9092"
state = "state"
recipe = "demo"
rank = 8
limit_mb = 64
[model]
path = "./model"
[data]
train = "notes.jsonl"
test_share = 0.5
[rules]
hours = ["22:00-06:00", "12:00-24:00"]
idle_cpu = 0.5
[accept]
strategies = ["fedloom"]
bases = ["0123abcd"]
"""
_OVERRIDES: Final = (b"train.lr=0.01\nserver.rounds=3", b"strategy.name=sketch\nstrategy.k=64", b'fleet={"devices"=3}')


def _overrides(keys: Sequence[str]) -> SearchStrategy[bytes]:
    line = st.builds(lambda key, value: f"{key}={value}", st.sampled_from(keys), st.sampled_from(_VALUES))
    return st.lists(line, max_size=4).map(lambda lines: "\n".join(lines).encode())


def _keys() -> list[str]:
    sections = RunConfig.model_fields
    made = list(sections)
    for name, field in sections.items():
        inner = getattr(field.annotation, "model_fields", {})
        made += [f"{name}.{key}" for key in inner]
    return [*made, "strategy.k", "strategy.rank", "strategy.clip_norm", "compare", "x.y", "a..b", ".", "seed.x"]


def targets(folder: Path) -> dict[str, Target]:
    """Files go into `folder`."""
    texts = Texts(folder)
    limits: Final[dict[str, Any]] = {"max_len": _LONGEST, "memory": 16 * MIB, "seconds": 3.0}
    made = [
        Target(name="recipe", check=texts.check_recipe, seeds=_recipes, mutate=mutate_toml, **limits),
        Target(
            name="overrides",
            check=texts.check_overrides,
            seeds=lambda: _OVERRIDES,
            mutate=mutate_toml,
            inputs=lambda: _overrides(_keys()),
            **limits,
        ),
        Target(
            name="server-settings", check=texts.check_server, seeds=lambda: [_SERVER, b""], mutate=mutate_toml, **limits
        ),
        Target(
            name="device-settings", check=texts.check_device, seeds=lambda: [_DEVICE, b""], mutate=mutate_toml, **limits
        ),
        Target(name="bundle", check=texts.check_bundle, seeds=texts.seeds_of_bundles, mutate=mutate_toml, **limits),
        Target(name="orders", check=texts.check_orders, seeds=texts.seeds_of_orders, mutate=mutate_text, **limits),
    ]
    return {target.name: target for target in made}
