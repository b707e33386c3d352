"""PEM files for TLS, checked as they are read: what gRPC says about a bad one helps nobody."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path

from geosurge.errors import ConfigurationError


@dataclass(frozen=True)
class Identity:
    """A certificate and what proves that it is one's own.

    Attributes:
        chain: PEM text of the certificate and of the intermediate authorities below the root.
        key: PEM text of its private key.
    """

    chain: bytes
    key: bytes = field(repr=False)


def read_identity(certificate_file: Path, key_file: Path) -> Identity:
    """Reads a certificate and its private key.

    Raises:
        ConfigurationError: A file cannot be read, or holds something else; the key is encrypted, or another
            certificate's; or the files are being replaced.
    """
    identity = Identity(_read(certificate_file), _read(key_file))
    try:
        # An encrypted key would make OpenSSL ask for its password on the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate_file, key_file, password=_no_password)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"the certificate {certificate_file} and the key {key_file} cannot be used together ({_reason(error)}); "
            "they must be PEM files, the certificate first in its chain, the key its own and not encrypted"
        ) from error
    if identity != Identity(_read(certificate_file), _read(key_file)):
        raise ConfigurationError(f"{certificate_file} or {key_file} was replaced while it was read")
    return identity


def read_authorities(ca_file: Path) -> bytes:
    """Reads the certificates of authorities to trust.

    Raises:
        ConfigurationError: The file cannot be read, or is not a PEM file of certificates.
    """
    content = _read(ca_file)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=content.decode())
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"{ca_file} holds no certificates of authorities ({_reason(error)}); it must be a PEM file"
        ) from error
    return content


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror}") from error


def _no_password() -> str:
    raise ValueError("the key is encrypted")


def _reason(error: Exception) -> str:
    return getattr(error, "reason", None) or str(error)
