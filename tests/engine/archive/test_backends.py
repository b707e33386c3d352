from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.bad_archive import bomb, picture
from support.bundles import make_bundle, make_store, tiny_encoder
from support.servers import background_server, settings_for

from geosurge.archive.backends import Backend, LocalBackend, Query, ServerBackend, open_index, open_server
from geosurge.encoder import ImageEncoder
from geosurge.errors import (
    BundleNotFoundError,
    EncoderError,
    EncoderMissingError,
    GeoSurgeError,
    ImageTooManyPixelsError,
    ServiceError,
)
from geosurge.images import OWN_LIMITS
from geosurge.location import LocateOptions, Location

OPTIONS = LocateOptions(top_k=2)
IMAGES = [picture(seed) for seed in range(7)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("index") / "tiny", encoder=tiny_encoder())


@pytest.fixture(scope="module")
def local(bundle: Path) -> Iterator[LocalBackend]:
    with open_index(bundle, "cpu", 4) as backend:
        yield backend


@pytest.fixture(scope="module")
def address(bundle: Path) -> Iterator[str]:
    with background_server(settings_for(bundle, max_image_bytes=2_000_000, max_image_pixels=1_000_000)) as address:
        yield address


def decoded(backend: Backend, images: list[bytes]) -> list[Query]:
    assert backend.preprocessing is not None
    return [backend.preprocessing.decode(image, backend.limits) for image in images]


def numbers(outcome: Location | GeoSurgeError) -> tuple[float, ...]:
    assert isinstance(outcome, Location)
    return outcome.latitude_deg, outcome.longitude_deg, outcome.radius_km, outcome.probability


def test_an_index_says_who_it_is(local: Backend, bundle: Path, tmp_path: Path) -> None:
    assert local.index_version == "tiny"
    assert local.encoder_hash == tiny_encoder().fingerprint
    assert local.preprocessing == tiny_encoder().preprocessing
    assert (local.limits, local.batch_size, local.concurrency) == (OWN_LIMITS, 4, 2)
    store = make_store(tmp_path / "store", {"first": tiny_encoder(), "second": tiny_encoder(seed=1)})
    with open_index(store, "cpu", 4) as backend:
        assert backend.index_version == "first", "of a store the active one"


def test_an_answer_does_not_depend_on_the_batch_to_the_last_digit(local: Backend) -> None:
    queries = decoded(local, IMAGES)
    alone = [numbers(local.locate([query], OPTIONS)[0]) for query in queries]
    for size in (2, 3, 4):
        together = [numbers(each) for each in local.locate(queries[:size], OPTIONS)]
        assert together == alone[:size]
    assert len(set(alone)) > 1


def test_a_large_encoder_gets_the_batches_that_it_wants_whatever_is_asked_for(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageEncoder, "useful_batch_size", lambda _, limit: min(limit, 2))
    with open_index(bundle, "cpu", 4) as backend:
        assert backend.batch_size == 2
        queries = decoded(backend, IMAGES)
        alone = [numbers(backend.locate([query], OPTIONS)[0]) for query in queries]
        assert [numbers(each) for each in backend.locate(queries, OPTIONS)] == alone
    with open_index(bundle, "cpu", 1) as backend:
        assert backend.batch_size == 1


