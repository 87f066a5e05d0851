"""Makes the TLS credentials of the port Envoy connects to.

Self-signed, as the reference picker has it: gateways connect over TLS and do not check the certificate, for
they find the picker by its Service. It is made anew with every start, and its key never leaves the picker's
processes.
"""

import datetime
from pathlib import Path

import grpc

from headway.core.errors import ConfigError
from headway.front.config import TlsSpec
from headway.front.tls import tls_context
from headway.hosts.envoy.config import SecureSpec

__all__ = ["Pem", "credentials", "pem_of", "self_signed"]

#: Longer than a process lives.
LASTS = datetime.timedelta(days=3650)


#: A certificate and its key, in PEM.
Pem = tuple[bytes, bytes]


def pem_of(spec: SecureSpec) -> Pem | None:
    """Return what to serve with; None for plain text. Raises ConfigError for files that cannot be used."""
    if spec.mode == "off":
        return None
    if spec.mode == "self-signed":
        return self_signed()
    assert spec.certificate is not None and spec.key is not None  # the configuration sees to it
    tls_context(TlsSpec(certificate=spec.certificate, key=spec.key))  # gRPC would say nothing of use
    return _read(spec.certificate), _read(spec.key)


def credentials(pem: Pem | None) -> grpc.ServerCredentials | None:
    """Build gRPC's credentials; None for plain text."""
    return None if pem is None else grpc.ssl_server_credentials([pem[::-1]])


def self_signed() -> Pem:
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
