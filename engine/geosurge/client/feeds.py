"""Feeds a bidirectional stream from an iterable: ordered, bounded, and able to start again on a new connection.

A feed keeps every query that has no answer yet. A connection reads them from the oldest on, so that after a broken one
the next repeats exactly what is missing. A query that cannot even be sent holds its place with the reason.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

from geosurge.errors import GeoSurgeError

QueryT = TypeVar("QueryT")
RequestT = TypeVar("RequestT")


@dataclass(frozen=True)
class Entry(Generic[RequestT]):
    """One query in its place: the request to send, or why there is none."""

    request: RequestT | None = None
    error: GeoSurgeError | None = None


class Feed(Generic[QueryT, RequestT]):
    """A feed for threads: one consumer calls `head` and `pop`, connections iterate over `requests`.

    Queries are pulled and prepared on a thread of the feed's own, at most `window` ahead of the answers.
    """

    def __init__(self, queries: Iterable[QueryT], prepare: Callable[[QueryT], Entry[RequestT]], window: int) -> None:
        self._entries: deque[Entry[RequestT]] = deque()
        self._changed = threading.Condition()
        self._connection = 0
        self._cursor = 0
        self._finished = False
        self._failure: BaseException | None = None
        self._closed = False
        self._window = max(window, 1)
        threading.Thread(target=self._pull, args=(queries, prepare), name="geosurge-feed", daemon=True).start()

    def head(self) -> Entry[RequestT] | None:
        """The oldest query without an answer, waiting for one; ``None`` when all were answered.

        Raises:
            BaseException: Whatever the iterable raised, once the queries before it were answered.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._entries or self._finished)
            if self._entries:
                return self._entries[0]
            if self._failure is not None:
                raise self._failure
            return None

    def pop(self) -> None:
        """Counts the oldest query as answered."""
        with self._changed:
            self._entries.popleft()
            self._cursor = max(self._cursor - 1, 0)
            self._changed.notify_all()

    def requests(self) -> Iterator[list[RequestT]]:
        """Requests for a new connection, from the oldest unanswered on, as many at a time as are there.

        It ends those of the connection before.
        """
        with self._changed:
            self._connection += 1
            self._cursor = 0
            self._changed.notify_all()
            return self._requests(self._connection)

    def close(self) -> None:
        """Ends the pulling, at the latest when the iterable yields once more, and all connections' requests."""
        with self._changed:
            self._closed = True
            self._finished = True
            self._changed.notify_all()

    def _requests(self, connection: int) -> Iterator[list[RequestT]]:
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._cursor < len(self._entries) or self._finished or connection != self._connection
                )
                if self._closed or connection != self._connection or self._cursor >= len(self._entries):
                    return
                entries = list(islice(self._entries, self._cursor, None))
                self._cursor += len(entries)
            if requests := [entry.request for entry in entries if entry.request is not None]:
                yield requests

    def _pull(self, queries: Iterable[QueryT], prepare: Callable[[QueryT], Entry[RequestT]]) -> None:
        try:
            for query in queries:
                entry = prepare(query)
                with self._changed:
                    self._changed.wait_for(lambda: len(self._entries) < self._window or self._closed)
                    if self._closed:
                        return
                    self._entries.append(entry)
                    self._changed.notify_all()
        except BaseException as failure:  # noqa: BLE001
            self._failure = failure
        finally:
            with self._changed:
                self._finished = True
                self._changed.notify_all()


class AsyncFeed(Generic[QueryT, RequestT]):
    """The same feed for one event loop; queries are prepared on threads, because files are read then."""

    def __init__(
        self,
        queries: Iterable[QueryT] | AsyncIterable[QueryT],
        prepare: Callable[[QueryT], Entry[RequestT]],
        window: int,
    ) -> None:
        self._entries: deque[Entry[RequestT]] = deque()
        self._changed = asyncio.Condition()
        self._connection = 0
        self._cursor = 0
        self._finished = False
        self._failure: BaseException | None = None
        self._window = max(window, 1)
        self._pulling = asyncio.create_task(self._pull(queries, prepare))

    async def head(self) -> Entry[RequestT] | None:
        """As `Feed.head`."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._entries or self._finished)
            if self._entries:
                return self._entries[0]
            if self._failure is not None:
                raise self._failure
            return None

    async def pop(self) -> None:
        """As `Feed.pop`."""
        async with self._changed:
            self._entries.popleft()
            self._cursor = max(self._cursor - 1, 0)
            self._changed.notify_all()

    async def requests(self) -> AsyncIterator[list[RequestT]]:
        """As `Feed.requests`; a connection begins when its first request is asked for."""
        async with self._changed:
            self._connection += 1
            self._cursor = 0
            connection = self._connection
        while True:
            async with self._changed:
                await self._changed.wait_for(
                    lambda: self._cursor < len(self._entries) or self._finished or connection != self._connection
                )
                if connection != self._connection or self._cursor >= len(self._entries):
                    return
                entries = list(islice(self._entries, self._cursor, None))
                self._cursor += len(entries)
            if requests := [entry.request for entry in entries if entry.request is not None]:
                yield requests

    def close(self) -> None:
        """Ends the pulling."""
        self._pulling.cancel()

    async def _pull(
        self, queries: Iterable[QueryT] | AsyncIterable[QueryT], prepare: Callable[[QueryT], Entry[RequestT]]
    ) -> None:
        try:
            async for query in _as_async(queries):
                entry = await asyncio.to_thread(prepare, query)
                async with self._changed:
                    await self._changed.wait_for(lambda: len(self._entries) < self._window)
                    self._entries.append(entry)
                    self._changed.notify_all()
        except Exception as failure:  # noqa: BLE001
            self._failure = failure
        finally:
            async with self._changed:
                self._finished = True
                self._changed.notify_all()


async def _as_async(items: Iterable[QueryT] | AsyncIterable[QueryT]) -> AsyncIterator[QueryT]:
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item
