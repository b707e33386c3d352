"""One permit per request, taken before any work: a bound on everything that a server holds at once."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from types import TracebackType
from typing import Any, Final, Self

from geosurge.errors import OverloadedError, PeerOverloadedError

_SMOOTHING: Final = 0.05
_MIN_RETRY_SECONDS: Final = 0.05
_MAX_RETRY_SECONDS: Final = 5.0


class Permit:
    """The right to be worked on, given back by `release` or at the end of a ``with`` block."""

    def __init__(self, admission: Admission, peer: str, *, of_stream: bool) -> None:
        self._admission: Admission | None = admission
        self._peer = peer
        self._of_stream = of_stream
        self._taken_at = time.monotonic()

    def release(self) -> None:
        """Gives the permit back; calling it again does nothing."""
        admission, self._admission = self._admission, None
        if admission is not None:
            admission._release(self._peer, time.monotonic() - self._taken_at, of_stream=self._of_stream)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Admission:
    """A fixed number of permits, with a limit for each peer; all methods belong to one event loop.

    A unary call takes a permit or is refused at once, so that its caller can turn to another server. A stream waits for
    one, so that gRPC's flow control slows its client down. Waiting streams are served in the order in which they came,
    and before unary calls; those of a peer that is at its limit are passed over.

    A stream takes whatever it can get, so streams together hold at most three quarters of the permits: the rest is left
    to unary calls, which would otherwise be refused as long as one stream is open. Unary calls may hold all.
    """

    def __init__(self, permits: int, permits_per_peer: int | None = None) -> None:
        self.permits: Final = permits
        """Permits in all: most requests that are worked on at once."""
        self.permits_per_peer: Final = permits if permits_per_peer is None else permits_per_peer
        """Most permits that one peer may hold."""
        self.permits_for_streams: Final = max(1, permits - max(1, permits // 4))
        """Most permits that streams may hold together."""
        self.in_use = 0
        """Permits that are held, or granted to a stream that has yet to resume."""
        self._held: Counter[str] = Counter()
        self._held_by_streams = 0
        self._waiting: deque[tuple[str, asyncio.Future[None]]] = deque()
        self._mean_hold_seconds = 0.0

    def take(self, peer: str = "") -> Permit:
        """Takes a permit at once.

        Args:
            peer: Who asks: the address without the port.

        Raises:
            OverloadedError: No permit is free. Its ``retry_after_seconds`` is a moving average of the time for which
                permits are held.
            PeerOverloadedError: The peer is at its limit.
        """
        if self.in_use >= self.permits:
            retry_after = self._retry_after_seconds()
            raise OverloadedError(
                f"the server is working on {self.permits} requests, as many as it may; "
                f"try again in {retry_after:.2f} s, or send a stream, which waits",
                retry_after_seconds=retry_after,
            )
        if self._held[peer] >= self.permits_per_peer:
            retry_after = self._retry_after_seconds()
            raise PeerOverloadedError(
                f"the server is working on {self.permits_per_peer} requests from this address, as many as it may; "
                f"try again in {retry_after:.2f} s, or send a stream, which waits",
                retry_after_seconds=retry_after,
            )
        self._grant(peer, of_stream=False)
        return Permit(self, peer, of_stream=False)

    async def wait(self, peer: str = "") -> Permit:
        """Takes a permit for an item of a stream, as soon as streams may have one more and the peer may, too."""
        if self._can_grant_to_stream(peer):
            self._grant(peer, of_stream=True)
            return Permit(self, peer, of_stream=True)
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((peer, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._free(peer, of_stream=True)
            else:
                self._waiting.remove((peer, turn))
            raise
        return Permit(self, peer, of_stream=True)

    def _retry_after_seconds(self) -> float:
        return min(max(self._mean_hold_seconds, _MIN_RETRY_SECONDS), _MAX_RETRY_SECONDS)

    def _can_grant_to_stream(self, peer: str) -> bool:
        return (
            self.in_use < self.permits
            and self._held_by_streams < self.permits_for_streams
            and self._held[peer] < self.permits_per_peer
        )

    def _grant(self, peer: str, *, of_stream: bool) -> None:
        self.in_use += 1
        self._held[peer] += 1
        self._held_by_streams += of_stream

    def _release(self, peer: str, held_seconds: float, *, of_stream: bool) -> None:
        self._mean_hold_seconds += _SMOOTHING * (held_seconds - self._mean_hold_seconds)
        self._free(peer, of_stream=of_stream)

    def _free(self, peer: str, *, of_stream: bool) -> None:
        """Frees a permit, and grants it to the stream that has waited longest of those that may have it."""
        self.in_use -= 1
        self._held[peer] -= 1
        self._held_by_streams -= of_stream
        if not self._held[peer]:
            del self._held[peer]
        for place, (waiting_peer, turn) in enumerate(self._waiting):
            if not turn.done() and self._can_grant_to_stream(waiting_peer):
                del self._waiting[place]
                self._grant(waiting_peer, of_stream=True)
                turn.set_result(None)
                return


def peer_address(context: Any) -> str:  # noqa: ANN401
    """Who calls: the address without the port."""
    peer: str = context.peer()
    return peer.rpartition(":")[0] if peer.startswith(("ipv4:", "ipv6:")) else peer
