"""What tests of the clients share."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.processes import wait_until
from support.servers import embedding, encoded_image

from geosurge.client import Query
from geosurge.errors import (
    EmbeddingInvalidError,
    GeoSurgeError,
    ImageEmptyError,
    ImageNotDecodableError,
    ImageTooLargeError,
    InputNotReadableError,
)
from geosurge.location import Location, Timings

MAX_IMAGE_BYTES = 100_000


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def without_timings(location: Location | GeoSurgeError) -> Location:
    assert isinstance(location, Location), location
    return replace(location, timings=Timings())


def queries(directory: Path) -> tuple[list[Query], list[type]]:
    """Every kind of query, good and bad, and what each becomes."""
    file = directory / "good.png"
    file.write_bytes(encoded_image(2))
    large = directory / "large.jpg"
    large.write_bytes(bytes(5_000_000))
    pairs: list[tuple[Any, type]] = [
        (encoded_image(1), Location),
        (b"", ImageEmptyError),
        (file, Location),
        ("missing.jpg", InputNotReadableError),
        (bytes(5_000_000), ImageTooLargeError),
        (large, ImageTooLargeError),
        (embedding(1), Location),
        (embedding(1)[2:], EmbeddingInvalidError),
        (np.zeros((48, 48, 3), np.uint8), Location),
        (b"no image", ImageNotDecodableError),
    ] * 5
    return [query for query, _ in pairs], [kind for _, kind in pairs]


def ended_streams(caplog: pytest.LogCaptureFixture, count: int) -> list[str]:
    """Codes with which a server of this process logged that streams ended; waits for so many."""

    def ended() -> list[str]:
        calls = [vars(record) for record in caplog.records]
        codes = [call["code"] for call in calls if str(call.get("method", "")).endswith("/LocateStream")]
        return codes if len(codes) >= count else []

    return wait_until(ended, f"{count} streams end")
