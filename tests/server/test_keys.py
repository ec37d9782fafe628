"""A consortium's keys, tried for what they are for: Flower's own loaders, ssh-keygen, a crash at every step."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import stat
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from fedloom.protocols.bundle import read_bundle
from fedloom.server.keys import Consortium

SERVER = "fl.example.org:9092"


@pytest.fixture
def consortium(tmp_path: Path) -> Consortium:
    made = Consortium(tmp_path / "keys")
    made.init(["fl.example.org", "10.0.0.5"])
    return made


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_what_is_secret_only_the_owner_may_read(consortium: Consortium, tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        consortium.renew()
        consortium.add_device("a", SERVER, out=tmp_path / "a.toml")
    finally:
        os.umask(old)
    assert mode(consortium.folder) == 0o700
    assert {mode(consortium.folder / name) for name in ("ca.key", "server.key")} == {0o600}
    assert mode(tmp_path / "a.toml") == 0o600
    here = [path for path in consortium.folder.rglob("*") if path.is_file()]
    assert [path.name for path in here if b"OPENSSH PRIVATE" in path.read_bytes()] == []
    assert not [path for path in here if "draft" in path.name]


def test_keys_that_others_can_read_are_a_warning(consortium: Consortium) -> None:
    assert consortium.check() == []
    (consortium.folder / "ca.key").chmod(0o640)
    assert [line for line in consortium.check() if "ca.key can be read by others: chmod 600" in line]


def test_a_bundle_has_all_that_a_device_needs(consortium: Consortium, tmp_path: Path) -> None:
    consortium.add_device("hospital-a", SERVER, out=tmp_path / "a.toml")
    bundle = read_bundle(tmp_path / "a.toml")
    assert (bundle.name, bundle.server) == ("hospital-a", SERVER)
    assert bundle.ca == consortium.server_files().ca.read_text()
    private = load_ssh_private_key(bundle.key.encode(), None)
    (key,) = consortium.devices()
    assert load_ssh_public_key(key.public_key.read_bytes()) == private.public_key()
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert private.curve.name == "secp384r1"
    assert (key.name, key.revoked, key.public_key.is_absolute()) == ("hospital-a", False, True)


def test_flower_loads_both_halves_of_a_key(consortium: Consortium, tmp_path: Path) -> None:
    """By the functions that `flower-supernode` and `flwr supernode register` call."""
    from flwr.cli.supernode.register import try_load_public_key
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes
    from flwr.supernode.cli.flower_supernode import _try_setup_client_authentication

    bundle = consortium.add_device("a", SERVER)
    private = tmp_path / "a.key"
    private.write_text(bundle.key)
    settings = argparse.Namespace(auth_supernode_private_key=str(private), auth_supernode_public_key=None)
    pair = _try_setup_client_authentication(settings)
    assert pair is not None
    assert try_load_public_key(consortium.devices()[0].public_key) == public_key_to_bytes(pair[1])


def test_ssh_keygen_reads_the_same_key(consortium: Consortium, tmp_path: Path) -> None:
    keygen = shutil.which("ssh-keygen")
    if not keygen:
        pytest.skip("no ssh-keygen here")
    bundle = consortium.add_device("a", SERVER)
    private = tmp_path / "a.key"
    private.touch(0o600)
    private.write_text(bundle.key)
    (key,) = consortium.devices()
    listed = subprocess.run([keygen, "-l", "-f", key.public_key], capture_output=True, text=True, check=True).stdout
    assert listed.split() == ["384", key.fingerprint, "a", "(ECDSA)"]
    public = subprocess.run([keygen, "-y", "-f", private], capture_output=True, text=True, check=True).stdout
    assert public.split()[:2] == key.public_key.read_text().split()[:2]


@pytest.mark.parametrize("name", ["", "A", "../a", "a/b", "a.b", "--force", "a b", "ca\n"])
def test_a_name_that_cannot_be_a_file_is_refused(consortium: Consortium, name: str) -> None:
    with pytest.raises(ValueError, match="a device's name must be"):
        consortium.add_device(name, SERVER)
    assert consortium.devices() == []


def test_a_device_has_one_key_at_a_time(consortium: Consortium, tmp_path: Path) -> None:
    consortium.add_device("a", SERVER)
    before = consortium.devices()
    with pytest.raises(ValueError, match="device 'a' has a key already; revoke it first"):
        consortium.add_device("a", SERVER, out=tmp_path / "a.toml")
    assert consortium.devices() == before
    assert not (tmp_path / "a.toml").exists()


def test_a_bundle_is_not_written_over_another(consortium: Consortium, tmp_path: Path) -> None:
    out = tmp_path / "x.toml"
    consortium.add_device("a", SERVER, out=out)
    with pytest.raises(ValueError, match=r"x\.toml exists already"):
        consortium.add_device("b", SERVER, out=out)
    assert [key.name for key in consortium.devices()] == ["a"]
    assert read_bundle(out).name == "a"
    consortium.add_device("b", SERVER, out=out, force=True)
    assert read_bundle(out).name == "b"


@pytest.mark.parametrize(
    ("server", "message"),
    [
        ("fl.example.org", "address must be host:port"),
        (
            "other.example.org:9092",
            r"must cover the host other\.example\.org, got fl\.example\.org, 10\.0\.0\.5, local",
        ),
        ("0.0.0.0:9092", "a host that it can reach"),
    ],
)
def test_a_device_is_not_sent_where_it_would_be_refused(consortium: Consortium, server: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        consortium.add_device("a", server)
    assert consortium.devices() == []


def test_the_whole_folder_is_for_its_owner_alone_whatever_the_umask(tmp_path: Path) -> None:
    mask = os.umask(0)
    try:
        consortium = Consortium(tmp_path / "keys")
        consortium.init()
        consortium.add_device("a", "127.0.0.1:1", out=tmp_path / "a.toml")
        consortium.revoke("a")
        assert os.umask(0) == 0  # as it was before
    finally:
        os.umask(mask)
    made = [tmp_path / "a.toml", tmp_path / "keys", *(tmp_path / "keys").rglob("*")]
    assert len(made) == 10
    assert [path.name for path in made if path.stat().st_mode & 0o077] == []


def test_revoking_twice_changes_nothing(tmp_path: Path) -> None:
    now = [datetime(2026, 1, 1, tzinfo=UTC)]
    consortium = Consortium(tmp_path / "keys", clock=lambda: now[0])
    consortium.init(["fl.example.org"])
    consortium.add_device("a", SERVER)
    consortium.add_device("b", SERVER)
    first = consortium.revoke("a")
    now[0] += timedelta(days=1)
    assert consortium.revoke("a") == first
    assert (first.revoked, first.revoked_at) == (True, "2026-01-01T00:00:00+00:00")
    assert [(key.name, key.revoked) for key in consortium.devices()] == [("a", True), ("b", False)]
    listed = json.loads((consortium.folder / "devices.json").read_text())
    assert listed["b"]["revoked"] is None
    assert listed["a"]["fingerprint"] == first.fingerprint


def test_an_unknown_device_gets_the_nearest_name(consortium: Consortium) -> None:
    with pytest.raises(ValueError, match="unknown device 'hospital-b': no device was added yet"):
        consortium.revoke("hospital-b")
    consortium.add_device("hospital-a", SERVER)
    consortium.add_device("clinic", SERVER)
    with pytest.raises(ValueError, match="unknown device 'hospital-b': did you mean 'hospital-a'"):
        consortium.revoke("hospital-b")


def test_a_device_added_again_has_a_new_key_and_the_old_ones_stay_revoked(consortium: Consortium) -> None:
    for _ in range(3):
        consortium.add_device("a", SERVER)
        consortium.revoke("a")
    consortium.add_device("a", SERVER)
    keys = consortium.devices()
    assert [key.revoked for key in keys] == [True, True, True, False]
    assert len({key.fingerprint for key in keys}) == len({key.public_key for key in keys}) == 4
    assert keys[-1].public_key.name == "a.pub"
    assert {key.name: key for key in keys}["a"] == keys[-1]  # by name, the last key is the one that counts


@pytest.mark.parametrize("step", ["former key", "public key", "devices.json"])
def test_an_addition_cut_short_lets_nobody_in_and_can_be_done_again(
    consortium: Consortium, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    consortium.add_device("a", SERVER)
    old = consortium.revoke("a")
    cut = {"former key": "a.1.pub", "public key": "a.pub", "devices.json": "devices.json"}[step]
    from fedloom.server import keys

    whole = keys.write_whole

    def dies(path: Path, data: bytes) -> None:
        if path.name == cut:
            raise KeyboardInterrupt
        whole(path, data)

    monkeypatch.setattr(keys, "write_whole", dies)
    with pytest.raises(KeyboardInterrupt):
        consortium.add_device("a", SERVER, out=tmp_path / "a.toml")
    monkeypatch.undo()
    (after,) = consortium.devices()
    assert (after.fingerprint, after.revoked) == (old.fingerprint, True)
    consortium.add_device("a", SERVER, out=tmp_path / "a.toml", force=True)
    former, now = consortium.devices()
    assert (former.fingerprint, former.revoked, now.revoked) == (old.fingerprint, True, False)
    private = load_ssh_private_key(read_bundle(tmp_path / "a.toml").key.encode(), None)
    assert load_ssh_public_key(now.public_key.read_bytes()) == private.public_key()


def test_init_writes_over_nothing(consortium: Consortium) -> None:
    consortium.add_device("a", SERVER)
    before = {path: path.read_bytes() for path in consortium.folder.rglob("*") if path.is_file()}
    with pytest.raises(
        ValueError, match=r"holds keys already \(ca\.crt, .*--force .* revokes 1 active device: each must"
    ):
        consortium.init(["fl.example.org"])
    assert {path: path.read_bytes() for path in consortium.folder.rglob("*") if path.is_file()} == before


def test_force_starts_over_and_revokes_every_device(consortium: Consortium) -> None:
    consortium.add_device("a", SERVER)
    old_ca = consortium.server_files().ca.read_bytes()
    consortium.init(["fl.example.org"], force=True)
    assert consortium.check(SERVER) == []
    assert consortium.server_files().ca.read_bytes() != old_ca
    assert [key.revoked for key in consortium.devices()] == [True]
    consortium.add_device("a", SERVER)


def test_the_authority_s_key_may_be_elsewhere_until_a_renewal(consortium: Consortium, tmp_path: Path) -> None:
    key = consortium.folder / "ca.key"
    shutil.move(key, tmp_path / "safe")
    assert consortium.check(SERVER) == []
    consortium.add_device("a", SERVER)
    with pytest.raises(ValueError, match=r"ca\.key is not there: put it back"):
        consortium.renew()
    shutil.move(tmp_path / "safe", key)
    consortium.renew()


@pytest.mark.parametrize("name", ["ca.crt", "server.crt", "server.key", "devices.json", "devices/a.pub"])
@pytest.mark.parametrize("damage", ["torn", "empty", "junk", "gone"])
def test_damaged_files_are_one_line(consortium: Consortium, name: str, damage: str) -> None:
    consortium.add_device("a", SERVER)
    path = consortium.folder / name
    whole = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"torn": whole[: len(whole) // 2], "empty": b"", "junk": b"[\xff\n1]\n"}[damage])
    if (name, damage) == ("devices.json", "gone"):
        assert consortium.devices() == []  # no device was let in: the safe side
        return
    with pytest.raises(ValueError, match=path.name) as caught:
        (consortium.check if path.name.startswith(("ca", "server")) else consortium.devices)()
    assert "\n" not in str(caught.value)


def test_a_public_key_that_was_swapped_is_noticed(consortium: Consortium) -> None:
    consortium.add_device("a", SERVER)
    consortium.add_device("b", SERVER)
    shutil.copy(consortium.folder / "devices" / "b.pub", consortium.folder / "devices" / "a.pub")
    with pytest.raises(ValueError, match=r"a\.pub must be the key that was added, SHA256:.*, got SHA256:"):
        consortium.devices()


@pytest.mark.parametrize(
    "record", ['{"../x": {}}', '{"a": {"created": 1}}', '{"a": {"creatde": ""}}', "{}x", '{"a": []}']
)
def test_a_list_that_was_edited_wrongly_is_refused(consortium: Consortium, record: str) -> None:
    (consortium.folder / "devices.json").write_text(record)
    with pytest.raises(ValueError, match=r"devices\.json|a device's name"):
        consortium.devices()


def test_a_folder_without_keys_says_what_makes_them(tmp_path: Path) -> None:
    nothing = Consortium(tmp_path / "none")
    for act in (nothing.check, nothing.renew, nothing.server_files, nothing.facts, lambda: nothing.revoke("a")):
        with pytest.raises(ValueError, match="is not there: `fedloom keys init` makes"):
            act()
    assert nothing.devices() == []
    assert not (tmp_path / "none").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be used: "):
        Consortium(tmp_path / "file").init()


@pytest.mark.parametrize(
    ("hosts", "days"), [(["a b"], 10), (["fl.example.org:9092"], 10), (["*.a.org"], 10), ([], 0), ([], 3651)]
)
def test_bad_hosts_and_days_are_refused_before_anything_is_written(tmp_path: Path, hosts: list[str], days: int) -> None:
    with pytest.raises(ValueError, match=r"a host must be a plain name|must be valid for 1 to 3650 days"):
        Consortium(tmp_path / "keys").init(hosts, days=days)
    assert not (tmp_path / "keys").exists()


def _add(folder: Path, first: int) -> None:
    for number in range(first, first + 5):
        Consortium(folder).add_device(f"box-{number}", SERVER)


def test_processes_that_add_at_once_lose_no_device(consortium: Consortium) -> None:
    start = multiprocessing.get_context("spawn")
    workers = [start.Process(target=_add, args=(consortium.folder, 10 * number)) for number in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert len(consortium.devices()) == 15
