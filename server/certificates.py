"""X.509 certificates for TLS: an authority, servers' certificates signed by it, and what is to be known of either.

ECDSA on P-256 with SHA-256, and the extensions of RFC 5280 that strict verifiers ask for (basic constraints, key
usage, key identifiers; server authentication and subject alternative names on a server's).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CA_DAYS = 3650
SERVER_DAYS = 825  # the longest that every common TLS library takes from a private authority
_SKEW = timedelta(days=1)  # valid from yesterday, for devices whose clock is behind

SigningKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey  # ours are ECDSA; one made elsewhere may be RSA


@dataclass(frozen=True, kw_only=True)
class CertificateFacts:
    """What people ask of a certificate: until when (UTC), for which hosts, and its SHA-256 in hex."""

    expires: datetime
    days_left: int
    hosts: tuple[str, ...]
    fingerprint: str


def facts_of(certificate: x509.Certificate, now: datetime) -> CertificateFacts:
    """The facts, as of `now`."""
    return CertificateFacts(
        expires=certificate.not_valid_after_utc,
        days_left=(certificate.not_valid_after_utc - now).days,
        hosts=hosts_of(certificate),
        fingerprint=certificate.fingerprint(hashes.SHA256()).hex(":"),
    )


def hosts_of(certificate: x509.Certificate) -> tuple[str, ...]:
    """The host names and IP addresses that a certificate is for; an authority's has none."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    return tuple(str(name.value).lower() for name in names if isinstance(name, x509.DNSName | x509.IPAddress))


def make_authority(key: SigningKey, now: datetime) -> x509.Certificate:
    """A self-signed certificate, valid for ten years, that may sign servers' but no other authority."""
    # A name of its own for each, so that two consortia on one device are not mistaken for each other.
    name = _name(f"Fedloom consortium {x509.random_serial_number() & 0xFFFFFFFF:08x}")
    draft = _draft(name, name, key, now, now + timedelta(days=CA_DAYS), signs=True)
    return draft.sign(key, hashes.SHA256())


def make_server(
    own: SigningKey, authority: x509.Certificate, key: SigningKey, *, hosts: Sequence[str], now: datetime, days: int
) -> x509.Certificate:
    """A server's certificate for the holder of `own`, signed by the authority's `key`; it ends with the authority."""
    ends = min(now + timedelta(days=days), authority.not_valid_after_utc)
    issuer_id = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    draft = (
        _draft(_name("Fedloom server"), authority.subject, own, now, ends, signs=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_general_name(host) for host in hosts]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_id), critical=False)
    )
    return draft.sign(key, hashes.SHA256())


def signed_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Whether this authority, and no other of the same name, signed the certificate."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def load_certificate(path: Path) -> x509.Certificate:
    """The certificate in a PEM file.

    Raises:
        ValueError: one line for a file that is missing or no certificate.
    """
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise ValueError(f"{path} must be a certificate in PEM") from None


def load_key(path: Path) -> SigningKey:
    """The private key in a PEM file.

    Raises:
        ValueError: one line for a file that is missing or no private key.
    """
    try:
        key = load_pem_private_key(path.read_bytes(), None)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, SigningKey):
        raise ValueError(f"{path} must be a private key in PEM, without a passphrase")
    return key


def new_key() -> ec.EllipticCurvePrivateKey:
    """A key for a certificate."""
    return ec.generate_private_key(ec.SECP256R1())


def certificate_pem(certificate: x509.Certificate) -> bytes:
    """As files hold it."""
    return certificate.public_bytes(Encoding.PEM)


def key_pem(key: SigningKey) -> bytes:
    """As files hold it: PKCS #8, without a passphrase."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _draft(
    subject: x509.Name, issuer: x509.Name, key: SigningKey, now: datetime, ends: datetime, *, signs: bool
) -> x509.CertificateBuilder:
    """What both kinds of certificate have in common."""
    usage = x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    return (
        x509.CertificateBuilder(subject_name=subject, issuer_name=issuer, public_key=key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(ends)
        .add_extension(x509.BasicConstraints(ca=signs, path_length=0 if signs else None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)
