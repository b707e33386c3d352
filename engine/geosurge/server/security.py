"""Who may call what: TLS with certificates that can be renewed, tokens with roles, and the check before every call.

A token file, and the variable GEOSURGE_TOKENS, holds one token a line:

    # role:token[:last day on which it is valid, UTC]
    locate:3f0c...
    admin:9ab1...:2027-03-31

Certificates and tokens are read again when their files change. If the new files cannot be used, what was read before
stays in force, and a warning is logged once. Connections and streams that are open already are not checked again.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import stat
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from enum import IntEnum
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import grpc

from geosurge.bearer import AUTHORIZATION_KEY, BEARER, is_token
from geosurge.certificates import read_authorities, read_identity
from geosurge.errors import (
    ConfigurationError,
    CredentialsExpiredError,
    CredentialsInvalidError,
    CredentialsMissingError,
    GeoSurgeError,
    PermissionDeniedError,
)
from geosurge.server.interceptors import ENGINE_METHOD_PREFIX, abort
from geosurge.settings import TOKENS_VARIABLE, ServerSettings

logger = logging.getLogger(__name__)

MIN_TOKEN_LENGTH: Final = 16

_FileStates = tuple[tuple[int, int, int] | None, ...]
"""Inode, size and time of change of files; what replaces or rewrites one changes them. ``None`` for a missing one."""


class Role(IntEnum):
    """What a token permits; each role may do all that the ones before it may."""

    LOCATE = 1
    READ = 2
    ADMIN = 3


REQUIRED_ROLES: Final[Mapping[str, Role | None]] = MappingProxyType(
    {
        "/grpc.health.v1.Health/Check": None,
        "/grpc.health.v1.Health/List": None,
        "/grpc.health.v1.Health/Watch": None,
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Role.LOCATE,
        "/geosurge.v1.GeolocationService/Locate": Role.LOCATE,
        "/geosurge.v1.GeolocationService/LocateStream": Role.LOCATE,
        "/geosurge.v1.GeolocationService/GetInfo": Role.LOCATE,
        "/geosurge.v1.CellService/GetCell": Role.LOCATE,
        "/geosurge.v1.CellService/ListChildren": Role.LOCATE,
        "/geosurge.v1.CellService/GetPath": Role.LOCATE,
        "/geosurge.v1.IndexService/ListVersions": Role.READ,
        "/geosurge.v1.IndexService/GetVersion": Role.READ,
        "/geosurge.v1.IndexService/LoadVersion": Role.ADMIN,
        "/geosurge.v1.IndexService/ActivateVersion": Role.ADMIN,
        "/geosurge.v1.IndexService/RollbackVersion": Role.ADMIN,
        "/geosurge.v1.IndexService/UnloadVersion": Role.ADMIN,
        "/geosurge.v1.IndexService/SetCanary": Role.ADMIN,
    }
)
"""The least role that may call a method; ``None`` lets everybody. What is not listed needs ADMIN."""


def server_credentials(settings: ServerSettings) -> grpc.ServerCredentials | None:
    """Reads the credentials that a secure port is opened with.

    Args:
        settings: ``tls_certificate``, ``tls_key`` and ``tls_client_ca`` say which files are read, now and whenever they
            change. With a client authority, clients without a certificate that it signed are refused.

    Returns:
        The credentials; ``None`` when the settings name no certificate.

    Raises:
        ConfigurationError: A file cannot be used; the message names it.
    """
    if settings.tls_certificate is None or settings.tls_key is None:
        return None
    certificates = _Certificates(settings.tls_certificate, settings.tls_key, settings.tls_client_ca)
    return grpc.dynamic_ssl_server_credentials(
        certificates.read(),
        certificates.changed,  # type: ignore[arg-type]  # None means that nothing has changed.
        require_client_authentication=settings.tls_client_ca is not None,
    )


class _Certificates:
    """The server's certificate files; gRPC asks with each new connection, on threads of its own."""

    def __init__(self, certificate: Path, key: Path, client_ca: Path | None) -> None:
        self._certificate = certificate
        self._key = key
        self._client_ca = client_ca
        self._files = [path for path in (certificate, key, client_ca) if path is not None]
        self._states = _states(self._files)
        self._lock = threading.Lock()

    def read(self) -> grpc.ServerCertificateConfiguration:
        identity = read_identity(self._certificate, self._key)
        authorities = None if self._client_ca is None else read_authorities(self._client_ca)
        return grpc.ssl_server_certificate_configuration([(identity.key, identity.chain)], authorities)

    def changed(self) -> grpc.ServerCertificateConfiguration | None:
        """The certificates, if the files have changed and can be used."""
        states = _states(self._files)
        with self._lock:
            if states == self._states:
                return None
            self._states = states
            try:
                configuration = self.read()
            except ConfigurationError as error:
                logger.warning("the TLS files changed, but the certificate in use stays: %s", error)
                return None
            logger.info("the TLS files changed and were read again", extra={"certificate": str(self._certificate)})
            return configuration


