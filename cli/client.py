"""The commands of `fedloom client`: a device's resident agent, and what its owner may ask of it."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from fedloom.client.agent.calls import Calls
    from fedloom.client.agent.home import Home
    from fedloom.client.agent.link import Link
    from fedloom.client.settings import DeviceSettings

app = typer.Typer(
    invoke_without_command=True,
    help=(
        "Take part in runs with this machine's data, which never leaves it.\n\n"
        "`fedloom client --join bundle.toml --recipe demo --data mine.jsonl` starts a device from the bundle that the "
        "server's operator made; `fedloom client --config device.toml` one with settings of its own: when it may work, "
        "how much of the machine it may use, and what a server may ask for. It stays until it is stopped, and killed "
        "at any moment it goes on where it was."
    ),
)

PLACES = (Path("device.toml"), Path("/etc/fedloom/device.toml"))

Config = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="The device's settings. [default: ./device.toml or /etc/fedloom/device.toml]"),
]
Join = Annotated[Path | None, typer.Option(metavar="FILE", help="A join bundle, from `fedloom keys add-device`.")]
State = Annotated[Path | None, typer.Option(metavar="FOLDER", help="What the device keeps between rounds.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON in place of a table.")]


class Stopped(BaseException):
    """A signal asked this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__("the device was stopped")
        self.code = 130 if number == signal.SIGINT else 0


@app.callback()
def client(
    context: typer.Context,
    config: Config = None,
    join: Join = None,
    data: Annotated[Path | None, typer.Option(metavar="FILE", help="Examples to train on, JSONL or CSV.")] = None,
    recipe: Annotated[str, typer.Option(help="A recipe whose model the device holds, as the server runs it.")] = "",
    state: State = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, e.g. rank=16.")
    ] = None,
) -> None:
    """Take part in runs with this machine's data, which never leaves it."""
    told = {"join": join, "state": state, "data.train": data, "recipe": recipe}
    context.obj = (config, {key: str(value) for key, value in told.items() if value}, set_ or [])
    if context.invoked_subcommand is None:
        run(*context.obj)


@app.command()
def status(
    context: typer.Context, config: Config = None, join: Join = None, state: State = None, as_json: AsJson = False
) -> None:
    """What the device is at: its state, its task, its link to the server, memory and bytes."""
    from fedloom.cli.device_tables import show_status

    with _agent(context, config, join, state) as agent:
        found = agent.status()
    if as_json:
        print(json.dumps(asdict(found), indent=1))
    else:
        show_status(Console(), found)


@app.command()
def pause(context: typer.Context, config: Config = None, join: Join = None, state: State = None) -> None:
    """Take no more tasks, and stop the one that runs. It lasts until `resume`, restarts included."""
    with _agent(context, config, join, state) as agent:
        print(f"{agent.pause().device} is paused; `fedloom client resume` lets it work again")


@app.command()
def resume(context: typer.Context, config: Config = None, join: Join = None, state: State = None) -> None:
    """Work again after `pause`."""
    with _agent(context, config, join, state) as agent:
        print(f"{agent.resume().device} works again")


@app.command()
def log(
    context: typer.Context,
    config: Config = None,
    join: Join = None,
    state: State = None,
    tail: Annotated[int, typer.Option(min=0, help="The newest so many; 0 shows all.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """Everything that left this device: when, how many bytes, and what it was. Needs no running agent."""
    from fedloom.cli.device_tables import show_log
    from fedloom.client.agent.outbox import entries

    home = _home(context, config, join, state)
    found = list(entries(home.folder))
    if as_json:
        for entry in found[-tail:]:
            print(json.dumps(entry))
    else:
        show_log(Console(), found, tail)


def run(config: Path | None, changes: dict[str, str], set_: list[str]) -> None:
    """Be the device until a signal says stop."""
    from fedloom.cli.device_console import DeviceNarrator
    from fedloom.client.agent.agent import running
    from fedloom.client.agent.home import Home
    from fedloom.client.agent.link import with_bundle
    from fedloom.client.agent.supernode import SuperNode
    from fedloom.client.settings import check_ready

    settings, link = with_bundle(_settings(config, changes, set_))
    check_ready(settings)
    home = Home(folder=settings.folder.absolute())
    try:
        with _signals(), DeviceNarrator(Console(), settings.name) as narrator:
            narrator.begins(settings, home)
            node = SuperNode(link, settings.name, home, narrator.say) if link else None
            try:
                with running(settings, home, node.status if node else dict) as agent, narrator.follows(agent):
                    _stay(node, link, narrator.say)
            except Stopped:
                narrator.say(f"{settings.name}: stopped")
                raise
    except Stopped as stopped:
        raise SystemExit(stopped.code) from None


def _stay(node: Any, link: Link | None, say: Any) -> None:
    """Keep the link to the server until a signal ends the wait."""
    if node is None or link is None:
        say("no server is named: the agent answers on its socket only")
        signal.pause()
        return
    say(f"connecting to {link.server}{' without TLS' if link.insecure else ''}")
    node.start()
    try:
        while True:
            signal.pause()
    finally:
        node.stop()


@contextmanager
def _signals() -> Iterator[None]:
    """In the block, the first SIGTERM or SIGINT raises Stopped; those after it change nothing."""

    def stop(number: int, frame: FrameType | None) -> None:
        for other in (signal.SIGTERM, signal.SIGINT):
            signal.signal(other, signal.SIG_IGN)
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _settings(config: Path | None, changes: dict[str, str], set_: list[str]) -> DeviceSettings:
    """The device's settings, with the model that ships with the package resolved."""
    from fedloom.client.settings import device_settings
    from fedloom.protocols.config import override, parse_settings, read_recipe
    from fedloom.simulations.cookbook import RECIPES, find_recipe

    path = config or (None if "join" in changes else next((place for place in PLACES if place.is_file()), None))
    if path is None and "join" not in changes:
        raise ValueError("a device needs --config device.toml or --join bundle.toml, got neither")
    asked = override(override({}, parse_settings(set_)), changes)
    settings = device_settings(path, asked, lambda name: read_recipe(find_recipe(name)))
    if settings.model.path != "embedded":
        return settings
    model = settings.model.model_copy(update={"path": str(RECIPES.parent / "models" / "household")})
    return settings.model_copy(update={"model": model})


def _home(context: typer.Context, config: Path | None, join: Path | None, state: Path | None) -> Home:
    """The state folder of the device that the options name, before or after the subcommand."""
    from fedloom.client.agent.home import Home
    from fedloom.protocols.bundle import read_bundle

    above, changes, set_ = context.obj
    told = {key: str(value) for key, value in (("join", join), ("state", state)) if value}
    if "state" in (both := {**changes, **told}) and not config and not above:
        return Home(folder=Path(both["state"]).absolute())
    settings = _settings(config or above, both, set_)
    if not settings.state and not settings.name and settings.join:
        settings = settings.model_copy(update={"name": read_bundle(Path(settings.join)).name})
    return Home(folder=settings.folder.absolute())


@contextmanager
def _agent(context: typer.Context, config: Path | None, join: Path | None, state: Path | None) -> Iterator[Calls]:
    """A line to the device's agent.

    Raises:
        ValueError: when none runs.
    """
    from fedloom.client.agent.calls import Away, calling

    home = _home(context, config, join, state)
    try:
        with calling(home.socket) as agent:
            yield agent
    except Away:
        raise ValueError(f"no agent runs for {home.folder}; `fedloom client` starts one") from None
