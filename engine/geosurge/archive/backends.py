"""What locates: an index that is opened here, or a server."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from geosurge.errors import EncoderError, EncoderMissingError, GeoSurgeError, IndexVersionUnknownError, ServiceError
from geosurge.images import DEFAULT_LIMITS, OWN_LIMITS, ImageLimits
from geosurge.location import LocateOptions, Location
from geosurge.preprocessing import Preprocessing

if TYPE_CHECKING:
    from geosurge.client import Client
    from geosurge.client.connection import Connection
    from geosurge.locator import Locator

Query: TypeAlias = NDArray[np.uint8] | bytes
"""(3, s, s) canonical pixels, or an encoded image."""

_STREAMS: Final = 4
"""Batches at a server at once: one is on its way while others are worked on."""


class Backend(Protocol):
    """Something that locates batches."""

    @property
    def index_version(self) -> str:
        """Name of the index bundle that answers."""

    @property
    def encoder_hash(self) -> str:
        """SHA-256 of its encoder."""

    @property
    def preprocessing(self) -> Preprocessing | None:
        """How pictures are brought to pixels before `locate`; ``None`` wants them encoded."""

    @property
    def limits(self) -> ImageLimits:
        """What is accepted as an image."""

    @property
    def batch_size(self) -> int:
        """Pictures of a batch at most."""

    @property
    def concurrency(self) -> int:
        """Threads that may call `locate` at once."""

    def locate(self, queries: Sequence[Query], options: LocateOptions) -> list[Location | GeoSurgeError]:
        """Locates a batch.

        Returns:
            For each query its location, or why it has none.
        """


@dataclass(frozen=True)
class LocalBackend:
    """An index that is opened here.

    Attributes:
        locator: The index.
        batch_size: Pictures encoded together.
        concurrency: Batches at once: one is searched while the next is encoded.
    """

    locator: Locator
    batch_size: int
    concurrency: int = 2
    _encoding: Lock = field(default_factory=Lock, init=False, repr=False, compare=False)
    _searching: Lock = field(default_factory=Lock, init=False, repr=False, compare=False)

    @property
    def index_version(self) -> str:
        """Name of the index bundle that answers."""
        return self.locator.index_version

    @property
    def encoder_hash(self) -> str:
        """SHA-256 of its encoder."""
        return "" if self.locator.manifest.encoder is None else self.locator.manifest.encoder.sha256

    @property
    def preprocessing(self) -> Preprocessing:
        """How pictures are brought to pixels."""
        return self.locator.encoder.preprocessing

    @property
    def limits(self) -> ImageLimits:
        """What is accepted as an image."""
        return self.locator.limits

    def locate(self, queries: Sequence[Query], options: LocateOptions) -> list[Location | GeoSurgeError]:
        """Locates canonical pixels, in whole batches; each gets the same answer whatever the others are.

        Raises:
            EncoderError: The GPU has too little memory for a batch.
        """
        from torch import OutOfMemoryError  # noqa: PLC0415 - as in `open_index`

        # Batches of other sizes are computed by other kernels, which round differently: a run that was interrupted, and
        # so had other batches, would end with other last digits.
        whole = -(-len(queries) // self.batch_size) * self.batch_size
        pixels = np.zeros((whole, *np.shape(queries[0])), dtype=np.uint8)
        np.stack([np.asarray(query) for query in queries], out=pixels[: len(queries)])
        with self._encoding:
            begun = time.perf_counter()
            try:
                embeddings = self.locator.encode(pixels)[: len(queries)]
            except OutOfMemoryError as error:
                raise EncoderError(
                    f"encoding {self.batch_size} pictures takes more memory than the GPU has free; give a smaller "
                    "--batch-size, or --device cpu: what has been located is kept"
                ) from error
            encode_ms = 1000 * (time.perf_counter() - begun)
        with self._searching:
            answers = self.locator.locate_embeddings(embeddings, [options] * len(queries))
        return [
            replace(answer, timings=replace(answer.timings, encode_ms=encode_ms))
            if isinstance(answer, Location)
            else answer
            for answer in answers
        ]


@dataclass(frozen=True)
class ServerBackend:
    """A server; decoding, encoding and search happen there.

    Attributes:
        client: The connection to it.
        index_version: Index version that has to answer.
        encoder_hash: SHA-256 of its encoder.
        limits: What it accepts as an image.
        batch_size: Pictures sent over one stream.
    """

    client: Client
    index_version: str
    encoder_hash: str
    limits: ImageLimits
    batch_size: int
    preprocessing: None = None
    concurrency: int = _STREAMS

    def locate(self, queries: Sequence[Query], options: LocateOptions) -> list[Location | GeoSurgeError]:
        """Locates a batch of encoded images.

        Raises:
            ServiceError: The server has gone, or has the index version no longer.
        """
        images = [query for query in queries if isinstance(query, bytes)]
        outcomes = list(self.client.locate_many(images, options, index_version=self.index_version))
        if any(isinstance(outcome, IndexVersionUnknownError) for outcome in outcomes):
            raise ServiceError(
                f"{self.client.address} has the index version {self.index_version} no longer, which this run began"
                " with; give the same command again to go on with the one that is active now"
            )
        return outcomes


@contextlib.contextmanager
def open_index(index: Path, device: str, batch_size: int) -> Iterator[LocalBackend]:
    """Opens an index.

    Args:
        index: A bundle, or a store, whose active bundle is opened.
        device: Where encoder and index live.
        batch_size: Pictures encoded together at most (see `geosurge.encoder.model.ImageEncoder.useful_batch_size`).

    Raises:
        EncoderMissingError: The index answers embeddings only.
        GeoSurgeError: As `geosurge.locator.Locator.open`.
    """
    from geosurge.locator import Locator  # noqa: PLC0415 - without it, neither torch nor FAISS is needed

    with Locator.open(index, device, limits=OWN_LIMITS) as locator:
        yield LocalBackend(locator, locator.encoder.useful_batch_size(batch_size))


@contextlib.contextmanager
def open_server(
    address: str, connection: Connection | None, batch_size: int, timeout_seconds: float
) -> Iterator[Backend]:
    """Connects to a server; what is its active index version now answers the whole run.

    Args:
        address: ``host:port``.
        connection: How it is reached.
        batch_size: Pictures sent over one stream.
        timeout_seconds: Time that it has for its next answer.

    Raises:
        EncoderMissingError: Its index answers embeddings only.
        ServiceError: It cannot be reached.
    """
    from geosurge.client import Client  # noqa: PLC0415 - as above, of gRPC

    with Client(address, timeout_seconds=timeout_seconds, connection=connection) as client:
        info = client.get_info()
        if not info.encoder_sha256:
            raise EncoderMissingError(f"the active index version of {address} has no encoder and cannot read images")
        limits = ImageLimits(
            max_bytes=min(info.max_image_bytes, DEFAULT_LIMITS.max_bytes),
            max_pixels=info.max_image_pixels,
            min_side_px=info.min_image_side_px,
        )
        yield ServerBackend(client, info.index_version, info.encoder_sha256, limits, batch_size)
