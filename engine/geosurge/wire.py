"""Protobuf messages of the public API to plain dataclasses and errors, and back.

The command line prints these messages, the server sends them, the client reads them and a run over an archive keeps
them; none of that needs gRPC here. A failure travels as a ``google.rpc.Status`` whose details hold a
``google.rpc.ErrorInfo`` (domain `ERROR_DOMAIN`, the error's stable reason) and, when the server is overloaded, a
``google.rpc.RetryInfo``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from datetime import UTC
from typing import Final

from google.protobuf import json_format
from google.rpc import code_pb2, error_details_pb2, status_pb2

from geosurge.description import Cell, Coordinate, IndexVersion, ServerInfo, VersionState
from geosurge.errors import (
    DeadlineExceededError,
    GeoSurgeError,
    InputError,
    MessageTooLargeError,
    OptionOutOfRangeError,
    OverloadedError,
    ServiceError,
)
from geosurge.location import (
    Alternative,
    CredibleRegion,
    LocateOptions,
    Location,
    PathCell,
    Place,
    Timings,
)
from geosurge.v1 import cell_pb2, geolocation_pb2, index_pb2

ERROR_DOMAIN: Final = "geosurge"

MAX_STATUS_MESSAGE_BYTES: Final = 1000
"""A status travels twice in HTTP/2 trailers, which peers limit to 8 kB, and a message may quote its input."""

_STATE_PREFIX: Final = "VERSION_STATE_"


def location_to_response(location: Location, request_id: str) -> geolocation_pb2.LocateResponse:
    """Builds the answer that `Locate` returns.

    Args:
        location: The answer of the engine.
        request_id: Id of the request that it answers.

    Returns:
        The message.
    """
    region, timings = location.credible_region, location.timings
    # Nested messages are given as dictionaries: built as messages, each would be copied into the one around it.
    return geolocation_pb2.LocateResponse(
        request_id=request_id,
        location={
            "latitude_deg": location.latitude_deg,
            "longitude_deg": location.longitude_deg,
            "radius_km": location.radius_km,
            "confidence_level": location.confidence_level,
            "probability": location.probability,
            "place": _place_fields(location.place),
            "h3_cell": location.h3_cell or "",
        },
        path=[{"level": cell.level, "token": cell.token, "probability": cell.probability} for cell in location.path],
        alternatives=[
            {
                "token": leaf.token,
                "probability": leaf.probability,
                "latitude_deg": leaf.latitude_deg,
                "longitude_deg": leaf.longitude_deg,
                "place": _place_fields(leaf.place),
            }
            for leaf in location.alternatives
        ],
        credible_region={"tokens": region.tokens, "area_km2": region.area_km2, "probability": region.probability},
        index_version=location.index_version,
        timings={
            "decode_ms": timings.decode_ms,
            "queue_ms": timings.queue_ms,
            "encode_ms": timings.encode_ms,
            "search_ms": timings.search_ms,
            "posterior_ms": timings.posterior_ms,
        },
    )


def response_to_location(response: geolocation_pb2.LocateResponse) -> Location:
    """Reads the answer that `location_to_response` built; nothing but the request id is lost."""
    location, region, timings = response.location, response.credible_region, response.timings
    return Location(
        latitude_deg=location.latitude_deg,
        longitude_deg=location.longitude_deg,
        radius_km=location.radius_km,
        confidence_level=location.confidence_level,
        probability=location.probability,
        path=tuple(PathCell(cell.level, cell.token, cell.probability) for cell in response.path),
        alternatives=tuple(
            Alternative(
                token=leaf.token,
                probability=leaf.probability,
                latitude_deg=leaf.latitude_deg,
                longitude_deg=leaf.longitude_deg,
                place=message_to_place(leaf.place) if leaf.HasField("place") else None,
            )
            for leaf in response.alternatives
        ),
        credible_region=CredibleRegion(tuple(region.tokens), region.area_km2, region.probability),
        index_version=response.index_version,
        place=message_to_place(location.place) if location.HasField("place") else None,
        h3_cell=location.h3_cell or None,
        timings=Timings(
            decode_ms=timings.decode_ms,
            queue_ms=timings.queue_ms,
            encode_ms=timings.encode_ms,
            search_ms=timings.search_ms,
            posterior_ms=timings.posterior_ms,
        ),
    )


def location_to_bytes(location: Location) -> bytes:
    """Serializes an answer to be kept: as the message of the wire, so that nothing of it is lost."""
    return location_to_response(location, "").SerializeToString()


def bytes_to_location(response: bytes) -> Location:
    """Reads the answer that `location_to_bytes` serialized."""
    return response_to_location(geolocation_pb2.LocateResponse.FromString(response))


def message_to_place(place: cell_pb2.Place) -> Place:
    """Reads the message of a place."""
    return Place(place.city, place.region, place.country, place.country_code, place.distance_km)


def options_to_message(options: LocateOptions, index_version: str = "") -> geolocation_pb2.LocateOptions:
    """Builds the options of a request; out-of-range values are left for the server to refuse where they fit the wire.

    Raises:
        OptionOutOfRangeError: A number is negative or too large to be written down.
    """
    mode = geolocation_pb2.SEARCH_MODE_EXACT if options.exact else geolocation_pb2.SEARCH_MODE_UNSPECIFIED
    try:
        return geolocation_pb2.LocateOptions(
            top_k=options.top_k,
            search_mode=mode,
            beam_width=options.beam_width,
            confidence_level=options.confidence_level,
            h3_resolution=options.h3_resolution,
            region_tokens=options.region_tokens,
            index_version=index_version,
        )
    except (ValueError, TypeError) as error:
        raise OptionOutOfRangeError(f"options cannot be sent: {error}; see LocateOptions for the ranges") from error


def message_to_cell(cell: cell_pb2.Cell, index_version: str) -> Cell:
    """Reads a cell that came from an index version."""
    has_children = cell.HasField("first_child_ordinal")
    return Cell(
        token=cell.token,
        level=cell.level,
        ordinal=cell.ordinal,
        parent_ordinal=cell.parent_ordinal if cell.HasField("parent_ordinal") else None,
        child_ordinals=range(cell.first_child_ordinal, cell.last_child_ordinal + 1) if has_children else range(0),
        mean=Coordinate(cell.mean.latitude_deg, cell.mean.longitude_deg),
        spread_km=cell.spread_km,
        sample_count=cell.sample_count,
        area_km2=cell.area_km2,
        outline=tuple(Coordinate(corner.latitude_deg, corner.longitude_deg) for corner in cell.outline),
        place=message_to_place(cell.place) if cell.HasField("place") else None,
        s2_level=cell.s2_level if cell.HasField("s2_level") else None,
        index_version=index_version,
    )


def message_to_info(info: geolocation_pb2.GetInfoResponse) -> ServerInfo:
    """Reads what a server tells of itself."""
    return ServerInfo(
        engine_version=info.engine_version,
        index_version=info.index_version,
        index_create_time=info.index_create_time.ToDatetime(tzinfo=UTC),
        domain=info.domain,
        dimension=info.dimension,
        cell_counts=tuple(level.cell_count for level in info.levels),
        encoder_sha256=info.encoder_sha256,
        image_formats=tuple(info.image_formats),
        max_image_bytes=info.limits.max_image_bytes,
        max_image_pixels=info.limits.max_image_pixels,
        min_image_side_px=info.limits.min_image_side_px,
        max_top_k=info.limits.max_top_k,
        max_beam_width=info.limits.max_beam_width,
        max_region_tokens=info.limits.max_region_tokens,
        max_batch_size=info.limits.max_batch_size,
        max_concurrent_requests=info.limits.max_concurrent_requests,
        max_requests_per_peer=info.limits.max_requests_per_peer,
        max_stream_items=info.limits.max_stream_items,
        default_beam_width=info.default_beam_width,
    )


def version_to_message(version: IndexVersion) -> index_pb2.IndexVersion:
    """Describes one index version of a server."""
    message = index_pb2.IndexVersion(
        name=version.name,
        state=f"{_STATE_PREFIX}{version.state.name}",
        failure=None if version.failure is None else error_to_status(version.failure),
        load_step=version.load_step,
        load_progress=version.load_progress,
        request_count=version.request_count,
        memory_bytes=version.memory_bytes,
        canary_share=version.canary_share,
        encoder_sha256=version.encoder_sha256,
    )
    if version.state_time is not None:
        message.state_time.FromDatetime(version.state_time)
    if version.create_time is not None:
        message.create_time.FromDatetime(version.create_time)
    return message


def message_to_version(message: index_pb2.IndexVersion) -> IndexVersion:
    """Reads one index version of a server.

    Raises:
        ServiceError: It is in a state that this client does not know.
    """
    try:
        state = VersionState[index_pb2.VersionState.Name(message.state).removeprefix(_STATE_PREFIX)]
    except (KeyError, ValueError) as error:
        raise ServiceError(
            f"the server reports the state {message.state} of version {message.name!r}, which this client does not "
            "know; use a client of the server's version"
        ) from error
    return IndexVersion(
        name=message.name,
        state=state,
        failure=status_to_error(message.failure) if message.HasField("failure") else None,
        load_step=message.load_step,
        load_progress=message.load_progress,
        request_count=message.request_count,
        memory_bytes=message.memory_bytes,
        canary_share=message.canary_share,
        state_time=message.state_time.ToDatetime(tzinfo=UTC) if message.HasField("state_time") else None,
        create_time=message.create_time.ToDatetime(tzinfo=UTC) if message.HasField("create_time") else None,
        encoder_sha256=message.encoder_sha256,
    )


def response_to_json(response: geolocation_pb2.LocateResponse) -> str:
    """Writes an answer as one line of protobuf JSON.

    Field names are those of the .proto files, and scalars, lists and maps are present also when they are empty or zero,
    so that readers can rely on the keys.
    """
    return json_format.MessageToJson(
        response, preserving_proto_field_name=True, always_print_fields_with_no_presence=True, indent=None
    )


def error_to_json(error: GeoSurgeError, request_id: str) -> str:
    """Writes a failure as the line that stands where its answer would be."""
    return json.dumps({"request_id": request_id, "error": {"reason": error.reason, "message": str(error)}})


def error_to_status(error: GeoSurgeError, metadata: Mapping[str, str] | None = None) -> status_pb2.Status:
    """Describes a failure to another process.

    Args:
        error: What went wrong.
        metadata: Facts for ``ErrorInfo.metadata``, such as the request id.

    Returns:
        A status of the error's gRPC code; its message is cut where it would not fit into trailers.
    """
    status = status_pb2.Status(code=code_pb2.Code.Value(error.grpc_code), message=_shorten(str(error)))
    facts = {key: _shorten(value, 200) for key, value in (metadata or {}).items()}
    info = error_details_pb2.ErrorInfo(domain=ERROR_DOMAIN, reason=error.reason, metadata=facts)
    status.details.add().Pack(info)
    if isinstance(error, OverloadedError):
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(error.retry_after_seconds * 1e9))
        status.details.add().Pack(retry)
    return status


def status_to_error(status: status_pb2.Status) -> GeoSurgeError:
    """Rebuilds the error that `error_to_status` described.

    A status without an ``ErrorInfo`` of this engine comes from the transport or a proxy: its code decides.
    """
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    for detail in status.details:
        detail.Unpack(info)
        detail.Unpack(retry)
    known = _ERROR_BY_REASON.get(info.reason) if info.domain == ERROR_DOMAIN else None
    if known is not None and issubclass(known, OverloadedError):
        return known(status.message, retry_after_seconds=retry.retry_delay.ToNanoseconds() / 1e9)
    if known is not None:
        return known(status.message)
    return _ERROR_BY_CODE.get(status.code, GeoSurgeError)(status.message)


def _place_fields(place: Place | None) -> dict[str, str | float] | None:
    """The fields of a place's message; ``None`` leaves it unset."""
    if place is None:
        return None
    return {
        "city": place.city,
        "region": place.region,
        "country": place.country,
        "country_code": place.country_code,
        "distance_km": place.distance_km,
    }


