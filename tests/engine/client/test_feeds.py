from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geosurge.client.feeds import AsyncFeed, Entry, Feed
from geosurge.errors import InputError


def prepare(query: int) -> Entry[int]:
    return Entry(error=InputError("odd")) if query % 2 else Entry(request=query)


async def flat(groups: AsyncIterator[list[int]]) -> AsyncIterator[int]:
    async for group in groups:
        for request in group:
            yield request


def consume(feed: Feed[int, int], break_after: set[int]) -> list[int | None]:
    """Answers every request with itself; some connections break before an answer arrives."""
    answers: list[int | None] = []
    requests: Iterator[int] | None = None
    while (entry := feed.head()) is not None:
        if entry.error is not None:
            answers.append(None)
            feed.pop()
            continue
        requests = requests or chain.from_iterable(feed.requests())
        answer = next(requests)
        if len(answers) in break_after:
            break_after.discard(len(answers))
            requests = None
            continue
        assert answer == entry.request
        answers.append(answer)
        feed.pop()
    return answers


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), max_size=20), st.sets(st.integers(0, 20)), st.integers(1, 5))
def test_each_query_is_answered_once_in_order_however_often_the_connection_breaks(
    queries: list[int], break_after: set[int], window: int
) -> None:
    feed = Feed(queries, prepare, window)
    assert consume(feed, break_after) == [None if query % 2 else query for query in queries]
    feed.close()


def test_a_feed_pulls_no_further_than_its_window() -> None:
    pulled: list[int] = []

    def queries() -> Iterator[int]:
        for number in range(0, 100, 2):
            pulled.append(number)
            yield number

    feed = Feed(queries(), prepare, 4)
    requests = chain.from_iterable(feed.requests())
    assert [next(requests) for _ in range(4)] == [0, 2, 4, 6]
    # One more is prepared, waiting for its place.
    while len(pulled) < 5:
        time.sleep(0.001)
    time.sleep(0.05)
    assert len(pulled) == 5
    feed.close()
    assert list(requests) == []


def test_answers_come_while_the_iterable_still_waits() -> None:
    more = threading.Event()

    def queries() -> Iterator[int]:
        yield 0
        more.wait(10)
        yield 2

    feed = Feed(queries(), prepare, 8)
    requests = feed.requests()
    assert next(requests) == [0]
    feed.pop()
    more.set()
    assert next(requests) == [2]
    feed.close()


def test_requests_that_are_there_come_at_once() -> None:
    feed = Feed([0, 1, 2, 4, 6], prepare, 4)
    while len(feed._entries) < 4:
        time.sleep(0.001)
    requests = feed.requests()
    assert next(requests) == [0, 2, 4]
    for _ in range(4):
        feed.pop()
    assert list(requests) == [[6]]


def test_what_the_iterable_raises_comes_after_the_answers_before_it() -> None:
    def queries() -> Iterator[int]:
        yield 0
        raise OSError("the disk is gone")

    feed = Feed(queries(), prepare, 8)
    entry = feed.head()
    assert entry is not None
    assert entry.request == 0
    feed.pop()
    with pytest.raises(OSError, match="the disk is gone"):
        feed.head()


async def test_the_asynchronous_feed_does_the_same() -> None:
    async def queries() -> AsyncIterator[int]:
        for number in (0, 1, 2):
            yield number
            await asyncio.sleep(0)

    for source in (queries(), [0, 1, 2]):
        feed = AsyncFeed(source, prepare, 2)
        answers: list[int | None] = []
        requests = flat(feed.requests())
        while (entry := await feed.head()) is not None:
            if entry.request is not None:
                assert await anext(requests) == entry.request
            answers.append(entry.request)
            await feed.pop()
        assert answers == [0, None, 2]
        assert [request async for request in requests] == []
        feed.close()


async def test_a_new_connection_starts_with_the_oldest_unanswered() -> None:
    feed = AsyncFeed([0, 2, 4, 6], prepare, 4)
    first = flat(feed.requests())
    assert [await anext(first) for _ in range(3)] == [0, 2, 4]
    await feed.pop()
    second = flat(feed.requests())
    assert [request async for request in second] == [2, 4, 6]
    assert [request async for request in first] == []
    feed.close()
