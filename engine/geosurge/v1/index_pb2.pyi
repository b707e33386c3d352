import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.rpc import status_pb2 as _status_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class VersionState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    VERSION_STATE_UNSPECIFIED: _ClassVar[VersionState]
    VERSION_STATE_LOADING: _ClassVar[VersionState]
    VERSION_STATE_READY: _ClassVar[VersionState]
    VERSION_STATE_ACTIVE: _ClassVar[VersionState]
    VERSION_STATE_DRAINING: _ClassVar[VersionState]
    VERSION_STATE_UNLOADED: _ClassVar[VersionState]
    VERSION_STATE_FAILED: _ClassVar[VersionState]
VERSION_STATE_UNSPECIFIED: VersionState
VERSION_STATE_LOADING: VersionState
VERSION_STATE_READY: VersionState
VERSION_STATE_ACTIVE: VersionState
VERSION_STATE_DRAINING: VersionState
VERSION_STATE_UNLOADED: VersionState
VERSION_STATE_FAILED: VersionState

class IndexVersion(_message.Message):
    __slots__ = ("name", "state", "failure", "load_step", "load_progress", "request_count", "memory_bytes", "canary_share", "state_time", "create_time", "encoder_sha256")
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    LOAD_STEP_FIELD_NUMBER: _ClassVar[int]
    LOAD_PROGRESS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_COUNT_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    CANARY_SHARE_FIELD_NUMBER: _ClassVar[int]
    STATE_TIME_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    ENCODER_SHA256_FIELD_NUMBER: _ClassVar[int]
    name: str
    state: VersionState
    failure: _status_pb2.Status
    load_step: str
    load_progress: float
    request_count: int
    memory_bytes: int
    canary_share: float
    state_time: _timestamp_pb2.Timestamp
    create_time: _timestamp_pb2.Timestamp
    encoder_sha256: str
    def __init__(self, name: _Optional[str] = ..., state: _Optional[_Union[VersionState, str]] = ..., failure: _Optional[_Union[_status_pb2.Status, _Mapping]] = ..., load_step: _Optional[str] = ..., load_progress: _Optional[float] = ..., request_count: _Optional[int] = ..., memory_bytes: _Optional[int] = ..., canary_share: _Optional[float] = ..., state_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., encoder_sha256: _Optional[str] = ...) -> None: ...

class ListVersionsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListVersionsResponse(_message.Message):
    __slots__ = ("versions", "active_version")
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_VERSION_FIELD_NUMBER: _ClassVar[int]
    versions: _containers.RepeatedCompositeFieldContainer[IndexVersion]
    active_version: str
    def __init__(self, versions: _Optional[_Iterable[_Union[IndexVersion, _Mapping]]] = ..., active_version: _Optional[str] = ...) -> None: ...

class GetVersionRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class GetVersionResponse(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: IndexVersion
    def __init__(self, version: _Optional[_Union[IndexVersion, _Mapping]] = ...) -> None: ...

class LoadVersionRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class LoadVersionResponse(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: IndexVersion
    def __init__(self, version: _Optional[_Union[IndexVersion, _Mapping]] = ...) -> None: ...

class ActivateVersionRequest(_message.Message):
    __slots__ = ("name", "unload_first")
    NAME_FIELD_NUMBER: _ClassVar[int]
    UNLOAD_FIRST_FIELD_NUMBER: _ClassVar[int]
    name: str
    unload_first: bool
    def __init__(self, name: _Optional[str] = ..., unload_first: bool = ...) -> None: ...

class ActivateVersionResponse(_message.Message):
    __slots__ = ("version", "previous_version")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_VERSION_FIELD_NUMBER: _ClassVar[int]
    version: IndexVersion
    previous_version: str
    def __init__(self, version: _Optional[_Union[IndexVersion, _Mapping]] = ..., previous_version: _Optional[str] = ...) -> None: ...

class RollbackVersionRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RollbackVersionResponse(_message.Message):
    __slots__ = ("version", "previous_version")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_VERSION_FIELD_NUMBER: _ClassVar[int]
    version: IndexVersion
    previous_version: str
    def __init__(self, version: _Optional[_Union[IndexVersion, _Mapping]] = ..., previous_version: _Optional[str] = ...) -> None: ...

class UnloadVersionRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class UnloadVersionResponse(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: IndexVersion
    def __init__(self, version: _Optional[_Union[IndexVersion, _Mapping]] = ...) -> None: ...

class SetCanaryRequest(_message.Message):
    __slots__ = ("name", "share")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    name: str
    share: float
    def __init__(self, name: _Optional[str] = ..., share: _Optional[float] = ...) -> None: ...

class SetCanaryResponse(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: IndexVersion
    def __init__(self, version: _Optional[_Union[IndexVersion, _Mapping]] = ...) -> None: ...
