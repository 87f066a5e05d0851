"""Makes the TLS credentials of the port Envoy connects to.

Self-signed, as the reference picker has it: gateways connect over TLS and do not check the certificate, for
they find the picker by its Service. It is made anew with every start, and its key never leaves the picker's
processes.
"""

import datetime
import ssl
from pathlib import Path
from typing import NamedTuple

import grpc

from headway.core.errors import ConfigError
from headway.front.config import TlsSpec
from headway.front.tls import tls_context
from headway.hosts.envoy.config import SecureSpec

__all__ = ["Pem", "credentials", "pem_of", "self_signed"]

#: Longer than a process lives.
LASTS = datetime.timedelta(days=3650)


class Pem(NamedTuple):
    """The certificate and key of the port, in PEM. `client_ca`: who signs certificates of clients, if any."""

    certificate: bytes
    key: bytes
    client_ca: bytes = b""


def pem_of(spec: SecureSpec) -> Pem | None:
    """Return what to serve with; None for plain text. Raises ConfigError for files that cannot be used."""
    if spec.mode == "off":
        return None
    client_ca = b"" if spec.client_ca is None else _authorities(spec.client_ca)
    if spec.mode == "self-signed":
        return Pem(*self_signed(), client_ca)
    assert spec.certificate is not None and spec.key is not None  # the configuration sees to it
    tls_context(TlsSpec(certificate=spec.certificate, key=spec.key))  # gRPC would say nothing of use
    return Pem(_read(spec.certificate), _read(spec.key), client_ca)


def credentials(pem: Pem | None) -> grpc.ServerCredentials | None:
    """Build gRPC's credentials; None for plain text."""
    if pem is None:
        return None
    return grpc.ssl_server_credentials(
        [(pem.key, pem.certificate)],
        root_certificates=pem.client_ca or None,
        require_client_auth=bool(pem.client_ca),
    )


def _authorities(file: Path) -> bytes:
    """Read the certificates that sign clients'. Raises ConfigError when the file has none."""
    data = _read(file)
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cadata=data.decode("ascii"))
    except (UnicodeDecodeError, ssl.SSLError):
        raise ConfigError(f"tls.client_ca: no certificates in {file}") from None
    return data


def self_signed() -> tuple[bytes, bytes]:
    """Make a certificate. Raises ConfigError where `cryptography` is missing."""
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError:
        raise ConfigError("tls.mode 'self-signed' needs the package 'cryptography'") from None
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "headway-epp")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + LASTS)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("headway-epp")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    plain = serialization.NoEncryption()
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)
    return certificate.public_bytes(pem), secret


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"tls: cannot read {file}: {error.strerror}") from None
