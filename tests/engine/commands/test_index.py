from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from support.bundles import make_bundle
from support.servers import background_server, embedding, running, settings_for
from typer.testing import CliRunner

from geosurge import store as stores
from geosurge.bundle import read_manifest
from geosurge.client import Client
from geosurge.commands.index import POLL_SECONDS, index_app
from geosurge.description import VersionState


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    for seed, name in enumerate(("a", "b")):
        make_bundle(folder / name, seed=seed, name=name)
    return folder


@pytest.fixture
def store(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The default store, with the bundles a and b, of which a is active."""
    path = tmp_path / "store"
    stores.publish(path, sources / "a", activate=True)
    stores.publish(path, sources / "b")
    monkeypatch.setenv(stores.STORE_VARIABLE, str(path))
    return path


@pytest.fixture
def address(store: Path) -> Iterator[str]:
    """A server of the store."""
    with background_server(settings_for(store, scratch=store.parent)) as address:
        yield address


def run(*arguments: object) -> Result:
    return CliRunner().invoke(index_app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def run_json(*arguments: object, exit_code: int = 0) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == exit_code, result.output
    assert result.stdout.count("\n") == 1, "one line on standard output and nothing else"
    assert result.stderr == ""
    content: dict[str, Any] = json.loads(result.stdout)
    return content


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def test_list(store: Path) -> None:
    (store / "b" / "level-1.faiss").unlink()
    listed = run_json("list")
    assert listed["store"] == str(store)
    first, second = listed["bundles"]
    assert first == {"name": "a", "active": True, "create_time": "2025-03-01T12:00:00Z", "problem": None}
    assert (second["name"], second["active"], second["create_time"]) == ("b", False, None)
    assert "level-1.faiss is missing" in second["problem"]
    table = run("list", "--store", store)
    assert table.exit_code == 0
    assert "* " in table.stdout
    assert "2025-03-01T12:00:00Z" in table.stdout
    assert "is missing" in table.stdout


def test_inspect(store: Path) -> None:
    seen = run_json("inspect")
    assert seen["path"] == str(store / "a")
    assert seen["manifest"]["name"] == "a"
    assert [level["cells"] for level in seen["manifest"]["levels"]] == [4, 9, 20]
    assert seen["bytes"] == sum(file.size for file in read_manifest(store / "a").files.values())
    assert run_json("inspect", store / "b")["manifest"]["name"] == "b"
    text = run("inspect", store / "b").stdout
    for words in ("does not locate", "anything", "answers embeddings only", "hierarchical_product", "3 golden queries"):
        assert words in text


def test_inspect_shows_square_brackets_as_they_are(tmp_path: Path) -> None:
    path = make_bundle(tmp_path / "[bold]x[" / "tiny")
    assert str(path) in run("inspect", path).stdout


def test_verify(store: Path) -> None:
    assert run_json("verify") == {"path": str(store / "a"), "ok": True, "problems": []}
    assert "nothing wrong" in run("verify", store).stdout
    flip(store / "a" / "level-2.faiss")
    flip(store / "a" / "cells.lmdb" / "data.mdb")
    report = run_json("verify", exit_code=3)
    assert report["ok"] is False
    assert {problem["file"] for problem in report["problems"]} == {"level-2.faiss", "cells.lmdb/data.mdb"}
    assert {problem["reason"] for problem in report["problems"]} == {"BUNDLE_CORRUPT"}
    result = run("verify", store / "a")
    assert result.exit_code == 3
    assert "2 problems" in result.stdout
    assert "level-2.faiss" in result.stdout


def test_publish_activate_and_rollback(store: Path, sources: Path) -> None:
    assert run_json("publish", sources / "b", "--name", "c") == {"store": str(store), "name": "c", "active": False}
    assert stores.current(store) == "a"
    assert run_json("publish", sources / "b", "--name", "d", "--activate")["active"] is True
    assert stores.current(store) == "d"
    assert run_json("activate", "c") == {"store": str(store), "name": "c", "active": True}
    assert stores.current(store) == "c"
    assert run_json("rollback")["name"] == "d"
    assert run_json("rollback")["name"] == "a"
    assert stores.current(store) == "a"
    assert run("activate", "b").stdout == f"activated b in {store}\n"
    assert run("rollback").stdout == f"went back to a in {store}\n"


def test_publish_makes_a_store(sources: Path, tmp_path: Path) -> None:
    result = run("publish", sources / "a", "--store", tmp_path / "new", "--activate")
    assert result.exit_code == 0
    assert "published a in" in result.stdout
    assert stores.resolve_bundle(tmp_path / "new") == tmp_path / "new" / "a"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("activate", "nothing"), "BUNDLE_NOT_FOUND"),
        (("activate", "../a"), "STORE_INVALID"),
        (("rollback",), "STORE_INVALID"),
        (("list", "--store", "nowhere"), "STORE_INVALID"),
        (("inspect", "nowhere"), "BUNDLE_NOT_FOUND"),
        (("verify", "nowhere"), "BUNDLE_NOT_FOUND"),
        (("publish", "nowhere"), "BUNDLE_NOT_FOUND"),
    ],
)
def test_what_cannot_be_done_exits_with_3_and_its_reason(
    store: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: tuple[str, ...], reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    failure = run_json(*arguments, exit_code=3)
    assert failure["error"]["reason"] == reason
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (3, "")
    assert failure["error"]["message"] in result.stderr
    assert stores.current(store) == "a"


def test_a_damaged_source_is_not_published(store: Path, sources: Path, tmp_path: Path) -> None:
    source = shutil.copytree(sources / "b", tmp_path / "damaged")
    flip(source / "level-3.faiss")
    failure = run_json("publish", source, "--name", "c", exit_code=3)
    assert failure["error"]["reason"] == "BUNDLE_CORRUPT"
    assert "level-3.faiss" in failure["error"]["message"]
    assert not (store / "c").exists()


def test_an_error_of_the_file_system_is_an_error_of_the_store(store: Path, sources: Path) -> None:
    (store / ".publish.lock").unlink()
    (store / ".publish.lock").mkdir()
    assert run_json("publish", sources / "b", "--name", "c", exit_code=3)["error"]["reason"] == "STORE_INVALID"


@pytest.mark.parametrize("arguments", [("publish",), ("activate",), ("list", "--colour"), ("remove", "a")])
def test_wrong_usage_exits_with_2(store: Path, arguments: tuple[str, ...]) -> None:
    assert run(*arguments).exit_code == 2


def test_help_names_every_command() -> None:
    text = run("--help").stdout
    for command in ("list", "inspect", "verify", "publish", "activate", "rollback", "load", "unload", "canary"):
        assert command in text
    assert "Exits with 3" in run("verify", "--help").stdout


def test_the_versions_of_a_server_are_loaded_activated_rolled_back_and_unloaded(address: str, store: Path) -> None:
    server = ("--server", address)

    def states() -> dict[str, str]:
        return {version["name"]: version["state"] for version in run_json("list", *server)["versions"]}

    assert states() == {"a": "active", "b": "unloaded"}
    loaded = run_json("load", "b", *server)
    assert (loaded["server"], loaded["name"], loaded["state"], loaded["failure"]) == (address, "b", "ready", None)
    assert loaded["create_time"] == "2025-03-01T12:00:00Z"
    assert run_json("activate", "b", *server)["state"] == "active"
    with Client(address) as client:
        assert client.locate_embedding(embedding(0)).index_version == "b"
    assert (states(), stores.current(store)) == ({"a": "ready", "b": "active"}, "b")
    assert run_json("rollback", *server)["name"] == "a"
    assert run_json("canary", "b", "0.25", *server)["canary_share"] == 0.25
    table = run("list", *server).stdout
    assert f"index versions of {address}" in table
    for words in ("active", "ready", "25.0%"):
        assert words in table
    assert run_json("canary", "b", "0", *server) == {"server": address, "canary": None}
    assert run_json("unload", "b", *server)["name"] == "b"
    assert stores.current(store) == "a"

    assert run("load", "b", *server).stdout == f"loaded b on {address}\n"
    assert run("activate", "b", *server).stdout == f"activated b on {address}\n"
    assert run("rollback", *server).stdout == f"went back to a on {address}\n"
    assert run("canary", "b", "1", *server).stdout == f"100.0% of the requests go to b on {address}\n"
    assert run("canary", "b", "0", *server).stdout == f"no canary on {address}\n"
    assert run("unload", "b", *server).stdout == f"unloaded b on {address}\n"


async def test_a_version_that_is_still_being_unloaded_is_waited_for(store: Path) -> None:
    async with running(settings_for(store, scratch=store.parent)) as (server, _):
        versions = server._versions
        while versions.load("b").state is not VersionState.READY:
            await asyncio.sleep(0.01)
        with versions.acquire("b"):
            versions.unload("b")
            loading = asyncio.create_task(asyncio.to_thread(run, "load", "b", "--server", server.admin_address))
            while not versions.status("b").load_step:
                await asyncio.sleep(0.01)
            # It has been told that the version is draining, and asked again.
            await asyncio.sleep(2 * POLL_SECONDS)
        assert (await loading).stdout == f"loaded b on {server.admin_address}\n"
        assert versions.status("b").state is VersionState.READY


def test_a_version_that_a_server_cannot_use_exits_with_3_and_its_reason(address: str, store: Path) -> None:
    flip(store / "b" / "level-2.faiss")
    for command in ("load", "activate"):
        failure = run_json(command, "b", "--server", address, exit_code=3)
        assert failure["error"]["reason"] == "BUNDLE_CORRUPT"
        result = run(command, "b", "--server", address)
        assert (result.exit_code, result.stdout) == (3, "")
        assert "level-2.faiss" in result.stderr
    assert "failed" in run("list", "--server", address).stdout
    for arguments, reason in (
        (("unload", "a"), "VERSION_IN_USE"),
        (("canary", "b", "0.5"), "VERSION_NOT_LOADED"),
        (("rollback",), "STORE_INVALID"),
        (("activate", "c"), "BUNDLE_NOT_FOUND"),
    ):
        assert run_json(*arguments, "--server", address, exit_code=3)["error"]["reason"] == reason
    listed = run_json("list", "--server", address)["versions"]
    assert [(version["name"], version["state"]) for version in listed] == [("a", "active"), ("b", "failed")]
    assert listed[1]["failure"]["reason"] == "BUNDLE_CORRUPT"


@pytest.mark.parametrize(
    "arguments",
    [
        ("list", "--server", "127.0.0.1:1", "--store", "."),
        ("activate", "a", "--server", "127.0.0.1:1", "--store", "."),
        ("rollback", "--server", "127.0.0.1:1", "--store", "."),
        ("activate", "a", "--unload-first"),
        ("load", "a"),
        ("unload", "a"),
        ("canary", "a", "0.5"),
        ("canary", "a", "1.5", "--server", "127.0.0.1:1"),
        ("list", "--server", "nonsense"),
    ],
)
def test_what_is_said_of_a_server_must_fit_together(store: Path, arguments: tuple[str, ...]) -> None:
    assert run(*arguments).exit_code == 2


def test_a_server_that_is_not_there_exits_with_3() -> None:
    assert run_json("list", "--server", "127.0.0.1:1", exit_code=3)["error"]["reason"] == "UNAVAILABLE"
