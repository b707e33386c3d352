"""``geosurge serve``: a server until it is told to end."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from geosurge.settings import ServerSettings, load_settings
from geosurge.store import resolve_bundle

if TYPE_CHECKING:
    from geosurge.server.app import Server


def _with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command that takes ``**flags`` one option for each field of `ServerSettings`.

    No value is checked or filled in here, because flags are but one of the sources of `load_settings`.
    """
    flags = []
    for name, field in ServerSettings.model_fields.items():
        computed = field.default_factory is not None or field.default is None or field.default is False
        option = typer.Option(
            metavar=None if field.annotation is bool else name.rpartition("_")[2].upper(),
            help=field.description,
            show_default=False if computed else str(field.default),
        )
        annotation = Annotated[Optional[field.annotation], option]  # type: ignore[name-defined]  # noqa: UP045
        flags.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    signature = inspect.signature(command, eval_str=True)
    own = [value for value in signature.parameters.values() if value.kind is not inspect.Parameter.VAR_KEYWORD]
    command.__signature__ = signature.replace(parameters=[*own, *flags])  # type: ignore[attr-defined]
    return command


@_with_settings
def serve(
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="TOML file with settings as its keys.", show_default=False)
    ] = None,
    **flags: Any,  # noqa: ANN401
) -> None:
    """Serves an index over gRPC until SIGTERM or Ctrl-C.

    Every option but --config is also an environment variable and a key of the configuration file:
    --max-batch-size is GEOSURGE_MAX_BATCH_SIZE and max_batch_size.
    Options win over the environment, which wins over the file.
    """
    settings = load_settings(config, **flags)
    resolve_bundle(settings.index)  # A wrong path is told before PyTorch is loaded.
    from geosurge.server.process import serve as run  # noqa: PLC0415

    def announce(server: Server) -> None:
        extras = {"administration": server.admin_address, "monitoring": server.metrics_address}
        named = [f", {name} on {address}" for name, address in extras.items() if address not in ("", server.address)]
        typer.echo(f"serving {settings.index} on {server.address}{''.join(named)}", err=True)

    run(settings, on_ready=announce)
