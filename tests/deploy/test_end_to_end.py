"""`fedloom server` with real SuperNodes over TLS: killed in every part, it ends in the bytes of a simulated run.

The devices' agents live in this process (pretend.py); everything of the server's is real.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from common import BIN, free_port
from pretend import Fleet
from serving import Serving

from fedloom.protocols.config import RunConfig, read_recipe
from fedloom.server.keys import Consortium
from fedloom.server.processes import birth, is_alive, processes_of
from fedloom.server.standing import read_standing
from fedloom.simulations.cookbook import find_recipe
from fedloom.simulations.runs import run_recipe

pytestmark = pytest.mark.deploy

SMALL = ("fleet.devices=2", "train.steps=2", "data.train_scale=0.2", "data.test_size=4", "eval.every=0")
SMALL += ("server.timeout=120", "track.tensorboard=false")


@dataclass
class Site:
    """Keys, devices and a server on loopback."""

    config: RunConfig
    keys: Consortium
    fleet: Fleet
    server: Serving

    def restart_server(self) -> None:
        """Kill it with -9 and start it again at once."""
        assert self.server.process is not None
        self.server.process.kill()
        self.server.process.wait()
        self.server.start()

    def kill(self, words: str) -> None:
        """Kill -9 those of the server's processes whose command line holds `words`."""
        found = self.server.find(words)
        assert found, words
        for process in found:
            process.kill()

    def recovers(self, kill: Callable[[], None], *, what: str) -> None:
        """After the kill the round loop starts again, and the next round is finished."""
        starts, done = len(self.server.events("started")), len(self.server.events("round"))
        began = time.monotonic()
        kill()
        self.server.wait(lambda: len(self.server.events("started")) > starts, label=f"a new start after {what}")
        again = time.monotonic() - began
        self.server.wait(lambda: len(self.server.events("round")) > done, label=f"a round after {what}")
        print(f"{what}: round loop again after {again:.1f} s, next round done after {time.monotonic() - began:.1f} s")


@pytest.fixture
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    """A site; the parameter is the number of rounds."""
    settings = (*SMALL, f"server.rounds={request.param}")
    config, port = read_recipe(find_recipe("quick"), settings), free_port()
    keys = Consortium(tmp_path / "keys")
    keys.init()
    (tmp_path / "server.toml").write_text(f'[link]\nhost = "127.0.0.1"\nport = {port}\n[fleet]\nwait_for = 2\n')
    told = [word for setting in settings for word in ("--set", setting)]
    server = Serving(tmp_path, "quick", "--config", tmp_path / "server.toml", *told)
    fleet = Fleet(config, tmp_path / "fleet", port, keys)
    try:
        yield Site(config=config, keys=keys, fleet=fleet, server=server)
    finally:
        server.close()
        fleet.close()


