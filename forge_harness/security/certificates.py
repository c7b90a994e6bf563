"""Certificates for a server on this machine: an authority of one's own, for trials and tests.

Keys of such an authority are kept nowhere. A server that others reach gets its certificate from
theirs.
"""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from forge_harness.durable import staged_file, write_durably

_DAY = timedelta(days=1)


class LocalAuthority:
    """Signs certificates; its own key lives as long as the object.

    Args:
        name: Of the authority.
    """

    def __init__(self, name: str = "Forge Harness trial") -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _named(name)
        usage = x509.KeyUsage(
            digital_signature=True,
            key_cert_sign=True,
            crl_sign=True,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            encipher_only=False,
            decipher_only=False,
        )
        builder = _builder(self._name, self._name, self._key, datetime.now(UTC) + _DAY)
        self.certificate = (
            builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(_key_id(self._key), critical=False)
            .sign(self._key, hashes.SHA256())
        )

    def write(self, path: Path) -> Path:
        """Writes the authority's certificate, PEM, for clients that are to trust it."""
        write_durably(path, self.certificate.public_bytes(Encoding.PEM))
        return path

    def issue(
        self, directory: Path, address: str = "127.0.0.1", *, until: datetime | None = None
    ) -> tuple[Path, Path]:
        """Writes a certificate and its key, PEM; returns their paths.

        Args:
            directory: Where to; `cert.pem` and `key.pem`.
            address: IP address or name of the server.
            until: End of its validity; None: a day from now.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        end = until or datetime.now(UTC) + _DAY
        builder = _builder(_named(address), self._name, key, end)
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        certificate = (
            builder.add_extension(x509.SubjectAlternativeName([_general(address)]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(authority, critical=False)
            .add_extension(_key_id(key), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        directory.mkdir(parents=True, exist_ok=True)
        cert, private = directory / "cert.pem", directory / "key.pem"
        write_durably(cert, certificate.public_bytes(Encoding.PEM))
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        with staged_file(private) as stage:
            stage.touch(0o600)
            stage.write_bytes(pem)
        return cert, private


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, until: datetime
) -> x509.CertificateBuilder:
    return x509.CertificateBuilder(
        issuer_name=issuer,
        subject_name=subject,
        public_key=key.public_key(),
        serial_number=x509.random_serial_number(),
        not_valid_before=min(datetime.now(UTC), until) - _DAY,
        not_valid_after=until,
    )


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _key_id(key: ec.EllipticCurvePrivateKey) -> x509.SubjectKeyIdentifier:
    return x509.SubjectKeyIdentifier.from_public_key(key.public_key())


def _general(address: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(address))
    except ValueError:
        return x509.DNSName(address)