def test_a_batch_that_the_gpu_has_no_room_for_ends_the_run_with_what_to_do(
    local: LocalBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(pixels: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")

    monkeypatch.setattr(local.locator, "encode", encode)
    with pytest.raises(EncoderError, match=r"encoding 4 pictures takes more memory .*; give a smaller --batch-size"):
        local.locate(decoded(local, IMAGES[:2]), OPTIONS)


def test_a_batch_is_searched_while_the_next_is_encoded(local: LocalBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, under_way, most, overlap = Counter[str](), Counter[str](), Counter[str](), threading.Event()

    def watched(step: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def one(*arguments: object) -> object:
            begun[step] += 1
            under_way[step] += 1
            most[step] = max(most[step], under_way[step])
            if step == "encode" and begun[step] == 2:
                overlap.set()
            if step == "search":
                assert overlap.wait(60), "the second batch is encoded before the first has been searched"
            outcome = work(*arguments)
            under_way[step] -= 1
            return outcome

        return one

    monkeypatch.setattr(local.locator, "encode", watched("encode", local.locator.encode))
    search = local.locator.locate_embeddings
    monkeypatch.setattr(local.locator, "locate_embeddings", watched("search", search))
    queries = decoded(local, IMAGES[:2])
    with ThreadPoolExecutor(local.concurrency) as threads:
        outcomes = [outcome for (outcome,) in threads.map(lambda query: local.locate([query], OPTIONS), queries)]
    monkeypatch.undo()
    assert most == {"encode": 1, "search": 1}
    assert list(map(numbers, outcomes)) == [numbers(local.locate([query], OPTIONS)[0]) for query in queries]


def test_encoding_is_timed(local: Backend) -> None:
    (outcome,) = local.locate(decoded(local, IMAGES[:1]), OPTIONS)
    assert isinstance(outcome, Location)
    assert outcome.timings.encode_ms > 0


def test_an_index_without_an_encoder_or_that_is_not_there_is_refused(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bare")
    with pytest.raises(EncoderMissingError), open_index(bundle, "cpu", 4):
        pass
    with pytest.raises(BundleNotFoundError, match="nowhere"), open_index(tmp_path / "nowhere", "cpu", 4):
        pass


def test_a_server_answers_as_the_index_does(address: str, local: Backend) -> None:
    with open_server(address, None, 4, 30.0) as server:
        assert (server.index_version, server.encoder_hash) == (local.index_version, local.encoder_hash)
        assert server.preprocessing is None
        assert server.concurrency > 1
        outcomes = server.locate(IMAGES[:4], OPTIONS)
    for outcome, expected in zip(outcomes, local.locate(decoded(local, IMAGES[:4]), OPTIONS), strict=True):
        assert isinstance(outcome, Location)
        assert isinstance(expected, Location)
        assert numbers(outcome) == pytest.approx(numbers(expected), rel=1e-4)
        assert [cell.token for cell in outcome.path] == [cell.token for cell in expected.path]
        assert [leaf.token for leaf in outcome.alternatives] == [leaf.token for leaf in expected.alternatives]


def test_a_server_sets_the_limits_and_tells_which_image_is_bad(address: str) -> None:
    with open_server(address, None, 4, 30.0) as server:
        assert (server.limits.max_bytes, server.limits.max_pixels) == (2_000_000, 1_000_000)
        first, bad, last = server.locate([IMAGES[0], bomb(1), IMAGES[1]], OPTIONS)
    assert isinstance(first, Location)
    assert isinstance(bad, ImageTooManyPixelsError)
    assert isinstance(last, Location)


def test_a_run_ends_when_a_server_has_its_version_no_longer(address: str) -> None:
    with open_server(address, None, 4, 30.0) as server:
        assert isinstance(server, ServerBackend)
        unloaded = replace(server, index_version="unloaded")
        with pytest.raises(ServiceError, match=rf"{address} has the index version unloaded no longer"):
            unloaded.locate(IMAGES[:2], OPTIONS)


def test_a_server_that_cannot_locate_pictures_is_refused(tmp_path: Path) -> None:
    with (
        background_server(settings_for(make_bundle(tmp_path / "bare"))) as bare,
        pytest.raises(EncoderMissingError, match=bare),
        open_server(bare, None, 4, 30.0),
    ):
        pass


def test_a_server_that_is_gone_ends_the_run(bundle: Path) -> None:
    with background_server(settings_for(bundle)) as gone:
        backend = open_server(gone, None, 4, 1.0)
        server = backend.__enter__()
        assert np.isfinite(numbers(server.locate(IMAGES[:1], OPTIONS)[0])).all()
    with pytest.raises(ServiceError):
        server.locate(IMAGES[:2], OPTIONS)
    backend.__exit__(None, None, None)
    with pytest.raises(ServiceError), open_server(gone, None, 4, 1.0):
        pass
