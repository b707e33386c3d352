from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image
from support.bundles import make_bundle, tiny_encoder
from support.servers import background_server, embedding, encoded_image, settings_for

from geosurge.client import AsyncClient, Client, Query, RetryPolicy, _split
from geosurge.errors import (
    CellUnknownError,
    CoordinateOutOfRangeError,
    DeadlineExceededError,
    EmbeddingInvalidError,
    GeoSurgeError,
    ImageEmptyError,
    ImageFormatUnsupportedError,
    ImageNotDecodableError,
    ImageTooLargeError,
    IndexVersionUnknownError,
    InputNotReadableError,
    MessageTooLargeError,
    OptionOutOfRangeError,
    ServiceError,
)
from geosurge.location import LocateOptions, Location, Timings
from geosurge.locator import Locator
from geosurge.server.message_size import check_message_size
from geosurge.v1 import geolocation_pb2, geolocation_pb2_grpc

MAX_IMAGE_BYTES = 100_000


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundles") / "tiny", encoder=tiny_encoder())


@pytest.fixture(scope="module")
def address(bundle: Path) -> Iterator[str]:
    with background_server(settings_for(bundle, max_image_bytes=MAX_IMAGE_BYTES)) as address:
        yield address


@pytest.fixture
def client(address: str) -> Iterator[Client]:
    with Client(address) as client:
        yield client


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def without_timings(location: Location | GeoSurgeError) -> Location:
    assert isinstance(location, Location), location
    return replace(location, timings=Timings())


