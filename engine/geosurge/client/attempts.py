"""How often, and until when, a call is repeated."""

from __future__ import annotations

import random
import sys
import time
from dataclasses import dataclass, replace
from typing import Final

import grpc

from geosurge.client.connection import Connection, is_refused_handshake
from geosurge.client.failures import ended_early, error_of, is_cut_off, unanswered
from geosurge.errors import DeadlineExceededError

DEFAULT_TIMEOUT_SECONDS: Final = 30.0

_UNREACHED = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
"""Statuses of calls that the server did not take: gRPC itself cancels those that come in the moment it stops."""


@dataclass(frozen=True)
class RetryPolicy:
    """How often and when a call that never reached the server is repeated.

    Attributes:
        max_attempts: Attempts in all, at least 1. A stream that has had an answer is taken up again until its timeout,
            however many attempts that takes: its address is known to be right, and a restart lasts a while.
        first_pause_seconds: Mean pause before the second attempt; it doubles with each further one.
        longest_pause_seconds: The mean pause at most.
    """

    max_attempts: int = 5
    first_pause_seconds: float = 0.1
    longest_pause_seconds: float = 2.0

    def pause_seconds(self, failed_attempts: int, remaining_seconds: float) -> float | None:
        """Pause before the next attempt, spread by half around the mean; ``None`` when there must be none."""
        if failed_attempts >= self.max_attempts:
            return None
        mean = min(self.first_pause_seconds * 2.0 ** min(failed_attempts - 1, 100), self.longest_pause_seconds)
        # Spread keeps many clients from returning at one moment; nothing secret depends on it.
        pause = mean * random.uniform(0.5, 1.5)  # noqa: S311
        return pause if pause < remaining_seconds else None


class Attempts:
    """The attempts of one call, or those to get one answer out of a stream: how many, and until when."""

    def __init__(self, address: str, connection: Connection, policy: RetryPolicy, timeout_seconds: float) -> None:
        if timeout_seconds <= 0:
            # gRPC would send the call, and an answer can be faster than a deadline that has passed.
            raise DeadlineExceededError(unanswered(address, timeout_seconds))
        self._address = address
        self._connection = connection
        self._policy = policy
        self._timeout_seconds = timeout_seconds
        self._failed = 0
        self._deadline: float | None = None

    @property
    def remaining_seconds(self) -> float:
        """Time left for the current attempt; the clock starts when this is first asked for."""
        if self._deadline is None:
            self._deadline = time.monotonic() + self._timeout_seconds
        return max(self._deadline - time.monotonic(), 0.0)

    def pause_after(self, failure: grpc.RpcError) -> float:
        """Seconds to wait before the next attempt.

        Raises:
            GeoSurgeError: What the failure meant, when there is no next attempt.
        """
        self._failed += 1
        was_cut_off = is_cut_off(failure)
        is_unreached = failure.code() in _UNREACHED and not is_refused_handshake(failure.details() or "")
        if is_unreached or was_cut_off:
            pause = self._policy.pause_seconds(self._failed, self.remaining_seconds)
            if pause is not None:
                return pause
        if was_cut_off:
            raise ended_early() from failure
        raise error_of(failure, self._address, self._connection, self._timeout_seconds) from failure

    def succeed(self) -> None:
        """Forgets failures and starts the clock anew for the next answer; only the clock ends the attempts now."""
        self._policy = replace(self._policy, max_attempts=sys.maxsize)
        self._failed = 0
        self._deadline = None
