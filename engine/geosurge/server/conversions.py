"""Converts requests of the public API into arguments of the engine; `geosurge.wire` converts answers and errors."""

from __future__ import annotations

import uuid
from typing import Final

import numpy as np
from numpy.typing import NDArray

from geosurge.errors import EmbeddingInvalidError, OptionOutOfRangeError, QueryMissingError
from geosurge.location import LocateOptions
from geosurge.locator import MAX_REGION_TOKENS
from geosurge.v1 import geolocation_pb2

MAX_EMBEDDING_LENGTH = 65_536
"""Most values that are copied: an embedding too long for any index is refused without reading it."""

MAX_REQUEST_ID_LENGTH = 4096
"""Characters that a request id may have: it is echoed, and may be a path."""

MAX_VERSION_NAME_LENGTH = 255
"""Characters that the name of an index version may have: it is the name of a directory."""

_DEFAULT: Final = LocateOptions()
_SEARCH_MODES: Final = frozenset(geolocation_pb2.SearchMode.values())


def request_to_query(request: geolocation_pb2.LocateRequest) -> bytes | NDArray[np.float32]:
    """Reads what is to be located.

    Returns:
        The encoded image, or the embedding of shape (d,).

    Raises:
        QueryMissingError: The request holds neither.
        EmbeddingInvalidError: The embedding is longer than any index's.
    """
    kind = request.WhichOneof("query")
    if kind == "image":
        return request.image
    if kind == "embedding":
        count = len(request.embedding.values)
        if count > MAX_EMBEDDING_LENGTH:
            raise EmbeddingInvalidError(f"the embedding has {count} values; GetInfo says how many the index needs")
        return np.array(request.embedding.values, dtype=np.float32)
    raise QueryMissingError("the request holds neither an image nor an embedding; set one of the two")


def message_to_options(message: geolocation_pb2.LocateOptions) -> LocateOptions:
    """Reads the options of a request; a field that is not set takes its default, one that is set is kept even if zero.

    Raises:
        OptionOutOfRangeError: The search mode is not one that this engine knows, or the region has too many cells.
    """
    if message.search_mode not in _SEARCH_MODES:
        raise OptionOutOfRangeError(
            f"search_mode is {message.search_mode}, which this server does not know; use SEARCH_MODE_BEAM or "
            "SEARCH_MODE_EXACT"
        )
    if len(message.region_tokens) > MAX_REGION_TOKENS:
        raise OptionOutOfRangeError(
            f"region_tokens has {len(message.region_tokens)} cells, at most {MAX_REGION_TOKENS} are allowed; use "
            "larger cells"
        )
    return LocateOptions(
        top_k=message.top_k if message.HasField("top_k") else _DEFAULT.top_k,
        beam_width=message.beam_width if message.HasField("beam_width") else None,
        exact=message.search_mode == geolocation_pb2.SEARCH_MODE_EXACT,
        confidence_level=(
            message.confidence_level if message.HasField("confidence_level") else _DEFAULT.confidence_level
        ),
        h3_resolution=message.h3_resolution if message.HasField("h3_resolution") else None,
        region_tokens=tuple(message.region_tokens),
    )


def request_to_id(request: geolocation_pb2.LocateRequest) -> str:
    """The id that a request's answer carries: its own, or a new one when it has none."""
    return request.request_id or uuid.uuid4().hex


def check_request_id(request_id: str) -> None:
    """Refuses an id that is too long to be echoed.

    Raises:
        OptionOutOfRangeError: It has more than `MAX_REQUEST_ID_LENGTH` characters.
    """
    if len(request_id) > MAX_REQUEST_ID_LENGTH:
        raise OptionOutOfRangeError(
            f"request_id has {len(request_id)} characters, at most {MAX_REQUEST_ID_LENGTH} are allowed"
        )


def check_version_name(name: str) -> str:
    """Returns the name of an index version, unless no version can have it.

    Raises:
        OptionOutOfRangeError: It has more than `MAX_VERSION_NAME_LENGTH` characters.
    """
    if len(name) > MAX_VERSION_NAME_LENGTH:
        raise OptionOutOfRangeError(
            f"the name of the index version has {len(name)} characters, at most {MAX_VERSION_NAME_LENGTH} are allowed"
        )
    return name