def test_the_client_imports_no_model_and_no_index() -> None:
    program = (
        "import sys, geosurge.client; "
        "print([name for name in ('torch', 'faiss', 'transformers', 'lmdb', 'PIL') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_a_path_bytes_an_array_and_a_picture_get_one_answer(client: Client, bundle: Path, tmp_path: Path) -> None:
    data = encoded_image(1)
    path = tmp_path / "view.png"
    path.write_bytes(data)
    picture = Image.open(path)
    with Locator.open(bundle) as locator:
        expected = without_timings(locator.locate([data])[0])
    for image in (path, str(path), data, np.asarray(picture), picture):
        assert without_timings(client.locate(image)) == expected


def test_a_rotated_picture_is_sent_upright(client: Client, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "rotated.jpg"
    Image.fromarray(np.arange(40 * 48 * 3, dtype=np.uint8).reshape(40, 48, 3)).save(path, exif=exif, quality=100)
    with Image.open(path) as picture:
        sent = client.locate(picture)
    assert without_timings(sent).path[-1].token == client.locate(path).path[-1].token
    assert sent.probability == pytest.approx(client.locate(path).probability, rel=1e-6)


def test_options_and_the_version_reach_the_server(client: Client) -> None:
    location = client.locate_embedding(embedding(1), LocateOptions(top_k=2, exact=True), index_version="tiny")
    assert len(location.alternatives) == 2
    assert location.index_version == "tiny"
    with pytest.raises(IndexVersionUnknownError, match="'nope'"):
        client.locate_embedding(embedding(1), index_version="nope")


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (b"", ImageEmptyError),
        (b"no image", ImageNotDecodableError),
        (encoded_image(1) + bytes(MAX_IMAGE_BYTES), ImageTooLargeError),
        (bytes(3_000_000), MessageTooLargeError),
        ("missing.jpg", InputNotReadableError),
        (Path(__file__).parent, InputNotReadableError),
        ("nul\x00byte.jpg", InputNotReadableError),
        (np.zeros((4, 4), np.uint8), ImageFormatUnsupportedError),
        (np.zeros((4, 4, 3)), ImageFormatUnsupportedError),
        (np.zeros((0, 4, 3), np.uint8), ImageFormatUnsupportedError),
        (3, ImageFormatUnsupportedError),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else type(value).__name__,
)
def test_an_image_that_cannot_be_used_raises_the_class_that_says_why(
    client: Client, image: Any, expected: type[GeoSurgeError]
) -> None:
    with pytest.raises(expected) as caught:
        client.locate(image)
    assert type(caught.value) is expected


def test_bad_options_and_embeddings_are_refused(client: Client) -> None:
    for options in (LocateOptions(top_k=0), LocateOptions(top_k=-1), LocateOptions(confidence_level=2)):
        with pytest.raises(OptionOutOfRangeError):
            client.locate_embedding(embedding(0), options)
    for wrong in (embedding(0)[1:], embedding(0)[None], np.full(16, np.nan), np.arange(16)):
        with pytest.raises(EmbeddingInvalidError):
            client.locate_embedding(wrong)


def queries(directory: Path) -> tuple[list[Query], list[type]]:
    """Every kind of query, good and bad, and what each becomes."""
    file = directory / "good.png"
    file.write_bytes(encoded_image(2))
    large = directory / "large.jpg"
    large.write_bytes(bytes(5_000_000))
    pairs: list[tuple[Any, type]] = [
        (encoded_image(1), Location),
        (b"", ImageEmptyError),
        (file, Location),
        ("missing.jpg", InputNotReadableError),
        (bytes(5_000_000), ImageTooLargeError),
        (large, ImageTooLargeError),
        (embedding(1), Location),
        (embedding(1)[2:], EmbeddingInvalidError),
        (np.zeros((48, 48, 3), np.uint8), Location),
        (b"no image", ImageNotDecodableError),
    ] * 5
    return [query for query, _ in pairs], [kind for _, kind in pairs]


def test_many_answers_come_in_order_and_bad_ones_cost_themselves_alone(client: Client, tmp_path: Path) -> None:
    sent, expected = queries(tmp_path)
    answers = list(client.locate_many(iter(sent), window=7))
    assert [type(answer) for answer in answers] == expected
    alone = client.locate(sent[0])
    for position in range(0, 50, 10):
        answer = answers[position]
        assert isinstance(answer, Location)
        assert answer.path[-1].token == alone.path[-1].token


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
    before = threading.active_count()
    for answer in client.locate_many(embedding(seed) for seed in range(10_000)):
        assert isinstance(answer, Location)
        break
    deadline = time.monotonic() + 30
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


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


async def test_an_asynchronous_stream_outlasts_it_too_and_ends_at_its_timeout(bundle: Path) -> None:
    port = free_port()
    retry = RetryPolicy(max_attempts=2, first_pause_seconds=0.05)
    with ExitStack() as first, ExitStack() as second:
        address = first.enter_context(background_server(settings_for(bundle, port=port)))
        starting = threading.Timer(1, lambda: second.enter_context(background_server(settings_for(bundle, port=port))))

        async def send() -> AsyncIterator[Query]:
            for number in range(30):
                if number == 10:
                    await asyncio.to_thread(first.close)
                    starting.start()
                if number == 20:
                    await asyncio.to_thread(second.close)
                yield embedding(number)

        answers = []
        async with AsyncClient(address, retry=retry) as client:
            with pytest.raises((ServiceError, DeadlineExceededError)):  # noqa: PT012
                async for answer in client.locate_many(send(), window=4, timeout_seconds=10):
                    answers.append(answer)  # noqa: PERF401
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


@pytest.mark.parametrize("timeout", [0, -1])
def test_a_timeout_of_nothing_is_not_the_default(client: Client, timeout: float) -> None:
    with pytest.raises(DeadlineExceededError, match="did not answer within"):
        client.get_info(timeout_seconds=timeout)
    with pytest.raises(DeadlineExceededError, match="did not answer within"):
        client.locate_embedding(embedding(0), timeout_seconds=timeout)


def test_a_server_that_comes_up_late_is_waited_for(bundle: Path) -> None:
    port = free_port()
    with ExitStack() as stack:
        client = stack.enter_context(Client(f"127.0.0.1:{port}", retry=RetryPolicy(max_attempts=50)))
        starting = threading.Timer(0.3, lambda: stack.enter_context(background_server(settings_for(bundle, port=port))))
        starting.start()
        assert client.locate_embedding(embedding(0)).index_version == "tiny"
        starting.join()


def test_a_server_that_stays_away_is_reported_with_its_address() -> None:
    port = free_port()
    with Client(f"127.0.0.1:{port}", retry=RetryPolicy(max_attempts=2)) as client:
        with pytest.raises(ServiceError, match=f"127.0.0.1:{port} cannot be reached"):
            client.get_info()
        with pytest.raises(ServiceError):
            list(client.locate_many([encoded_image(1)]))


@pytest.mark.parametrize("attempts", [1, 2])
def test_a_call_that_the_server_itself_cancels_is_repeated(attempts: int) -> None:
    answers = iter([grpc.StatusCode.CANCELLED])

    class Stopping(geolocation_pb2_grpc.GeolocationServiceServicer):
        def GetInfo(self, request: Any, context: grpc.ServicerContext) -> geolocation_pb2.GetInfoResponse:  # noqa: N802
            for code in answers:
                context.abort(code, "stopping")
            return geolocation_pb2.GetInfoResponse(index_version="answered")

    server = grpc.server(ThreadPoolExecutor(1))
    geolocation_pb2_grpc.add_GeolocationServiceServicer_to_server(Stopping(), server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with Client(f"127.0.0.1:{port}", retry=RetryPolicy(max_attempts=attempts)) as client:
            if attempts == 1:
                with pytest.raises(ServiceError, match="ended before it took the call"):
                    client.get_info()
            else:
                assert client.get_info().index_version == "answered"
    finally:
        server.stop(None)


@pytest.fixture
def silent_address() -> Iterator[str]:
    """A port that accepts connections and never says a word."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def test_a_call_ends_at_its_deadline(silent_address: str) -> None:
    with Client(silent_address, timeout_seconds=0.3) as client:
        begun = time.monotonic()
        with pytest.raises((DeadlineExceededError, ServiceError)):
            client.locate_embedding(embedding(0))
        assert time.monotonic() - begun < 10


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


def test_pauses_grow_up_to_a_limit_and_end_with_the_deadline() -> None:
    policy = RetryPolicy(max_attempts=10, first_pause_seconds=0.1, longest_pause_seconds=1.0)
    for failed, mean in ((1, 0.1), (2, 0.2), (3, 0.4), (9, 1.0)):
        pauses = [policy.pause_seconds(failed, 100) for _ in range(50)]
        assert all(pause is not None and 0.5 * mean <= pause <= 1.5 * mean for pause in pauses)
        assert len(set(pauses)) > 1
    assert policy.pause_seconds(10, 100) is None
    assert policy.pause_seconds(1, 0.04) is None


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


async def test_the_asynchronous_client_does_the_same(address: str, tmp_path: Path) -> None:
    sent, expected = queries(tmp_path)

    async def asynchronous() -> AsyncIterator[Query]:
        for query in sent:
            yield query

    with Client(address) as blocking:
        async with AsyncClient(address) as client:
            for source in (sent, asynchronous()):
                assert [type(answer) async for answer in client.locate_many(source, window=7)] == expected
            async for _ in client.locate_many(embedding(seed) for seed in range(1000)):
                break
            located = await client.locate(encoded_image(1))
            assert without_timings(located) == without_timings(blocking.locate(encoded_image(1)))
            assert (await client.locate_embedding(embedding(1))).index_version == "tiny"
            assert await client.get_info() == blocking.get_info()
            top = [cell async for cell in client.children()]
            assert top == list(blocking.children())
            assert await client.cell(top[0].token) == top[0]
            mean = top[0].mean
            assert await client.path(mean.latitude_deg, mean.longitude_deg) == blocking.path(
                mean.latitude_deg, mean.longitude_deg
            )
            with pytest.raises(ImageEmptyError):
                await client.locate(b"")
            with pytest.raises(InputNotReadableError):
                await client.locate("missing.jpg")


async def test_the_asynchronous_client_reports_a_server_that_stays_away() -> None:
    async with AsyncClient(f"127.0.0.1:{free_port()}", retry=RetryPolicy(max_attempts=2)) as client:
        with pytest.raises(ServiceError, match="cannot be reached"):
            await client.get_info()


def test_small_requests_share_a_message_and_a_large_image_has_one_for_itself() -> None:
    sizes = [1500] * 40 + [2_000_000] + [1500] * 50 + [100_000, 100_000]
    requests = [geolocation_pb2.LocateRequest(image=bytes(size)) for size in sizes]
    messages = list(_split(requests))
    assert [request for message in messages for request in message.requests] == requests
    assert [len(message.requests) for message in messages] == [40, 1, 43, 7, 1, 1]
    for message in messages:
        check_message_size("/geosurge.v1.GeolocationService/LocateStream", message.SerializeToString())
