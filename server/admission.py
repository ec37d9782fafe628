"""Which device keys a SuperLink lets in: those of the keys folder that are not revoked, whatever changes there.

Two places must agree with the folder: Flower's register of SuperNodes, and the list of the door (guestbook.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key

from fedloom.server.enrolled import write_nodes
from fedloom.server.guestbook import Guests, digests, write_guests
from fedloom.server.keys import Consortium, DeviceKey

if TYPE_CHECKING:
    from fedloom.server.control import Control


class Admission:
    """Keeps a SuperLink's register in step with a keys folder.

    Args:
        keys: the consortium; None where there are no keys (a trial without TLS).
        folder: where door.json and nodes.json (Flower's node numbers and the names they belong to) are written.
        limit: bytes of the largest request that the door lets pass.
        alone: whether the register is this run's alone, so that keys which left the folder are taken off it too.

    Attributes:
        names: the devices that are let in; None where there are no keys, so that any may come.
    """

    def __init__(self, keys: Consortium | None, folder: Path, *, limit: int, alone: bool = True) -> None:
        self._keys, self._folder, self._limit, self._alone = keys, folder, limit, alone
        self._stamp: tuple[object, ...] = ()
        self._stuck: dict[bytes, str] = {}
        self.names: tuple[str, ...] | None = None

    def post(self) -> None:
        """Write the door's list, before there is a register to keep in step.

        Raises:
            ValueError: for a keys folder that cannot be read.
        """
        listed = self._listed()
        self._stamp = self._stamp_now()
        self._write(listed)

    def changed(self) -> bool:
        """Whether the keys folder has changed since it was last read."""
        return self._keys is not None and self._stamp_now() != self._stamp

    def sync(self, control: Control) -> list[str]:
        """Let in and shut out what must be; return a line for each change.

        Raises:
            ValueError: for a keys folder that cannot be read; what was let in stays in.
            ConnectionError: when the SuperLink cannot be reached.
        """
        if self._keys is None:
            return []
        stamp, listed = self._stamp_now(), self._listed()
        self._write(listed)  # first: a revoked key is turned away at once
        register = {node.key: node for node in control.nodes()}
        lines, allowed = [], {}
        for device, key in listed:
            if not device.revoked:
                allowed[key] = device.name
            if not device.revoked and key not in register:
                lines += self._let_in(control, device.name, key)
        for key, node in register.items():
            if key in allowed or not (self._alone or any(key == other for _, other in listed)):
                continue
            control.unregister(node.id)
            lines.append(f"{node.name or node.id} is shut out: its key is revoked or no longer in the keys folder")
        write_nodes(self._folder, {node.id: allowed[node.key] for node in control.nodes() if node.key in allowed})
        self._stamp = stamp
        return lines

    def _let_in(self, control: Control, name: str, key: bytes) -> list[str]:
        try:
            control.register(name, key)
        except ValueError as error:
            if self._stuck.get(key) == str(error):
                return []
            self._stuck[key] = str(error)
            return [f"{name} cannot be let in: {error} (a key that was revoked once needs a new one: add it again)"]
        return [f"{name} is let in"]

    def _listed(self) -> list[tuple[DeviceKey, bytes]]:
        """Every key of the folder with its PEM bytes, as Flower has them."""
        return [] if self._keys is None else [(device, pem_of(device.public_key)) for device in self._keys.devices()]

    def _write(self, listed: Sequence[tuple[DeviceKey, bytes]]) -> None:
        known = digests((device.name, key) for device, key in listed if not device.revoked)
        revoked = digests((device.name, key) for device, key in listed if device.revoked)
        if self._keys is not None:
            self.names = tuple(sorted({device.name for device, _ in listed if not device.revoked}))
        write_guests(
            self._folder,
            Guests(limit=self._limit, known=None if self._keys is None else known, revoked=revoked),
        )

    def _stamp_now(self) -> tuple[object, ...]:
        """What tells one state of the keys folder from another."""
        if self._keys is None:
            return ()
        stamps: list[object] = []
        for path in (self._keys.folder / "devices.json", self._keys.folder / "devices"):
            with suppress(OSError):
                status = path.stat()
                stamps.append((status.st_ino, status.st_size, status.st_mtime_ns))
        return tuple(stamps)


def pem_of(path: Path) -> bytes:
    """The public key of an OpenSSH file in PEM.

    Raises:
        ValueError: when it is none.
    """
    try:
        key = load_ssh_public_key(path.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise ValueError(f"{path} must be a public key in OpenSSH's format: {error}") from None
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
