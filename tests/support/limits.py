"""Limits of this process, whose files then fail as on a machine that is out of something."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def limited(what: int, limit: int) -> Iterator[None]:
    """Lowers a limit; with `RLIMIT_FSIZE`, writing more to a file fails as on a full disk."""
    before = resource.getrlimit(what)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(what, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, before)
        signal.signal(signal.SIGXFSZ, handler)
