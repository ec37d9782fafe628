"""Certificates, tried for what they are for: real TLS handshakes over loopback, and OpenSSL's own verifier."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from fedloom.server.certificates import load_certificate
from fedloom.server.keys import Consortium, ServerFiles

SERVER = "fl.example.org:9092"


@pytest.fixture
def consortium(tmp_path: Path) -> Consortium:
    made = Consortium(tmp_path / "keys")
    made.init(["fl.example.org", "10.0.0.5"])
    return made


def at(*date: int) -> Callable[[], datetime]:
    return lambda: datetime(*date, tzinfo=UTC)  # type: ignore[arg-type]


def handshake(files: ServerFiles, ca: Path, host: str) -> str:
    """Connect over loopback to a server with `files`, as a device that trusts `ca` and dials `host`."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(10)

    def serve() -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(files.certificate, files.key)
        connection, _ = listener.accept()
        try:
            with context.wrap_socket(connection, server_side=True) as secured:
                secured.sendall(secured.recv(100))
        except OSError:
            connection.close()  # the device hung up, as it should on a server it does not trust

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        context = ssl.create_default_context(cafile=str(ca))
        context.verify_flags |= ssl.VERIFY_X509_STRICT  # as from Python 3.13 on by default
        with (
            socket.create_connection(listener.getsockname(), timeout=10) as connection,
            context.wrap_socket(connection, server_hostname=host) as secured,
        ):
            secured.sendall(b"hello")
            return secured.recv(100).decode()
    finally:
        thread.join()
        listener.close()


@pytest.mark.parametrize("host", ["fl.example.org", "FL.example.org", "10.0.0.5", "localhost", "127.0.0.1"])
def test_a_device_with_the_right_ca_connects(consortium: Consortium, host: str) -> None:
    files = consortium.server_files()
    assert handshake(files, files.ca, host) == "hello"


@pytest.mark.parametrize("host", ["other.example.org", "sub.fl.example.org", "10.0.0.6", "example.org"])
def test_a_server_under_another_name_is_refused(consortium: Consortium, host: str) -> None:
    files = consortium.server_files()
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        handshake(files, files.ca, host)


def test_a_server_of_another_ca_is_refused(consortium: Consortium, tmp_path: Path) -> None:
    other = Consortium(tmp_path / "other")
    other.init(["fl.example.org"])
    with pytest.raises(ssl.SSLCertVerificationError, match="unable to get local issuer"):
        handshake(other.server_files(), consortium.server_files().ca, "fl.example.org")


def test_an_expired_certificate_is_refused(tmp_path: Path) -> None:
    long_ago = datetime.now(UTC) - timedelta(days=100)
    consortium = Consortium(tmp_path / "keys", clock=lambda: long_ago)
    consortium.init(["fl.example.org"], days=90)
    files = consortium.server_files()
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        handshake(files, files.ca, "fl.example.org")
    with pytest.raises(ValueError, match=r"the server certificate expired on 20..-..-..: run `fedloom keys renew`"):
        Consortium(tmp_path / "keys").check()


def test_a_server_certificate_cannot_be_an_authority(consortium: Consortium, tmp_path: Path) -> None:
    """Whoever steals the server's key cannot make certificates that devices trust."""
    files = consortium.server_files()
    forged = Consortium(tmp_path / "forged")
    forged.init()
    shutil.copy(files.certificate, tmp_path / "forged" / "ca.crt")
    shutil.copy(files.key, tmp_path / "forged" / "ca.key")
    forged.renew(["fl.example.org"])
    chained = tmp_path / "forged" / "server.crt"
    chained.write_bytes(chained.read_bytes() + files.certificate.read_bytes())
    with pytest.raises(ssl.SSLCertVerificationError, match="invalid CA certificate"):
        handshake(forged.server_files(), files.ca, "fl.example.org")