@dataclass(frozen=True)
class _Entry:
    """A token, of which only the hash is kept."""

    digest: bytes
    role: Role
    last_day: date | None


class Tokens:
    """The tokens that the server accepts; safe to use from many threads."""

    def __init__(self, lines: str | None = None, file: Path | None = None) -> None:
        """Reads the tokens.

        Args:
            lines: Text in the format of a token file.
            file: A token file, which is read again when it changes.

        Raises:
            ConfigurationError: A line is not a token's, the file cannot be read, or others can read it.
        """
        self._file = file
        self._fixed = [] if lines is None else _parse(lines, TOKENS_VARIABLE)
        self._lock = threading.Lock()
        self._states = () if file is None else _states([file])
        self._entries = self._read()
        self.required: Final = lines is not None or file is not None
        """Whether calls need a token."""

    @classmethod
    def from_settings(cls, settings: ServerSettings) -> Tokens:
        """The tokens of the file that the settings name, and those of the environment; raises as the constructor."""
        return cls(os.environ.get(TOKENS_VARIABLE), settings.token_file)

    def role_of(self, token: str) -> Role | None:
        """The role of a token.

        The time that this takes reveals nothing about the tokens: hashes of equal length are compared, each in constant
        time, and always all of them.

        Returns:
            The role; ``None`` when the token is not known.

        Raises:
            CredentialsExpiredError: Its last day has passed.
        """
        digest = _digest(token)
        found: _Entry | None = None
        for entry in self._current():
            if hmac.compare_digest(entry.digest, digest):
                found = entry
        if found is None:
            return None
        if found.last_day is not None and datetime.now(UTC).date() > found.last_day:
            raise CredentialsExpiredError(
                f"the token was valid until {found.last_day.isoformat()}; ask the server's administrator for a new one"
            )
        return found.role

    def _current(self) -> list[_Entry]:
        if self._file is None:
            return self._entries
        states = _states([self._file])
        with self._lock:
            if states != self._states:
                self._states = states
                try:
                    self._entries = self._read()
                except ConfigurationError as error:
                    logger.warning("the token file changed, but the tokens read before stay valid: %s", error)
                else:
                    logger.info("the token file was read again", extra={"tokens": len(self._entries)})
            return self._entries

    def _read(self) -> list[_Entry]:
        entries = [*self._fixed, *([] if self._file is None else _parse(_read_private(self._file), str(self._file)))]
        if len({entry.digest for entry in entries}) < len(entries):
            raise ConfigurationError(f"{self._file or TOKENS_VARIABLE} holds a token twice; each has one role")
        return entries


