import datetime

from geosurge.v1 import cell_pb2 as _cell_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.rpc import status_pb2 as _status_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SearchMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SEARCH_MODE_UNSPECIFIED: _ClassVar[SearchMode]
    SEARCH_MODE_BEAM: _ClassVar[SearchMode]
    SEARCH_MODE_EXACT: _ClassVar[SearchMode]
SEARCH_MODE_UNSPECIFIED: SearchMode
SEARCH_MODE_BEAM: SearchMode
SEARCH_MODE_EXACT: SearchMode

class Embedding(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, values: _Optional[_Iterable[float]] = ...) -> None: ...

class LocateOptions(_message.Message):
    __slots__ = ("top_k", "search_mode", "beam_width", "confidence_level", "h3_resolution", "region_tokens", "index_version")
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    SEARCH_MODE_FIELD_NUMBER: _ClassVar[int]
    BEAM_WIDTH_FIELD_NUMBER: _ClassVar[int]
    CONFIDENCE_LEVEL_FIELD_NUMBER: _ClassVar[int]
    H3_RESOLUTION_FIELD_NUMBER: _ClassVar[int]
    REGION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    INDEX_VERSION_FIELD_NUMBER: _ClassVar[int]
    top_k: int
    search_mode: SearchMode
    beam_width: int
    confidence_level: float
    h3_resolution: int
    region_tokens: _containers.RepeatedScalarFieldContainer[str]
    index_version: str
    def __init__(self, top_k: _Optional[int] = ..., search_mode: _Optional[_Union[SearchMode, str]] = ..., beam_width: _Optional[int] = ..., confidence_level: _Optional[float] = ..., h3_resolution: _Optional[int] = ..., region_tokens: _Optional[_Iterable[str]] = ..., index_version: _Optional[str] = ...) -> None: ...

class LocateRequest(_message.Message):
    __slots__ = ("request_id", "image", "embedding", "options")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    image: bytes
    embedding: Embedding
    options: LocateOptions
    def __init__(self, request_id: _Optional[str] = ..., image: _Optional[bytes] = ..., embedding: _Optional[_Union[Embedding, _Mapping]] = ..., options: _Optional[_Union[LocateOptions, _Mapping]] = ...) -> None: ...

class Location(_message.Message):
    __slots__ = ("latitude_deg", "longitude_deg", "radius_km", "confidence_level", "probability", "place", "h3_cell")
    LATITUDE_DEG_FIELD_NUMBER: _ClassVar[int]
    LONGITUDE_DEG_FIELD_NUMBER: _ClassVar[int]
    RADIUS_KM_FIELD_NUMBER: _ClassVar[int]
    CONFIDENCE_LEVEL_FIELD_NUMBER: _ClassVar[int]
    PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    PLACE_FIELD_NUMBER: _ClassVar[int]
    H3_CELL_FIELD_NUMBER: _ClassVar[int]
    latitude_deg: float
    longitude_deg: float
    radius_km: float
    confidence_level: float
    probability: float
    place: _cell_pb2.Place
    h3_cell: str
    def __init__(self, latitude_deg: _Optional[float] = ..., longitude_deg: _Optional[float] = ..., radius_km: _Optional[float] = ..., confidence_level: _Optional[float] = ..., probability: _Optional[float] = ..., place: _Optional[_Union[_cell_pb2.Place, _Mapping]] = ..., h3_cell: _Optional[str] = ...) -> None: ...

class PathCell(_message.Message):
    __slots__ = ("level", "token", "probability")
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    level: int
    token: str
    probability: float
    def __init__(self, level: _Optional[int] = ..., token: _Optional[str] = ..., probability: _Optional[float] = ...) -> None: ...

class Alternative(_message.Message):
    __slots__ = ("token", "probability", "latitude_deg", "longitude_deg", "place")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    LATITUDE_DEG_FIELD_NUMBER: _ClassVar[int]
    LONGITUDE_DEG_FIELD_NUMBER: _ClassVar[int]
    PLACE_FIELD_NUMBER: _ClassVar[int]
    token: str
    probability: float
    latitude_deg: float
    longitude_deg: float
    place: _cell_pb2.Place
    def __init__(self, token: _Optional[str] = ..., probability: _Optional[float] = ..., latitude_deg: _Optional[float] = ..., longitude_deg: _Optional[float] = ..., place: _Optional[_Union[_cell_pb2.Place, _Mapping]] = ...) -> None: ...

