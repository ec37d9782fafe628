"""How a device reaches its server: the address, the CA that it trusts, and the key that it is known by."""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass, field
from pathlib import Path

from fedloom.client.settings import WHAT, DeviceSettings
from fedloom.protocols.bundle import JoinBundle, read_bundle, split_address

_PATIENCE = 10.0  # seconds for a connection and its handshake


@dataclass(frozen=True, kw_only=True)
class Link:
    """`ca` and `key` are what the files hold; both are empty on a link without TLS."""

    server: str
    ca: str = field(default="", repr=False)
    key: str = field(default="", repr=False)

    @property
    def insecure(self) -> bool:
        return not self.ca


def with_bundle(settings: DeviceSettings) -> tuple[DeviceSettings, Link | None]:
    """Settings with the name that a join bundle gives, and the link to the server; None without a server.

    Raises:
        ValueError: for settings that contradict the bundle, a missing file, or a link that is half secured.
    """
    if settings.join:
        return _joined(settings, read_bundle(Path(settings.join)))
    if not settings.server:
        return settings, None
    split_address(settings.server)
    if settings.insecure:
        if settings.ca or settings.key:
            raise ValueError(f"{WHAT} key 'insecure' must be false where 'ca' and 'key' are given, got true")
        return settings, Link(server=settings.server)
    if not settings.ca or not settings.key:
        raise ValueError(f"{WHAT} keys 'ca' and 'key' must name files (or use a join bundle), got none")
    ca, key = _read(settings.ca, "ca"), _read(settings.key, "key")
    return settings, Link(server=settings.server, ca=ca, key=key)


def _joined(settings: DeviceSettings, bundle: JoinBundle) -> tuple[DeviceSettings, Link]:
    for key in ("name", "server"):
        given, bundled = getattr(settings, key), getattr(bundle, key)
        if given and given != bundled:
            raise ValueError(f"{WHAT} key {key!r} must be the join bundle's {bundled!r}, got {given!r}")
    if settings.ca or settings.key or settings.insecure:
        raise ValueError(f"{WHAT} keys 'ca', 'key' and 'insecure' must be left out beside a join bundle")
    named = settings.model_copy(update={"name": bundle.name, "server": bundle.server})
    return named, Link(server=bundle.server, ca=bundle.ca, key=bundle.key)


def _read(path: str, key: str) -> str:
    if "-----BEGIN" in path:
        raise ValueError(f"{WHAT} key {key!r} must be the path of a file, not what it holds")
    try:
        return Path(path).read_text(encoding="ascii")
    except OSError as error:
        raise ValueError(f"{WHAT} key {key!r}: {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{WHAT} key {key!r}: {path} must be a PEM file") from None


def probe(link: Link) -> str:
    """Why the server cannot be reached or trusted, in one line; empty if it can be.

    A handshake tells apart what Flower's own messages do not: a wrong CA, an expired certificate, a port without TLS.
    """
    host, port = split_address(link.server)
    try:
        with socket.create_connection((host, port), timeout=_PATIENCE) as plain:
            if link.insecure:
                return ""
            context = ssl.create_default_context(cadata=link.ca)
            with context.wrap_socket(plain, server_hostname=host):
                return ""
    except ssl.SSLCertVerificationError as error:
        return f"the certificate of {link.server} is not good: {error.verify_message}"
    except ssl.SSLError as error:
        reason = (error.reason or str(error)).replace("_", " ").lower()
        return f"{link.server} does not speak TLS: {reason}"
    except TimeoutError:
        return f"{link.server} does not answer within {_PATIENCE:g} s"
    except OSError as error:
        return f"{link.server} cannot be reached: {error.strerror or error}"
