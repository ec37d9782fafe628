"""`fedloom server` as a person meets it: its mistakes in one line each, its lines while a run goes on, its folder."""

from __future__ import annotations

import io
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedloom.cli.conclude import conclude
from fedloom.cli.console import Narrator, clean
from fedloom.cli.server import check_folder, deployed, last_round, open_folder
from fedloom.protocols.config import RunConfig, read_recipe
from fedloom.server.deployed import run_in
from fedloom.server.keys import Consortium
from fedloom.server.orders import Orders, write_orders
from fedloom.server.processes import claim
from fedloom.simulations.cookbook import find_recipe
from fedloom.simulations.grid import InProcessGrid, pretend_nodes
from fedloom.simulations.naming import run_name
from fedloom.simulations.runs import run_recipe
from fedloom.simulations.world import pretend_app

Fedloom = Callable[..., tuple[int, str, str]]
SMALL = ("fleet.devices=2", "server.rounds=1", "train.steps=1", "data.train_scale=0.1", "data.test_size=2")


def quick(*settings: str) -> RunConfig:
    return deployed(read_recipe(find_recipe("quick"), (*SMALL, *settings)))


def finished(out: Path, config: RunConfig) -> None:
    """A deployed run of a recipe, on pretend devices, as `fedloom server` leaves it."""
    out.mkdir(parents=True, exist_ok=True)
    open_folder(config, out)
    write_orders(out, Orders(config=config, run=run_name(config), wait_for=2))
    nodes = pretend_nodes(config.fleet.devices)
    run_in(out, InProcessGrid(nodes, pretend_app, (config, out.parent / f"{out.name}-devices")), 1)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nope"], "fedloom: no recipe 'nope': "),
        (["quick"], "fedloom: keys holds no keys: `fedloom keys init --keys keys` makes them"),
        (["quick", "--keys", "mine"], "`fedloom keys init --keys mine` makes them"),
        (["quick", "--config", "server.toml"], "server settings server.toml cannot be read: No such file or directory"),
        (["quick", "--set", "strategy.name=flra"], "unknown strategy 'flra': did you mean 'flora'?"),
        (["quick", "--set", "train.tuner=lor"], "unknown tuner 'lor': did you mean 'lora'?"),
        (["quick", "--set", "server.rounds=0"], "recipe key 'server.rounds'"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    fedloom: Fedloom, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = fedloom("server", *arguments)
    assert (code, out) == (2, "")
    assert line in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_help_says_what_it_does(fedloom: Fedloom) -> None:
    code, out, _ = fedloom("server", "--help")
    assert code == 0
    for word in ("--dashboard", "--config", "--keys", "over TLS"):
        assert word in out


def test_a_port_in_use_is_one_line(fedloom: Fedloom, tmp_path: Path) -> None:
    Consortium(tmp_path / "keys").init()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (tmp_path / "server.toml").write_text(f'[link]\nhost = "127.0.0.1"\nport = {port}\n')
        code, out, err = fedloom("server", "quick", "--config", tmp_path / "server.toml", "--out", tmp_path / "run")
    assert code == 2
    assert f"port {port} must be free, it is used by process" in err
    assert err.count("\n") == 1
    assert "no device can join yet" in out


def test_a_folder_that_another_server_runs_is_let_be(fedloom: Fedloom, tmp_path: Path) -> None:
    Consortium(tmp_path / "keys").init()
    with claim(tmp_path / "run"):
        code, _, err = fedloom("server", "quick", "--keys", tmp_path / "keys", "--out", tmp_path / "run")
    assert code == 2
    assert "is served by another `fedloom server`" in err


def test_a_certificate_for_another_host_is_one_line(fedloom: Fedloom, tmp_path: Path) -> None:
    Consortium(tmp_path / "keys").init()
    (tmp_path / "server.toml").write_text('[link]\nhost = "192.0.2.7"\n')
    code, _, err = fedloom("server", "quick", "--config", tmp_path / "server.toml", "--out", tmp_path / "run")
    assert code == 2
    assert "the server certificate must cover the host 192.0.2.7" in err
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_summed_up_again_and_goes_on_with_more_rounds(fedloom: Fedloom, tmp_path: Path) -> None:
    out, keys = tmp_path / "run", tmp_path / "keys"
    Consortium(keys).init()
    finished(out, quick())
    settings = [word for setting in SMALL for word in ("--set", setting)]
    code, said, err = fedloom("server", "quick", *settings, "--keys", keys, "--out", out, "--json")
    assert code == 0
    summary = json.loads(said)
    assert (summary["devices"], summary["rounds"], summary["ranks"]) == (2, 1, [16, 8])
    assert "is finished: round 1 of 1 is done" in err
    for what in ("summary", "report", "adapter"):
        assert Path(summary["files"][what]).exists()

    more = quick("server.rounds=2")
    check_folder(more, out)
    finished(out, more)
    assert last_round(out) == 2


def test_the_summary_is_that_of_a_simulated_run(tmp_path: Path) -> None:
    config = quick()
    finished(tmp_path / "deployed", config)
    there, _ = conclude(config, tmp_path / "deployed")
    here = run_recipe(config, tmp_path / "here")
    costs = {"seconds", "device_seconds", "peak_rss_mb", "wall_seconds"}

    def of(summary: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in summary["strategies"][0].items() if key not in costs}

    assert of(there) == of(here)
    assert there["machine"] == here["machine"]


def test_another_recipe_is_refused_and_what_never_began_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    open_folder(quick(), out)
    (out / "journal").mkdir()
    (out / "events.jsonl").write_text("{}\n")
    other = quick("seed=5")
    open_folder(other, out)  # no round was finished yet
    assert not (out / "journal").exists()
    assert not (out / "events.jsonl").exists()
    (out / "checkpoints" / "round-000000").mkdir(parents=True)
    (out / "checkpoints" / "round-000000" / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a run of another recipe: choose another --out"):
        check_folder(quick(), out)
    check_folder(quick("seed=5", "server.rounds=9"), out)


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"must be empty or hold a run, got a folder with thesis\.txt"):
        check_folder(quick(), tmp_path)
    (tmp_path / "thesis.txt").unlink()
    (tmp_path / "server.lock").touch()
    check_folder(quick(), tmp_path)


def test_a_deployed_run_has_one_line_and_loads_no_torch_unasked() -> None:
    demo = read_recipe(find_recipe("demo"))
    assert demo.compare
    assert deployed(demo).compare == ()
    assert run_name(deployed(demo)) == run_name(demo)
    assert not deployed(demo).track.tensorboard
    assert deployed(read_recipe(find_recipe("demo"), ["track.tensorboard=true"])).track.tensorboard


def test_the_narrator_says_what_happens_and_nothing_twice(tmp_path: Path) -> None:
    screen = io.StringIO()
    record = {"round": 1, "seconds": 2.5, "bytes_up": 3000, "bytes_down": 2000, "updates": 2}
    record["evaluation"] = {"exact_match": 0.5, "loss": 1.25}
    joined = {"event": "joined", "device": "a", "rank": 8, "examples": 12, "software": "fedloom 1"}
    with Narrator(Console(file=screen), tmp_path / "log", metric="exact_match", bytes_before=(1000, 0)) as narrator:
        narrator.waits(1, 3)
        narrator.waits(1, 3)
        narrator.event(joined)
        narrator.event(joined)
        for _ in range(2):
            narrator.event({"event": "left_out", "device": "c", "reason": "it must hold another base"})
        narrator.event({"event": "started", "name": "trial", "round": -1, "devices": ["a"]})
        narrator.event({"event": "phase", "round": 1, "rounds": 4, "phase": "train", "devices": ["a"]})
        narrator.event({"event": "answer", "round": 1, "phase": "train", "device": "a", "refused": "too [bold]big\x1b"})
        narrator.event({"event": "quarantined", "device": "a", "until": 3, "reason": "failing"})
        narrator.event({"event": "round", "round": 1, "record": record})
        narrator.event({"event": "something new"})
        narrator.visit({"event": "refused", "device": "b", "address": "10.0.0.9", "why": "its key is revoked"})
        narrator.visit({"event": "connected", "device": "a", "address": "10.0.0.8"})
    lines = screen.getvalue().splitlines()
    assert lines == [
        "waiting for devices: 1 of 3 connected",
        "a joined: rank 8, 12 examples, fedloom 1",
        "c is left out: it must hold another base",
        "trial begins with 1 device: a",
        "round 1: a is left out: too [bold]big?",
        "a sits out up to round 3: failing",
        "round 1 done: exact match 0.500, loss 1.250, 2 updates, 2.5 s, 2.00 kB up, 2.00 kB down",
        "refused a connection from 10.0.0.9 (b): its key is revoked",
        "a connected from 10.0.0.8",
    ]
    logged = (tmp_path / "log").read_text().splitlines()
    assert [line.split(" ", 3)[3] for line in logged] == lines
    assert "WARNING" in logged[-2]


def test_a_line_is_one_line_whatever_a_device_wrote() -> None:
    assert clean("a\nb\x1b[2Jc") == "a b?[2Jc"
    assert len(clean("x" * 10_000)) == 300