def same_as_simulated(site: Site, folder: Path) -> None:
    """The last checkpoint and the devices' evaluations are those of a run that nothing disturbed, byte for byte."""
    run_recipe(site.config, folder)
    last = f"checkpoints/round-{site.config.server.rounds:06d}/state.safetensors"
    assert (site.server.out / last).read_bytes() == (folder / last).read_bytes()
    there, here = (
        [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        for out in (site.server.out, folder)
    )
    assert [record["round"] for record in there] == list(range(site.config.server.rounds + 1))
    assert there[-1]["devices"] == here[-1]["devices"]


@pytest.mark.parametrize("site", [7], indirect=True)
def test_every_part_is_killed_and_the_run_ends_as_if_nothing_had_happened(site: Site, tmp_path: Path) -> None:
    server = site.server
    began = time.monotonic()
    site.fleet.start_all()
    server.start()
    server.wait(lambda: server.events("started"), label="the round loop")
    print(f"start: round loop after {time.monotonic() - began:.1f} s")
    server.wait_for_round(1)
    print(f"start: round 1 done after {time.monotonic() - began:.1f} s")
    site.recovers(lambda: site.kill("flwr-serverapp"), what="ServerApp killed")
    site.recovers(lambda: site.kill("fedloom.server.door"), what="SuperLink killed")
    site.recovers(lambda: site.kill("flower-superexec"), what="SuperExec killed")
    site.recovers(site.restart_server, what="server killed")
    assert server.end() == 0
    assert processes_of(server.out) == []
    assert "quick: 2 devices, 7 rounds" in server.said
    assert (server.out / "report.html").exists()
    assert "Traceback" not in server.said
    same_as_simulated(site, tmp_path / "simulated")


@pytest.mark.parametrize("site", [3], indirect=True)
def test_a_stop_is_clean_and_the_same_command_goes_on(site: Site, tmp_path: Path) -> None:
    server = site.server
    site.fleet.start_all()
    server.start()
    server.wait_for_round(1)
    assert server.stop() == 0
    assert processes_of(server.out) == []
    assert "stopped after round 1; the same command goes on from there" in server.said
    assert server.events("stopped")
    server.start()
    assert server.end() == 0
    assert "quick goes on after round 1" in server.said
    same_as_simulated(site, tmp_path / "simulated")


@pytest.mark.parametrize("site", [2], indirect=True)
def test_keys_are_let_in_and_shut_out_while_the_server_runs(site: Site) -> None:
    server, (first, second) = site.server, site.fleet.devices
    site.keys.revoke(second.name)
    site.fleet.start_all()
    server.start()
    server.wait(lambda: f"({second.name}): its key is revoked" in server.said, label="a refusal")
    server.wait(lambda: "waiting for devices: 1 of 2 connected" in server.said, label="the first device")
    site.fleet.kill(second)
    site.fleet.renew(second, site.keys)
    server.wait(lambda: f"{second.name} is let in" in server.said, label="the new key")
    site.fleet.start(second)
    server.wait_for_round(0)
    site.keys.revoke(first.name)
    server.wait(lambda: f"{first.name} is shut out" in server.said, label="the revocation")
    server.wait(lambda: f"({first.name}): its key is revoked" in server.said, label="its connection to be cut")
    assert server.end() == 0  # the rounds are finished by the other device


@pytest.mark.parametrize("site", [4], indirect=True)
def test_a_device_whose_supernode_is_killed_is_back_within_seconds(site: Site) -> None:
    server, second = site.server, site.fleet.devices[1]
    site.fleet.start_all()
    server.start()
    server.wait_for_round(0)
    server.wait(lambda: any(event["phase"] == "train" for event in server.events("phase")), label="round 1")
    site.fleet.kill(second)
    began = time.monotonic()
    site.fleet.start(second)
    server.wait(lambda: server.said.count(f"{second.name} connected") == 2, label="its return", seconds=60)
    print(f"SuperNode killed: connected again after {time.monotonic() - began:.1f} s")
    assert server.end() == 0
    rounds = server.events("round")
    assert [event["round"] for event in rounds] == [0, 1, 2, 3, 4]
    assert rounds[-1]["record"]["updates"] == 2
    assert len(rounds[-1]["record"]["devices"]) == 2
    print(f"the round that it missed took {rounds[1]['record']['seconds']:.1f} s")


@pytest.mark.parametrize("site", [1], indirect=True)
def test_a_killed_server_leaves_no_process(site: Site) -> None:
    server = site.server
    site.fleet.start_all()
    server.start()
    server.wait(lambda: server.events("started"), label="the round loop")
    left = [(process.pid, birth(process.pid)) for process in processes_of(server.out)]
    assert len(left) >= 3  # SuperLink, SuperExec, ServerApp
    assert server.process is not None
    server.process.kill()
    server.process.wait()
    server.wait(lambda: not any(is_alive(*process) for process in left), seconds=20, label="its processes to end")


@pytest.mark.parametrize("site", [1], indirect=True)
def test_a_run_that_cannot_go_on_is_one_line_and_exit_code_2(site: Site) -> None:
    server = site.server
    settings = (server.folder / "server.toml").read_text().replace("wait_for = 2", "wait_for = 2\nwait_seconds = 1")
    (server.folder / "server.toml").write_text(settings)
    server.start()  # and no device
    assert server.end() == 2
    assert server.said.splitlines()[-1] == "fedloom: a run waits for 2 devices, got 0 within 1 s"
    assert "Traceback" not in server.said
    assert psutil.Process().children() == [] or processes_of(server.out) == []


@pytest.fixture
def shared_link(tmp_path: Path) -> Iterator[int]:
    """A SuperLink that somebody else runs, without TLS; its port. The environment knows it as `shared`."""
    port, home = free_port(), tmp_path / "flwr"
    home.mkdir()
    (home / "config.toml").write_text(f'[superlink.shared]\naddress = "127.0.0.1:{port}"\ninsecure = true\n')
    environment = os.environ | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    command = [str(BIN / "flower-superlink"), "--insecure", "--host", "127.0.0.1", "--port", str(port)]
    with (tmp_path / "shared.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=tmp_path)
    yield port
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    for child in children:
        child.kill()


def test_a_superlink_that_is_there_already_is_joined(
    shared_link: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flwr"))
    settings = (*SMALL, "server.rounds=2")
    config = read_recipe(find_recipe("quick"), settings)
    (tmp_path / "server.toml").write_text('[link]\njoin = "shared"\n[fleet]\nwait_for = 2\n')
    told = [word for setting in settings for word in ("--set", setting)]
    server = Serving(tmp_path, "quick", "--config", tmp_path / "server.toml", *told)
    fleet = Fleet(config, tmp_path / "fleet", shared_link, None)
    try:
        fleet.start_all()
        server.start()
        server.wait_for_round(0)
        assert server.stop() == 0
        standing = read_standing(server.out)
        assert standing is not None
        assert not is_alive(standing.pid, standing.born)  # its ServerApp has ended too
        server.start()
        assert server.end() == 0
        assert "joining Flower's connection 'shared'" in server.said
        same_as_simulated(Site(config=config, keys=Consortium(tmp_path), fleet=fleet, server=server), tmp_path / "here")
    finally:
        server.close()
        fleet.close()
