"""The options with which commands reach a server through TLS and with a token.

A token itself is never an option, because options show in a list of processes.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeAlias

import typer

from geosurge.errors import ConfigurationError, UsageError

if TYPE_CHECKING:
    from geosurge.client.connection import Connection

MAX_PORT: Final = 65535
TOKEN_VARIABLE: Final = "GEOSURGE_TOKEN"  # noqa: S105 - the name of a variable

Connect: TypeAlias = Callable[[], "Connection | None"]
"""What `with_connection` hands to a command: it reads certificates and tokens when it is called."""

TlsCaOption = Annotated[
    Path | None,
    typer.Option("--tls-ca", metavar="FILE", help="Use TLS, trusting the authorities in this PEM file."),
]
TlsOption = Annotated[bool, typer.Option("--tls", help="Use TLS, trusting the authorities of the system.")]
TlsCertificateOption = Annotated[
    Path | None,
    typer.Option("--tls-certificate", metavar="FILE", help="PEM file of the certificate to show to the server."),
]
TlsKeyOption = Annotated[
    Path | None, typer.Option("--tls-key", metavar="FILE", help="PEM file of that certificate's private key.")
]
TokenFileOption = Annotated[
    Path | None,
    typer.Option(
        "--token-file",
        metavar="FILE",
        help=f"File whose first line is the token to send; {TOKEN_VARIABLE} in the environment by default.",
    ),
]


def check_server(address: str | None) -> str | None:
    """Checks the form of ``HOST:PORT``, for typer."""
    parts = re.fullmatch(r"(?:\[[^\[\]/]+\]|[^:/\[\]\s]+):([0-9]{1,5})", address) if address is not None else None
    if address is not None and (parts is None or not 1 <= int(parts[1]) <= MAX_PORT):
        raise typer.BadParameter(f"{address!r} is not HOST:PORT, such as 127.0.0.1:50051")
    return address


def make_connection(
    server: str | None,
    *,
    tls_ca: Path | None,
    tls: bool,
    tls_certificate: Path | None,
    tls_key: Path | None,
    token_file: Path | None,
) -> Connection | None:
    """What the options, and the token in the environment, say about the connection to a server.

    Args:
        server: Address of the server; ``None`` when the command asks none.
        tls_ca: `TlsCaOption`.
        tls: `TlsOption`.
        tls_certificate: `TlsCertificateOption`.
        tls_key: `TlsKeyOption`.
        token_file: `TokenFileOption`.

    Returns:
        The connection; ``None`` without a server.

    Raises:
        UsageError: An option is given without a server.
        ConfigurationError: The token's file cannot be read or holds none, or a certificate lacks its key.
    """
    if server is None:
        given = {
            "--tls-ca": tls_ca,
            "--tls": tls,
            "--tls-certificate": tls_certificate,
            "--tls-key": tls_key,
            "--token-file": token_file,
        }
        if names := [name for name, value in given.items() if value]:
            raise UsageError(f"{', '.join(names)}: for reaching a server; name one with --server, or leave it out")
        return None
    # What only looks at files starts without gRPC.
    from geosurge.client.connection import Connection  # noqa: PLC0415

    return Connection(
        ca_file=tls_ca,
        certificate_file=tls_certificate,
        key_file=tls_key,
        token=(os.environ.get(TOKEN_VARIABLE) or None) if token_file is None else _first_line(token_file),
        tls=tls,
    )


def with_connection(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options of this module in place of its parameter ``connection``, which is a `Connect`.

    The command also takes ``server``, the address; without one, `Connect` returns ``None``.
    """
    options: dict[str, tuple[object, object]] = {
        "tls_ca": (TlsCaOption, None),
        "tls": (TlsOption, False),
        "tls_certificate": (TlsCertificateOption, None),
        "tls_key": (TlsKeyOption, None),
        "token_file": (TokenFileOption, None),
    }

    @functools.wraps(command)
    def run(**arguments: Any) -> None:  # noqa: ANN401
        given = {name: arguments.pop(name) for name in options}
        command(**arguments, connection=lambda: make_connection(arguments["server"], **given))

    signature = inspect.signature(command, eval_str=True)
    own = [value for name, value in signature.parameters.items() if name != "connection"]
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (annotation, default) in options.items()
    ]
    parameters = [*own, *added]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del run.__wrapped__  # Its own annotations would be looked at instead.
    return run


def _first_line(path: Path) -> str:
    try:
        return path.read_bytes().partition(b"\n")[0].decode("ascii", "replace").strip()
    except OSError as error:
        raise ConfigurationError(f"cannot read the token file {path}: {error.strerror}") from error
