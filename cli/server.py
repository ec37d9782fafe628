"""`fedloom server RECIPE`: a run on real devices, kept going until it is finished."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from fedloom.server.disk import room_for, write_whole

if TYPE_CHECKING:
    from fedloom.cli.console import Narrator
    from fedloom.protocols.config import RunConfig
    from fedloom.server.keys import Consortium
    from fedloom.server.settings import ServerSettings

RECIPE_FILE = "recipe.json"
LOG_FILE = "server.log"
OF_THE_RUN = ("checkpoints", "journal", "metrics.jsonl", "events.jsonl", "summary.json")
OF_THE_SERVER = {"server.lock", LOG_FILE, "superlink"}


class Stopped(BaseException):
    """A signal asked this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__("the server was stopped")
        self.code = 130 if number == signal.SIGINT else 0


def server(
    recipe: Annotated[str, typer.Argument(help="A recipe file (.toml), or the name of an embedded one.")],
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The server's settings, server.toml. [default: built in]")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run. [default: runs/RECIPE]")] = None,
    keys: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="The consortium's keys. [default: the settings', or keys]")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key, e.g. train.lr=0.01.")
    ] = None,
    dashboard: Annotated[bool, typer.Option("--dashboard", help="Serve the live run page.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the summary as JSON; the rest goes to stderr.")
    ] = False,
) -> None:
    """Run a recipe on real devices, over TLS, until its last round.

    Starts a SuperLink, lets in the devices of the keys folder, and starts again whatever dies. Killed itself, the same
    command goes on where it was, to the same bytes; so it does for a finished run whose recipe got more rounds.

    Examples: `fedloom keys init`, `fedloom keys add-device hospital-a --server fl.example.org:9092`, then
    `fedloom server my.toml --dashboard`.
    """
    from fedloom.protocols.config import read_recipe
    from fedloom.server.processes import claim
    from fedloom.server.settings import read_settings
    from fedloom.simulations.cookbook import find_recipe

    path = find_recipe(recipe)
    whole = read_recipe(path, set_ or [])
    asked = deployed(whole)
    settings = read_settings(config)
    if keys is not None:
        settings = settings.model_copy(update={"keys": settings.keys.model_copy(update={"folder": keys})})
    folder, console = out or Path("runs") / path.stem, Console(stderr=as_json)
    _preflight(asked)
    check_folder(asked, folder)
    consortium, warnings = _open_keys(settings)
    with room_for(folder), claim(folder) as orphans, _signals(), _narrator(console, folder, asked) as narrator:
        open_folder(asked, folder)
        if whole.compare:
            warnings.append(f"the comparison is left out: a deployed run has one line, {asked.strategy.name}")
        if orphans:
            warnings.append(f"ended {orphans} process{'es' * (orphans != 1)} that a server before this one left behind")
        for warning in warnings:
            narrator.say(warning, bad=True)
        with _page(settings, folder, narrator, wanted=dashboard):
            _serve(asked, settings, consortium, folder, narrator)
    with room_for(folder):
        _conclude(asked, folder, console, as_json=as_json)


