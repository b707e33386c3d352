"""Requests that are refused, each with its own reason and status code, and what a refusal must not show."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import grpc
from support.servers import embedding, encoded_image

from geosurge.v1 import geolocation_pb2 as pb

INVALID, NOT_FOUND = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND

MAX_IMAGE_BYTES = 100_000
"""Limit of the servers that `BAD_REQUESTS` are for."""


def png_announcing(width: int, height: int) -> bytes:
    """A small file whose header announces a large picture."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def of_embedding(values: Iterable[float], **options: Any) -> pb.LocateRequest:
    return pb.LocateRequest(embedding=pb.Embedding(values=values), options=pb.LocateOptions(**options))


def with_options(**options: Any) -> pb.LocateRequest:
    return of_embedding(embedding(0).tolist(), **options)


BAD_REQUESTS: dict[str, tuple[pb.LocateRequest, str, grpc.StatusCode]] = {
    "no query": (pb.LocateRequest(), "QUERY_MISSING", INVALID),
    "no bytes": (pb.LocateRequest(image=b""), "IMAGE_EMPTY", INVALID),
    "no image": (pb.LocateRequest(image=b"Hello, world!" * 9), "IMAGE_NOT_DECODABLE", INVALID),
    "truncated PNG": (pb.LocateRequest(image=encoded_image(1)[:-900]), "IMAGE_TRUNCATED", INVALID),
    "truncated JPEG": (pb.LocateRequest(image=encoded_image(1, "JPEG")[:-200]), "IMAGE_TRUNCATED", INVALID),
    "one pixel": (pb.LocateRequest(image=encoded_image(1, size=(1, 1))), "IMAGE_TOO_SMALL", INVALID),
    "400 megapixels": (pb.LocateRequest(image=png_announcing(20_000, 20_000)), "IMAGE_TOO_MANY_PIXELS", INVALID),
    "too many bytes": (pb.LocateRequest(image=encoded_image(1) + bytes(MAX_IMAGE_BYTES)), "IMAGE_TOO_LARGE", INVALID),
    "unlisted format": (pb.LocateRequest(image=b"%PDF-1.7 ..."), "IMAGE_FORMAT_UNSUPPORTED", INVALID),
    "NaN": (of_embedding([float("nan"), *embedding(0).tolist()[1:]]), "EMBEDDING_INVALID", INVALID),
    "infinite": (of_embedding([float("inf"), *embedding(0).tolist()[1:]]), "EMBEDDING_INVALID", INVALID),
    "short": (of_embedding(embedding(0).tolist()[1:]), "EMBEDDING_INVALID", INVALID),
    "empty embedding": (pb.LocateRequest(embedding=pb.Embedding()), "EMBEDDING_INVALID", INVALID),
    "endless embedding": (of_embedding([1.0] * 70_000), "EMBEDDING_INVALID", INVALID),
    "zero embedding": (of_embedding([0.0] * 16), "EMBEDDING_INVALID", INVALID),
    "k = 0": (with_options(top_k=0), "OPTION_OUT_OF_RANGE", INVALID),
    "k too large": (with_options(top_k=2**32 - 1), "OPTION_OUT_OF_RANGE", INVALID),
    "no beam": (with_options(beam_width=0), "OPTION_OUT_OF_RANGE", INVALID),
    "certainty": (with_options(confidence_level=1.0), "OPTION_OUT_OF_RANGE", INVALID),
    "NaN confidence": (with_options(confidence_level=float("nan")), "OPTION_OUT_OF_RANGE", INVALID),
    "H3 resolution": (with_options(h3_resolution=16), "OPTION_OUT_OF_RANGE", INVALID),
    "search mode": (with_options(search_mode=99), "OPTION_OUT_OF_RANGE", INVALID),
    "unknown region": (with_options(region_tokens=["no-such-cell"]), "REGION_CELL_UNKNOWN", INVALID),
    "too many regions": (with_options(region_tokens=["1"] * 1001), "OPTION_OUT_OF_RANGE", INVALID),
    "empty region": (with_options(region_tokens=["8888888888888889"]), "REGION_EMPTY", INVALID),
    "long request id": (pb.LocateRequest(request_id="x" * 5000, image=b"a"), "OPTION_OUT_OF_RANGE", INVALID),
    "endless version": (with_options(index_version="x" * 256), "OPTION_OUT_OF_RANGE", INVALID),
    "unknown version": (with_options(index_version="nope"), "INDEX_VERSION_UNKNOWN", NOT_FOUND),
}


def shows_code(text: str) -> bool:
    """Whether a text shows how the server is made: a stack trace, or where its files are."""
    return any(words in text for words in ("Traceback", 'File "', ".py", "/geosurge/", str(Path.home()), "/tmp/"))
