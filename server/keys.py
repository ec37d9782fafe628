"""A consortium's keys: its certificate authority, the server's certificate, and one key per device.

    keys/ca.crt, ca.key          the authority (ten years); ca.key signs server certificates and does nothing else
    keys/server.crt, server.key  what the server shows to devices, for the hosts they reach it by
    keys/devices/NAME.pub        a device's public key; the private one exists in its join bundle only
    keys/devices.json            when each device was added or revoked, and its key's fingerprint

Devices trust a server by its certificate (TLS), and the server knows a device by its key (Flower's node
authentication). Every file is written whole and then renamed, and changes take turns by a lock.
"""

from __future__ import annotations

import base64
import binascii
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from fedloom.protocols.bundle import (
    JoinBundle,
    check_host,
    check_name,
    readable_by_others,
    split_address,
    write_bundle,
    write_secret,
)
from fedloom.protocols.sections import Section, build_section, nearest
from fedloom.server.certificates import (
    CA_DAYS,
    SERVER_DAYS,
    CertificateFacts,
    SigningKey,
    certificate_pem,
    facts_of,
    hosts_of,
    key_pem,
    load_certificate,
    load_key,
    make_authority,
    make_server,
    new_key,
    signed_by,
)
from fedloom.server.disk import write_whole

WARN_DAYS = 30
_ALWAYS = ("localhost", "127.0.0.1")
_ANY_HOST = ("0.0.0.0", "::")  # where a server listens, never where a device finds it
_FILES = ("ca.crt", "ca.key", "server.crt", "server.key", "devices.json")


@dataclass(frozen=True, kw_only=True)
class ServerFiles:
    """What SuperLink is started with, as absolute paths."""

    ca: Path
    certificate: Path
    key: Path


@dataclass(frozen=True, kw_only=True)
class DeviceKey:
    """One public key of a device. A device that was revoked and added again has a line for each of its keys."""

    name: str
    public_key: Path
    revoked: bool
    fingerprint: str
    created: str = ""
    revoked_at: str = ""


class _Former(Section):
    created: str
    revoked: str
    fingerprint: str


class _Record(Section):
    """A device's line in devices.json: its key of today, and those it had before (oldest first)."""

    created: str
    revoked: str | None = None
    fingerprint: str
    former: tuple[_Former, ...] = ()


