"""`fedloom keys`, as a person or a script meets it."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from fedloom.protocols.bundle import read_bundle

Fedloom = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_from_nothing_to_a_device_and_back(fedloom: Fedloom) -> None:
    code, out, err = fedloom("keys", "init", "--host", "fl.example.org", "--host", "10.0.0.5")
    assert (code, err) == (0, "")
    assert "for fl.example.org, 10.0.0.5, localhost, 127.0.0.1, valid until 20" in out
    assert "Next: fedloom keys add-device NAME --server fl.example.org:9092\n" in out

    code, out, err = fedloom("keys", "add-device", "hospital-a", "--server", "fl.example.org:9092")
    assert (code, err) == (0, "")
    assert "Next: on the device: fedloom client --join hospital-a.toml\n" in out
    assert "PRIVATE" not in out
    assert read_bundle(Path("hospital-a.toml")).name == "hospital-a"
    assert stat.S_IMODE(Path("hospital-a.toml").stat().st_mode) == 0o600

    code, out, _ = fedloom("keys", "list")
    assert code == 0
    assert "hospital-a" in out
    assert "active" in out

    code, out, _ = fedloom("keys", "revoke", "hospital-a")
    assert code == 0
    assert "is revoked since 20" in out
    code, out, _ = fedloom("keys", "revoke", "hospital-a")
    assert code == 0
    assert "was revoked already, at 20" in out

    code, out, _ = fedloom("keys", "add-device", "hospital-a", "--server", "10.0.0.5:9092", "--out", "again.toml")
    assert code == 0
    assert read_bundle(Path("again.toml")).server == "10.0.0.5:9092"


def test_the_list_for_scripts(fedloom: Fedloom) -> None:
    fedloom("keys", "init", "--keys", "k")
    fedloom("keys", "add-device", "a", "--server", "localhost:9092", "--keys", "k")
    code, out, _ = fedloom("keys", "list", "--keys", "k", "--json")
    found = json.loads(out)
    assert code == 0
    assert set(found) == {"ca", "server", "devices", "warnings"}
    assert found["server"]["hosts"] == ["localhost", "127.0.0.1"]
    assert (found["server"]["days_left"], found["ca"]["days_left"]) == (824, 3649)
    (device,) = found["devices"]
    assert (device["name"], device["revoked"], device["revoked_at"]) == ("a", False, "")
    assert device["fingerprint"].startswith("SHA256:")
    assert Path(device["public_key"]).is_file()
    assert found["warnings"] == []


def test_without_hosts_the_next_step_is_to_name_one(fedloom: Fedloom) -> None:
    _, out, _ = fedloom("keys", "init", "--keys", "my keys")
    assert "Only this machine can connect" in out
    assert "Next: fedloom keys add-device NAME --server localhost:9092 --keys 'my keys'\n" in out
    code, out, _ = fedloom("keys", "renew", "--keys", "my keys", "--host", "2001:db8::1", "--days", 20)
    assert code == 0
    assert "for 2001:db8::1, localhost, 127.0.0.1, valid until" in out
    assert "Next: restart `fedloom server`" in out
    _, out, _ = fedloom("keys", "list", "--keys", "my keys")
    assert "Next: fedloom keys add-device NAME --server [2001:db8::1]:9092 --keys 'my keys'\n" in out
    assert "Warning: the server certificate expires on 20" in out


def test_a_list_shows_broken_keys_rather_than_failing(fedloom: Fedloom) -> None:
    fedloom("keys", "init", "--keys", "one")
    fedloom("keys", "init", "--keys", "two")
    Path("one/server.key").write_bytes(Path("two/server.key").read_bytes())
    code, out, _ = fedloom("keys", "list", "--keys", "one", "--json")
    assert code == 0
    assert "must belong to" in json.loads(out)["warnings"][0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("init",), "--force starts over with a new CA and revokes 1 active device:"),
        (("add-device", "a", "--server", "localhost:1", "--out", "b.toml"), "device 'a' has a key already"),
        (("add-device", "b", "--server", "localhost:1", "--out", "a.toml"), "a.toml exists already"),
        (("add-device", "Hospital A", "--server", "localhost:1"), "a device's name must be 1 to 63 of a-z"),
        (("add-device", "../b", "--server", "localhost:1"), "a device's name must be 1 to 63 of a-z"),
        (("add-device", "b", "--server", "localhost"), "a server's address must be host:port, got 'localhost'"),
        (("add-device", "b", "--server", "fl.org:1"), "must cover the host fl.org, got localhost, 127.0.0.1"),
        (("revoke", "aa"), "unknown device 'aa': did you mean 'a'?"),
        (("renew", "--host", "a:1"), "a host must be a plain name or an IP address, without a port"),
        (("list", "--keys", "none"), "is not there: `fedloom keys init` makes a consortium's keys"),
        (("revoke", "a", "--keys", "none"), "is not there: `fedloom keys init` makes a consortium's keys"),
    ],
)
def test_mistakes_are_one_line(fedloom: Fedloom, arguments: tuple[str, ...], message: str) -> None:
    fedloom("keys", "init")
    fedloom("keys", "add-device", "a", "--server", "localhost:9092")
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    code, out, err = fedloom("keys", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("fedloom: ")
    assert message in err
    assert err.count("\n") == 1
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


def test_force_replaces(fedloom: Fedloom) -> None:
    fedloom("keys", "init")
    fedloom("keys", "add-device", "a", "--server", "localhost:9092")
    assert fedloom("keys", "init", "--force")[0] == 0
    assert fedloom("keys", "add-device", "a", "--server", "localhost:9092", "--force")[0] == 0
    assert read_bundle(Path("a.toml")).ca == Path("keys/ca.crt").read_text()


@pytest.mark.parametrize("command", ["init", "add-device", "revoke", "renew", "list"])
def test_each_command_explains_itself(fedloom: Fedloom, command: str) -> None:
    code, out, _ = fedloom("keys", command, "--help")
    assert code == 0
    assert "--keys" in out
