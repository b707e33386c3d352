from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Coordinate(_message.Message):
    __slots__ = ("latitude_deg", "longitude_deg")
    LATITUDE_DEG_FIELD_NUMBER: _ClassVar[int]
    LONGITUDE_DEG_FIELD_NUMBER: _ClassVar[int]
    latitude_deg: float
    longitude_deg: float
    def __init__(self, latitude_deg: _Optional[float] = ..., longitude_deg: _Optional[float] = ...) -> None: ...

class Place(_message.Message):
    __slots__ = ("city", "region", "country", "country_code", "distance_km")
    CITY_FIELD_NUMBER: _ClassVar[int]
    REGION_FIELD_NUMBER: _ClassVar[int]
    COUNTRY_FIELD_NUMBER: _ClassVar[int]
    COUNTRY_CODE_FIELD_NUMBER: _ClassVar[int]
    DISTANCE_KM_FIELD_NUMBER: _ClassVar[int]
    city: str
    region: str
    country: str
    country_code: str
    distance_km: float
    def __init__(self, city: _Optional[str] = ..., region: _Optional[str] = ..., country: _Optional[str] = ..., country_code: _Optional[str] = ..., distance_km: _Optional[float] = ...) -> None: ...

class Cell(_message.Message):
    __slots__ = ("token", "level", "ordinal", "parent_ordinal", "first_child_ordinal", "last_child_ordinal", "mean", "spread_km", "sample_count", "area_km2", "outline", "place", "s2_level")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    ORDINAL_FIELD_NUMBER: _ClassVar[int]
    PARENT_ORDINAL_FIELD_NUMBER: _ClassVar[int]
    FIRST_CHILD_ORDINAL_FIELD_NUMBER: _ClassVar[int]
    LAST_CHILD_ORDINAL_FIELD_NUMBER: _ClassVar[int]
    MEAN_FIELD_NUMBER: _ClassVar[int]
    SPREAD_KM_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_COUNT_FIELD_NUMBER: _ClassVar[int]
    AREA_KM2_FIELD_NUMBER: _ClassVar[int]
    OUTLINE_FIELD_NUMBER: _ClassVar[int]
    PLACE_FIELD_NUMBER: _ClassVar[int]
    S2_LEVEL_FIELD_NUMBER: _ClassVar[int]
    token: str
    level: int
    ordinal: int
    parent_ordinal: int
    first_child_ordinal: int
    last_child_ordinal: int
    mean: Coordinate
    spread_km: float
    sample_count: int
    area_km2: float
    outline: _containers.RepeatedCompositeFieldContainer[Coordinate]
    place: Place
    s2_level: int
    def __init__(self, token: _Optional[str] = ..., level: _Optional[int] = ..., ordinal: _Optional[int] = ..., parent_ordinal: _Optional[int] = ..., first_child_ordinal: _Optional[int] = ..., last_child_ordinal: _Optional[int] = ..., mean: _Optional[_Union[Coordinate, _Mapping]] = ..., spread_km: _Optional[float] = ..., sample_count: _Optional[int] = ..., area_km2: _Optional[float] = ..., outline: _Optional[_Iterable[_Union[Coordinate, _Mapping]]] = ..., place: _Optional[_Union[Place, _Mapping]] = ..., s2_level: _Optional[int] = ...) -> None: ...

class GetCellRequest(_message.Message):
    __slots__ = ("token", "level", "index_version")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    INDEX_VERSION_FIELD_NUMBER: _ClassVar[int]
    token: str
    level: int
    index_version: str
    def __init__(self, token: _Optional[str] = ..., level: _Optional[int] = ..., index_version: _Optional[str] = ...) -> None: ...

class GetCellResponse(_message.Message):
    __slots__ = ("cell", "index_version")
    CELL_FIELD_NUMBER: _ClassVar[int]
    INDEX_VERSION_FIELD_NUMBER: _ClassVar[int]
    cell: Cell
    index_version: str
    def __init__(self, cell: _Optional[_Union[Cell, _Mapping]] = ..., index_version: _Optional[str] = ...) -> None: ...

class ListChildrenRequest(_message.Message):
    __slots__ = ("token", "level", "index_version", "page_size", "page_token")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    INDEX_VERSION_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    token: str
    level: int
    index_version: str
    page_size: int
    page_token: str
    def __init__(self, token: _Optional[str] = ..., level: _Optional[int] = ..., index_version: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListChildrenResponse(_message.Message):
    __slots__ = ("cells", "index_version", "next_page_token")
    CELLS_FIELD_NUMBER: _ClassVar[int]
    INDEX_VERSION_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    cells: _containers.RepeatedCompositeFieldContainer[Cell]
    index_version: str
    next_page_token: str
    def __init__(self, cells: _Optional[_Iterable[_Union[Cell, _Mapping]]] = ..., index_version: _Optional[str] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class GetPathRequest(_message.Message):
    __slots__ = ("coordinate", "index_version")
    COORDINATE_FIELD_NUMBER: _ClassVar[int]
    INDEX_VERSION_FIELD_NUMBER: _ClassVar[int]
    coordinate: Coordinate
    index_version: str
    def __init__(self, coordinate: _Optional[_Union[Coordinate, _Mapping]] = ..., index_version: _Optional[str] = ...) -> None: ...

class GetPathResponse(_message.Message):
    __slots__ = ("cells", "index_version")
    CELLS_FIELD_NUMBER: _ClassVar[int]
    INDEX_VERSION_FIELD_NUMBER: _ClassVar[int]
    cells: _containers.RepeatedCompositeFieldContainer[Cell]
    index_version: str
    def __init__(self, cells: _Optional[_Iterable[_Union[Cell, _Mapping]]] = ..., index_version: _Optional[str] = ...) -> None: ...
