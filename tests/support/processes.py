"""Servers in processes of their own, started as users start them, and what can be seen of them from outside."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from geosurge.client import IndexClient
from geosurge.settings import ENVIRONMENT_PREFIX
from geosurge.v1 import geolocation_pb2, geolocation_pb2_grpc

PATIENCE_SECONDS = 120.0
"""Longest that anything here is waited for; on a busy machine a start alone can take a minute."""

REPORT_TASKS = """
import asyncio, os, signal
from pathlib import Path
from geosurge.server import app

start = app.Server.start

def report(loop):
    target = Path(os.environ["TASKS_FILE"])
    aside = target.with_suffix(".new")
    aside.write_text(str(len(asyncio.all_tasks(loop))))
    aside.replace(target)

async def start_and_listen(self):
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR1, report, loop)
    await start(self)

app.Server.start = start_and_listen
"""
"""A prelude after which SIGUSR1 makes the server write its number of asyncio tasks to the file TASKS_FILE."""

SLOW_ENCODER = """
import os, time
from geosurge.encoder.model import ImageEncoder

encode = ImageEncoder.encode

def encode_slowly(self, pixels):
    time.sleep(float(os.environ["ENCODE_SECONDS"]))
    return encode(self, pixels)

ImageEncoder.encode = encode_slowly
"""
"""A prelude after which every batch of images takes ENCODE_SECONDS longer, as on a GPU: without using the cores."""

HELD_ENCODER = """
import os, time
from pathlib import Path
from geosurge.encoder.model import ImageEncoder

encode = ImageEncoder.encode

def encode_when_let(self, pixels):
    while Path(os.environ["HOLD_FILE"]).exists():
        time.sleep(0.01)
    return encode(self, pixels)

ImageEncoder.encode = encode_when_let
"""
"""A prelude after which no image is encoded while there is a file HOLD_FILE."""

FAILING_ENCODER = """
import os
from pathlib import Path
from geosurge.encoder.model import ImageEncoder

encode = ImageEncoder.encode

def encode_or_fail(self, pixels):
    if Path(os.environ["FAIL_FILE"]).exists():
        raise RuntimeError("made to fail")
    return encode(self, pixels)

ImageEncoder.encode = encode_or_fail
"""
"""A prelude after which every batch of images fails while there is a file FAIL_FILE, as on a GPU that is lost."""

CRASHING_STAGE = """
import os
from pathlib import Path
from geosurge.server import batcher

take_batch = batcher._Stage._take_batch

def take_batch_or_crash(self):
    file = Path(os.environ["CRASH_FILE"])
    if file.exists() and file.read_text() == self.name:
        raise RuntimeError("made to crash")
    return take_batch(self)

batcher._Stage._take_batch = take_batch_or_crash
"""
"""A prelude after which the stage whose name is in the file CRASH_FILE crashes when it has something to do."""

_ANNOUNCED = re.compile(
    r"^serving .* on (\S+:\d+)(?:, administration on (\S+:\d+))?, monitoring on (\S+:\d+)$", re.MULTILINE
)

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class ServerProcess:
    """A server that is SERVING, or was.

    Attributes:
        process: The process.
        address: ``host:port`` of its services.
        admin_address: That of its IndexService.
        metrics_address: That of its monitoring.
        log_file: Where its standard error goes.
        scratch: Where it keeps what it loads.
    """

    process: subprocess.Popen[bytes]
    address: str
    admin_address: str
    metrics_address: str
    log_file: Path
    scratch: Path

    @property
    def log(self) -> str:
        """What it has written so far."""
        return self.log_file.read_text()

    def metrics(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        """What it counts, by name and labels."""
        with urllib.request.urlopen(f"http://{self.metrics_address}/metrics", timeout=30) as page:
            families = text_string_to_metric_families(page.read().decode())
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in families
            for sample in family.samples
        }

    def metric(self, name: str, **labels: str) -> float:
        """One number of `metrics`; 0 where it was never counted."""
        return self.metrics().get((name, frozenset(labels.items())), 0.0)

    def resident_bytes(self) -> int:
        """Its resident memory."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def thread_count(self) -> int:
        """How many threads it has."""
        return int(psutil.Process(self.process.pid).num_threads())

    def health(self, service: str = "") -> str:
        """The name of its health."""
        with grpc.insecure_channel(self.address) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            status = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=30).status
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(status))

    def send(self, number: signal.Signals) -> None:
        """Sends it a signal."""
        self.process.send_signal(number)

    def wait(self, seconds: float = PATIENCE_SECONDS) -> int:
        """Waits until it has ended; returns its exit status."""
        return self.process.wait(seconds)


