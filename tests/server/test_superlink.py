"""A real SuperLink behind its door, over TLS, with keys: who reaches what, and what is left of it when it dies."""

from __future__ import annotations

import base64
import datetime
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_private_key
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest

from fedloom.client.agent.link import Link as DeviceLink
from fedloom.client.agent.link import seconds_ahead
from fedloom.protocols.config import RunConfig
from fedloom.server.admission import Admission
from fedloom.server.bundle_app import SETTING, write_app
from fedloom.server.control import connect, join
from fedloom.server.keys import Consortium
from fedloom.server.orders import Orders, write_orders
from fedloom.server.processes import claim, end_all, is_alive, processes_of
from fedloom.server.settings import Link
from fedloom.server.standing import Stage, read_standing
from fedloom.server.superlink import FOLDER, JoinedLink, SuperLink, check_free, trim
from fedloom.server.supervisor import Supervisor


class Bench:
    """A run's folder with keys of two devices, `a` and `b` (revoked), and its SuperLink."""

    def __init__(self, out: Path) -> None:
        self.out, self.keys = out, Consortium(out / "keys")
        self.keys.init()
        bundles = {name: self.keys.add_device(name, "127.0.0.1:1") for name in ("a", "b")}
        self.private = {name: load_ssh_private_key(bundle.key.encode(), None) for name, bundle in bundles.items()}
        self.private["stranger"] = ec.generate_private_key(ec.SECP384R1())
        self.keys.revoke("b")
        (out / FOLDER).mkdir()
        self.admission = Admission(self.keys, out / FOLDER, limit=2**20)
        self.admission.post()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.link = SuperLink(Link(host="127.0.0.1", port=self.port), out, self.keys.server_files())

    def pem(self, key: str) -> bytes:
        return self.private[key].public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    def ask(self, path: str, *, key: str = "", body: bytes = b"", ca: Path | None = None, ahead: float = 0.0) -> int:
        """The status of a POST, signed with a device's key as a SuperNode signs it whose clock is so far `ahead`."""
        request = urllib.request.Request(f"https://127.0.0.1:{self.port}{path}", data=body, method="POST")
        request.add_header("content-type", "application/protobuf")
        if key:
            private = self.private[key]
            now = (datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=ahead)).isoformat()
            assert isinstance(private, ec.EllipticCurvePrivateKey)
            pem = self.pem(key)
            signature = private.sign(now.encode(), ec.ECDSA(hashes.SHA256()))
            request.add_header("flwr-public-key", base64.b64encode(pem).decode())
            request.add_header("flwr-signature", base64.b64encode(signature).decode())
            request.add_header(TIMESTAMP_HEADER, now)
        context = ssl.create_default_context(cafile=str(ca or self.keys.server_files().ca))
        try:
            with urllib.request.urlopen(request, timeout=10, context=context) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return int(error.code)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    made = Bench(tmp_path_factory.mktemp("superlink"))
    made.link.start()
    yield made
    made.link.stop()


@pytest.mark.deploy
def test_it_answers_over_tls_and_registers_the_keys_that_are_let_in(bench: Bench) -> None:
    assert bench.link.problem() == ""
    bench.admission.sync(bench.link.control)
    assert [node.name for node in bench.link.control.nodes()] == ["a"]
    assert bench.admission.sync(bench.link.control) == []


@pytest.mark.deploy
def test_only_a_key_that_is_let_in_reaches_flower(bench: Bench) -> None:
    assert bench.ask("/v1/fleet/pull-messages") == 401
    assert bench.ask("/v1/fleet/pull-messages", key="stranger") == 401
    assert bench.ask("/v1/fleet/pull-messages", key="b") == 401
    told = (bench.out / FOLDER / "door.jsonl").read_text()
    assert told.count("refused") == 3
    assert '"device": "b"' in told
    assert bench.ask("/v1/fleet/pull-messages", key="a", body=b"x" * (2**20 + 1)) == 413


@pytest.mark.deploy
def test_a_clock_that_flower_refuses_is_told_by_how_much(bench: Bench) -> None:
    link = DeviceLink(server=bench.link.address, ca=bench.keys.server_files().ca.read_text(), key="k")
    ahead = seconds_ahead(link)
    assert ahead is not None
    assert abs(ahead) < 1.5  # a server tells its time in whole seconds
    path = "/v1/fleet/activate-node"
    body = ActivateNodeRequest(public_key=bench.pem("a"), heartbeat_interval=30).SerializeToString()
    for seconds, why in ((60, "60 s ahead"), (-400, "400 s behind")):
        assert bench.ask(path, key="a", body=body, ahead=seconds) == 401
        assert f"its clock is {why}" in (bench.out / FOLDER / "door.jsonl").read_text()
    for seconds in (3, -290):
        assert bench.ask(path, key="a", body=body, ahead=seconds) == 200
        node = bench.link.control.nodes()[0].id
        left = DeactivateNodeRequest(node_id=node).SerializeToString()
        assert bench.ask("/v1/fleet/deactivate-node", key="a", body=left) == 200


