"""How a client reaches a server: in plain text or through TLS, with its own certificate, with a token.

Plain text is for servers on the same machine, and for networks that encrypt by themselves; a token is only ever sent
through TLS or within the machine.
"""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc

from geosurge.addresses import address_to_host, is_loopback
from geosurge.bearer import AUTHORIZATION_KEY, BEARER, is_token
from geosurge.certificates import read_authorities, read_identity
from geosurge.errors import ConfigurationError

ChannelOptions = Sequence[tuple[str, Any]]

_OPTIONS: Final[ChannelOptions] = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # A server that restarts should be found again sooner than by the default of up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 5000),
)

_SYSTEM_AUTHORITIES: Final = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)
"""Where Debian, Fedora, SUSE, and Alpine or macOS keep the authorities that they trust."""

_NOT_TRUSTED: Final = "CERTIFICATE_VERIFY_FAILED"
_OTHER_NAME: Final = "Hostname Verification Check failed"
_NO_TLS: Final = "WRONG_VERSION_NUMBER"
_HUNG_UP: Final = ("Socket closed", "Connection reset", "Broken pipe")


@dataclass(frozen=True)
class Connection:
    """How to reach a server, apart from its address.

    Attributes:
        ca_file: PEM file of the authorities that may have signed the server's certificate; implies ``tls``.
        certificate_file: PEM file of the client's own certificate, for servers that ask for one; implies ``tls``.
        key_file: PEM file of its private key.
        token: The token to send with every call.
        tls: Encrypt, trusting the authorities of the system unless ``ca_file`` names others.

    Raises:
        ConfigurationError: One of certificate and key is missing, or the token is not one.
    """

    ca_file: Path | None = None
    certificate_file: Path | None = None
    key_file: Path | None = None
    token: str | None = field(default=None, repr=False)
    tls: bool = False

    def __post_init__(self) -> None:
        if (self.certificate_file is None) != (self.key_file is None):
            raise ConfigurationError("a client certificate and its key come together; give both or neither")
        if self.token is not None and not is_token(self.token):
            raise ConfigurationError(
                "the token is empty or has characters that a token cannot have (letters, digits and . _ ~ + / - can be "
                "in one); give the token alone, without its role, quotes or blanks"
            )

    @property
    def encrypted(self) -> bool:
        """Whether TLS is used."""
        return self.tls or self.ca_file is not None or self.certificate_file is not None


def open_channel(address: str, connection: Connection | None = None, options: ChannelOptions = ()) -> grpc.Channel:
    """Prepares a blocking channel, which connects with its first call.

    Args:
        address: ``host:port`` of the server.
        connection: How to reach it; ``None`` is plain text without a token.
        options: gRPC channel arguments on top of the engine's own.

    Raises:
        ConfigurationError: A certificate, key or authority cannot be used, or a token would cross a network in plain
            text.
    """
    connection = connection or Connection()
    token, credentials = _token(address, connection), _credentials(connection)
    arguments = _arguments(address, options)
    if credentials is None:
        channel = grpc.insecure_channel(address, arguments)
    else:
        channel = grpc.secure_channel(address, credentials, arguments)
    return channel if token is None else grpc.intercept_channel(channel, _TokenSender(token))


def open_async_channel(
    address: str, connection: Connection | None = None, options: ChannelOptions = ()
) -> grpc.aio.Channel:
    """Prepares a channel of the running event loop; otherwise as `open_channel`."""
    connection = connection or Connection()
    token, credentials = _token(address, connection), _credentials(connection)
    arguments = _arguments(address, options)
    # gRPC takes an asynchronous interceptor for one arity alone; these two are all that the API has.
    senders = [] if token is None else [_AsyncUnaryTokenSender(token), _AsyncStreamTokenSender(token)]
    if credentials is None:
        return grpc.aio.insecure_channel(address, arguments, interceptors=senders)
    return grpc.aio.secure_channel(address, credentials, arguments, interceptors=senders)


def is_refused_handshake(details: str) -> bool:
    """Whether an UNAVAILABLE server will be so again, because TLS failed, by what gRPC says of it."""
    return any(sign in details for sign in (_NOT_TRUSTED, _OTHER_NAME, _NO_TLS))


