"""One permit a request, taken before any work: a bound on everything that a server holds at once."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from types import TracebackType
from typing import Final, Self

from geosurge.errors import OverloadedError

_SMOOTHING: Final = 0.05
_MIN_RETRY_SECONDS: Final = 0.05
_MAX_RETRY_SECONDS: Final = 5.0


class Permit:
    """The right to be worked on, given back by `release` or at the end of a ``with`` block."""

    def __init__(self, admission: Admission) -> None:
        self._admission: Admission | None = admission
        self._taken_at = time.monotonic()

    def release(self) -> None:
        """Gives the permit back; calling it again does nothing."""
        admission, self._admission = self._admission, None
        if admission is not None:
            admission._take_back(time.monotonic() - self._taken_at)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Admission:
    """A fixed number of permits; all methods belong to one event loop.

    A unary call takes a permit or is refused at once, so that its caller can turn to another server. A stream waits for
    one, so that gRPC's flow control slows its client down. Waiting streams are served in the order in which they came,
    and before unary calls.
    """

    def __init__(self, permits: int) -> None:
        self.permits: Final = permits
        """Requests that can hold a permit at once."""
        self.in_use = 0
        """Permits that are held, or handed over to a stream that has yet to notice."""
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._mean_hold_seconds = 0.0

    def take(self) -> Permit:
        """Takes a permit at once.

        Raises:
            OverloadedError: None is free. It comes with the time that permits have been held for of late: a request
                that comes back after it competes with other requests.
        """
        if self.in_use >= self.permits:
            retry_after = min(max(self._mean_hold_seconds, _MIN_RETRY_SECONDS), _MAX_RETRY_SECONDS)
            raise OverloadedError(
                f"the server is working on {self.permits} requests, as many as it may; "
                f"try again in {retry_after:.2f} s, or send a stream, which waits",
                retry_after_seconds=retry_after,
            )
        self.in_use += 1
        return Permit(self)

    async def wait(self) -> Permit:
        """Takes a permit as soon as one is free."""
        if self.in_use < self.permits:
            self.in_use += 1
            return Permit(self)
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._hand_over()
            else:
                self._waiting.remove(turn)
            raise
        return Permit(self)

    def _take_back(self, held_seconds: float) -> None:
        self._mean_hold_seconds += _SMOOTHING * (held_seconds - self._mean_hold_seconds)
        self._hand_over()

    def _hand_over(self) -> None:
        """Gives a permit to the stream that has waited longest; without one it becomes free."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self.in_use -= 1