class CredibleRegion(_message.Message):
    __slots__ = ("tokens", "area_km2", "probability")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    AREA_KM2_FIELD_NUMBER: _ClassVar[int]
    PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedScalarFieldContainer[str]
    area_km2: float
    probability: float
    def __init__(self, tokens: _Optional[_Iterable[str]] = ..., area_km2: _Optional[float] = ..., probability: _Optional[float] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("decode_ms", "queue_ms", "encode_ms", "search_ms", "posterior_ms")
    DECODE_MS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    ENCODE_MS_FIELD_NUMBER: _ClassVar[int]
    SEARCH_MS_FIELD_NUMBER: _ClassVar[int]
    POSTERIOR_MS_FIELD_NUMBER: _ClassVar[int]
    decode_ms: float
    queue_ms: float
    encode_ms: float
    search_ms: float
    posterior_ms: float
    def __init__(self, decode_ms: _Optional[float] = ..., queue_ms: _Optional[float] = ..., encode_ms: _Optional[float] = ..., search_ms: _Optional[float] = ..., posterior_ms: _Optional[float] = ...) -> None: ...

class LocateResponse(_message.Message):
    __slots__ = ("request_id", "location", "path", "alternatives", "credible_region", "index_version", "timings")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    LOCATION_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    ALTERNATIVES_FIELD_NUMBER: _ClassVar[int]
    CREDIBLE_REGION_FIELD_NUMBER: _ClassVar[int]
    INDEX_VERSION_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    location: Location
    path: _containers.RepeatedCompositeFieldContainer[PathCell]
    alternatives: _containers.RepeatedCompositeFieldContainer[Alternative]
    credible_region: CredibleRegion
    index_version: str
    timings: Timings
    def __init__(self, request_id: _Optional[str] = ..., location: _Optional[_Union[Location, _Mapping]] = ..., path: _Optional[_Iterable[_Union[PathCell, _Mapping]]] = ..., alternatives: _Optional[_Iterable[_Union[Alternative, _Mapping]]] = ..., credible_region: _Optional[_Union[CredibleRegion, _Mapping]] = ..., index_version: _Optional[str] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ...) -> None: ...

class LocateStreamRequest(_message.Message):
    __slots__ = ("requests",)
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.RepeatedCompositeFieldContainer[LocateRequest]
    def __init__(self, requests: _Optional[_Iterable[_Union[LocateRequest, _Mapping]]] = ...) -> None: ...

class LocateResult(_message.Message):
    __slots__ = ("request_id", "response", "status")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    response: LocateResponse
    status: _status_pb2.Status
    def __init__(self, request_id: _Optional[str] = ..., response: _Optional[_Union[LocateResponse, _Mapping]] = ..., status: _Optional[_Union[_status_pb2.Status, _Mapping]] = ...) -> None: ...

class LocateStreamResponse(_message.Message):
    __slots__ = ("results",)
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[LocateResult]
    def __init__(self, results: _Optional[_Iterable[_Union[LocateResult, _Mapping]]] = ...) -> None: ...

class GetInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_image_bytes", "max_image_pixels", "min_image_side_px", "max_top_k", "max_beam_width", "max_region_tokens", "max_batch_size", "max_concurrent_requests", "max_requests_per_peer", "max_stream_items")
    MAX_IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_IMAGE_PIXELS_FIELD_NUMBER: _ClassVar[int]
    MIN_IMAGE_SIDE_PX_FIELD_NUMBER: _ClassVar[int]
    MAX_TOP_K_FIELD_NUMBER: _ClassVar[int]
    MAX_BEAM_WIDTH_FIELD_NUMBER: _ClassVar[int]
    MAX_REGION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_CONCURRENT_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    MAX_REQUESTS_PER_PEER_FIELD_NUMBER: _ClassVar[int]
    MAX_STREAM_ITEMS_FIELD_NUMBER: _ClassVar[int]
    max_image_bytes: int
    max_image_pixels: int
    min_image_side_px: int
    max_top_k: int
    max_beam_width: int
    max_region_tokens: int
    max_batch_size: int
    max_concurrent_requests: int
    max_requests_per_peer: int
    max_stream_items: int
    def __init__(self, max_image_bytes: _Optional[int] = ..., max_image_pixels: _Optional[int] = ..., min_image_side_px: _Optional[int] = ..., max_top_k: _Optional[int] = ..., max_beam_width: _Optional[int] = ..., max_region_tokens: _Optional[int] = ..., max_batch_size: _Optional[int] = ..., max_concurrent_requests: _Optional[int] = ..., max_requests_per_peer: _Optional[int] = ..., max_stream_items: _Optional[int] = ...) -> None: ...

class LevelInfo(_message.Message):
    __slots__ = ("level", "cell_count")
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    CELL_COUNT_FIELD_NUMBER: _ClassVar[int]
    level: int
    cell_count: int
    def __init__(self, level: _Optional[int] = ..., cell_count: _Optional[int] = ...) -> None: ...

class GetInfoResponse(_message.Message):
    __slots__ = ("engine_version", "index_version", "index_create_time", "domain", "dimension", "levels", "encoder_sha256", "image_formats", "limits", "default_beam_width")
    ENGINE_VERSION_FIELD_NUMBER: _ClassVar[int]
    INDEX_VERSION_FIELD_NUMBER: _ClassVar[int]
    INDEX_CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    DIMENSION_FIELD_NUMBER: _ClassVar[int]
    LEVELS_FIELD_NUMBER: _ClassVar[int]
    ENCODER_SHA256_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FORMATS_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_BEAM_WIDTH_FIELD_NUMBER: _ClassVar[int]
    engine_version: str
    index_version: str
    index_create_time: _timestamp_pb2.Timestamp
    domain: str
    dimension: int
    levels: _containers.RepeatedCompositeFieldContainer[LevelInfo]
    encoder_sha256: str
    image_formats: _containers.RepeatedScalarFieldContainer[str]
    limits: Limits
    default_beam_width: int
    def __init__(self, engine_version: _Optional[str] = ..., index_version: _Optional[str] = ..., index_create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., domain: _Optional[str] = ..., dimension: _Optional[int] = ..., levels: _Optional[_Iterable[_Union[LevelInfo, _Mapping]]] = ..., encoder_sha256: _Optional[str] = ..., image_formats: _Optional[_Iterable[str]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., default_beam_width: _Optional[int] = ...) -> None: ...
