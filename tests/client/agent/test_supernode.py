"""The link to the server: what is in its way is said in one line, and nothing of it outlives the agent."""

from __future__ import annotations

import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import psutil
import pytest

from fedloom.client.agent import supernode
from fedloom.client.agent.home import Home
from fedloom.client.agent.launcher import write_commands
from fedloom.client.agent.link import Link, probe, seconds_ahead
from fedloom.client.agent.linklog import REFUSED, UNREACHABLE, LinkLog, is_last, meaning
from fedloom.client.agent.supernode import SuperNode
from fedloom.protocols.password import HEADER, VARIABLE, fresh
from fedloom.server.keys import Consortium


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@contextmanager
def listening(consortium: Consortium | None, date: str = "") -> Iterator[int]:
    """A port that accepts, over TLS with a consortium's certificate, or without; with a date it says the time."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        context = None
        if consortium is not None:
            files = consortium.server_files()
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(files.certificate, files.key)

        def serve() -> None:
            while True:
                try:
                    line, _ = server.accept()
                except OSError:
                    return
                with line:
                    try:
                        if context is None:
                            line.recv(100)
                            line.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                        else:
                            with context.wrap_socket(line, server_side=True) as secure:
                                if date:
                                    secure.recv(1000)
                                    secure.sendall(f"HTTP/1.1 200 OK\r\n{date}\r\n\r\n".encode())
                    except OSError:
                        continue

        threading.Thread(target=serve, daemon=True).start()
        yield int(server.getsockname()[1])
        server.shutdown(socket.SHUT_RDWR)  # wakes the thread


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Consortium:
    made = Consortium(tmp_path_factory.mktemp("keys"))
    made.init()
    return made


def ca_of(consortium: Consortium) -> str:
    return consortium.server_files().ca.read_text()


def test_a_probe_tells_what_is_wrong_with_a_server(consortium: Consortium, tmp_path: Path) -> None:
    with listening(consortium) as port:
        address = f"127.0.0.1:{port}"
        assert probe(Link(server=address, ca=ca_of(consortium), key="k")) == ""
        other = Consortium(tmp_path / "other")
        other.init()
        reason = probe(Link(server=address, ca=ca_of(other), key="k"))
        assert reason.startswith(f"the certificate of {address} is not good: ")
        assert probe(Link(server=address)) == ""  # without TLS nothing can be told
    past = datetime.now(UTC) - timedelta(days=60)
    expired = Consortium(tmp_path / "expired", clock=lambda: past)
    expired.init(days=30)
    with listening(expired) as port:
        reason = probe(Link(server=f"127.0.0.1:{port}", ca=ca_of(expired), key="k"))
        assert reason == f"the certificate of 127.0.0.1:{port} is not good: certificate has expired"
    with listening(None) as port:
        reason = probe(Link(server=f"127.0.0.1:{port}", ca=ca_of(consortium), key="k"))
        assert reason.startswith(f"127.0.0.1:{port} does not speak TLS: ")
    assert probe(Link(server=f"127.0.0.1:{port}", ca=ca_of(consortium), key="k")) == (
        f"127.0.0.1:{port} cannot be reached: Connection refused"
    )


def date_of(seconds: float) -> str:
    """How a server says the time whose clock is so far ahead."""
    return f"Date: {format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)}"


@pytest.mark.parametrize(("ahead", "word"), [(-60, "60 s ahead of"), (-9, "9 s ahead of"), (3600, "3600 s behind")])
def test_a_clock_that_is_wrong_is_told_by_how_much(consortium: Consortium, ahead: float, word: str) -> None:
    with listening(consortium, date_of(ahead)) as port:
        line = probe(Link(server=f"127.0.0.1:{port}", ca=ca_of(consortium), key="k"))
    told = re.fullmatch(
        r"this device's clock is wrong: about (\d+) s (ahead of|behind) the server's, which lets in none that is 5 s "
        "ahead or 5 minutes behind",
        line,
    )
    assert told, line
    seconds, _, way = word.partition(" s ")
    assert told.group(2) == way
    assert abs(int(told.group(1)) - int(seconds)) <= 2


@pytest.mark.parametrize("says", ["", "Date: soon", "Server: x", 0.0, -3.0, 290.0])
def test_a_clock_that_may_be_right_is_let_be(consortium: Consortium, says: str | float) -> None:
    with listening(consortium, says if isinstance(says, str) else date_of(says)) as port:
        assert probe(Link(server=f"127.0.0.1:{port}", ca=ca_of(consortium), key="k")) == ""


def test_what_flower_calls_unreachable_may_be_the_clock(consortium: Consortium, tmp_path: Path) -> None:
    """It may have jumped after the probe; near the limit, where a probe is not sure, the failure makes it so."""
    for ahead, start in ((0.0, UNREACHABLE), (-5.0, "this device's clock is wrong"), (400.0, "this device's clock is")):
        said: list[str] = []
        with listening(consortium, date_of(ahead)) as port:
            link = Link(server=f"127.0.0.1:{port}", ca=ca_of(consortium), key="k")
            node = SuperNode(link, "a", Home(folder=tmp_path), said.append)
            node._broke(UNREACHABLE)
            assert said == []
            node._broke(UNREACHABLE)
        assert len(said) == 1
        assert said[0].startswith(start)
    assert seconds_ahead(Link(server=f"127.0.0.1:{port}", ca=ca_of(consortium), key="k")) is None
    assert seconds_ahead(Link(server=f"127.0.0.1:{port}")) is None


def test_a_certificate_from_the_future_raises_the_question_of_the_clock(tmp_path: Path) -> None:
    made = Consortium(tmp_path, clock=lambda: datetime.now(UTC) + timedelta(days=60))
    made.init()
    with listening(made) as port:
        reason = probe(Link(server=f"127.0.0.1:{port}", ca=ca_of(made), key="k"))
    assert f"is not yet valid; is this device's clock right? It says {time.strftime('%Y-%m-%d')}" in reason


def test_flowers_words_become_plain_ones() -> None:
    """Lines as Flower 1.41 wrote them."""
    assert meaning("[code: 2004] Failed to activate SuperNode.") == REFUSED
    assert "not signed by this device's CA" in meaning(
        "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: unable to get local issuer certificate"
    )
    assert meaning("WARNING :   Connection attempt failed, retrying in 0.36 seconds") == UNREACHABLE
    assert meaning("INFO :      Sent successfully") == ""
    assert is_last("ERROR :     Exit Code: 305")
    assert not is_last("ERROR :     ClientApp raised an exception")
    assert not is_last("ERROR :     Failed to send message 1234: x")
    assert not is_last("INFO :      Starting Flower SuperNode")


def test_the_log_does_not_grow_for_ever(tmp_path: Path) -> None:
    log = LinkLog(tmp_path / "supernode.log")
    assert log.write("\x1b[91mERROR \x1b[0m:     Exit Code: 305\n") == "ERROR :     Exit Code: 305"
    for _ in range(700):
        assert len(log.write("x" * 10_000)) == 4000
    log.close()
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sizes.keys() == {"supernode.log", "supernode.old.log"}
    assert max(sizes.values()) < 2**20 + 5000
    assert all(path.stat().st_mode & 0o077 == 0 for path in tmp_path.iterdir())


def test_a_server_that_cannot_be_reached_is_tried_again_and_said_once(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    home, said = Home(folder=tmp_path), []
    home.open()
    node = SuperNode(Link(server=f"127.0.0.1:{port}"), "a", home, said.append)
    node.start()
    until(lambda: len(said) > 0)
    time.sleep(1.2)  # another try
    assert said == [f"127.0.0.1:{port} cannot be reached: Connection refused"]
    status = node.status()
    assert (status["connected"], status["problem"], status["starts"]) == (False, said[0], 0)
    began = time.monotonic()
    node.stop()
    assert time.monotonic() - began < 3


def test_a_clock_that_goes_on_being_wrong_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By how much it is wrong is measured anew at each try, and is never quite the same."""
    ahead = iter(range(7200, 8000))
    monkeypatch.setattr("fedloom.client.agent.supernode.probe", lambda _: f"the clock is {next(ahead)} s ahead")
    home, said = Home(folder=tmp_path), []
    home.open()
    node = SuperNode(Link(server="127.0.0.1:1"), "a", home, said.append)
    node.start()
    until(lambda: next(iter(node.status()["problem"].split()[3:4]), "") > "7200")
    node.stop()
    assert said == ["the clock is 7200 s ahead"]


