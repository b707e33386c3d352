"""Requests from what callers have: files, bytes, arrays, pictures, embeddings."""

from __future__ import annotations

import io
import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from geosurge.client.feeds import Entry
from geosurge.errors import (
    EmbeddingInvalidError,
    GeoSurgeError,
    ImageFormatUnsupportedError,
    ImageTooLargeError,
    InputNotReadableError,
)
from geosurge.location import LocateOptions
from geosurge.v1 import cell_pb2, geolocation_pb2
from geosurge.wire import options_to_message

if TYPE_CHECKING:
    from PIL import Image

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | NDArray[np.uint8] | Image.Image"
"""A file's path, an encoded image, or pixels: (height, width, 3) uint8 or a Pillow image, which are sent as PNG."""

Query: TypeAlias = "ImageSource | NDArray[np.floating[Any]]"
"""An image, or an embedding of shape (d,)."""

_LARGEST_IMAGE_BYTES: Final = 500_000_000
"""No server can be set to accept more, and protobuf itself ends at two gigabytes."""


def locate_request(
    query: bytes | NDArray[np.floating[Any]], options: LocateOptions | None, index_version: str
) -> geolocation_pb2.LocateRequest:
    """The request for one image or embedding.

    Args:
        query: What `encode_image` or `check_embedding` returned.
        options: How it is located; ``None`` is the default.
        index_version: Version that must answer; empty means the active one.
    """
    # The id is made here rather than by the server so that a repeated call is recognised as the same request.
    request = geolocation_pb2.LocateRequest(
        request_id=uuid.uuid4().hex, options=options_to_message(options or LocateOptions(), index_version)
    )
    if isinstance(query, bytes):
        request.image = query
    else:
        request.embedding.values.extend(query.tolist())
        request.embedding.SetInParent()
    return request


def stream_entry(
    query: Query, options: LocateOptions | None, index_version: str, max_image_bytes: int
) -> Entry[geolocation_pb2.LocateRequest]:
    """Prepares a query of a stream. One that the server would have to refuse by ending the stream is refused here."""
    try:
        is_embedding = isinstance(query, np.ndarray) and query.ndim == 1
        content = check_embedding(query) if is_embedding else encode_image(query, max_image_bytes)
    except GeoSurgeError as error:
        return Entry(error=error)
    return Entry(request=locate_request(content, options, index_version))


def path_request(latitude_deg: float, longitude_deg: float, index_version: str) -> cell_pb2.GetPathRequest:
    """The request for the cells that hold a coordinate."""
    coordinate = cell_pb2.Coordinate(latitude_deg=latitude_deg, longitude_deg=longitude_deg)
    return cell_pb2.GetPathRequest(coordinate=coordinate, index_version=index_version)


def check_embedding(embedding: Any) -> NDArray[np.floating[Any]]:  # noqa: ANN401
    """An embedding as an array (d,).

    Raises:
        EmbeddingInvalidError: It is not one row of floats.
    """
    values = np.asarray(embedding)
    if values.ndim != 1 or not np.issubdtype(values.dtype, np.floating):
        raise EmbeddingInvalidError(f"an embedding is one row of floats, not {values.shape} {values.dtype}")
    return values


def encode_image(image: Any, max_bytes: int = _LARGEST_IMAGE_BYTES) -> bytes:  # noqa: ANN401
    """The bytes that stand for an image on the wire.

    Args:
        image: An `ImageSource`.
        max_bytes: What the server accepts.

    Raises:
        ImageTooLargeError: There are more bytes.
        InputNotReadableError: Its file cannot be read.
        ImageFormatUnsupportedError: It is no image, or an array of another shape or type.
    """
    if isinstance(image, bytes):
        data = image
    elif isinstance(image, str | os.PathLike):
        data = _read_file(Path(image), max_bytes)
    else:
        data = _to_png(image)
    if len(data) > max_bytes:
        raise _too_large(len(data), max_bytes)
    return data


def _read_file(path: Path, max_bytes: int) -> bytes:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > max_bytes:
                raise _too_large(size, max_bytes)
            return file.read()
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise InputNotReadableError(f"cannot read {path}: {reason}") from error


def _to_png(image: Any) -> bytes:  # noqa: ANN401
    # Imported here because most callers send files and need no image library at all.
    from PIL import Image, ImageOps  # noqa: PLC0415

    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise ImageFormatUnsupportedError(
                f"an image array must be (height, width, 3) uint8, not {image.shape} {image.dtype}"
            )
        picture: Image.Image = Image.fromarray(image)
    elif isinstance(image, Image.Image):
        picture = ImageOps.exif_transpose(image)
        if picture.mode not in {"1", "L", "LA", "I;16", "P", "RGB", "RGBA"}:
            picture = picture.convert("RGB")
    else:
        raise ImageFormatUnsupportedError(
            f"an image is a path, bytes, a numpy array or a Pillow image, not {type(image).__name__}"
        )
    content = io.BytesIO()
    picture.save(content, "PNG", compress_level=1)
    return content.getvalue()


def _too_large(size: int, limit: int) -> ImageTooLargeError:
    return ImageTooLargeError(
        f"the image has {size} bytes, the limit is {limit}; send a smaller or more compressed picture"
    )
