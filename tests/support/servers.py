"""Real servers on free ports over small bundles, and the images to ask them."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from geosurge.server.app import Server
from geosurge.settings import ServerSettings

DIMENSION = 16


def encoded_image(seed: int, file_format: str = "PNG", size: tuple[int, int] = (48, 40)) -> bytes:
    """A smooth random picture."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    content = io.BytesIO()
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(content, file_format)
    return content.getvalue()


def embedding(seed: int) -> NDArray[np.float32]:
    """A random query embedding of the tiny bundles' dimension."""
    return np.random.default_rng(seed).standard_normal(DIMENSION).astype(np.float32)


def settings_for(bundle: Path, **changes: Any) -> ServerSettings:
    """Settings of a server on a free port."""
    small: dict[str, Any] = {
        "index": bundle,
        "port": 0,
        "max_batch_size": 8,
        "max_concurrent_requests": 256,
        "decode_workers": 2,
        "grace_seconds": 5.0,
    }
    return ServerSettings(**{**small, **changes})


@asynccontextmanager
async def running(settings: ServerSettings) -> AsyncIterator[tuple[Server, grpc.aio.Channel]]:
    """A server on this event loop, warmed up, and a channel to it; both are closed afterwards."""
    server = Server(settings)
    await server.start()
    try:
        async with grpc.aio.insecure_channel(server.address) as channel:
            yield server, channel
    finally:
        await server.stop(grace_seconds=0)


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
