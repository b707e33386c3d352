"""Settings of the server: a flag, an environment variable and a key of the configuration file are one and the same.

The field ``max_batch_size`` is the flag ``--max-batch-size``, the variable ``GEOSURGE_MAX_BATCH_SIZE`` and the TOML key
``max_batch_size``. Flags win over the environment, which wins over the file, which wins over the defaults.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from geosurge.addresses import is_loopback
from geosurge.cores import usable_cores
from geosurge.errors import ConfigurationError
from geosurge.store import default_store

ENVIRONMENT_PREFIX: Final = "GEOSURGE_"

TOKENS_VARIABLE: Final = "GEOSURGE_TOKENS"
"""Where tokens may come from besides `ServerSettings.token_file`. It is no setting: a flag would show in a list of
processes."""


class _Environment(EnvSettingsSource):
    """The environment, less what Kubernetes puts there for a Service named geosurge: GEOSURGE_PORT=tcp://10.0.0.3:50051."""

    def __call__(self) -> dict[str, Any]:
        values = super().__call__()
        if str(values.get("port")).startswith(("tcp://", "udp://")):
            del values["port"]
        return values


class ServerSettings(BaseSettings):
    """Everything about a server that can be set; `load_settings` says where the values come from."""

    model_config = SettingsConfigDict(env_prefix=ENVIRONMENT_PREFIX, extra="forbid", frozen=True)

    index: Path = Field(
        default_factory=default_store,
        description="Index store, whose current bundle is served, or one bundle's own directory.",
    )
    host: str = Field(
        default="127.0.0.1",
        min_length=1,
        description="Address to listen on; anything but a loopback address needs TLS with tokens or client "
        "certificates, or allow_remote.",
    )
    port: int = Field(default=50051, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    allow_remote: bool = Field(
        default=False,
        description="Listen on an address that other machines reach even without TLS, or without asking for "
        "credentials: only for a network, or behind a proxy, that provides them.",
    )
    device: str = Field(
        default="cpu",
        pattern=r"^(cpu|cuda(:\d+)?)$",
        description="Where the encoder and the indexes live: cpu, cuda or cuda:N.",
    )
    max_image_bytes: int = Field(
        default=20_000_000, ge=1, le=500_000_000, description="Largest encoded image that is accepted, bytes."
    )
    max_image_pixels: int = Field(
        default=50_000_000,
        ge=1,
        description="Most pixels (width x height) that an image may announce; each takes 8 to 14 bytes at once.",
    )
    max_batch_size: int = Field(
        default=32, ge=1, le=4096, description="Most requests that are encoded and searched together."
    )
    max_stream_window: int = Field(
        default=64,
        ge=1,
        le=10_000,
        description="Items of one stream worked on or waiting to be sent at once; the client is slowed down beyond it.",
    )
    max_page_size: int = Field(
        default=500, ge=1, le=10_000, description="Most cells in one page of a listing; also the default."
    )
    decode_workers: int = Field(
        default_factory=usable_cores,
        ge=1,
        le=256,
        description="Threads that decode images; by default one a usable core.",
    )
    max_concurrent_requests: int = Field(
        default_factory=lambda sizes: (
            sizes["max_batch_size"] + max(sizes["max_batch_size"], 2 * sizes["decode_workers"])
        ),
        ge=1,
        le=100_000,
        description="Requests worked on or queued at once; by default a batch and the next one, or two images a "
        "decoding thread where that is more. A unary call beyond it is refused, a stream waits.",
    )
    max_requests_per_peer: int = Field(
        default_factory=lambda sizes: sizes["max_concurrent_requests"],
        ge=1,
        le=100_000,
        description="Requests of one client address worked on or queued at once; by default all, because the clients "
        "of a proxy have one address.",
    )
    max_stream_items: int = Field(
        default=1_000_000,
        ge=1,
        description="Items that one stream may have; it then ends and the client opens another.",
    )
    max_loaded_versions: int = Field(
        default=2, ge=1, le=64, description="Index versions in memory at once: the active one and others."
    )
    scratch: Path | None = Field(
        default=None,
        description="Directory for private copies of loaded versions; by default the system's for temporary files.",
    )
    admin_port: int | None = Field(
        default=None,
        ge=0,
        le=65535,
        description="Port of its own for the IndexService, 0 for a free one. Without it the service is on the main "
        "port where that is loopback or guarded by tokens, and nowhere else.",
    )
    admin_host: str = Field(default="127.0.0.1", min_length=1, description="Address that admin_port listens on.")
    torch_threads: int | None = Field(
        default=None, ge=1, le=256, description="Threads that the encoder computes with; by default PyTorch decides."
    )
    max_stage_seconds: float = Field(
        default=300.0,
        gt=0,
        le=86_400,
        description="Time after which a batch that is still being encoded or searched means that the server hangs; it "
        "then ends itself.",
    )
    drain_seconds: float = Field(
        default=0.0,
        ge=0,
        le=600,
        description="Time between reporting NOT_SERVING and refusing calls, for load balancers to notice.",
    )
    grace_seconds: float = Field(
        default=30.0, ge=0, le=3600, description="Time that calls in flight get to finish when the server stops."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least severe messages that are logged."
    )
    log_format: Literal["text", "json"] = Field(
        default="text", description="What log lines look like: text for people, or one JSON object each."
    )
    metrics_port: int | None = Field(
        default=None,
        ge=0,
        le=65535,
        description="Port for /metrics, /livez and /readyz over HTTP, 0 for a free one; by default there is none.",
    )
    metrics_host: str = Field(
        default="127.0.0.1",
        min_length=1,
        description="Address that metrics_port listens on, without encryption or credentials; nothing of what clients "
        "ask can be read there.",
    )
    tls_certificate: Path | None = Field(
        default=None, description="PEM file of the server's certificate and its chain; read again when it changes."
    )
    tls_key: Path | None = Field(default=None, description="PEM file of the certificate's private key, not encrypted.")
    tls_client_ca: Path | None = Field(
        default=None,
        description="PEM file of authorities; clients without a certificate that one of them signed are refused.",
    )
    token_file: Path | None = Field(
        default=None,
        description="File of the tokens that calls need, a line each: role:token[:last valid day], role one of locate, "
        "read and admin. Only its owner may be able to read it. GEOSURGE_TOKENS may hold such lines, too.",
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """What pydantic calls to learn where values come from: arguments, then the environment."""
        return init_settings, _Environment(settings_cls)

    @property
    def max_receive_message_bytes(self) -> int:
        """Transport limit of one message.

        gRPC refuses a larger message before the engine sees it, which ends a whole stream. Twice the image limit (and a
        mebibyte for the other fields) leaves room for an image over its limit to be refused as one item, with its own
        reason.
        """
        return 2 * self.max_image_bytes + (1 << 20)

    @field_validator("tls_certificate", "tls_key", "tls_client_ca", "token_file")
    @classmethod
    def _require_readable(cls, path: Path | None) -> Path | None:
        try:
            if path is not None:
                path.open("rb").close()
        except OSError as error:
            raise ValueError(f"the file cannot be read ({error.strerror})") from error
        return path

    @model_validator(mode="after")
    def _require_whole_tls(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("--tls-certificate and --tls-key come together; give both or neither")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ValueError("--tls-client-ca needs TLS; give --tls-certificate and --tls-key, too")
        return self

    @model_validator(mode="after")
    def _refuse_unprotected_exposure(self) -> Self:
        names = ["host"] if self.admin_port is None else ["host", "admin_host"]
        exposed = [f"{name} {getattr(self, name)!r}" for name in names if not is_loopback(getattr(self, name))]
        if self.allow_remote or not exposed:
            return self
        if self.tls_certificate is None:
            raise ValueError(
                f"{exposed[0]} can be reached from other machines, but the server has no encryption; give it a "
                "certificate (--tls-certificate, --tls-key), listen on 127.0.0.1, or pass --allow-remote if the "
                "network in front of it encrypts and asks for credentials"
            )
        if self.tls_client_ca is None and self.token_file is None and TOKENS_VARIABLE not in os.environ:
            raise ValueError(
                f"{exposed[0]} can be reached from other machines, and anybody could call the server; ask for "
                f"tokens (--token-file, {TOKENS_VARIABLE}) or client certificates (--tls-client-ca), listen on "
                "127.0.0.1, or pass --allow-remote if the network in front of it asks for credentials"
            )
        return self


def load_settings(config_file: Path | None = None, **flags: Any) -> ServerSettings:  # noqa: ANN401
    """Reads the settings from every source.

    Args:
        config_file: A TOML file with settings as its keys; ``None`` reads none.
        **flags: Values given on the command line; ``None`` means that the flag was not given.

    Returns:
        The settings.

    Raises:
        ConfigurationError: The file cannot be read, or a value is wrong or unknown; names each and where it is set.
    """
    sources: dict[str, Mapping[str, Any]] = {
        "file": _read_toml(config_file) if config_file is not None else {},
        "environment": _Environment(ServerSettings)(),
        "flag": {name: value for name, value in flags.items() if value is not None},
    }
    merged = {name: value for source in sources.values() for name, value in source.items()}
    try:
        return ServerSettings(**merged)
    except ValidationError as error:
        # A default that is derived from a wrong value is not a problem of its own.
        causes = [problem for problem in error.errors() if problem["type"] != "default_factory_not_called"]
        problems = [_describe(problem, sources, config_file) for problem in causes]
        raise ConfigurationError("; ".join(problems)) from error


def unknown_variables(environment: Mapping[str, str]) -> dict[str, str | None]:
    """Finds variables that look like settings and are none, each with the setting it may have been meant as.

    They are not refused: a cluster may put variables of this prefix into every process.
    """
    # The command reads GEOSURGE_DEBUG and GEOSURGE_TOKEN itself.
    known = {name.upper() for name in ServerSettings.model_fields} | {"DEBUG", "TOKEN", "TOKENS"}
    found: dict[str, str | None] = {}
    for variable in environment:
        name = variable.upper().removeprefix(ENVIRONMENT_PREFIX)
        if variable.upper().startswith(ENVIRONMENT_PREFIX) and name not in known:
            closest = _closest(name, sorted(known))
            found[variable] = closest and ENVIRONMENT_PREFIX + closest
    return found


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigurationError(f"cannot read the configuration file {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"the configuration file {path} is not valid TOML: {error}") from error


def _describe(problem: Any, sources: Mapping[str, Mapping[str, Any]], config_file: Path | None) -> str:  # noqa: ANN401
    """One sentence on one problem that pydantic found: which setting, from where, what is wrong."""
    message = str(problem["msg"]).removeprefix("Value error, ")
    if not problem["loc"]:
        return message
    name = str(problem["loc"][0])
    source = next((source for source in reversed(list(sources)) if name in sources[source]), "")
    where = {
        "flag": f"--{name.replace('_', '-')}",
        "environment": f"{ENVIRONMENT_PREFIX}{name.upper()} in the environment",
        "file": f"{name} in {config_file}",
    }.get(source, name)
    if problem["type"] == "extra_forbidden":
        closest = _closest(name, list(ServerSettings.model_fields))
        return f"{where}: there is no such setting" + (f"; did you mean {closest}?" if closest else "")
    value = str(problem["input"]) if isinstance(problem["input"], Path) else problem["input"]
    return f"{where} is {value!r}: {message[0].lower()}{message[1:]}"


def _closest(name: str, known: list[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, known, n=1)), None)
