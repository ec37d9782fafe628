"""The join bundle: one file that lets one device into a consortium, and the rules for the names in it.

The server's operator makes it (`fedloom keys add-device`), the device reads it (`fedloom client --join`). It holds the
only copy of the device's private key, so nothing here prints, logs or quotes what a bundle contains.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import os
import re
import secrets
import ssl
from contextlib import suppress
from pathlib import Path

from pydantic import Field

from fedloom.protocols.sections import Section, build_section, read_toml

MAX_BUNDLE_BYTES = 64 * 1024

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOST = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_CERTIFICATES = re.compile(r"(?:-----BEGIN CERTIFICATE-----\n[A-Za-z0-9+/=\n]+-----END CERTIFICATE-----\n*)+")
_PRIVATE_KEY = re.compile(
    r"-----BEGIN OPENSSH PRIVATE KEY-----\n([A-Za-z0-9+/=\n]+)-----END OPENSSH PRIVATE KEY-----\n*"
)
# The head of an OpenSSH key that no passphrase protects: magic, cipher "none", key derivation "none", no options.
_UNLOCKED = b"openssh-key-v1\0" + b"\0\0\0\x04none" * 2 + b"\0\0\0\0"


class JoinBundle(Section):
    """What a device needs to find its server, to trust it and to be known by it."""

    name: str
    """The device's name: lower-case letters, digits, `-` and `_`, at most 63."""
    server: str
    """Where the server listens, `host:port`."""
    ca: str = Field(repr=False)
    """The consortium's CA certificate, PEM: the device trusts a server that this CA has signed, and no other."""
    key: str = Field(repr=False)
    """The device's own private key, ECDSA in OpenSSH's format, without a passphrase."""


def check_name(name: str) -> str:
    """The name itself, if a device may have it: it becomes file names on both sides.

    Raises:
        ValueError: for anything but lower-case letters, digits, `-` and `_`.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            "a device's name must be 1 to 63 of a-z, 0-9, '-' and '_', and begin with a letter or digit, "
            f"got {name[:80]!r}"
        )
    return name


def check_host(host: str) -> str:
    """The host as certificates and addresses write it: a name in lower case, or an IP address in its short form.

    Raises:
        ValueError: unless it is a plain host name or an IP address (no port, no scheme, no wildcard).
    """
    with suppress(ValueError):
        return str(ipaddress.ip_address(host))
    # A name that ends in digits is a mistyped IPv4 address, such as 10.0.0.256, to every resolver.
    if len(host) > 253 or not _HOST.fullmatch(host) or host.rpartition(".")[2].isdigit():
        raise ValueError(f"a host must be a plain name or an IP address, without a port, got {host[:80]!r}")
    return host.lower()


def split_address(address: str) -> tuple[str, int]:
    """`host:port` (`[::1]:9092` for IPv6) in its two parts.

    Raises:
        ValueError: unless it is a host and a port from 1 to 65535.
    """
    host, _, port = address.rpartition(":")
    try:
        if not (port.isascii() and port.isdigit() and 0 < int(port[:6]) < 65536):
            raise ValueError
        bracketed = host.startswith("[") and host.endswith("]")
        host = check_host(host[1:-1] if bracketed else host)
        if bracketed != (":" in host):
            raise ValueError
    except ValueError:
        raise ValueError(f"a server's address must be host:port, got {address[:80]!r}") from None
    return host, int(port)


def read_bundle(path: Path) -> JoinBundle:
    """Read a join bundle and check each part of it.

    Raises:
        ValueError: one line that says what is wrong, and never what the file holds.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ValueError(f"join bundle {path} cannot be read: {error.strerror}") from None
    if size > MAX_BUNDLE_BYTES:
        raise ValueError(f"join bundle {path} must be at most {MAX_BUNDLE_BYTES} bytes, got {size}")
    table = read_toml(path, "join bundle")
    # Before the schema sees it, whose errors quote their input.
    for field in JoinBundle.model_fields:
        if field not in table:
            raise ValueError(f"join bundle {path} must have {field!r}: is it the file that `keys add-device` wrote?")
        if not isinstance(table[field], str):
            raise ValueError(f"join bundle {path}: {field!r} must be a string")
    bundle = build_section(JoinBundle, table, "join bundle")
    try:
        _check(bundle)
    except ValueError as error:
        raise ValueError(f"join bundle {path}: {error}") from None
    return bundle


def write_bundle(path: Path, bundle: JoinBundle, *, replace: bool = False) -> None:
    """Write a join bundle that only its owner may read (mode 0600), whole or not at all.

    Raises:
        ValueError: for a bundle that `read_bundle` would refuse, a file that is there already, or a failing disk.
    """
    _check(bundle)
    text = (
        f"# {bundle.name}'s way into the consortium. It holds a private key: move it to the device by a safe way,\n"
        "# keep no copy, and show it to nobody. On the device: fedloom client --join THIS_FILE\n"
        f'name = "{bundle.name}"\n'
        f'server = "{bundle.server}"\n'
        f'ca = """\n{bundle.ca.strip()}\n"""\n'
        f'key = """\n{bundle.key.strip()}\n"""\n'
    )
    try:
        write_secret(path, text.encode(), replace=replace)
    except FileExistsError:
        raise ValueError(f"{path} exists already; name another file, or replace it with --force") from None
    except OSError as error:
        raise ValueError(f"join bundle {path} cannot be written: {error.strerror}") from None


def write_secret(path: Path, data: bytes, *, replace: bool = True) -> None:
    """Write a file of mode 0600 that is whole or not there at all; it is never readable by others, not for a moment.

    Raises:
        FileExistsError: if the file is there and `replace` is off.
        OSError: if the disk fails.
    """
    new = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.draft")
    if not replace:
        os.close(os.open(path, new, 0o600))  # takes the name, for only a rename is whole on every file system
    try:
        with os.fdopen(os.open(draft, new, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        if not replace:
            path.unlink(missing_ok=True)
        raise


def readable_by_others(path: Path) -> bool:
    """Whether anyone but the owner has a right to the file."""
    return bool(path.stat().st_mode & 0o077)


def _check(bundle: JoinBundle) -> None:
    """Raise a ValueError, without a secret in it, unless every part is well-formed."""
    check_name(bundle.name)
    split_address(bundle.server)
    if not _CERTIFICATES.fullmatch(bundle.ca):
        raise ValueError("'ca' must be a certificate in PEM")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=bundle.ca)
    except (ssl.SSLError, ValueError):
        raise ValueError("'ca' must be a certificate in PEM, and does not decode as one") from None
    found = _PRIVATE_KEY.fullmatch(bundle.key)
    try:
        inner = base64.b64decode(found.group(1).replace("\n", ""), validate=True) if found else b""
    except binascii.Error:
        inner = b""
    if not inner.startswith(_UNLOCKED) or b"ecdsa-sha2-nistp" not in inner[:128]:
        raise ValueError("'key' must be an ECDSA private key in OpenSSH's format, without a passphrase")
