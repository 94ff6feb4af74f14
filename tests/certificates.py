"""Certificates for tests, made when needed."""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

DAY = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Certificates:
    """PEM files: an authority, a server's certificate by it for 127.0.0.1 (not for localhost), and a foreign authority."""

    authority: Path
    server: Path
    server_key: Path
    foreign: Path


def make_certificates(folder: Path, *, rfc5280: bool = True) -> Certificates:
    """Make them with every extension that RFC 5280 asks for, or without, as MySQL makes its own."""
    authority_key, authority = _sign("the tests' authority", rfc5280)
    server_key, server = _sign("127.0.0.1", rfc5280, by=(authority_key, authority))
    _, foreign = _sign("a foreign authority", rfc5280)
    made = Certificates(*(folder / name for name in ("authority.pem", "server.pem", "server.key", "foreign.pem")))
    for path, certificate in ((made.authority, authority), (made.server, server), (made.foreign, foreign)):
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    made.server_key.write_bytes(
        server_key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return made


def _sign(
    name: str, rfc5280: bool, by: tuple[ec.EllipticCurvePrivateKey, x509.Certificate] | None = None
) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    building = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(by[1].subject if by else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - DAY)
        .not_valid_after(now + DAY)
        .add_extension(x509.BasicConstraints(ca=by is None, path_length=None), critical=True)
    )
    if rfc5280:
        issuer = (by[0] if by else key).public_key()
        building = building.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        building = building.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer), critical=False)
        building = building.add_extension(_usage(signs_certificates=by is None), critical=True)
    if by:
        address = x509.IPAddress(ipaddress.ip_address(name))
        building = building.add_extension(x509.SubjectAlternativeName([address]), critical=False)
    return key, building.sign(by[0] if by else key, hashes.SHA256())


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
