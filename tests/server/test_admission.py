"""Keys folder, Flower's register and the door's list: the three agree after every change of the first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedloom.server.admission import Admission, pem_of
from fedloom.server.control import Node
from fedloom.server.guestbook import key_digest
from fedloom.server.keys import Consortium


class Register:
    """Flower's register of SuperNodes, by its rules: a key that was taken off it cannot come back."""

    def __init__(self) -> None:
        self.there: dict[int, Node] = {}
        self.gone: set[bytes] = set()

    def nodes(self) -> list[Node]:
        return list(self.there.values())

    def register(self, name: str, key: bytes) -> Node:
        if key in self.gone:
            raise ValueError("SuperLink refused: Public key already in use.")
        node = Node(id=len(self.there) + len(self.gone) + 1, key=key, name=name)
        self.there[node.id] = node
        return node

    def unregister(self, node: int) -> None:
        self.gone.add(self.there.pop(node).key)


@pytest.fixture
def keys(tmp_path: Path) -> Consortium:
    consortium = Consortium(tmp_path / "keys")
    consortium.init()
    return consortium


def names(register: Any) -> list[str]:
    return sorted(node.name for node in register.nodes())


def door(folder: Path) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = json.loads((folder / "door.json").read_text())
    return found


def test_every_change_of_the_folder_is_carried_out_once(keys: Consortium, tmp_path: Path) -> None:
    register: Any = Register()
    admission = Admission(keys, tmp_path, limit=10)
    keys.add_device("a", "127.0.0.1:1")
    keys.add_device("b", "127.0.0.1:1")
    admission.post()
    assert admission.names == ("a", "b")
    assert not admission.changed()
    assert admission.sync(register) == ["a is let in", "b is let in"]
    assert admission.sync(register) == []
    numbers = json.loads((tmp_path / "nodes.json").read_text())
    assert numbers == {"1": "a", "2": "b"}

    keys.revoke("a")
    assert admission.changed()
    assert admission.sync(register) == ["a is shut out: its key is revoked or no longer in the keys folder"]
    assert not admission.changed()
    assert names(register) == ["b"]
    assert list(door(tmp_path)["revoked"].values()) == ["a"]
    assert list(door(tmp_path)["known"].values()) == ["b"]
    assert json.loads((tmp_path / "nodes.json").read_text()) == {"2": "b"}

    keys.add_device("a", "127.0.0.1:1")  # a new key under the old name
    assert admission.sync(register) == ["a is let in"]
    assert names(register) == ["a", "b"]
    assert len(door(tmp_path)["revoked"]) == 1


def test_the_door_knows_keys_as_flower_sends_them(keys: Consortium, tmp_path: Path) -> None:
    keys.add_device("a", "127.0.0.1:1")
    Admission(keys, tmp_path, limit=10).post()
    pem = pem_of(keys.devices()[0].public_key)
    assert pem.startswith(b"-----BEGIN PUBLIC KEY-----")
    assert door(tmp_path)["known"] == {key_digest(pem): "a"}


def test_a_key_that_flower_will_not_take_again_is_told_once(keys: Consortium, tmp_path: Path) -> None:
    register: Any = Register()
    keys.add_device("a", "127.0.0.1:1")
    register.gone.add(pem_of(keys.devices()[0].public_key))
    admission = Admission(keys, tmp_path, limit=10)
    admission.post()
    (line,) = admission.sync(register)
    assert line.startswith("a cannot be let in: SuperLink refused: Public key already in use")
    assert admission.sync(register) == []


def test_others_devices_stay_on_a_register_that_was_joined(keys: Consortium, tmp_path: Path) -> None:
    register: Any = Register()
    register.register("somebody else's", b"another key")
    keys.add_device("a", "127.0.0.1:1")
    Admission(keys, tmp_path, limit=10, alone=False).sync(register)
    assert names(register) == ["a", "somebody else's"]
    keys.revoke("a")
    Admission(keys, tmp_path, limit=10, alone=False).sync(register)
    assert names(register) == ["somebody else's"]
    assert Admission(keys, tmp_path, limit=10).sync(register) == [
        "somebody else's is shut out: its key is revoked or no longer in the keys folder"
    ]


def test_a_file_that_is_no_key_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.pub").write_text("not a key")
    with pytest.raises(ValueError, match=r"a\.pub must be a public key in OpenSSH's format"):
        pem_of(tmp_path / "a.pub")
