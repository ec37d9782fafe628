"""How a device reaches its server: the address, the CA that it trusts, and the key that it is known by."""

from __future__ import annotations

import socket
import ssl
import time
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Final

from fedloom.client.settings import WHAT, DeviceSettings
from fedloom.protocols.bundle import JoinBundle, read_bundle, split_address

_PATIENCE = 10.0  # seconds for a connection and its handshake
_AHEAD, _BEHIND = 5.0, 305.0  # seconds that a device's clock may be off before Flower's server lets it in no more
SLACK: Final = 2.0  # seconds that a comparison of clocks may be wrong by: a server tells its time in whole ones
_ASK = b"GET /health HTTP/1.1\r\nHost: fedloom\r\nConnection: close\r\n\r\n"
_HEAD = 8192  # bytes of an answer's head, at most


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
    The server's answer tells its time, by which this device's clock is wrong or right.
    """
    host, port = split_address(link.server)
    try:
        with socket.create_connection((host, port), timeout=_PATIENCE) as plain:
            if link.insecure:
                return ""
            context = ssl.create_default_context(cadata=link.ca)
            with context.wrap_socket(plain, server_hostname=host) as line:
                return clock_problem(_ahead_of(line), SLACK)
    except ssl.SSLCertVerificationError as error:
        clock = f"; is this device's clock right? It says {time.strftime('%Y-%m-%d')}"
        doubt = clock if "not yet valid" in error.verify_message else ""
        return f"the certificate of {link.server} is not good: {error.verify_message}{doubt}"
    except ssl.SSLError as error:
        reason = (error.reason or str(error)).replace("_", " ").lower()
        return f"{link.server} does not speak TLS: {reason}"
    except TimeoutError:
        return f"{link.server} does not answer within {_PATIENCE:g} s"
    except OSError as error:
        return f"{link.server} cannot be reached: {error.strerror or error}"


def seconds_ahead(link: Link) -> float | None:
    """How far this device's clock is ahead of the server's; None where that cannot be told, or does not matter."""
    if link.insecure:
        return None
    host, port = split_address(link.server)
    try:
        context = ssl.create_default_context(cadata=link.ca)
        with (
            socket.create_connection((host, port), timeout=_PATIENCE) as plain,
            context.wrap_socket(plain, server_hostname=host) as line,
        ):
            return _ahead_of(line)
    except OSError:
        return None


def clock_problem(ahead: float | None, slack: float) -> str:
    """What is wrong with a clock that is so far ahead, in one line; empty for one that Flower's server takes.

    A positive `slack` says only what is sure, a negative one also what may be.
    """
    if ahead is None or -_BEHIND - slack < ahead < _AHEAD + slack:
        return ""
    return (
        f"this device's clock is wrong: about {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the server's, "
        "which lets in none that is 5 s ahead or 5 minutes behind"
    )


def _ahead_of(line: ssl.SSLSocket) -> float | None:
    """This machine's time less the server's, by the Date of an answer; None without one."""
    head = b""
    try:
        line.sendall(_ASK)
        while b"\r\n\r\n" not in head and len(head) < _HEAD and (part := line.recv(_HEAD)):
            head += part
        now = time.time()
        dates = [row[5:] for row in head.decode("latin-1").split("\r\n") if row.lower().startswith("date:")]
        # A Date is cut to whole seconds, and the server may look at its clock once a second: half of both is added.
        return now - parsedate_to_datetime(dates[0].strip()).timestamp() - 1.0 if dates else None
    except (OSError, ValueError, OverflowError):
        return None
