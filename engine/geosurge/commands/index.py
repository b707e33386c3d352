"""``geosurge index``: look at bundles and stores, and change which bundle is active, here or on a running server.

With ``--server HOST:PORT`` the versions of a server are meant instead of a store.

With ``--json`` a command prints one JSON object on standard output and nothing else; a failed one prints
``{"error": {"reason", "message"}}``. Exit codes: 0 done, 2 wrong usage, 3 a bundle or store cannot be used, which
includes a bundle that does not verify.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from geosurge import store as stores
from geosurge.bundle import Bundle, open_bundle
from geosurge.bundle.verifying import verify_bundle
from geosurge.commands.connection_options import Connect, check_server, with_connection
from geosurge.errors import GeoSurgeError, StoreError, UsageError, VersionNotLoadedError
from geosurge.tables import print_content

if TYPE_CHECKING:
    from geosurge.client import IndexClient
    from geosurge.description import IndexVersion

POLL_SECONDS: Final = 0.2

index_app = typer.Typer(
    name="index",
    help="Look at index bundles and stores, and change which bundle is active.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

_CELL_KINDS: Final = {
    "s2": "S2 cells",
    "h3": "H3 cells",
    "entity": "administrative entities, which have names and no outlines",
}

_JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
_Store = Annotated[
    Path | None,
    typer.Option("--store", help="Directory of the store; GEOSURGE_INDEX, or the indexes/ folder, by default."),
]
_Server = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        callback=check_server,
        help="Address of a running server's IndexService, instead of a store.",
    ),
]
_RequiredServer = Annotated[
    str, typer.Option(metavar="HOST:PORT", callback=check_server, help="Address of the server's IndexService.")
]
_Version = Annotated[str, typer.Argument(help="Name of the version.")]
_BundleOrStore = Annotated[
    Path | None,
    typer.Argument(help="A bundle, or a store whose active bundle is meant.", metavar="[BUNDLE|STORE]"),
]


@index_app.command("list")
@with_connection
def list_command(
    *, store: _Store = None, server: _Server = None, as_json: _JsonFlag = False, connection: Connect
) -> None:
    """Lists bundles: which one is active and which cannot be used; of a server, also which are loaded."""
    with _reported(as_json=as_json):
        if server is not None:
            _refuse_store(store)
            with _client(server, connection) as client:
                versions = client.versions()
            if as_json:
                _print_json({"server": server, "versions": [_version_fields(version) for version in versions]})
            else:
                print_content(_version_table(server, versions))
            return
        connection()
        path = store or stores.default_store()
        entries = stores.list_bundles(path)
        if as_json:
            rows = [
                {
                    "name": entry.name,
                    "active": entry.active,
                    "create_time": entry.create_time and _utc(entry.create_time),
                    "problem": entry.problem,
                }
                for entry in entries
            ]
            _print_json({"store": str(path), "bundles": rows})
            return
        table = Table(
            "", "bundle", "created", "problem", title=f"index store {escape(str(path))}", title_justify="left"
        )
        for entry in entries:
            created = _utc(entry.create_time) if entry.create_time else ""
            table.add_row("*" if entry.active else "", escape(entry.name), created, escape(entry.problem or ""))
        print_content(table)


@index_app.command()
def inspect(path: _BundleOrStore = None, as_json: _JsonFlag = False) -> None:
    """Shows what a bundle is and what it can locate, from its manifest; checks that its files are there."""
    with _reported(as_json=as_json):
        bundle = open_bundle(stores.resolve_bundle(path or stores.default_store()))
        size = sum(file.size for file in bundle.manifest.files.values())
        if as_json:
            _print_json({"path": str(bundle.path), "bytes": size, "manifest": bundle.manifest.model_dump(mode="json")})
            return
        _print_bundle(bundle, size)


@index_app.command()
def verify(path: _BundleOrStore = None, as_json: _JsonFlag = False) -> None:
    """Reads every byte of a bundle, checks its parts against each other and asks its golden queries.

    Exits with 3 when something is wrong, because such a bundle cannot be used.
    """
    with _reported(as_json=as_json):
        report = verify_bundle(stores.resolve_bundle(path or stores.default_store()))
        if as_json:
            problems = [
                {"file": problem.file, "reason": problem.error.reason, "message": str(problem.error)}
                for problem in report.problems
            ]
            _print_json({"path": str(report.path), "ok": report.ok, "problems": problems})
        else:
            console = Console()
            for problem in report.problems:
                console.print(f"[red]{escape(problem.file)}[/red]: {escape(str(problem.error))}", soft_wrap=True)
            verdict = "[green]nothing wrong[/green]" if report.ok else f"[red]{len(report.problems)} problems[/red]"
            console.print(f"{escape(str(report.path))}: {verdict}", soft_wrap=True)
        if not report.ok:
            raise typer.Exit(StoreError.exit_code)


@index_app.command()
def publish(
    source: Annotated[Path, typer.Argument(help="Directory of the bundle to copy in.")],
    store: _Store = None,
    name: Annotated[str | None, typer.Option(help="Name in the store; the bundle's own by default.")] = None,
    activate: Annotated[bool, typer.Option("--activate", help="Also make it the active bundle.")] = False,
    as_json: _JsonFlag = False,
) -> None:
    """Copies a bundle into a store after verifying the copy; nobody sees it before it is whole."""
    with _reported(as_json=as_json):
        path = store or stores.default_store()
        published = stores.publish(path, source, name=name, activate=activate)
        _print_done(
            {"store": str(path), "name": published, "active": activate},
            f"published {published} in {path}" + (" and activated it" if activate else ""),
            as_json=as_json,
        )


@index_app.command()
@with_connection
def activate(
    name: Annotated[str, typer.Argument(help="Name of the bundle in the store.")],
    *,
    store: _Store = None,
    server: _Server = None,
    unload_first: Annotated[
        bool,
        typer.Option("--unload-first", help="Let the server refuse traffic while both do not fit into its memory."),
    ] = False,
    as_json: _JsonFlag = False,
    connection: Connect,
) -> None:
    """Makes a bundle the active one.

    Of a store: a server takes it up when it starts, or at once on SIGHUP. Of a server: it is loaded and checked beside
    the active one, which serves until the new one does; a bundle that cannot be used changes nothing.
    """
    with _reported(as_json=as_json):
        if server is not None:
            _refuse_store(store)
            with _client(server, connection) as client:
                _print_version(server, client.activate(name, unload_first=unload_first), "activated", as_json=as_json)
            return
        connection()
        if unload_first:
            raise UsageError("--unload-first is about a server's memory; name one with --server, or leave it out")
        path = store or stores.default_store()
        stores.activate(path, name)
        _print_done({"store": str(path), "name": name, "active": True}, f"activated {name} in {path}", as_json=as_json)


@index_app.command()
@with_connection
def rollback(*, store: _Store = None, server: _Server = None, as_json: _JsonFlag = False, connection: Connect) -> None:
    """Goes back to the bundle that was active before; again, and it goes back further."""
    with _reported(as_json=as_json):
        if server is not None:
            _refuse_store(store)
            with _client(server, connection) as client:
                _print_version(server, client.rollback(), "went back to", as_json=as_json)
            return
        connection()
        path = store or stores.default_store()
        name = stores.rollback(path)
        _print_done(
            {"store": str(path), "name": name, "active": True}, f"went back to {name} in {path}", as_json=as_json
        )


@index_app.command()
@with_connection
def load(name: _Version, *, server: _RequiredServer, as_json: _JsonFlag = False, connection: Connect) -> None:
    """Has a server load a version beside the active one, so that requests can name it; waits until it is ready."""
    with _reported(as_json=as_json), _client(server, connection) as client:
        version = client.load(name)
        with Console(stderr=True).status("") as status:
            # A version that is still being unloaded is loaded after that.
            while version.load_step or version.state in ("loading", "draining"):
                status.update(f"{escape(name)}: {version.load_step}, {version.load_progress:.0%}")
                time.sleep(POLL_SECONDS)
                version = client.version(name)
        if version.failure is not None:
            raise version.failure
        if version.state not in ("ready", "active"):
            raise VersionNotLoadedError(f"version {name!r} was unloaded as soon as it was loaded; load it again")
        _print_version(server, version, "loaded", as_json=as_json)


@index_app.command()
@with_connection
def unload(name: _Version, *, server: _RequiredServer, as_json: _JsonFlag = False, connection: Connect) -> None:
    """Has a server free a version that is neither active nor the canary."""
    with _reported(as_json=as_json), _client(server, connection) as client:
        _print_version(server, client.unload(name), "unloaded", as_json=as_json)


@index_app.command()
@with_connection
def canary(
    name: Annotated[str, typer.Argument(help="Name of a loaded version.")],
    share: Annotated[float, typer.Argument(min=0.0, max=1.0, help="Share of the requests, 0 to 1; 0 ends it.")],
    *,
    server: _RequiredServer,
    as_json: _JsonFlag = False,
    connection: Connect,
) -> None:
    """Sends a share of a server's traffic to a second version; which requests depends on their ids alone."""
    with _reported(as_json=as_json), _client(server, connection) as client:
        version = client.set_canary(name if share else "", share)
        if version is not None:
            _print_version(server, version, f"{share:.1%} of the requests go to", as_json=as_json)
        else:
            _print_done({"server": server, "canary": None}, f"no canary on {server}", as_json=as_json)


