"""Bundles that cannot be used, and bundles that somebody ruins under the server's feet: it goes on answering."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from support.answers import expected_answers, question, questions, same_answer
from support.bundles import make_bundle, tiny_encoder
from support.processes import ServerProcess, geolocation, index_client, server_process, start_fails, wait_until
from support.servers import embedding, encoded_image
from support.traffic import load

from geosurge import store as stores
from geosurge.bundle import finish_bundle, read_manifest
from geosurge.bundle.manifest import MANIFEST_FILE
from geosurge.client import Client
from geosurge.errors import BundleError, GeoSurgeError
from geosurge.location import LocateOptions

QUERIES = [query for seed in range(4) for query in (encoded_image(seed), embedding(seed))]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sound bundles: a and b share an encoder; wide is of another dimension, and foreign has another encoder."""
    folder = tmp_path_factory.mktemp("sources")
    make_bundle(folder / "a", name="a", encoder=tiny_encoder())
    make_bundle(folder / "b", name="b", seed=1, encoder=tiny_encoder())
    make_bundle(folder / "wide", name="wide", encoder=tiny_encoder(dimension=24))
    make_bundle(folder / "foreign", name="foreign", encoder=tiny_encoder(seed=1))
    return folder


@pytest.fixture(scope="module")
def server(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    store = tmp_path_factory.mktemp("server") / "store"
    stores.publish(store, sources / "a", activate=True)
    stores.publish(store, sources / "b")
    with server_process(store) as running:
        yield running


@pytest.fixture
def store(server: ServerProcess, sources: Path) -> Path:
    """The server's store, where a and b are sound and a is active."""
    path = Path(str(server.process.args[server.process.args.index("--index") + 1]))  # type: ignore[index]
    for name in ("a", "b"):
        shutil.rmtree(path / name, ignore_errors=True)
        shutil.copytree(sources / name, path / name)
    with index_client(server) as index:
        index.activate("a")
        index.unload("b")
    return path


def assert_answers(server: ServerProcess, bundle: Path) -> None:
    with grpc.insecure_channel(server.address) as channel:
        answers = [geolocation(channel).Locate(asked, timeout=60) for asked in questions(QUERIES)]
    assert all(map(same_answer, answers, expected_answers(bundle, QUERIES)))


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def refinish(bundle: Path) -> None:
    finish_bundle(bundle, read_manifest(bundle))


def other_dimension(bundle: Path, sources: Path) -> None:
    for file in (sources / "wide").glob("level-*.faiss"):
        shutil.copy(file, bundle)
    refinish(bundle)


def other_encoder(bundle: Path, sources: Path) -> None:
    shutil.copytree(sources / "foreign" / "encoder", bundle / "encoder", dirs_exist_ok=True)
    refinish(bundle)


def other_tree(bundle: Path, sources: Path) -> None:
    shutil.copytree(sources / "b" / "cells.lmdb", bundle / "cells.lmdb", dirs_exist_ok=True)
    refinish(bundle)


def newer_schema(bundle: Path, sources: Path) -> None:
    content = json.loads((bundle / MANIFEST_FILE).read_text())
    (bundle / MANIFEST_FILE).write_text(json.dumps({**content, "schema_version": 99}))


DAMAGE: dict[str, tuple[Callable[[Path, Path], object], str, str]] = {
    "truncated-level": (lambda bundle, _: cut(bundle / "level-3.faiss"), "BUNDLE_CORRUPT", "level-3.faiss"),
    "truncated-tree": (lambda bundle, _: cut(bundle / "cells.lmdb" / "data.mdb"), "BUNDLE_CORRUPT", "cells.lmdb"),
    "truncated-manifest": (lambda bundle, _: cut(bundle / MANIFEST_FILE), "BUNDLE_CORRUPT", MANIFEST_FILE),
    "flipped-level": (lambda bundle, _: flip(bundle / "level-2.faiss"), "BUNDLE_CORRUPT", "level-2.faiss"),
    "flipped-tree": (lambda bundle, _: flip(bundle / "cells.lmdb" / "data.mdb"), "BUNDLE_CORRUPT", "cells.lmdb"),
    "flipped-encoder": (
        lambda bundle, _: flip(bundle / "encoder" / "model.safetensors"),
        "BUNDLE_CORRUPT",
        "model.safetensors",
    ),
    "flipped-manifest": (lambda bundle, _: flip(bundle / MANIFEST_FILE), "BUNDLE_CORRUPT", MANIFEST_FILE),
    "other-dimension": (other_dimension, "BUNDLE_INCONSISTENT", "vectors of 24 values, but the manifest says 16"),
    "other-tree": (other_tree, "BUNDLE_INCONSISTENT", "cell tree"),
    "other-encoder": (other_encoder, "BUNDLE_ENCODER_MISMATCH", "encoder"),
    "newer-schema": (newer_schema, "BUNDLE_SCHEMA_UNSUPPORTED", "schema version 99; this engine reads 1"),
    "no-manifest": (lambda bundle, _: (bundle / MANIFEST_FILE).unlink(), "BUNDLE_PARTIAL", MANIFEST_FILE),
    "no-level": (lambda bundle, _: (bundle / "level-1.faiss").unlink(), "BUNDLE_PARTIAL", "level-1.faiss"),
    "empty": (lambda bundle, _: [shutil.rmtree(bundle), bundle.mkdir()], "BUNDLE_PARTIAL", MANIFEST_FILE),
}


async def test_every_bad_bundle_is_refused_with_its_reason_while_the_active_one_answers(
    server: ServerProcess, store: Path, sources: Path
) -> None:
    for name, (damage, _, _) in DAMAGE.items():
        stores.publish(store, sources / "a", name=name, verify=False)
        damage(store / name, sources)
    refusals: dict[str, BundleError] = {}
    with index_client(server) as index:
        async with load(server.address, questions(QUERIES), 4) as log:
            for name, (_, reason, words) in DAMAGE.items():
                try:
                    await asyncio.to_thread(index.activate, name)
                except BundleError as error:
                    refusals[name] = error
                seen = index.version(name)
                assert seen.state == "failed", name
                assert seen.failure is not None
                assert (seen.failure.reason, str(seen.failure)) == (refusals[name].reason, str(refusals[name]))
                assert refusals[name].reason == reason
                assert words in str(refusals[name])
                assert index.version("a").state == "active"
        assert stores.current(store) == "a"
        index.activate("b")
    assert log.failures == {}
    assert log.calls > len(DAMAGE)
    assert log.inconsistent({"a": expected_answers(sources / "a", QUERIES)}) == 0
    assert_answers(server, sources / "b")
    assert server.metric("geosurge_load_seconds_count", outcome="failed") >= len(DAMAGE)
    assert list(server.scratch.iterdir()) == []
    for name in DAMAGE:
        shutil.rmtree(store / name)


def test_a_bundle_that_is_still_being_copied_is_refused_until_it_is_whole(
    server: ServerProcess, store: Path, sources: Path
) -> None:
    files = sorted(path.relative_to(sources / "b") for path in (sources / "b").rglob("*") if path.is_file())
    shutil.rmtree(store / "b")
    with index_client(server) as index:
        for file in files:
            if (store / "b").exists():
                with pytest.raises(BundleError):
                    index.activate("b")
            target = store / "b" / file
            target.parent.mkdir(parents=True, exist_ok=True)
            content = (sources / "b" / file).read_bytes()
            target.write_bytes(content[: len(content) // 2])
            with pytest.raises(BundleError):
                index.activate("b")
            target.write_bytes(content)
        assert_answers(server, sources / "a")
        index.activate("b")
    assert_answers(server, sources / "b")


def test_the_files_of_the_active_bundle_may_be_overwritten_truncated_and_deleted(
    server: ServerProcess, store: Path, sources: Path
) -> None:
    with Client(server.address) as client:
        cells = list(client.children())
        inside = client.locate(QUERIES[0], LocateOptions(region_tokens=(cells[1].token,)))
        for file in [path for path in (store / "a").rglob("*") if path.is_file()]:
            with file.open("r+b") as content:
                content.write(bytes(file.stat().st_size))
        assert_answers(server, sources / "a")
        for file in [path for path in (store / "a").rglob("*") if path.is_file()]:
            file.write_bytes(b"")
        assert_answers(server, sources / "a")
        shutil.rmtree(store / "a")
        assert_answers(server, sources / "a")
        assert list(client.children()) == cells
        again = client.locate(QUERIES[0], LocateOptions(region_tokens=(cells[1].token,)))
        assert (again.path, again.alternatives) == (inside.path, inside.alternatives)
    assert server.health() == "SERVING"
    status, words = start_fails(store)
    assert status != 0
    assert "names 'a', which is not there; activate another bundle" in words
    with index_client(server) as index:
        assert index.version("a").state == "active"
        index.activate("b")
        index.unload("a")
        wait_until(lambda: index.version("a").state == "unloaded", "a is unloaded")
        with pytest.raises(BundleError, match="'a'"):
            index.activate("a")
        with pytest.raises(BundleError):
            index.rollback()
    assert_answers(server, sources / "b")


@pytest.mark.parametrize("ruin", [shutil.rmtree, lambda bundle: cut(bundle / "level-3.faiss")], ids=["delete", "cut"])
def test_a_bundle_that_is_ruined_while_it_is_loaded_is_refused(
    server: ServerProcess, store: Path, sources: Path, ruin: Callable[[Path], object]
) -> None:
    padded = shutil.copytree(sources / "b", store / "padded", dirs_exist_ok=True)
    # Read before everything else, which takes a while.
    (padded / "a.bin").write_bytes(bytes(48 << 20))
    finish_bundle(padded, read_manifest(padded).model_copy(update={"name": "padded"}))
    with index_client(server) as index:
        index.load("padded")
        wait_until(lambda: index.version("padded").load_step == "reading a.bin", "the load has begun")
        ruin(padded)
        wait_until(lambda: index.version("padded").state != "loading", "the load has ended")
        seen = index.version("padded")
        assert (seen.state, index.version("a").state) == ("failed", "active")
        assert isinstance(seen.failure, BundleError), seen.failure
        assert "padded" in str(seen.failure)
    assert_answers(server, sources / "a")
    assert list(server.scratch.iterdir()) == []
    shutil.rmtree(padded, ignore_errors=True)


def test_a_bundle_may_be_deleted_as_soon_as_it_is_loaded(server: ServerProcess, store: Path, sources: Path) -> None:
    with index_client(server) as index:
        index.load("b")
        wait_until(lambda: index.version("b").state == "ready", "b is loaded")
        shutil.rmtree(store / "b")
        with grpc.insecure_channel(server.address) as channel:
            pinned = geolocation(channel).Locate(question(QUERIES[0], version="b"), timeout=60)
        assert same_answer(pinned, expected_answers(sources / "b", QUERIES[:1])[0])
        with pytest.raises(BundleError, match="'b'"):
            index.activate("b")
    assert stores.current(store) == "a"
    assert_answers(server, sources / "a")


def test_sighup_follows_the_store_and_ignores_what_cannot_be_used(
    server: ServerProcess, store: Path, sources: Path
) -> None:
    with Client(server.address) as client, index_client(server) as index:

        def follow(version: str) -> None:
            server.send(signal.SIGHUP)
            wait_until(lambda: client.locate(QUERIES[0]).index_version == version, f"{version} answers")

        stores.activate(store, "b")
        assert client.locate(QUERIES[0]).index_version == "a"
        follow("b")
        assert_answers(server, sources / "b")
        stores.activate(store, "a")
        follow("a")
        index.unload("b")
        wait_until(lambda: index.version("b").state == "unloaded", "b is unloaded")

        stores.activate(store, "b")
        flip(store / "b" / "level-1.faiss")
        server.send(signal.SIGHUP)
        wait_until(lambda: index.version("b").state == "failed", "b is refused")
        assert index.version("a").state == "active"

        told = server.log.count("was not activated")
        (store / stores.CURRENT_FILE).write_text("no such bundle\n")
        server.send(signal.SIGHUP)
        wait_until(lambda: server.log.count("was not activated") > told, "the pointer is refused")
        assert_answers(server, sources / "a")
        stores.activate(store, "a")


def test_a_bundle_of_another_dimension_that_is_sound_becomes_active_and_says_what_it_needs(
    server: ServerProcess, store: Path, sources: Path
) -> None:
    stores.publish(store, sources / "wide", verify=False)
    with (
        index_client(server) as index,
        grpc.insecure_channel(server.address) as channel,
        Client(server.address) as client,
    ):
        index.activate("wide")
        with pytest.raises(GeoSurgeError, match="24") as refused:
            client.locate_embedding(embedding(0))
        assert refused.value.reason == "EMBEDDING_INVALID"
        pinned = geolocation(channel).Locate(question(embedding(0), version="a"), timeout=60)
        assert pinned.index_version == "a"
        assert client.locate(QUERIES[0]).index_version == "wide"
        index.activate("a")
        index.unload("wide")
    shutil.rmtree(store / "wide")
    assert_answers(server, sources / "a")