def test_the_certificates_say_what_they_may_do(consortium: Consortium) -> None:
    files = consortium.server_files()
    ca, server = load_certificate(files.ca), load_certificate(files.certificate)
    extensions = [{type(e.value): (e.value, e.critical) for e in found.extensions} for found in (ca, server)]
    assert extensions[0][x509.BasicConstraints] == (x509.BasicConstraints(ca=True, path_length=0), True)
    assert extensions[1][x509.BasicConstraints] == (x509.BasicConstraints(ca=False, path_length=None), True)
    may = [found[x509.KeyUsage] for found in extensions]
    assert [(usage.key_cert_sign, usage.digital_signature, critical) for usage, critical in may] == [
        (True, False, True),
        (False, True, True),
    ]
    assert x509.ExtendedKeyUsage not in extensions[0]
    assert list(extensions[1][x509.ExtendedKeyUsage][0]) == [ExtendedKeyUsageOID.SERVER_AUTH]
    own = extensions[0][x509.SubjectKeyIdentifier][0].digest
    assert extensions[1][x509.AuthorityKeyIdentifier][0].key_identifier == own
    assert all(isinstance(found.public_key().curve, ec.SECP256R1) for found in (ca, server))
    facts = consortium.facts()[1]
    assert facts.hosts == ("fl.example.org", "10.0.0.5", "localhost", "127.0.0.1")
    assert facts.days_left == 824
    assert datetime.now(UTC) - server.not_valid_before_utc > timedelta(hours=23)  # for clocks that are behind


def test_openssl_takes_the_chain(consortium: Consortium) -> None:
    files = consortium.server_files()
    openssl = shutil.which("openssl")
    if not openssl:
        pytest.skip("no openssl here")
    names = ["-verify_hostname", "fl.example.org", "-purpose", "sslserver", "-x509_strict"]
    told = subprocess.run(
        [openssl, "verify", "-CAfile", files.ca, *names, files.certificate], capture_output=True, text=True, check=False
    )
    assert (told.returncode, told.stderr) == (0, "")


def test_renewal_keeps_the_authority_and_the_hosts_unless_told_others(consortium: Consortium, tmp_path: Path) -> None:
    files = consortium.server_files()
    trusted = shutil.copy(files.ca, tmp_path / "device-ca.crt")
    before = files.certificate.read_bytes(), files.key.read_bytes()
    assert consortium.renew(days=10).hosts == ("fl.example.org", "10.0.0.5", "localhost", "127.0.0.1")
    assert before[0] != files.certificate.read_bytes()
    assert before[1] != files.key.read_bytes()
    assert handshake(files, trusted, "10.0.0.5") == "hello"
    assert consortium.renew(["fl2.example.org", "2001:db8:0::1"]).hosts[:2] == ("fl2.example.org", "2001:db8::1")
    assert handshake(files, trusted, "fl2.example.org") == "hello"
    assert handshake(files, trusted, "2001:db8::1") == "hello"
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        handshake(files, trusted, "10.0.0.5")


def test_a_certificate_near_its_end_is_a_warning_and_ends_with_its_authority(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    Consortium(folder, clock=at(2026, 1, 1)).init(days=60)
    assert Consortium(folder, clock=at(2026, 1, 31)).check() == []
    (warning,) = Consortium(folder, clock=at(2026, 2, 5)).check()
    assert warning == "the server certificate expires on 2026-03-02: run `fedloom keys renew` before"
    late = Consortium(folder, clock=at(2035, 12, 20))
    ca = late.facts()[0]
    assert late.renew(days=825).expires == ca.expires == datetime(2035, 12, 30, tzinfo=UTC)
    assert [line.split(" expires")[0] for line in late.check()] == ["the CA certificate", "the server certificate"]
    over = Consortium(folder, clock=at(2036, 1, 1))
    for act in (over.check, over.renew):
        with pytest.raises(
            ValueError, match=r"the CA certificate expired on 2035-12-30: run `fedloom keys init --force`"
        ):
            act()
    with pytest.raises(ValueError, match=r"valid from 2025-12-31 on: is the clock right\?"):
        Consortium(folder, clock=at(1970, 1, 1)).check()


def test_files_that_do_not_belong_together_are_named(consortium: Consortium, tmp_path: Path) -> None:
    other = Consortium(tmp_path / "other")
    other.init(["fl.example.org"])
    mine, theirs = consortium.folder, other.folder
    kept = {name: (mine / name).read_bytes() for name in ("ca.crt", "ca.key", "server.crt", "server.key")}
    for name, message in {
        "ca.crt": r"server\.crt must be signed by .*ca\.crt: run `fedloom keys renew`",
        "server.crt": r"server\.crt must be signed by .*ca\.crt: run `fedloom keys renew`",
        "server.key": r"server\.key must belong to .*server\.crt: run `fedloom keys renew`",
    }.items():
        shutil.copy(theirs / name, mine / name)
        with pytest.raises(ValueError, match=message):
            consortium.check()
        (mine / name).write_bytes(kept[name])
    shutil.copy(theirs / "ca.key", mine / "ca.key")
    with pytest.raises(ValueError, match=r"ca\.key must belong to .*ca\.crt"):
        consortium.renew()
    (mine / "ca.key").write_bytes(kept["ca.key"])
    assert consortium.check(SERVER) == []
