"""TLS 1.3 and nothing else."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

from forge_harness.errors import UsageError


def server_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """Returns a context that speaks TLS 1.3 only.

    Args:
        certificate: PEM, leaf first.
        key: PEM.

    Raises:
        UsageError: A file cannot be read, the two do not belong together, or the certificate is
            not valid now.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.maximum_version = ssl.TLSVersion.TLSv1_3
    try:
        # Without a password one that is encrypted would wait for it at the terminal.
        context.load_cert_chain(certificate, key, password=b"")
        leaf = x509.load_pem_x509_certificates(certificate.read_bytes())[0]
    except (OSError, ValueError, ssl.SSLError) as error:
        raise UsageError(
            f"The certificate {str(certificate)!r} with the key {str(key)!r} cannot be used "
            f"({error}); expected PEM files that belong together, the key not encrypted."
        ) from error
    now = datetime.now(UTC)
    if not leaf.not_valid_before_utc <= now < leaf.not_valid_after_utc:
        raise UsageError(
            f"The certificate {str(certificate)!r} is valid from {leaf.not_valid_before_utc} to "
            f"{leaf.not_valid_after_utc}, not now; renew it."
        )
    return context