def _shorten(text: str, max_bytes: int = MAX_STATUS_MESSAGE_BYTES) -> str:
    encoded = text.encode("utf-8", "replace")
    if len(encoded) <= max_bytes:
        return encoded.decode()
    half = (max_bytes - len(" [...] ")) // 2
    return f"{encoded[:half].decode(errors='ignore')} [...] {encoded[-half:].decode(errors='ignore')}"


def _error_classes(base: type[GeoSurgeError] = GeoSurgeError) -> Iterator[type[GeoSurgeError]]:
    yield base
    for child in base.__subclasses__():
        yield from _error_classes(child)


_ERROR_BY_REASON: Final = {error.reason: error for error in reversed(list(_error_classes()))}

_ERROR_BY_CODE: Final[dict[int, type[GeoSurgeError]]] = {
    code_pb2.INVALID_ARGUMENT: InputError,
    code_pb2.NOT_FOUND: InputError,
    code_pb2.OUT_OF_RANGE: InputError,
    code_pb2.DEADLINE_EXCEEDED: DeadlineExceededError,
    code_pb2.RESOURCE_EXHAUSTED: MessageTooLargeError,
    code_pb2.UNAVAILABLE: ServiceError,
    code_pb2.CANCELLED: ServiceError,
    code_pb2.UNIMPLEMENTED: ServiceError,
    code_pb2.UNAUTHENTICATED: ServiceError,
    code_pb2.PERMISSION_DENIED: ServiceError,
}