class Consortium:
    """The keys in one folder. Every method raises a ValueError of one line for what must be put right by hand."""

    def __init__(self, folder: Path, *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self.folder = folder
        self._clock = clock

    def init(self, hosts: Sequence[str] = (), *, days: int = SERVER_DAYS, force: bool = False) -> CertificateFacts:
        """Make the authority and a server certificate for `hosts`, localhost and 127.0.0.1, valid for `days`.

        With `force` it starts an existing consortium over: all devices are revoked, since they trust the old authority.
        """
        names = _with_loopback(hosts)
        _check_days(days)
        with self._changing(create=True):
            there = [name for name in _FILES if (self.folder / name).exists()]
            records = self._records()
            if there and not force:
                active = sum(record.revoked is None for record in records.values())
                raise ValueError(
                    f"{self.folder} holds keys already ({', '.join(there)}); --force starts over with a new CA and "
                    f"revokes {active} active device{'s' * (active != 1)}: each must be added again and join anew"
                )
            self._write_records({name: self._revoked(record) for name, record in records.items()})
            key = new_key()
            authority = make_authority(key, self._clock())
            write_secret(self.folder / "ca.key", key_pem(key))
            write_whole(self.folder / "ca.crt", certificate_pem(authority))
            return self._sign(authority, key, names, days)

    def renew(self, hosts: Sequence[str] = (), *, days: int = SERVER_DAYS) -> CertificateFacts:
        """A new server key and certificate from the same authority; `hosts` replace the old ones, none keeps them."""
        named = _with_loopback(hosts)
        _check_days(days)
        with self._changing():
            authority, path = load_certificate(self.folder / "ca.crt"), self.folder / "ca.key"
            if not path.exists():
                raise ValueError(f"{path} is not there: put it back for as long as it takes to sign a certificate")
            key = load_key(path)
            if key.public_key() != authority.public_key():
                raise ValueError(f"{path} must belong to {self.folder / 'ca.crt'}: put the pair back, or init --force")
            self._in_force("CA", authority, "init --force")
            return self._sign(authority, key, named if hosts else self._present_hosts(), days)

    def add_device(self, name: str, server: str, *, out: Path | None = None, force: bool = False) -> JoinBundle:
        """Make a device's key, let it in, and write its join bundle to `out` (with `force` over a file that is there).

        The private key is in the bundle that comes back and nowhere else.
        """
        check_name(name)
        if split_address(server)[0] in _ANY_HOST:
            raise ValueError(f"a device must be told a host that it can reach, got {server!r}")
        self.check(server)
        with self._changing():
            records = self._records()
            old = records.get(name)
            if old is not None and old.revoked is None:
                raise ValueError(f"device {name!r} has a key already; revoke it first, then add the device again")
            key = ec.generate_private_key(ec.SECP384R1())
            line = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + f" {name}\n".encode()
            bundle = JoinBundle(
                name=name,
                server=server,
                ca=(self.folder / "ca.crt").read_text("ascii"),
                key=key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()).decode("ascii"),
            )
            # The bundle first: cut short after it, the key in it is one that no server takes.
            if out is not None:
                write_bundle(out, bundle, replace=force)
            former = () if old is None else (*old.former, self._set_aside(name, old))
            write_whole(self._public_key(name), line)
            records[name] = _Record(created=self._stamp(), fingerprint=_fingerprint(line), former=former)
            self._write_records(records)
        return bundle

    def revoke(self, name: str) -> DeviceKey:
        """Shut a device out. Doing it twice changes nothing: the first date stays."""
        with self._changing():
            records = self._records()
            if name not in records:
                hint = nearest(name, records) if records else "no device was added yet"
                raise ValueError(f"unknown device {name[:80]!r}: {hint}")
            records[name] = self._revoked(records[name])
            self._write_records(records)
        return next(key for key in reversed(self.devices()) if key.name == name)

    def devices(self) -> list[DeviceKey]:
        """Every key that was ever let in, by name; a device's former keys, all revoked, stand before its last one."""
        keys = []
        for name, record in sorted(self._records().items()):
            for number, old in enumerate(record.former, start=1):
                keys.append(self._key(self._public_key(name, number), name, old))
            last, kept = self._public_key(name), self._public_key(name, len(record.former) + 1)
            if record.revoked and kept.exists():
                last = kept  # an addition that was cut short may have overtaken NAME.pub
            keys.append(self._key(last, name, record))
        return keys

    def server_files(self) -> ServerFiles:
        """The files a SuperLink needs; whether they are any good, `check` says."""
        paths = [(self.folder / name).absolute() for name in ("ca.crt", "server.crt", "server.key")]
        for path in paths:
            if not path.is_file():
                raise ValueError(f"{path} is not there: `fedloom keys init` makes a consortium's keys")
        return ServerFiles(ca=paths[0], certificate=paths[1], key=paths[2])

    def facts(self) -> tuple[CertificateFacts, CertificateFacts]:
        """Of the authority's certificate and of the server's."""
        files, now = self.server_files(), self._clock()
        return facts_of(load_certificate(files.ca), now), facts_of(load_certificate(files.certificate), now)

    def check(self, server: str = "") -> list[str]:
        """Warnings, one line each, about keys that work but need care; `server` is the host:port that devices dial.

        Raises:
            ValueError: for keys that cannot work: expired, of another authority, not a pair, or not for that host.
        """
        files = self.server_files()
        authority, certificate = load_certificate(files.ca), load_certificate(files.certificate)
        warnings = self._in_force("CA", authority, "init --force") + self._in_force("server", certificate, "renew")
        if not signed_by(certificate, authority):
            raise ValueError(f"{files.certificate} must be signed by {files.ca}: run `fedloom keys renew`")
        if load_key(files.key).public_key() != certificate.public_key():
            raise ValueError(f"{files.key} must belong to {files.certificate}: run `fedloom keys renew`")
        if server:
            host, hosts = split_address(server)[0], hosts_of(certificate)
            if host not in (*hosts, *_ANY_HOST):
                raise ValueError(
                    f"the server certificate must cover the host {host}, got {', '.join(hosts)}: run `fedloom keys "
                    "renew` with a --host for each"
                )
        secret = [path for path in (files.key, self.folder / "ca.key") if path.exists() and readable_by_others(path)]
        return warnings + [f"{path} can be read by others: chmod 600 {path}" for path in secret]

    def _in_force(self, what: str, certificate: x509.Certificate, cure: str) -> list[str]:
        """A warning if the certificate ends soon; a ValueError if it is not valid now."""
        facts, since = facts_of(certificate, self._clock()), certificate.not_valid_before_utc
        if self._clock() >= facts.expires:
            raise ValueError(f"the {what} certificate expired on {facts.expires:%Y-%m-%d}: run `fedloom keys {cure}`")
        if self._clock() < since:
            raise ValueError(f"the {what} certificate is valid from {since:%Y-%m-%d} on: is the clock right?")
        soon = f"the {what} certificate expires on {facts.expires:%Y-%m-%d}: run `fedloom keys {cure}` before"
        return [soon] if facts.days_left < WARN_DAYS else []

    def _present_hosts(self) -> tuple[str, ...]:
        path = self.folder / "server.crt"
        return _with_loopback(hosts_of(load_certificate(path)) if path.exists() else ())

    def _sign(self, authority: x509.Certificate, key: SigningKey, hosts: Sequence[str], days: int) -> CertificateFacts:
        """Make and write the server's key and certificate. Cut short between the two, `check` asks for a renewal."""
        own, now = new_key(), self._clock()
        certificate = make_server(own, authority, key, hosts=hosts, now=now, days=days)
        write_secret(self.folder / "server.key", key_pem(own))
        write_whole(self.folder / "server.crt", certificate_pem(certificate))
        return facts_of(certificate, now)

    @contextmanager
    def _changing(self, *, create: bool = False) -> Iterator[None]:
        """One change at a time; a failing disk becomes one line."""
        try:
            if create:
                self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            elif not self.folder.is_dir():
                raise ValueError(f"{self.folder} is not there: `fedloom keys init` makes a consortium's keys")
            with _for_the_owner(), (self.folder / ".lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                (self.folder / "devices").mkdir(exist_ok=True)
                yield
        except OSError as error:
            raise ValueError(f"{error.filename or self.folder} cannot be used: {error.strerror}") from None

    def _records(self) -> dict[str, _Record]:
        path = self.folder / "devices.json"
        try:
            table = json.loads(path.read_bytes())
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError):
            table = None
        if not isinstance(table, dict) or not all(isinstance(record, dict) for record in table.values()):
            raise ValueError(f"{path} must be a JSON object of devices; put back a copy that is")
        return {check_name(name): build_section(_Record, record, f"{path} [{name}]") for name, record in table.items()}

    def _write_records(self, records: dict[str, _Record]) -> None:
        table: dict[str, Any] = {name: record.model_dump() for name, record in sorted(records.items())}
        write_whole(self.folder / "devices.json", (json.dumps(table, indent=1) + "\n").encode())

    def _revoked(self, record: _Record) -> _Record:
        return record if record.revoked else record.model_copy(update={"revoked": self._stamp()})

    def _set_aside(self, name: str, old: _Record) -> _Former:
        """Keep a revoked public key under the number it gets: the server must know which key to take off."""
        kept = self._public_key(name, len(old.former) + 1)
        if not kept.exists():  # after a change cut short it is there, and NAME.pub is no longer the old key
            write_whole(kept, self._public_key(name).read_bytes())
        return _Former(created=old.created, revoked=old.revoked or self._stamp(), fingerprint=old.fingerprint)

    def _public_key(self, name: str, former: int = 0) -> Path:
        return (self.folder / "devices" / (f"{name}.{former}.pub" if former else f"{name}.pub")).absolute()

    def _key(self, path: Path, name: str, record: _Record | _Former) -> DeviceKey:
        try:
            found = _fingerprint(path.read_bytes())
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from None
        if found != record.fingerprint:
            noted = " ".join(record.fingerprint.split())[:80]
            raise ValueError(f"{path} must be the key that was added, {noted}, got {found}")
        return DeviceKey(
            name=name,
            public_key=path,
            revoked=record.revoked is not None,
            fingerprint=found,
            created=record.created,
            revoked_at=record.revoked or "",
        )

    def _stamp(self) -> str:
        return self._clock().isoformat(timespec="seconds")


@contextmanager
def _for_the_owner() -> Iterator[None]:
    """Have what is made meanwhile be for its owner alone, whatever the umask was."""
    mask = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(mask)


def _with_loopback(hosts: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*map(check_host, hosts), *_ALWAYS)))


def _check_days(days: int) -> None:
    if not 1 <= days <= CA_DAYS:
        raise ValueError(f"a server certificate must be valid for 1 to {CA_DAYS} days, got {days}")


def _fingerprint(line: bytes) -> str:
    """Of a public key in OpenSSH's format, as `ssh-keygen -l` prints it."""
    try:
        blob = base64.b64decode(line.split()[1], validate=True)
    except (IndexError, binascii.Error):
        return "no key at all"
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")