def _serve(
    asked: RunConfig, settings: ServerSettings, consortium: Consortium | None, folder: Path, narrator: Narrator
) -> None:
    """Run to the end; a stop or a failure is one line and an exit code."""
    from fedloom.server.admission import Admission
    from fedloom.server.orders import Orders
    from fedloom.server.superlink import FOLDER, JoinedLink, SuperLink, Uplink
    from fedloom.server.supervisor import RunError, Supervisor
    from fedloom.simulations.naming import run_name

    if (done := last_round(folder)) >= asked.server.rounds:
        narrator.say(f"{folder} is finished: round {done} of {asked.server.rounds} is done")
        return
    (folder / FOLDER).mkdir(exist_ok=True)
    orders = Orders(
        config=asked,
        run=run_name(asked),
        wait_for=settings.fleet.wait_for,
        wait_seconds=settings.fleet.wait_seconds,
        rejoin_seconds=settings.fleet.rejoin_seconds,
    )
    link, limit = settings.link, (asked.wire.limit_mb + 1) * 2**20
    uplink: Uplink
    if link.join:
        uplink = JoinedLink(link.join, folder)
        narrator.say(f"joining Flower's connection {link.join!r}")
    else:
        uplink = SuperLink(link, folder, consortium.server_files() if consortium else None)
        narrator.say(f"listening on {link.host}:{link.port}{' without TLS' if link.insecure else ' over TLS'}")
    admission = Admission(consortium, folder / FOLDER, limit=limit, alone=uplink.own)
    try:
        Supervisor(orders, folder, uplink, admission, narrator).run()
    except Stopped as stop:
        narrator.say(f"stopped after round {max(last_round(folder), 0)}; the same command goes on from there")
        raise typer.Exit(stop.code) from None
    except RunError as error:
        print(f"fedloom: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


def deployed(asked: RunConfig) -> RunConfig:
    """The recipe as devices run it: one line of a comparison, and TensorBoard (which loads torch) only when asked."""
    track = asked.track.model_copy(
        update={"tensorboard": asked.track.tensorboard and "tensorboard" in asked.track.model_fields_set}
    )
    return asked.model_copy(update={"compare": (), "track": track})


def check_folder(asked: RunConfig, folder: Path) -> None:
    """Raise ValueError for a folder that holds another recipe's run, or something that is no run."""
    if not folder.exists() or (folder / RECIPE_FILE).exists():
        if last_round(folder) >= 0 and not _is_same(asked, folder):
            raise ValueError(f"{folder} holds a run of another recipe: choose another --out")
    elif others := sorted({path.name for path in folder.iterdir()} - OF_THE_SERVER):
        raise ValueError(f"{folder} must be empty or hold a run, got a folder with {others[0]}")


def open_folder(asked: RunConfig, folder: Path) -> None:
    """Make the run's folder ready, or take it up again; what failed before its first checkpoint holds nothing to keep.

    Raises:
        ValueError: as `check_folder` does.
    """
    check_folder(asked, folder)
    if (folder / RECIPE_FILE).exists() and not _is_same(asked, folder):
        for path in (folder / name for name in OF_THE_RUN):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    body = json.dumps(asked.model_dump(mode="json"), indent=1)
    write_whole(folder / RECIPE_FILE, body.encode())


def _is_same(asked: RunConfig, folder: Path) -> bool:
    """Whether the folder's run is the recipe's, but for its number of rounds."""
    from fedloom.protocols.config import build_config
    from fedloom.simulations.naming import run_name

    path = folder / RECIPE_FILE
    try:
        return run_name(build_config(json.loads(path.read_bytes()))) == run_name(asked)
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def last_round(folder: Path) -> int:
    """The newest round that has a checkpoint; -1 for none."""
    rounds = [path.parent.name.removeprefix("round-") for path in folder.glob("checkpoints/round-*/run.json")]
    return max((int(number) for number in rounds if number.isdigit()), default=-1)


def _preflight(asked: RunConfig) -> None:
    """Raise what can be known to be wrong before anything is started."""
    from fedloom.server.app import build_strategy

    build_strategy(asked)
    if asked.train.tuner != "auto":
        from fedloom.client import tuners

        tuners.known(asked.train.tuner)


def _open_keys(settings: ServerSettings) -> tuple[Consortium | None, list[str]]:
    """The keys that the settings name, and warnings about them.

    Raises:
        ValueError: when there are none but must be, or they cannot work.
    """
    from fedloom.server.keys import Consortium

    link, folder = settings.link, settings.keys.folder
    if link.insecure and not link.join:
        return None, ["no TLS and no device keys: anyone on this machine can take part"]
    if link.join and not folder.exists():
        return None, []  # who may take part is up to those who run the SuperLink
    if not (folder / "devices.json").exists():
        raise ValueError(f"{folder} holds no keys: `fedloom keys init --keys {folder}` makes them")
    consortium = Consortium(folder)
    warnings = consortium.check("" if link.join else f"{_bracketed(link.host)}:{link.port}")
    if not any(not device.revoked for device in consortium.devices()):
        warnings.append(f"no device can join yet: `fedloom keys add-device NAME --keys {folder}` lets one in, also now")
    return consortium, warnings


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


@contextmanager
def _narrator(console: Console, folder: Path, asked: RunConfig) -> Iterator[Narrator]:
    from fedloom.cli.console import Narrator
    from fedloom.simulations.naming import main_metric

    counted = _bytes_counted(folder)
    with Narrator(console, folder / LOG_FILE, metric=main_metric(asked), bytes_before=counted) as narrator:
        yield narrator


def _bytes_counted(folder: Path) -> tuple[int, int]:
    """Bytes up and down of the rounds that are done."""
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        record = json.loads(lines[-1])
        return int(record["bytes_up"]), int(record["bytes_down"])
    except (OSError, IndexError, KeyError, ValueError):
        return 0, 0


@contextmanager
def _page(settings: ServerSettings, folder: Path, narrator: Narrator, *, wanted: bool) -> Iterator[None]:
    """The live run page, where it is asked for."""
    if not (wanted or settings.dashboard.enabled):
        yield
        return
    from fedloom.server.dashboard.serving import Dashboard

    with Dashboard(folder, settings.dashboard.host, settings.dashboard.port) as page:
        narrator.say(f"the run page is at {page.url}")
        yield


@contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM and SIGINT become `Stopped`, once; while that is being dealt with they are ignored."""
    before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def stop(number: int, frame: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(number)

    for each in (signal.SIGTERM, signal.SIGINT):
        before[each] = signal.signal(each, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _conclude(asked: RunConfig, folder: Path, console: Console, *, as_json: bool) -> None:
    """The summary, the report and, where this machine has the base model, the adapter."""
    from fedloom.cli.conclude import conclude
    from fedloom.cli.tables import show_ending

    summary, written = conclude(asked, folder)
    show_ending(console, summary, written, as_json=as_json)