@pytest.mark.deploy
def test_tls_is_not_optional(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises((urllib.error.URLError, OSError)):
        urllib.request.urlopen(f"http://127.0.0.1:{bench.port}/health", timeout=5)
    other = Consortium(tmp_path / "other")
    other.init()
    with pytest.raises(urllib.error.URLError, match="certificate verify failed"):
        bench.ask("/v1/fleet/pull-messages", ca=other.server_files().ca)


@pytest.mark.deploy
def test_its_port_is_taken_and_the_holder_is_named(bench: Bench) -> None:
    with pytest.raises(ValueError, match=rf"port {bench.port} must be free, it is used by process \d+"):
        check_free("127.0.0.1", bench.port)


@pytest.mark.deploy
def test_a_run_whose_folder_is_empty_fails_and_says_why(bench: Bench) -> None:
    write_app(bench.out / FOLDER / "app")
    run = bench.link.submit()
    until = time.monotonic() + 60
    while (status := bench.link.control.run_status(run)).status != "finished" and time.monotonic() < until:
        time.sleep(0.2)
    assert status.ending == "failed"
    assert "plan.json cannot be read" in status.details
    bench.link.control.stop_run(run)  # over already: nothing happens
    assert bench.link.control.unfinished_runs() == []


@pytest.mark.deploy
def test_another_user_of_this_machine_can_start_nothing(bench: Bench) -> None:
    """Flower's Control API takes no password, and its Runtime API a token that is on a command line."""
    files = bench.keys.server_files()
    for password in ("", "a guess"):
        stranger = connect(bench.link.address, files.ca, password)
        with pytest.raises(ValueError, match="SuperLink refused: HTTP 401"):
            stranger.start_run(write_app(bench.out / FOLDER / "app"), {})
        with pytest.raises(ValueError, match="SuperLink refused: HTTP 401"):
            stranger.nodes()
        stranger.close()
    assert bench.ask("/v1/runtime/acquire-task") == 401
    assert bench.ask("/v1/runtime/pull-task-input", key="a") == 401
    told = (bench.out / FOLDER / "door.jsonl").read_text()
    assert "/v1/control/start-run is for this run's own processes alone" in told
    for process in processes_of(bench.out):
        assert bench.link._password not in " ".join(process.cmdline())


def await_status(link: SuperLink, run: int, status: str) -> None:
    until = time.monotonic() + 60
    while link.control.run_status(run).status != status:
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.deploy
def test_a_killed_server_leaves_a_run_that_the_next_one_stops(bench: Bench) -> None:
    """Nobody else's: on a SuperLink that is joined a run is known by the folder that it was given."""
    write_orders(bench.out, Orders(config=RunConfig(), run="abc", wait_seconds=600.0))
    mine = bench.link.submit()
    await_status(bench.link, mine, "running")
    for process in processes_of(bench.out):
        process.send_signal(signal.SIGKILL)
    end_all(bench.out)
    bench.link.start()
    assert bench.link.stale_runs() == [mine]
    named = bench.link.control.start_run(bench.out / FOLDER / "app", {SETTING: str(bench.out)})
    assert sorted(bench.link.stale_runs()) == sorted([mine, named])
    assert bench.link.control.unfinished_runs({SETTING: str(bench.out)}) == [named]
    assert bench.link.control.unfinished_runs({SETTING: "/elsewhere"}) == []
    for run in (mine, named):
        bench.link.control.stop_run(run)
    assert bench.link.stale_runs() == []
    assert bench.link.control.run_status(mine).ending == "stopped"


@pytest.fixture
def joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Somebody else's SuperLink, under the name of a connection in Flower's config.toml."""
    beside = Path(sys.executable).parent
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", f"{beside}{os.pathsep}{os.environ['PATH']}")
    for flag in ("FLWR_DISABLE_UPDATE_CHECK", "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"):
        monkeypatch.setenv(flag, "1")
    (tmp_path / "config.toml").write_text(f'[superlink.here]\naddress = "{address}"\ninsecure = true\n')
    command = [str(beside / "flower-superlink"), "--insecure", "--host", "127.0.0.1"]
    command += ["--port", address.rpartition(":")[2], "--database", str(tmp_path / "s.db")]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    yield "here"
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    for child in family:
        with suppress(psutil.Error):
            child.kill()


class Mute:
    """Tells nobody."""

    def say(self, line: str, *, bad: bool = False) -> None: ...

    event = visit = waits = say  # type: ignore[assignment]


@pytest.mark.deploy
def test_on_a_superlink_that_is_joined_a_killed_servers_run_is_ended_and_no_other(joined: str, tmp_path: Path) -> None:
    """There the ServerApp outlives its server: it would keep the run's folder from the next one."""
    orders = Orders(config=RunConfig(), run="abc", wait_seconds=600.0)
    outs, runs, links = [tmp_path / "mine", tmp_path / "other"], [], []
    for out in outs:
        (out / FOLDER).mkdir(parents=True)
        write_orders(out, orders)
        links.append(JoinedLink(joined, out))
        links[-1].start()
        runs.append(links[-1].submit())
    until = time.monotonic() + 90
    while not all((found := read_standing(out)) and found.stage == Stage.WAITING for out in outs):
        assert time.monotonic() < until
        time.sleep(0.1)
    mine, other = (read_standing(out) for out in outs)
    assert mine is not None
    assert other is not None
    again = JoinedLink(joined, outs[0])
    assert again.stale_runs() == [runs[0]]
    teller: Any = Mute()
    Supervisor(orders, outs[0], again, Admission(None, outs[0] / FOLDER, limit=1), teller)._stop_stale()
    assert again.stale_runs() == []
    assert not is_alive(mine.pid, mine.born)
    assert is_alive(other.pid, other.born)
    assert links[1].stale_runs() == [runs[1]]


@pytest.mark.deploy
def test_all_that_a_superlink_writes_is_for_its_user_alone(bench: Bench) -> None:
    """Under `claim`, as `fedloom server` runs."""
    bench.link.stop()
    for path in (bench.out / FOLDER).iterdir():
        if path.is_file() and not path.name.startswith(("door", "nodes")):
            path.rename(path.with_name(f"before-{path.name}"))
    with claim(bench.out):
        bench.link.start()
        assert bench.link.control.nodes() == []
        bench.link.stop()
    made = [path for name in ("state.db", "superlink.log", "home", "bin") for path in [bench.out / FOLDER / name]]
    assert [path.name for path in made if path.exists() and path.name != "home" and path.stat().st_mode & 0o077] == []
    assert bench.out.stat().st_mode & 0o077 == 0
    for path in (bench.out / FOLDER).glob("before-*"):
        path.rename(path.with_name(path.name.removeprefix("before-")))
    bench.link.start()


@pytest.mark.deploy
def test_a_killed_superlink_is_noticed_and_leaves_nothing_behind(bench: Bench) -> None:
    (link,) = [process for process in processes_of(bench.out) if "fedloom.server.door" in " ".join(process.cmdline())]
    link.send_signal(signal.SIGKILL)
    psutil.wait_procs([link], timeout=5)
    assert bench.link.problem() in ("it was killed (signal 9)", "it ended (exit code 0)")
    with pytest.raises(ConnectionError, match="SuperLink cannot be reached"):
        bench.link.control.nodes()
    bench.link.stop()
    assert processes_of(bench.out) == []
    bench.link.start()  # on the same database and port
    assert [node.name for node in bench.link.control.nodes()] == ["a"]


@pytest.mark.deploy
def test_a_superlink_that_cannot_start_says_its_last_line(tmp_path: Path) -> None:
    made = Bench(tmp_path)
    (tmp_path / FOLDER / "state.db").write_text("this is no database, and too long to be taken for an empty one")
    with pytest.raises(ValueError, match=r"SuperLink did not start: .*superlink.log"):
        made.link.start()
    assert processes_of(tmp_path) == []


def test_an_address_that_is_not_this_machines_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"cannot listen on 192\.0\.2\.1:9092"):
        check_free("192.0.2.1", 9092)


def test_a_connection_that_flower_does_not_know_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="Flower's connection 'nowhere' cannot be used") as caught:
        join("nowhere")
    assert "\n" not in str(caught.value)


def test_nobody_there_is_a_connection_error() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        with pytest.raises(ConnectionError):
            connect(f"127.0.0.1:{probe.getsockname()[1]}", None, "password").nodes()


def test_the_app_is_the_same_bytes_every_time(tmp_path: Path) -> None:
    from flwr.cli.build import build_fab_from_disk

    first, second = (build_fab_from_disk(write_app(tmp_path / name)) for name in ("one", "two"))
    assert first == second
    assert len(first) < 5000


def test_a_log_is_set_aside_when_it_has_grown(tmp_path: Path) -> None:
    log = tmp_path / "superlink.log"
    trim(log)  # not there: nothing happens
    with log.open("ab", buffering=0) as writer:
        writer.write(b"old" * 100)
        trim(log, 100)
        writer.write(b"new")
    assert log.read_bytes() == b"new"
    assert (tmp_path / "superlink.log.old").read_bytes() == b"old" * 100


@pytest.fixture(autouse=True)
def _nothing_left(tmp_path: Path) -> Iterator[None]:
    yield
    end_all(tmp_path)
