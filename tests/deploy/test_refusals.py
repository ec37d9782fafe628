"""Who is not let in: no key, a revoked key, a wrong CA, an expired certificate, plain HTTP. The run goes on."""

from __future__ import annotations

import json
import re
import socket
import ssl
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from common import free_port
from stand import Stand, run

from fedloom.protocols.bundle import read_bundle, write_bundle
from fedloom.server.control import connect
from fedloom.server.keys import Consortium

pytestmark = pytest.mark.deploy
_FILES = {"ca": "ca.crt", "key": "device.key"}


def test_who_is_not_let_in(tmp_path: Path) -> None:
    with Stand(tmp_path, devices=3, changes={"server": {"rounds": 500}}) as stand:
        others = tmp_path / "other-keys"
        run("keys", "init", "--keys", others, "--host", "127.0.0.1")
        address = f"127.0.0.1:{stand.port}"
        foreign = tmp_path / "foreign.bundle.toml"
        run("keys", "add-device", "stranger", "--server", address, "--out", foreign, "--keys", others)
        bundle = read_bundle(foreign)
        ours = read_bundle(tmp_path / "clinic-a.bundle.toml")
        no_key = tmp_path / "no-key.bundle.toml"
        write_bundle(no_key, bundle.model_copy(update={"ca": ours.ca}))  # trusts the server, is unknown to it
        for name, joined in (("stranger", no_key), ("wary", foreign)):
            text = (tmp_path / "clinic-a.toml").read_text()
            text = re.sub("^join = .*$", f"join = {json.dumps(str(joined))}", text, flags=re.MULTILINE)
            text = re.sub(
                "^state = .*$", f"state = {json.dumps(str(tmp_path / 'state' / name))}", text, flags=re.MULTILINE
            )
            (tmp_path / f"{name}.toml").write_text(text)
        _let_in_under_another_name(stand, "clinic-d", "clinic-a")
        stand.start()
        checkpoints = stand.out / "checkpoints"
        stand.wait((checkpoints / "round-000001").exists, label="round 1")
        stand.start_client("stranger")
        stand.start_client("wary")
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"http://{address}/health", timeout=5)
        stand.wait(lambda: "refuses this device's key" in stand.log("stranger"), label="the stranger to be refused")
        stand.wait(lambda: "unable to get local issuer" in stand.log("wary"), label="the wrong CA to be noticed")
        stand.wait(lambda: "its key is unknown" in stand.log("server", 200), label="the server's line on the stranger")

        run("keys", "revoke", "clinic-c", "--keys", stand.folder / "keys")
        stand.wait(lambda: "clinic-c is shut out" in stand.log("server", 200), label="the server to shut clinic-c out")
        refused = "its key was given to 'clinic-d', and it calls itself 'clinic-a'"
        stand.start_client("clinic-d")
        stand.wait(lambda: refused in stand.log("server", 200), label="clinic-d not to pass for clinic-a")
        stand.processes["clinic-d"].terminate()
        stand.processes["clinic-d"].wait(30)
        _nothing_for_other_users(stand)

        before = max(event["round"] for event in stand.events() if event["event"] == "round")
        stand.wait(lambda: "refuses this device's key" in stand.log("clinic-c"), label="clinic-c to be refused")
        later = (checkpoints / f"round-{before + 4:06d}").exists
        stand.wait(later, seconds=300, label=f"round {before + 4}")
        late = [
            e["device"]
            for e in stand.events()
            if e["event"] == "answer" and e["round"] > before + 2 and not e["refused"]
        ]
        assert set(late) == {"clinic-a", "clinic-b"}
        assert stand.processes["server"].poll() is None
        told = {e["device"] for e in stand.events() if e["event"] == "joined"}
        assert told == {"clinic-a", "clinic-b", "clinic-c"}


def _let_in_under_another_name(stand: Stand, name: str, claimed: str) -> None:
    """A device of its own key whose settings call it by another's name."""
    stand.add_device(3, name)
    bundle = read_bundle(stand.folder / f"{name}.bundle.toml")
    (stand.folder / "ca.crt").write_text(bundle.ca)
    (stand.folder / "device.key").write_text(bundle.key)
    path = stand.folder / f"{name}.toml"
    own = f'name = "{claimed}"\nserver = "{bundle.server}"\n'
    own += "".join(f"{key} = {json.dumps(str(stand.folder / file))}\n" for key, file in _FILES.items())
    path.write_text(re.sub("^join = .*\n", own, path.read_text(), flags=re.MULTILINE))


def _nothing_for_other_users(stand: Stand) -> None:
    """Another user of the server's machine starts no run, and reads nothing that a run has written."""
    ca = stand.folder / "keys" / "ca.crt"
    stranger = connect(f"127.0.0.1:{stand.port}", ca, "a guess")
    with pytest.raises(ValueError, match="SuperLink refused: HTTP 401"):
        stranger.start_run(stand.out / "superlink" / "app", {})
    stranger.close()
    told = "/v1/control/start-run is for this run's own processes alone"
    stand.wait(lambda: told in stand.log("server", 200), label="the server's line on another user")
    for folder in (stand.out, stand.folder / "state" / "clinic-a", stand.folder / "keys"):
        assert [path for path in (folder, *folder.rglob("*")) if _is_for_others(path)] == []


def _is_for_others(path: Path) -> bool:
    try:
        return bool(path.stat().st_mode & 0o077)
    except FileNotFoundError:  # an old checkpoint that was dropped meanwhile
        return False


def test_an_expired_certificate_is_refused_by_both_sides(tmp_path: Path) -> None:
    past = Consortium(tmp_path / "old-keys", clock=lambda: datetime.now(UTC) - timedelta(days=400))
    past.init(["127.0.0.1"], days=30)
    with Stand(tmp_path / "stand", devices=1) as stand:
        config = stand.folder / "server.toml"
        said = run("server", stand.folder / "recipe.toml", "--config", config, "--keys", past.folder, expect=2)
        assert "expired" in said
        assert "Traceback" not in said

        port = free_port()
        bundle = past.add_device("clinic-z", f"127.0.0.1:{port}")
        write_bundle(stand.folder / "clinic-a.bundle.toml", bundle, replace=True)
        files = past.server_files()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(files.certificate, files.key)
        with socket.create_server(("127.0.0.1", port)) as listener:
            threading.Thread(target=_greet, args=(listener, context), daemon=True).start()
            stand.start_client("clinic-a")
            stand.wait(lambda: "certificate has expired" in stand.log("clinic-a"), label="the device to notice")


def _greet(listener: socket.socket, context: ssl.SSLContext) -> None:
    """A TLS server that shakes hands with whoever comes."""
    while True:
        try:
            peer, _ = listener.accept()
            context.wrap_socket(peer, server_side=True).close()
        except ssl.SSLError:
            continue
        except OSError:
            return
