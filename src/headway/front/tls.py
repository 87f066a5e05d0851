"""Reads a certificate and its key, and says in one line what is wrong with them."""

import os
import ssl

from headway.core.errors import ConfigError
from headway.front.config import TlsSpec

__all__ = ["tls_context"]


def tls_context(tls: TlsSpec) -> ssl.SSLContext:
    """Build a server's context. Raises ConfigError for files that cannot be read or do not fit."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    for key, file in (("certificate", tls.certificate), ("key", tls.key)):
        if not os.access(file, os.R_OK):
            raise ConfigError(f"tls.{key}: cannot read {file}")
    try:
        context.load_cert_chain(tls.certificate, tls.key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"tls: cannot use {tls.certificate} and {tls.key}: {error}") from None
    return context