@contextlib.contextmanager
def _reported(*, as_json: bool) -> Iterator[None]:
    """Turns errors into a message and the exit code that they carry."""
    try:
        yield
    except (GeoSurgeError, OSError) as caught:
        # A store on a full or read-only disk is an error of the store, whatever the system calls it.
        error = caught if isinstance(caught, GeoSurgeError) else StoreError(str(caught))
        if as_json:
            _print_json({"error": {"reason": error.reason, "message": str(error)}})
        else:
            Console(stderr=True).print(f"[red]error[/red]: {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(error.exit_code) from caught


def _client(server: str, connection: Connect) -> IndexClient:
    # What only looks at files starts without gRPC.
    from geosurge.client import IndexClient  # noqa: PLC0415

    return IndexClient(server, connection=connection())


def _refuse_store(store: Path | None) -> None:
    if store is not None:
        raise UsageError("--server has its own store; leave out --store, or --server")


def _version_fields(version: IndexVersion) -> dict[str, Any]:
    fields = {field.name: getattr(version, field.name) for field in dataclasses.fields(version)}
    for name in ("state_time", "create_time"):
        fields[name] = fields[name] and _utc(fields[name])
    failure = version.failure
    fields["failure"] = None if failure is None else {"reason": failure.reason, "message": str(failure)}
    return fields


def _version_table(server: str, versions: Sequence[IndexVersion]) -> Table:
    table = Table(
        Column("version", no_wrap=True),
        *("state", "canary", "requests", "memory", "created", "problem"),
        title=f"index versions of {escape(server)}",
        title_justify="left",
    )
    for version in versions:
        state: str = version.state
        if state == "loading":
            state += f": {version.load_step}, {version.load_progress:.0%}"
        table.add_row(
            escape(version.name),
            escape(state),
            f"{version.canary_share:.1%}" if version.canary_share else "",
            str(version.request_count or ""),
            f"{version.memory_bytes / 1e6:,.0f} MB" if version.memory_bytes else "",
            _utc(version.create_time) if version.create_time else "",
            "" if version.failure is None else escape(str(version.failure)),
        )
    return table


def _print_version(server: str, version: IndexVersion, done: str, *, as_json: bool) -> None:
    _print_done({"server": server, **_version_fields(version)}, f"{done} {version.name} on {server}", as_json=as_json)


def _print_json(content: dict[str, Any]) -> None:
    typer.echo(json.dumps(content, ensure_ascii=False))


def _print_done(content: dict[str, Any], sentence: str, *, as_json: bool) -> None:
    if as_json:
        _print_json(content)
    else:
        Console().print(escape(sentence), soft_wrap=True)


def _print_bundle(bundle: Bundle, size: int) -> None:
    manifest = bundle.manifest
    facts = Table(show_header=False, box=None, pad_edge=False)
    encoder, calibration, gallery = manifest.encoder, manifest.calibration, manifest.gallery
    for name, value in (
        ("name", manifest.name),
        ("path", str(bundle.path)),
        ("created", _utc(manifest.create_time)),
        ("about", manifest.description),
        ("locates", manifest.domain.can),
        ("does not locate", manifest.domain.cannot),
        ("trained on", manifest.domain.training),
        ("size", f"{size / 1e6:.1f} MB in {len(manifest.files)} files"),
        ("cells", _CELL_KINDS[manifest.cell_kind]),
        ("vectors", f"{manifest.dimension} values, {manifest.scoring}, {manifest.metric}"),
        ("beam width", str(manifest.default_beam_width)),
        ("answer", manifest.point_estimator),
        ("gallery", "none" if gallery is None else f"{gallery.references:,} references, {gallery.storage}"),
        (
            "encoder",
            "none: answers embeddings only"
            if encoder is None
            else f"{encoder.vision} + {encoder.segmentation}, {encoder.parameters:,} parameters, {encoder.sha256[:12]}",
        ),
        (
            "calibration",
            "none"
            if calibration is None
            else f"temperature {calibration.temperature:.3g}, expected calibration error "
            f"{calibration.expected_calibration_error:.3f} on {calibration.sample_count:,} samples",
        ),
        ("checked by", f"{len(manifest.golden_queries)} golden queries, {len(manifest.golden_images)} golden images"),
        ("libraries", ", ".join(f"{library} {version}" for library, version in manifest.library_versions.items())),
    ):
        facts.add_row(f"[bold]{name}[/bold]", escape(value))
    has_s2_levels = any(level.s2_level_min is not None for level in manifest.levels)
    headings = ["level", "cells", *(["S2 levels"] if has_s2_levels else []), "temperature", "storage"]
    levels = Table(*headings, title="levels", title_justify="left")
    for level, temperature in zip(manifest.levels, manifest.temperatures, strict=True):
        s2_levels = "" if level.s2_level_min is None else f"{level.s2_level_min} to {level.s2_level_max}"
        columns = [s2_levels] if has_s2_levels else []
        levels.add_row(str(level.level), f"{level.cells:,}", *columns, f"{temperature:.4g}", level.storage)
    print_content(facts)
    print_content(levels)


def _utc(time: datetime) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")
