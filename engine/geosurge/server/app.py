"""The server's life: open a bundle, listen, warm up, serve, stop.

Health is NOT_SERVING until an image has really gone through decoding, encoding, search and posterior. A stop goes the
other way round: health turns NOT_SERVING, load balancers get `drain_seconds` to notice, no new calls are accepted and
streams take no more items, what is in flight is answered within `grace_seconds`, then the threads end and the bundle is
closed. There is no transport encryption and there are no credentials, which is why settings refuse to listen beyond
loopback without an explicit flag.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import Final

import grpc
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from geosurge.errors import ConfigurationError
from geosurge.images import ImageLimits
from geosurge.locator import Locator
from geosurge.server.admission import Admission
from geosurge.server.batcher import Batcher
from geosurge.server.interceptors import CallInterceptor
from geosurge.server.services import CellService, GeolocationService
from geosurge.server.versions import VersionHandle, Versions
from geosurge.settings import ServerSettings, unknown_variables
from geosurge.v1 import cell_pb2, cell_pb2_grpc, geolocation_pb2, geolocation_pb2_grpc

logger = logging.getLogger(__name__)

SERVICE_NAMES: Final = (
    geolocation_pb2.DESCRIPTOR.services_by_name["GeolocationService"].full_name,
    cell_pb2.DESCRIPTOR.services_by_name["CellService"].full_name,
)
"""Services of the public API, as reflection lists them and health reports them."""


class Server:
    """One listening server; all methods belong to the event loop that runs it."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self._stopping = asyncio.Event()
        self._abandoned = asyncio.Event()
        self._health = health.aio.HealthServicer()
        self._batcher = Batcher(max_batch_size=settings.max_batch_size, decode_workers=settings.decode_workers)
        self._admission = Admission(settings.max_concurrent_requests)
        self._versions: Versions | None = None
        self._grpc: grpc.aio.Server | None = None
        self.address = ""
        """``host:port`` that it listens on, once it does."""

    async def start(self) -> None:
        """Opens the bundle, listens, and reports SERVING after a warm-up.

        Raises:
            BundleError: The bundle cannot be used.
            EncoderError: Its encoder cannot be loaded.
            ConfigurationError: The address cannot be listened on.
        """
        try:
            await self.listen()
            await self.warm_up()
        except BaseException:
            await self.stop(grace_seconds=0, drain_seconds=0)
            raise

    async def listen(self) -> None:
        """Opens the bundle and listens; health is NOT_SERVING. Raises as `start`."""
        self._batcher.start()
        handle = await self._batcher.on_owner(self._open)
        self._versions = Versions(handle)
        await self._report(health_pb2.HealthCheckResponse.NOT_SERVING)
        self._grpc = self._build(self._versions)
        try:
            port = self._grpc.add_insecure_port(self.settings.address)
        except RuntimeError as error:
            raise ConfigurationError(
                f"cannot listen on {self.settings.address}: the port is taken or the address is not this machine's; "
                "choose another port, or 0 for a free one"
            ) from error
        await self._grpc.start()
        self.address = self.settings.model_copy(update={"port": port}).address

    async def warm_up(self) -> None:
        """Sends real inferences through every stage, then reports SERVING."""
        assert self._versions is not None
        await self._batcher.warm_up(self._versions.active)
        await self._report(health_pb2.HealthCheckResponse.SERVING)
        logger.info("serving address=%s index_version=%s", self.address, self._versions.active.name)

    async def stop(self, *, grace_seconds: float | None = None, drain_seconds: float | None = None) -> None:
        """Stops in order and returns when nothing is left running; `abandon` shortens it.

        Args:
            grace_seconds: Time for calls in flight; by default that of the settings.
            drain_seconds: Time between NOT_SERVING and refusing calls; by default that of the settings.
        """
        grace = self.settings.grace_seconds if grace_seconds is None else grace_seconds
        drain = self.settings.drain_seconds if drain_seconds is None else drain_seconds
        await self._health.enter_graceful_shutdown()
        if self._grpc is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._abandoned.wait(), drain)
            self._stopping.set()
            await self._grpc.stop(grace)
        versions, self._versions = self._versions, None
        if versions is not None:
            await versions.wait_until_unused()
            for handle in versions.loaded:
                await self._batcher.on_owner(handle.locator.close)
        await self._batcher.stop()
        if self.address:
            logger.info("stopped address=%s", self.address)

    async def abandon(self) -> None:
        """Ends the drain of a running `stop`, and cancels the calls that it still waits for."""
        self._abandoned.set()
        if self._grpc is not None:
            await self._grpc.stop(None)

    def _open(self) -> VersionHandle:
        if self.settings.torch_threads is not None:
            torch.set_num_threads(self.settings.torch_threads)
        limits = ImageLimits(max_bytes=self.settings.max_image_bytes, max_pixels=self.settings.max_image_pixels)
        locator = Locator.open(self.settings.index, device=self.settings.device, limits=limits)
        return VersionHandle(locator.index_version, locator)

    def _build(self, versions: Versions) -> grpc.aio.Server:
        server = grpc.aio.server(
            interceptors=[CallInterceptor(self._stopping)],
            options=[
                ("grpc.max_receive_message_length", self.settings.max_receive_message_bytes),
                ("grpc.max_send_message_length", -1),
                # Two servers must not share a port without noticing.
                ("grpc.so_reuseport", 0),
            ],
        )
        geolocation = GeolocationService(self.settings, versions, self._batcher, self._admission, self._stopping)
        geolocation_pb2_grpc.add_GeolocationServiceServicer_to_server(geolocation, server)  # type: ignore[no-untyped-call]
        cells = CellService(self.settings, versions, self._batcher, self._admission)
        cell_pb2_grpc.add_CellServiceServicer_to_server(cells, server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((*SERVICE_NAMES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        return server

    async def _report(self, status: int) -> None:
        for service in (health.OVERALL_HEALTH, *SERVICE_NAMES):
            await self._health.set(service, status)


def serve(settings: ServerSettings, on_ready: Callable[[str], None] | None = None) -> None:
    """Serves until SIGTERM or SIGINT, then stops gracefully and returns; a second signal stops at once.

    A signal while the server is still starting ends the start; the bundle is never served then.

    Args:
        settings: The settings.
        on_ready: Called with ``host:port`` once the server reports SERVING.

    Raises:
        GeoSurgeError: The server could not start; see `Server.start`.
    """
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s")
    for name, meant in unknown_variables(os.environ).items():
        logger.warning("%s in the environment is no setting%s", name, f"; did you mean {meant}?" if meant else "")
    asyncio.run(_serve(settings, on_ready))


async def _serve(settings: ServerSettings, on_ready: Callable[[str], None] | None) -> None:
    loop = asyncio.get_running_loop()
    signals: asyncio.Queue[signal.Signals] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.put_nowait, number)
    server = Server(settings)
    start = asyncio.create_task(server.start())
    signalled = asyncio.create_task(signals.get())
    await asyncio.wait({start, signalled}, return_when=asyncio.FIRST_COMPLETED)
    if not start.done():
        logger.info("stopping signal=%s before the start was over", signalled.result().name)
        start.cancel()
        with suppress(asyncio.CancelledError):
            await start
        return
    await start
    if on_ready is not None:
        on_ready(server.address)
    logger.info("stopping signal=%s", (await signalled).name)
    stop = asyncio.create_task(server.stop())
    again = asyncio.create_task(signals.get())
    await asyncio.wait({stop, again}, return_when=asyncio.FIRST_COMPLETED)
    if not stop.done():
        await server.abandon()
    await stop
    again.cancel()


@contextmanager
def background_server(settings: ServerSettings) -> Iterator[str]:
    """Runs a server on a thread of its own for the length of a ``with`` block.

    Args:
        settings: The settings.

    Yields:
        ``host:port`` of the server, which reports SERVING.

    Raises:
        GeoSurgeError: The server could not start; see `Server.start`.
    """
    ready: Future[str] = Future()
    over = threading.Event()

    async def run() -> None:
        server = Server(settings)
        try:
            await server.start()
        except BaseException as error:  # noqa: BLE001
            ready.set_exception(error)
            return
        ready.set_result(server.address)
        await asyncio.to_thread(over.wait)
        await server.stop()

    thread = threading.Thread(target=lambda: asyncio.run(run()), name="geosurge-server")
    thread.start()
    try:
        yield ready.result()
    finally:
        over.set()
        thread.join()