class AuthInterceptor(grpc.aio.ServerInterceptor):
    """Lets a call through if its token has the role that the method needs.

    It stands after `CallInterceptor`, which logs and counts the calls that are refused here and turns the errors into
    statuses. A refused call costs nothing but its headers: no message of it is read.
    """

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:  # noqa: ANN401
        """Returns the method's handler, or one that refuses the call."""
        method = handler_call_details.method
        try:
            self._check(method, handler_call_details.invocation_metadata)
        except GeoSurgeError as error:
            return _refusal(method, error)
        return await continuation(handler_call_details)

    def _check(self, method: str, metadata: Iterable[tuple[str, str | bytes]]) -> None:
        required = REQUIRED_ROLES.get(method, Role.ADMIN)
        if required is None or not self._tokens.required:
            return
        role = self._tokens.role_of(_bearer_token(metadata))
        if role is None:
            raise CredentialsInvalidError(
                "the server does not know the token; check it, or ask the server's administrator for one"
            )
        if role < required:
            raise PermissionDeniedError(
                f"{method.rpartition('/')[2]} needs a token of the role {required.name.lower()}, and this one's is "
                f"{role.name.lower()}; ask the server's administrator for another"
            )


def _bearer_token(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    values = [value for key, value in metadata or () if key == AUTHORIZATION_KEY]
    if len(values) == 1 and isinstance(values[0], str):
        scheme, _, token = values[0].partition(" ")
        if scheme.lower() == BEARER.lower() and token:
            return token.strip()
    raise CredentialsMissingError(
        f"the call has no token; send one as the metadata '{AUTHORIZATION_KEY}: {BEARER} TOKEN', with the geosurge "
        "command by --token-file or GEOSURGE_TOKEN"
    )


def _refusal(method: str, error: GeoSurgeError) -> Any:  # noqa: ANN401
    # Whatever the method's arity, a handler of streams starts before any message is read.
    async def refuse(_requests: Any, context: Any) -> None:  # noqa: ANN401
        if method.startswith(ENGINE_METHOD_PREFIX):
            raise error
        await abort(context, error)

    return grpc.stream_stream_rpc_method_handler(refuse)


def _parse(text: str, source: str) -> list[_Entry]:
    """Reads lines of tokens; errors name the source and the line, never what is in it."""
    entries = []
    for number, line in enumerate(text.splitlines(), start=1):
        content = line.partition("#")[0].strip()
        if not content:
            continue
        where = f"{source}, line {number}"
        role, _, rest = content.partition(":")
        token, _, last_day = rest.partition(":")
        if role.upper() not in Role.__members__:
            raise ConfigurationError(f"{where}: it does not start with a role (locate:, read: or admin:)")
        if len(token) < MIN_TOKEN_LENGTH or not is_token(token):
            raise ConfigurationError(
                f"{where}: the token must be {MIN_TOKEN_LENGTH} or more letters, digits or . _ ~ + / -, such as "
                "'openssl rand -hex 32' prints"
            )
        try:
            expires = date.fromisoformat(last_day) if last_day else None
        except ValueError:
            raise ConfigurationError(f"{where}: the last field is not a date, such as 2027-03-31") from None
        entries.append(_Entry(_digest(token), Role[role.upper()], expires))
    if not entries:
        raise ConfigurationError(f"{source} holds no token; add a line such as locate:TOKEN, or leave it out")
    return entries


def _read_private(path: Path) -> str:
    """The text of a file that nobody but its owner can read."""
    try:
        with path.open(encoding="utf-8") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & 0o077:
                raise ConfigurationError(
                    f"the token file {path} can be read or changed by others (mode {mode:04o}); run: chmod 600 {path}"
                )
            return file.read()
    except OSError as error:
        raise ConfigurationError(f"cannot read the token file {path}: {error.strerror}") from error
    except UnicodeDecodeError:
        # The error holds what it could not decode.
        raise ConfigurationError(f"the token file {path} is not text") from None


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def _states(files: Iterable[Path]) -> _FileStates:
    return tuple(_state(file) for file in files)


def _state(file: Path) -> tuple[int, int, int] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_ctime_ns
