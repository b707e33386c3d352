"""The server's life: listen, open the active version, warm up, serve, stop.

Readiness (health of ``""`` and of every service) is NOT_SERVING until an image has really gone through decoding,
encoding, search and posterior, and whenever no version is active. Liveness (health of ``"liveness"``) is SERVING as
long as the event loop turns, whatever the models do.

A stop goes the other way round: health turns NOT_SERVING, load balancers get `drain_seconds` to notice, no new calls
are accepted and streams take no more items, what is in flight is answered within `grace_seconds`, then the threads end
and the versions are freed. When a stage of the batcher crashes, the server stops by itself and
`geosurge.server.process` ends with an error, so that a supervisor can start another: it never stays up without being
able to answer.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final

import grpc
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from geosurge.addresses import is_loopback, join_address
from geosurge.bundle.manifest import MANIFEST_FILE
from geosurge.errors import ConfigurationError, GeoSurgeError
from geosurge.images import ImageLimits
from geosurge.location import LocateOptions
from geosurge.server.admission import Admission
from geosurge.server.batcher import Batcher
from geosurge.server.cell_service import CellService
from geosurge.server.failures import PrivatePaths
from geosurge.server.geolocation_service import GeolocationService
from geosurge.server.index_service import IndexService
from geosurge.server.interceptors import CallInterceptor
from geosurge.server.loader import Loader, warm_up_query
from geosurge.server.metrics import Metrics
from geosurge.server.monitoring import Monitoring
from geosurge.server.security import AuthInterceptor, Tokens, server_credentials
from geosurge.server.versions import Versions
from geosurge.settings import ServerSettings
from geosurge.v1 import cell_pb2, cell_pb2_grpc, geolocation_pb2, geolocation_pb2_grpc, index_pb2, index_pb2_grpc

logger = logging.getLogger(__name__)

SERVICE_NAMES: Final = (
    geolocation_pb2.DESCRIPTOR.services_by_name["GeolocationService"].full_name,
    cell_pb2.DESCRIPTOR.services_by_name["CellService"].full_name,
)
"""Services of the public API, as reflection lists them and health reports them."""

INDEX_SERVICE_NAME: Final = index_pb2.DESCRIPTOR.services_by_name["IndexService"].full_name
LIVENESS: Final = "liveness"
"""Name under which health answers SERVING as long as the process lives."""

_HEARTBEAT_SECONDS: Final = 1.0
_HEARTBEATS_MISSED: Final = 10


class Server:
    """One listening server; all methods belong to the event loop that runs it.

    Attributes:
        settings: Its settings.
        metrics: Its metrics.
        address: ``host:port`` that it listens on; empty before `listen`.
        admin_address: That of the IndexService; empty where there is none.
        metrics_address: That of the monitoring endpoint; empty where there is none.
    """

    def __init__(self, settings: ServerSettings) -> None:
        """Prepares a server; nothing is opened.

        Raises:
            ConfigurationError: The tokens cannot be read.
            BundleError: The settings name a bundle whose manifest cannot be read.
        """
        self.settings = settings
        self.metrics = Metrics()
        self.address = self.admin_address = self.metrics_address = ""
        self._stopping = asyncio.Event()
        self._abandoned = asyncio.Event()
        self._tokens = Tokens.from_settings(settings)
        # Absolute, as errors name them.
        index = settings.index.absolute()
        scratch = Path(tempfile.gettempdir()) if settings.scratch is None else settings.scratch.absolute()
        self._private_paths = PrivatePaths(
            {index: "the bundle" if (index / MANIFEST_FILE).exists() else "the store", scratch: "the scratch directory"}
        )
        self._health = health.aio.HealthServicer()
        self._batcher = Batcher(
            max_batch_size=settings.max_batch_size,
            decode_workers=settings.decode_workers,
            device=settings.device,
            metrics=self.metrics,
        )
        self._admission = Admission(settings.max_concurrent_requests, settings.max_requests_per_peer)
        self._loader = Loader(
            self._batcher.between_batches,
            device=settings.device,
            limits=ImageLimits(max_bytes=settings.max_image_bytes, max_pixels=settings.max_image_pixels),
            max_batch_size=settings.max_batch_size,
            scratch=scratch,
        )
        self._versions = Versions(
            index,
            self._loader,
            max_versions=settings.max_loaded_versions,
            metrics=self.metrics,
            on_change=self._report_readiness,
        )
        self._monitoring = Monitoring(self.metrics, is_ready=lambda: self._is_serving, is_alive=self._is_alive)
        self._servers: list[grpc.aio.Server] = []
        self._is_warm = False
        self._last_beat = time.monotonic()
        self._heart: asyncio.Task[None] | None = None
        self._reports: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listens, opens the active version, and reports SERVING after a warm-up.

        Raises:
            BundleError: The bundle cannot be used.
            EncoderError: Its encoder cannot be loaded.
            ConfigurationError: An address cannot be listened on, or a certificate not be used.
        """
        try:
            await self.listen()
            await self.warm_up()
        except BaseException:
            await self.stop(grace_seconds=0, drain_seconds=0)
            raise

    async def listen(self) -> None:
        """Takes the ports, opens the active version, and listens; health is NOT_SERVING. Raises as `start`."""
        self._batcher.start()
        if self.settings.torch_threads is not None:
            set_threads = partial(torch.set_num_threads, self.settings.torch_threads)
            await asyncio.wrap_future(self._batcher.between_batches(set_threads))
        self._heart = asyncio.create_task(self._beat())
        self.metrics.watch("queue_length", lambda: self._batcher.queue_length)
        self.metrics.watch("permits_in_use", lambda: self._admission.in_use)
        self.metrics.watch("versions_loaded", lambda: len(self._versions.loaded))
        if self.settings.metrics_port is not None:
            port = self._monitoring.start(self.settings.metrics_host, self.settings.metrics_port)
            self.metrics_address = join_address(self.settings.metrics_host, port)
        await self._report(health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._health.set(LIVENESS, health_pb2.HealthCheckResponse.SERVING)
        has_own_port = self.settings.admin_port is not None
        is_guarded = self._tokens.required or is_loopback(self.settings.host)
        with_index = not has_own_port and is_guarded
        main = self._build(locates=True, administers=with_index)
        self.address = await self._open_port(main, self.settings.host, self.settings.port)
        if with_index:
            self.admin_address = self.address
        if self.settings.admin_port is not None:
            administration = self._build(locates=False, administers=True)
            self.admin_address = await self._open_port(
                administration, self.settings.admin_host, self.settings.admin_port
            )
        # The ports are taken already, so that calls which come meanwhile wait instead of being refused.
        await self._versions.start()
        for server in self._servers:
            await server.start()

    async def warm_up(self) -> None:
        """Sends a real request through every stage, then reports SERVING."""
        with self._versions.acquire() as handle:
            await self._batcher.locate(handle, warm_up_query(handle.locator), LocateOptions())
        self._is_warm = True
        await self._report(health_pb2.HealthCheckResponse.SERVING)
        logger.info("serving", extra={"address": self.address, "index_version": self._versions.active.name})

    async def crashed(self) -> str:
        """Waits until a stage of the batcher has crashed, turns health NOT_SERVING, and names the stage."""
        stage = await self._batcher.crashed()
        self._is_warm = False
        await self._report(health_pb2.HealthCheckResponse.NOT_SERVING)
        return stage

    async def follow_store(self) -> None:
        """Activates what the store's pointer names; a version that cannot be used changes nothing but the log."""
        try:
            await self._versions.follow_store()
        except GeoSurgeError as error:
            logger.error("the version that the store names was not activated: %s", error)  # noqa: TRY400

    async def stop(self, *, grace_seconds: float | None = None, drain_seconds: float | None = None) -> None:
        """Stops in order and returns when nothing is left running; `abandon` shortens it.

        Args:
            grace_seconds: Time for calls in flight; by default that of the settings.
            drain_seconds: Time between NOT_SERVING and refusing calls; by default that of the settings.
        """
        grace = self.settings.grace_seconds if grace_seconds is None else grace_seconds
        drain = self.settings.drain_seconds if drain_seconds is None else drain_seconds
        self._is_warm = False
        await self._report(health_pb2.HealthCheckResponse.NOT_SERVING)
        if self._servers:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._abandoned.wait(), drain)
            self._stopping.set()
            self._versions.give_up()
            await asyncio.gather(*(server.stop(grace) for server in self._servers))
        await self._health.enter_graceful_shutdown()
        await self._versions.close()
        await asyncio.to_thread(self._loader.stop)
        await self._batcher.stop()
        await asyncio.to_thread(self._monitoring.stop)
        if self._heart is not None:
            self._heart.cancel()
        if self.address:
            logger.info("stopped", extra={"address": self.address})

    async def abandon(self) -> None:
        """Ends the drain of a running `stop`, and cancels the calls that it still waits for."""
        self._abandoned.set()
        await asyncio.gather(*(server.stop(None) for server in self._servers))

    def _build(self, *, locates: bool, administers: bool) -> grpc.aio.Server:
        """A gRPC server with some of the services; each has health and reflection."""
        server = grpc.aio.server(
            interceptors=[
                CallInterceptor(self._stopping, self.metrics, self._private_paths),
                AuthInterceptor(self._tokens),
            ],
            options=[
                ("grpc.max_receive_message_length", self.settings.max_receive_message_bytes),
                ("grpc.max_send_message_length", -1),
                # gRPC unpacks before it measures: a megabyte would become a gigabyte. Images are packed already.
                ("grpc.compression_enabled_algorithms_bitset", 1 << grpc.Compression.NoCompression),
                # Two servers must not share a port without noticing.
                ("grpc.so_reuseport", 0),
                # One connection cannot hold an endless number of calls open.
                ("grpc.max_concurrent_streams", max(128, 2 * self.settings.max_concurrent_requests)),
            ],
        )
        names = [health.SERVICE_NAME, reflection.SERVICE_NAME]
        if locates:
            geolocation = GeolocationService(
                self.settings, self._versions, self._batcher, self._admission, self._stopping
            )
            geolocation_pb2_grpc.add_GeolocationServiceServicer_to_server(geolocation, server)  # type: ignore[no-untyped-call]
            cells = CellService(self.settings, self._versions, self._batcher, self._admission)
            cell_pb2_grpc.add_CellServiceServicer_to_server(cells, server)  # type: ignore[no-untyped-call]
            names += SERVICE_NAMES
        if administers:
            index_pb2_grpc.add_IndexServiceServicer_to_server(IndexService(self._versions), server)  # type: ignore[no-untyped-call]
            names.append(INDEX_SERVICE_NAME)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection(names, server)
        return server

    async def _open_port(self, server: grpc.aio.Server, host: str, port: int) -> str:
        address = join_address(host, port)
        credentials = server_credentials(self.settings)
        try:
            if credentials is None:
                port = server.add_insecure_port(address)
            else:
                port = server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise ConfigurationError(
                f"cannot listen on {address}: the port is taken or the address is not this machine's; "
                "choose another port, or 0 for a free one"
            ) from error
        self._servers.append(server)
        return join_address(host, port)

    @property
    def _is_serving(self) -> bool:
        return self._is_warm and self._versions.is_serving

    def _report_readiness(self) -> None:
        """Tells health of a change; before the warm-up and after the stop there is nothing to tell."""
        if self._is_warm:
            statuses = health_pb2.HealthCheckResponse
            report = asyncio.create_task(self._report(statuses.SERVING if self._is_serving else statuses.NOT_SERVING))
            self._reports.add(report)
            report.add_done_callback(self._reports.discard)

    async def _report(self, status: int) -> None:
        for service in (health.OVERALL_HEALTH, *SERVICE_NAMES):
            await self._health.set(service, status)

    async def _beat(self) -> None:
        while True:
            self._last_beat = time.monotonic()
            self._batcher.check(self.settings.max_stage_seconds)
            await asyncio.sleep(_HEARTBEAT_SECONDS)

    def _is_alive(self) -> bool:
        return time.monotonic() - self._last_beat < _HEARTBEATS_MISSED * _HEARTBEAT_SECONDS
