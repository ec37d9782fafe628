"""A real SuperLink behind its door, over TLS, with keys: who reaches what, and what is left of it when it dies."""

from __future__ import annotations

import base64
import datetime
import signal
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_private_key
from flwr.common.constant import TIMESTAMP_HEADER

from fedloom.server.admission import Admission
from fedloom.server.bundle_app import write_app
from fedloom.server.control import connect, join
from fedloom.server.keys import Consortium
from fedloom.server.processes import end_all, processes_of
from fedloom.server.settings import Link
from fedloom.server.superlink import FOLDER, SuperLink, check_free, trim


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

    def ask(self, path: str, *, key: str = "", body: bytes = b"", ca: Path | None = None) -> int:
        """The status of a POST, signed with a device's key as a SuperNode signs it."""
        request = urllib.request.Request(f"https://127.0.0.1:{self.port}{path}", data=body, method="POST")
        request.add_header("content-type", "application/x-protobuf")
        if key:
            private, now = self.private[key], datetime.datetime.now(datetime.UTC).isoformat()
            assert isinstance(private, ec.EllipticCurvePrivateKey)
            pem = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
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
            connect(f"127.0.0.1:{probe.getsockname()[1]}", None).nodes()


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