def explain_unavailable(details: str, address: str, connection: Connection) -> str:
    """Why a server is UNAVAILABLE and what to do about it.

    Args:
        details: What gRPC says.
        address: ``host:port`` of the server.
        connection: How it was to be reached.
    """
    if _NOT_TRUSTED in details:
        why = details.partition(f"{_NOT_TRUSTED}: ")[2].partition(":")[0]
        return (
            f"the certificate of the server at {address} is not trusted ({why}); give the "
            "authority that signed it as ca_file (--tls-ca), or have it renewed if it has expired"
        )
    if _OTHER_NAME in details:
        return (
            f"the certificate of the server at {address} was issued for another name; use a name or address that is in "
            "it, or have this one added"
        )
    if _NO_TLS in details:
        return f"the server at {address} does not speak TLS; check the port, or leave the TLS options out"
    hint = ""
    if any(sign in details for sign in _HUNG_UP):
        if not connection.encrypted:
            hint = "; if it speaks TLS, give its authority as ca_file (--tls-ca), or tls (--tls) for the system's"
        elif connection.certificate_file is None:
            hint = "; if it asks for a client certificate, give one (--tls-certificate, --tls-key)"
        else:
            hint = f"; if it asks for a client certificate, it may not trust {connection.certificate_file}"
    return f"the server at {address} cannot be reached ({details}); check the address and that it is running{hint}"


def _token(address: str, connection: Connection) -> str | None:
    if connection.token is not None and not connection.encrypted and not is_loopback(address_to_host(address)):
        raise ConfigurationError(
            f"a token for {address} would cross the network in plain text; use TLS, with the server's authority "
            "(ca_file, --tls-ca) or those of the system (tls, --tls)"
        )
    return connection.token


def _credentials(connection: Connection) -> grpc.ChannelCredentials | None:
    if not connection.encrypted:
        return None
    authorities = _system_authorities() if connection.ca_file is None else read_authorities(connection.ca_file)
    if connection.certificate_file is None or connection.key_file is None:
        return grpc.ssl_channel_credentials(authorities)
    identity = read_identity(connection.certificate_file, connection.key_file)
    return grpc.ssl_channel_credentials(authorities, identity.key, identity.chain)


def _system_authorities() -> bytes | None:
    """The authorities that the system trusts; without any, gRPC falls back to a list of its own."""
    # OpenSSL's own default comes first: SSL_CERT_FILE overrides it.
    for path in (ssl.get_default_verify_paths().cafile, *_SYSTEM_AUTHORITIES):
        if path is not None and Path(path).is_file():
            return Path(path).read_bytes()
    return None


def _arguments(address: str, options: ChannelOptions) -> list[tuple[str, Any]]:
    # gRPC would send even loopback connections to the proxy that the environment names.
    proxy = [("grpc.enable_http_proxy", 0)] if is_loopback(address_to_host(address)) else []
    return [*_OPTIONS, *proxy, *options]


def _with_token(details: Any, token: str) -> Any:  # noqa: ANN401
    """The details of a call with the token among its metadata."""
    metadata = [*(details.metadata or ()), (AUTHORIZATION_KEY, f"{BEARER} {token}")]
    return details._replace(metadata=grpc.aio.Metadata(*metadata))


class _TokenSender(grpc.UnaryUnaryClientInterceptor, grpc.StreamStreamClientInterceptor):
    def __init__(self, token: str) -> None:
        self._token = token

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:  # noqa: ANN401
        return continuation(_with_token(client_call_details, self._token), request)

    def intercept_stream_stream(
        self,
        continuation: Any,  # noqa: ANN401
        client_call_details: Any,  # noqa: ANN401
        request_iterator: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        return continuation(_with_token(client_call_details, self._token), request_iterator)


class _AsyncUnaryTokenSender(grpc.aio.UnaryUnaryClientInterceptor):
    def __init__(self, token: str) -> None:
        self._token = token

    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:  # noqa: ANN401
        return await continuation(_with_token(client_call_details, self._token), request)


class _AsyncStreamTokenSender(grpc.aio.StreamStreamClientInterceptor):
    def __init__(self, token: str) -> None:
        self._token = token

    async def intercept_stream_stream(
        self,
        continuation: Any,  # noqa: ANN401
        client_call_details: Any,  # noqa: ANN401
        request_iterator: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        return await continuation(_with_token(client_call_details, self._token), request_iterator)