CHILD = """
import signal, sys, time
signal.signal(15, lambda *_: sys.exit(print("bye", flush=True)))
print("up", flush=True)
time.sleep(60)
"""
PARENT = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-m", "fedloom.client.agent.lifeline", str(os.getpid()), *sys.argv[1:]])
print(child.pid, flush=True)
child.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell of a parent's death")
def test_a_process_on_a_lifeline_ends_with_its_parent(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with out.open("wb") as file:
        parent = subprocess.Popen([sys.executable, "-c", PARENT, sys.executable, "-c", CHILD], stdout=file)
    until(lambda: b"up" in out.read_bytes())
    child = psutil.Process(int(out.read_text().splitlines()[0]))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
    assert out.read_text().endswith("bye\n")  # it was told to end, not killed


def test_a_lifeline_to_a_parent_that_is_gone_starts_nothing() -> None:
    command = [sys.executable, "-m", "fedloom.client.agent.lifeline"]
    assert subprocess.run([*command, "1", "echo", "x"], capture_output=True, check=False).returncode == 1
    done = subprocess.run([*command, str(os.getpid()), "no-such-program"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (127, "no-such-program cannot be started: No such file or directory\n")


def test_what_an_earlier_agent_left_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supernode, "_GOODBYE", 0.2)
    home = Home(folder=tmp_path)
    home.open()
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"
    left = subprocess.Popen([sys.executable, "-c", code, f"agent='{home.socket}'"], start_new_session=True)
    stranger = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    until(lambda: code in psutil.Process(left.pid).cmdline())
    try:
        for process in (left, stranger):
            (home.link / "supernode.pid").write_text(str(process.pid))
            SuperNode(Link(server="h:1"), "a", home)._clear_away()
        assert left.wait(5) == -signal.SIGKILL
        assert stranger.poll() is None  # a number that another program has by now
    finally:
        for process in (left, stranger):
            process.kill()
            process.wait()


def test_a_supernode_finds_only_commands_that_run_no_bundle(tmp_path: Path) -> None:
    write_commands(tmp_path)
    for name in ("flwr-agentapp", "flwr-serverapp", "flwr-simulation", "flwr-model", "flwr-connector"):
        done = subprocess.run([tmp_path / name, "--token", "x"], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (1, f"this device runs no {name}\n")
    done = subprocess.run([tmp_path / "flwr-clientapp", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "Run a Flower ClientApp" in done.stdout


def status_of(port: int, headers: dict[str, str]) -> int:
    """Of a request to a SuperNode's Runtime API; 0 before it answers."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/runtime/acquire-task", data=b"", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return int(error.code)
    except OSError:
        return 0


def test_a_supernode_serves_nobody_without_the_devices_password(tmp_path: Path) -> None:
    """Also without a server: its port is open from the start."""
    write_commands(tmp_path)
    password = fresh()
    command = [str(tmp_path / "flower-supernode"), "--insecure", "--superlink", "127.0.0.1:1"]
    path = f"{tmp_path}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    told = {"PATH": path, "FLWR_HOME": str(tmp_path), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    surroundings = {**os.environ, **told}
    done = subprocess.run(command, env=surroundings, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "must be started with FEDLOOM_PASSWORD" in done.stderr
    process = subprocess.Popen(
        command, env={**surroundings, VARIABLE: password}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        node = psutil.Process(process.pid)
        until(lambda: any(line.status == "LISTEN" for line in node.net_connections()), 60)
        (port,) = {line.laddr.port for line in node.net_connections() if line.status == "LISTEN"}
        until(lambda: status_of(port, {}) > 0, 60)
        with pytest.raises(OSError, match="in use"), socket.socket() as taken:  # held from the start
            taken.bind(("127.0.0.1", port))
        for headers in ({}, {HEADER: ""}, {HEADER: "a guess"}):
            assert status_of(port, headers) == 401
        assert status_of(port, {HEADER: password}) not in (0, 401)  # Flower's own answer
        assert password not in " ".join(psutil.Process(process.pid).cmdline())
    finally:
        for child in [*psutil.Process(process.pid).children(recursive=True), process]:
            child.kill()
        process.wait()


def test_secrets_are_for_the_owner_alone(consortium: Consortium, tmp_path: Path) -> None:
    bundle = consortium.add_device("clinic", "127.0.0.1:9092")
    home = Home(folder=tmp_path)
    home.open()
    command = SuperNode(Link(server=bundle.server, ca=bundle.ca, key=bundle.key), "clinic", home)._command()
    assert (home.link / "device.key").read_text() == bundle.key
    assert (home.link / "device.key").stat().st_mode & 0o777 == 0o600
    assert "PRIVATE" not in " ".join(command)
    assert f"agent='{home.socket}' name='clinic'" in command