@contextmanager
def server_process(
    index: Path,
    *,
    prelude: str = "",
    environment: Mapping[str, str] | None = None,
    scratch: Path | None = None,
    **settings: object,
) -> Iterator[ServerProcess]:
    """Runs `geosurge serve` on free ports; it is killed afterwards if it has not ended.

    Args:
        index: A bundle or a store.
        prelude: Python that runs in the process before the command does.
        environment: Variables on top of this process's own.
        scratch: Where it keeps what it loads; by default a directory that is gone afterwards.
        **settings: Its settings.

    Yields:
        The server, which reports SERVING.
    """
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        log = directory / "log"
        if scratch is None:
            scratch = directory / "scratch"
            scratch.mkdir()
        flags = {"index": index, "port": 0, "metrics_port": 0, "scratch": scratch, "decode_workers": 2, **settings}
        process = stack.enter_context(_run(_command(prelude, flags), environment or {}, log))
        match = wait_until(lambda: _announced(process, log), "the server announces itself")
        address, admin, metrics = match.groups()
        yield ServerProcess(process, address, admin or address, metrics, log, scratch)


def start_fails(index: Path, **settings: object) -> tuple[int, str]:
    """Runs `geosurge serve` where it cannot start; returns its exit status and what it wrote."""
    command = _command("", {"index": index, "port": 0, **settings})
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False)
    return ended.returncode, ended.stdout + ended.stderr


def wait_until(look: Callable[[], _Result], what: str, seconds: float = PATIENCE_SECONDS) -> _Result:
    """Looks until there is something to see, and returns it."""
    give_up = time.monotonic() + seconds
    while not (seen := look()):
        assert time.monotonic() < give_up, f"waited {seconds:.0f} s in vain: {what}"
        time.sleep(0.01)
    return seen


def index_client(server: ServerProcess) -> IndexClient:
    """The administrator of a server."""
    return IndexClient(server.admin_address, timeout_seconds=PATIENCE_SECONDS)


def geolocation(channel: grpc.Channel | grpc.aio.Channel) -> Any:
    """The stub of the service that locates."""
    return geolocation_pb2_grpc.GeolocationServiceStub(channel)  # type: ignore[no-untyped-call]


async def results(call: Any) -> AsyncIterator[geolocation_pb2.LocateResult]:
    """The results of a stream, whatever messages they come in."""
    async for message in call:
        for result in message.results:
            yield result


def _command(prelude: str, flags: Mapping[str, object]) -> list[str]:
    program = ["-m", "geosurge.commands.cli"]
    if prelude:
        program = ["-c", f"{prelude}\nfrom geosurge.commands.cli import main\nmain()"]
    pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in flags.items()]
    return [sys.executable, *program, "serve", *(word for pair in pairs for word in pair)]


@contextmanager
def _run(command: Sequence[str], environment: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(ENVIRONMENT_PREFIX)}
    with (
        log.open("wb") as output,
        subprocess.Popen(command, stdout=output, stderr=output, env={**own, **environment}) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


def _announced(process: subprocess.Popen[bytes], log: Path) -> re.Match[str] | None:
    assert process.poll() is None, f"the server ended with {process.returncode}:\n{log.read_text()}"
    return _ANNOUNCED.search(log.read_text())
