"""Samples that cannot be used: counted by reason, and an error once there are too many."""

from __future__ import annotations

import logging
import math
import threading
from collections import Counter
from collections.abc import Iterable
from typing import Final

from geosurge.errors import ConfigurationError, GeoSurgeError

ALWAYS_ALLOWED: Final = 10
"""Bad samples that are never too many: the first of many good ones must not stop a run as 100 %."""

_MARGIN: Final = 4.0
_NAMED: Final = 3
_LOGGER = logging.getLogger(__name__)


def reason_of(error: OSError | GeoSurgeError) -> str:
    """Why a sample cannot be used, in a few words that are the same for all that have this flaw."""
    if isinstance(error, FileNotFoundError):
        return "file missing"
    if isinstance(error, OSError):
        return f"file not readable: {error.strerror or error}"
    return error.reason.lower().replace("_", " ")


class BadSamples:
    """Counts samples and what is wrong with the bad ones; threads may share it.

    More bad ones than a share of all samples, and than `ALWAYS_ALLOWED`, are an error. While samples are still to come,
    there may be four standard deviations more of them: every count is a chance of a false alarm.
    """

    def __init__(self, what: str, max_share: float) -> None:
        """Begins to count.

        Args:
            what: What is counted, for messages.
            max_share: Largest share of bad ones.
        """
        self._what = what
        self._max_share = max_share
        self._lock = threading.Lock()
        self._seen = 0
        self._reasons: Counter[str] = Counter()
        self._names: dict[str, list[str]] = {}
        self._reported: tuple[int, Counter[str]] = (0, Counter())

    @property
    def seen(self) -> int:
        """Samples counted so far, good and bad."""
        return self._seen

    @property
    def reasons(self) -> str:
        """What is wrong with the bad ones, and how often; for messages."""
        return _told(self._reasons)

    @property
    def examples(self) -> str:
        """Names of some bad ones; for messages."""
        return "; ".join(f"{reason}: {', '.join(names)}" for reason, names in self._names.items())

    def count(self, seen: int, bad: Iterable[tuple[str, str]]) -> None:
        """Counts samples.

        Args:
            seen: How many there were.
            bad: Reason and name of each bad one among them.

        Raises:
            ConfigurationError: There have been too many bad ones.
        """
        with self._lock:
            self._seen += seen
            for reason, name in bad:
                self._reasons[reason] += 1
                names = self._names.setdefault(reason, [])
                is_new = len(names) < _NAMED
                if is_new:
                    names.append(name)
                _LOGGER.log(logging.WARNING if is_new else logging.DEBUG, "%s is skipped: %s", name, reason)
            self._check(_MARGIN * math.sqrt(self._seen * self._max_share * (1.0 - self._max_share)))

    def report(self, when: str, *, whole: bool = True) -> None:
        """Logs what was skipped since the last report, if anything was.

        Args:
            when: What has just ended.
            whole: Whether all samples that there are have been seen, so that nothing is left to chance.

        Raises:
            ConfigurationError: There have been too many bad ones.
        """
        with self._lock:
            if whole:
                self._check(0.0)
            seen, reasons = self._seen - self._reported[0], self._reasons - self._reported[1]
            self._reported = self._seen, self._reasons.copy()
        if reasons:
            _LOGGER.warning("%s: %d of %d %s skipped (%s)", when, reasons.total(), seen, self._what, _told(reasons))

    def check_all(self, bad: int, total: int) -> None:
        """Checks all samples that there are, also those that other processes have counted: nothing is left to chance.

        Args:
            bad: Bad ones among all.
            total: How many samples there are.

        Raises:
            ConfigurationError: There are too many bad ones.
        """
        with self._lock:
            self._compare(bad, total, 0.0)

    def _check(self, margin: float) -> None:
        self._compare(self._reasons.total(), self._seen, margin)

    def _compare(self, bad: int, total: int, margin: float) -> None:
        if bad > max(ALWAYS_ALLOWED, self._max_share * total + margin):
            # A process that has met none itself knows no reasons.
            reasons = f" ({self.reasons})" if self._reasons else ""
            examples = f"For example {self.examples}. " if self._reasons else ""
            raise ConfigurationError(
                f"{bad:,} of {total:,} {self._what} cannot be used{reasons}, and `max_bad_share` allows "
                f"{self._max_share:.1%}. {examples}Mend them, leave them out, or raise the share"
            )


def _told(reasons: Counter[str]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
