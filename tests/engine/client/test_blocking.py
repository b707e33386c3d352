from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from support.clients import MAX_IMAGE_BYTES, ended_streams, free_port, queries, without_timings
from support.servers import background_server, embedding, encoded_image, settings_for

from geosurge.client import AsyncClient, Client, Query, RetryPolicy
from geosurge.errors import (
    CellUnknownError,
    CoordinateOutOfRangeError,
    DeadlineExceededError,
    EmbeddingInvalidError,
    IndexVersionUnknownError,
    OptionOutOfRangeError,
)
from geosurge.location import LocateOptions, Location
from geosurge.locator import Locator


def test_the_client_imports_no_model_and_no_index() -> None:
    program = (
        "import sys, geosurge.client; "
        "print([name for name in ('torch', 'faiss', 'transformers', 'lmdb', 'PIL') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_options_and_the_version_reach_the_server(client: Client) -> None:
    location = client.locate_embedding(embedding(1), LocateOptions(top_k=2, exact=True), index_version="tiny")
    assert len(location.alternatives) == 2
    assert location.index_version == "tiny"
    with pytest.raises(IndexVersionUnknownError, match="'nope'"):
        client.locate_embedding(embedding(1), index_version="nope")


def test_bad_options_and_embeddings_are_refused(client: Client) -> None:
    for options in (LocateOptions(top_k=0), LocateOptions(top_k=-1), LocateOptions(confidence_level=2)):
        with pytest.raises(OptionOutOfRangeError):
            client.locate_embedding(embedding(0), options)
    for wrong in (embedding(0)[1:], embedding(0)[None], np.full(16, np.nan), np.arange(16)):
        with pytest.raises(EmbeddingInvalidError):
            client.locate_embedding(wrong)


def test_many_answers_come_in_order_and_bad_ones_cost_themselves_alone(client: Client, tmp_path: Path) -> None:
    sent, expected = queries(tmp_path)
    answers = list(client.locate_many(iter(sent), window=7))
    assert [type(answer) for answer in answers] == expected
    alone = client.locate(sent[0])
    for position in range(0, 50, 10):
        answer = answers[position]
        assert isinstance(answer, Location)
        assert answer.path[-1].token == alone.path[-1].token


def test_an_answered_stream_counts_as_a_call_that_succeeded(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "geosurge.server.interceptors")
    for seed in range(60):
        (answer,) = client.locate_many([encoded_image(seed)])
        assert isinstance(answer, Location)
    assert ended_streams(caplog, 60) == ["OK"] * 60
    next(client.locate_many(encoded_image(seed) for seed in range(1000)))
    assert ended_streams(caplog, 61)[-1] == "CANCELLED", "one whose answers nobody wants any more"


def test_no_queries_give_no_answers(client: Client) -> None:
    assert list(client.locate_many([])) == []


def test_what_the_iterable_raises_reaches_the_caller_after_the_answers(client: Client) -> None:
    def broken() -> Iterator[bytes]:
        yield encoded_image(1)
        raise OSError("the disk is gone")

    answers = client.locate_many(broken())
    assert isinstance(next(answers), Location)
    with pytest.raises(OSError, match="the disk is gone"):
        next(answers)


def test_the_consumer_may_leave_early(client: Client) -> None:
    def own_threads() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name in ("geosurge-feed", "geosurge-receive")}

    before = own_threads()
    for answer in client.locate_many(embedding(seed) for seed in range(10_000)):
        assert isinstance(answer, Location)
        assert own_threads() - before
        break
    deadline = time.monotonic() + 30
    while own_threads() - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not own_threads() - before


def test_a_stream_survives_a_restart_of_the_server(bundle: Path) -> None:
    port = free_port()
    with ExitStack() as first, ExitStack() as second:
        address = first.enter_context(background_server(settings_for(bundle, port=port)))
        client = second.enter_context(Client(address, retry=RetryPolicy(max_attempts=20)))

        def send() -> Iterator[bytes]:
            for number in range(30):
                if number == 15:
                    first.close()
                    second.enter_context(background_server(settings_for(bundle, port=port)))
                yield encoded_image(number)

        answers = list(client.locate_many(send(), window=4))
        assert [without_timings(answer).path[-1].token for answer in answers] == [
            client.locate(encoded_image(number)).path[-1].token for number in range(30)
        ]


