"""The whole engine once through: a server in a process of its own, its client, sample views with known places.

The steps are functions of their own; the command line runs them in order and prints what they return.
"""

from __future__ import annotations

import os
import re
import signal
import statistics
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from rich.markup import escape
from rich.table import Table

from geosurge.client import Client
from geosurge.description import Coordinate
from geosurge.errors import ConfigurationError, GeoSurgeError, ServiceError, UsageError
from geosurge.location import LocateOptions, Location
from geosurge.settings import ENVIRONMENT_PREFIX
from geosurge.tables import coordinate_text, failure_text, path_text, place_text
from geosurge.truth import error_km, read_truth

TRUTH_FILE: Final = "truth.csv"
START_SECONDS: Final = 240.0
"""A cold start reads PyTorch and the bundle from the disk; on a busy machine that alone can take a minute."""

_READY: Final = re.compile(r"^serving .*? on (\S+:\d+)(?:, \w+ on \S+:\d+)*$")
_LAST_LINES: Final = 30
_CREDENTIALS: Final = (f"{ENVIRONMENT_PREFIX}TOKEN", f"{ENVIRONMENT_PREFIX}TLS_")


@dataclass(frozen=True)
class View:
    """A sample image and where it was really taken."""

    path: Path
    truth: Coordinate


@dataclass(frozen=True)
class Outcome:
    """What the engine said about a view."""

    view: View
    answer: Location | GeoSurgeError

    @property
    def error_km(self) -> float | None:
        """Great-circle distance from the truth to the answer; ``None`` where there is none."""
        if not isinstance(self.answer, Location):
            return None
        return error_km(self.answer, self.view.truth)


def default_views() -> Path:
    """The sample views of the checkout that this code runs from, or the same folder in the working directory."""
    inside = Path("tests", "data", "views")
    checkout = Path(__file__).resolve().parents[3]
    return checkout / inside if (checkout / inside).is_dir() else inside


def read_views(folder: Path) -> list[View]:
    """Reads which views a folder holds.

    Args:
        folder: Images, and a ``truth.csv`` that says where each was taken.

    Returns:
        The views, in the order of the file.

    Raises:
        UsageError: There are no views, or the file is not right.
    """
    table = folder / TRUTH_FILE
    if not table.is_file():
        raise UsageError(
            f"there are no sample views in {folder}: run the demo from a checkout of the repository, or name a folder "
            f"of images and a {TRUTH_FILE} (path, latitude_deg, longitude_deg) with --views"
        )
    views = [View(path, truth) for path, truth in read_truth(table).items()]
    if not views:
        raise UsageError(f"{table} names no images; add a row for each: path, latitude_deg, longitude_deg")
    return views


@contextmanager
def server_process(index: Path, *, start_seconds: float = START_SECONDS) -> Iterator[str]:
    """Runs ``geosurge serve`` on a free port for the length of a ``with`` block, and stops it with SIGTERM.

    Args:
        index: Bundle or store to serve.
        start_seconds: Time that it may take until it serves.

    Yields:
        ``host:port`` of the server, which reports SERVING.

    Raises:
        GeoSurgeError: The server did not start, or did not stop cleanly; with what it said.
    """
    command = [sys.executable, "-m", "geosurge.commands.cli", "serve", "--index", str(index)]
    command += ["--host", "127.0.0.1", "--port", "0", "--log-level", "warning"]
    # Its client comes without credentials, so those that another server asks for must not be asked for here.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_CREDENTIALS)}
    said: deque[str] = deque(maxlen=_LAST_LINES)
    ready: Future[str] = Future()
    # This interpreter and a path that the caller chose, without a shell: there is nothing to inject into.
    with subprocess.Popen(  # noqa: S603
        command, stderr=subprocess.PIPE, text=True, errors="replace", env=environment
    ) as process:
        assert process.stderr is not None
        # It has to be read to the end: a server whose pipe is full would stand still.
        listening = threading.Thread(target=_listen, args=(process.stderr, said, ready), name="geosurge-demo-server")
        listening.start()
        try:
            try:
                address = ready.result(start_seconds)
            except TimeoutError:
                raise ServiceError(_told(f"the server did not start within {start_seconds:.0f} s", said)) from None
            except EOFError:
                kind = ConfigurationError if process.wait() == UsageError.exit_code else ServiceError
                raise kind(_told("the server did not start", said)) from None
            yield address
            process.send_signal(signal.SIGTERM)
            if (code := process.wait(60.0)) != 0:
                raise ServiceError(_told(f"the server did not stop cleanly: exit code {code}", said))
        finally:
            process.kill()
            process.wait()
            listening.join()


def locate_views(address: str, views: Sequence[View], options: LocateOptions | None = None) -> list[Outcome]:
    """Asks a server where views were taken.

    Args:
        address: ``host:port`` of the server.
        views: The views.
        options: How each is located.

    Returns:
        What it said of each, in their order.

    Raises:
        ServiceError: The server cannot be reached.
    """
    with Client(address) as client:
        answers = list(client.locate_many([view.path for view in views], options))
    return [Outcome(view, answer) for view, answer in zip(views, answers, strict=True)]


def outcome_table(outcomes: Sequence[Outcome]) -> Table:
    """Truth against answers: one row a view."""
    table = Table("view", "truth", "answer")
    table.add_column("error km", justify="right")
    table.add_column("radius km", justify="right")
    table.add_column("place")
    table.add_column("path", overflow="fold")
    for outcome in outcomes:
        view, answer = outcome.view, outcome.answer
        start = (escape(view.path.stem), coordinate_text(view.truth.latitude_deg, view.truth.longitude_deg))
        if isinstance(answer, Location):
            table.add_row(
                *start,
                coordinate_text(answer.latitude_deg, answer.longitude_deg),
                f"{outcome.error_km:,.0f}",
                f"{answer.radius_km:,.0f}",
                place_text(answer.place),
                path_text(answer.path),
            )
        else:
            table.add_row(*start, failure_text(answer))
    return table


def summary(outcomes: Sequence[Outcome]) -> str:
    """One sentence on how good the answers are."""
    answers = [(outcome.answer, outcome.view.truth) for outcome in outcomes if isinstance(outcome.answer, Location)]
    located = f"{len(answers)} of {len(outcomes)} views located"
    if not answers:
        return located
    errors_km = [error_km(answer, truth) for answer, truth in answers]
    inside = sum(error <= answer.radius_km for error, (answer, _) in zip(errors_km, answers, strict=True))
    return f"{located}, median error {statistics.median(errors_km):,.0f} km, {inside} inside their radius"


def _listen(stream: IO[str], said: deque[str], ready: Future[str]) -> None:
    for line in stream:
        found = _READY.match(line.rstrip("\n"))
        if found and not ready.done():
            ready.set_result(found[1])
        else:
            said.append(line.rstrip("\n"))
    if not ready.done():
        ready.set_exception(EOFError())


def _told(problem: str, said: deque[str]) -> str:
    return f"{problem}; it said:\n" + "\n".join(said) if said else f"{problem} and said nothing"