def test_a_stream_outlasts_a_restart_longer_than_all_attempts_of_a_first_contact(bundle: Path) -> None:
    port = free_port()
    retry = RetryPolicy(max_attempts=2, first_pause_seconds=0.05)
    with ExitStack() as first, ExitStack() as second:
        address = first.enter_context(background_server(settings_for(bundle, port=port)))
        starting = threading.Timer(1, lambda: second.enter_context(background_server(settings_for(bundle, port=port))))

        def send() -> Iterator[Query]:
            for number in range(20):
                if number == 10:
                    first.close()
                    starting.start()
                yield embedding(number)

        with Client(address, retry=retry) as client:
            answers = list(client.locate_many(send(), window=4))
        starting.join()
        assert [type(answer) for answer in answers] == [Location] * 20


async def test_more_than_one_stream_may_have_goes_on_in_others(bundle: Path) -> None:
    queries = [embedding(number % 7) for number in range(500)]
    with background_server(settings_for(bundle, max_stream_items=90)) as address:
        with Client(address) as client:
            expected = [client.locate_embedding(query).path for query in queries[:7]]
            answers = list(client.locate_many(queries))
        async with AsyncClient(address) as other:
            others = [answer async for answer in other.locate_many(queries)]
    for received in (answers, others):
        assert [type(answer) for answer in received] == [Location] * len(queries)
        found = [[cell.token for cell in answer.path] for answer in received if isinstance(answer, Location)]
        assert found == [[cell.token for cell in expected[number % 7]] for number in range(500)]


def test_a_stream_without_answers_ends_at_its_deadline(bundle: Path) -> None:
    async def run() -> None:
        from support.servers import running

        async with running(settings_for(bundle, max_concurrent_requests=1)) as (server, _):
            with server._admission.take():
                async with AsyncClient(server.address) as client:
                    with pytest.raises(DeadlineExceededError, match=r"0\.3 s"):
                        _ = [answer async for answer in client.locate_many([encoded_image(1)], timeout_seconds=0.3)]

                def block() -> None:
                    with Client(server.address) as client, pytest.raises(DeadlineExceededError):
                        list(client.locate_many([encoded_image(1)], timeout_seconds=0.3))

                await asyncio.to_thread(block)

    asyncio.run(run())


def test_info_cells_children_and_path(client: Client, bundle: Path) -> None:
    info = client.get_info()
    with Locator.open(bundle) as locator:
        assert info.cell_counts == locator.tree.cell_counts
        assert info.encoder_sha256 == locator.encoder.fingerprint
        assert info.index_create_time == locator.manifest.create_time
        leaf_tokens = locator.tree.tokens(3, np.arange(locator.tree.cell_counts[2]))
    assert info.max_image_bytes == MAX_IMAGE_BYTES
    settings = settings_for(bundle)
    assert info.max_concurrent_requests == info.max_requests_per_peer == settings.max_concurrent_requests
    assert info.max_stream_items == settings.max_stream_items
    found = [
        leaf.token
        for continent in client.children()
        for region in client.children(continent.token, 1)
        for leaf in client.children(region.token, 2)
    ]
    assert found == leaf_tokens
    leaf = client.cell(leaf_tokens[5], 3)
    assert (leaf.level, leaf.ordinal, leaf.child_ordinals) == (3, 5, range(0))
    path = client.path(leaf.mean.latitude_deg, leaf.mean.longitude_deg)
    assert [cell.level for cell in path] == [1, 2, 3]
    assert path[-1] == leaf
    assert path[1].ordinal == leaf.parent_ordinal
    assert leaf.ordinal in path[1].child_ordinals
    with pytest.raises(CellUnknownError):
        client.cell("zz")
    with pytest.raises(CoordinateOutOfRangeError):
        client.path(91.0, 0.0)


def test_a_listing_longer_than_a_page_comes_whole(bundle: Path) -> None:
    with background_server(settings_for(bundle, max_page_size=1)) as address, Client(address) as client:
        assert [cell.ordinal for cell in client.children()] == [0, 1, 2, 3]
