"""Every error that the engine raises on purpose.

The tree has seven groups, and each class carries what every caller needs to act on it:

- ``grpc_code``: the name of the gRPC status code a server answers with;
- ``reason``: a stable, machine-readable string (``google.rpc.ErrorInfo.reason`` on the wire, ``error.reason`` in JSON);
- ``exit_code``: the exit code of a command that stops because of it (see the table in the README).

| group | raised when | exit code |
|---|---|---|
| `InputError` | one input cannot be answered; the next one can | 1 |
| `UsageError` | a setting, a flag or a recipe is wrong | 2 |
| `BundleError` | an index bundle or store cannot be used | 3 |
| `EncoderError` | an encoder cannot be built, loaded or run | 3 |
| `VersionError` | an index version cannot be loaded, activated or unloaded as asked | 3 |
| `LedgerError` | the ledger of an archive cannot be used | 3 |
| `ServiceError` | the engine is busy, stopping or unreachable | 3 |

The message always says what is wrong, with which input, and what to do.
"""

from __future__ import annotations

from typing import ClassVar


class GeoSurgeError(Exception):
    """Base of all errors raised by the engine."""

    grpc_code: ClassVar[str] = "INTERNAL"
    reason: ClassVar[str] = "INTERNAL"
    exit_code: ClassVar[int] = 3


class InputError(GeoSurgeError):
    """One input cannot be answered; others are not affected."""

    grpc_code = "INVALID_ARGUMENT"
    reason = "INPUT_INVALID"
    exit_code = 1


class QueryMissingError(InputError):
    """The request holds neither an image nor an embedding."""

    reason = "QUERY_MISSING"


class InputNotReadableError(InputError):
    """A file cannot be read."""

    reason = "INPUT_NOT_READABLE"


class InputChangedError(InputError):
    """A file is another one than when it was found."""

    grpc_code = "ABORTED"
    reason = "INPUT_CHANGED"


class EncoderMissingError(InputError):
    """An image was sent to an index version that has no encoder: it answers embeddings only."""

    grpc_code = "FAILED_PRECONDITION"
    reason = "ENCODER_MISSING"


class ImageError(InputError):
    """The image cannot be used."""

    reason = "IMAGE_INVALID"


class ImageEmptyError(ImageError):
    """The image has no bytes."""

    reason = "IMAGE_EMPTY"


class ImageNotDecodableError(ImageError):
    """The bytes are not an image, or are a damaged one."""

    reason = "IMAGE_NOT_DECODABLE"


class ImageTruncatedError(ImageError):
    """The image ends before its pixels do."""

    reason = "IMAGE_TRUNCATED"


class ImageTooSmallError(ImageError):
    """A side of the image is shorter than the limit."""

    reason = "IMAGE_TOO_SMALL"


class ImageTooLargeError(ImageError):
    """The encoded image has more bytes than the limit."""

    reason = "IMAGE_TOO_LARGE"


class ImageTooManyPixelsError(ImageError):
    """The image's header announces more pixels than the limit."""

    reason = "IMAGE_TOO_MANY_PIXELS"


class ImageFormatUnsupportedError(ImageError):
    """The image is of a format that is not on the list."""

    reason = "IMAGE_FORMAT_UNSUPPORTED"


class ImagePlugInMissingError(ImageFormatUnsupportedError):
    """The image is of a format that can be decoded where a plug-in is installed."""

    reason = "IMAGE_PLUG_IN_MISSING"


class EmbeddingInvalidError(InputError):
    """A query embedding has the wrong length, is zero, or is not finite."""

    reason = "EMBEDDING_INVALID"


class OptionOutOfRangeError(InputError):
    """An option of a request is outside its range."""

    reason = "OPTION_OUT_OF_RANGE"


class RegionCellUnknownError(InputError):
    """A region filter names a cell that the index does not have."""

    reason = "REGION_CELL_UNKNOWN"


class RegionEmptyError(InputError):
    """A region filter leaves no leaf to answer with."""

    reason = "REGION_EMPTY"


class LevelOutOfRangeError(InputError):
    """A level is outside 1 to L."""

    reason = "LEVEL_OUT_OF_RANGE"


class CoordinateOutOfRangeError(InputError):
    """A coordinate is not finite or not on the globe."""

    reason = "COORDINATE_OUT_OF_RANGE"


class PageInvalidError(InputError):
    """A page token was not issued by this server."""

    reason = "PAGE_INVALID"


class CellUnknownError(InputError):
    """The index has no cell with the token asked for."""

    grpc_code = "NOT_FOUND"
    reason = "CELL_UNKNOWN"


class CellKindUnsupportedError(InputError):
    """The index's cells are of a kind that cannot answer the question asked."""

    grpc_code = "FAILED_PRECONDITION"
    reason = "CELL_KIND_UNSUPPORTED"


class IndexVersionUnknownError(InputError):
    """No index version of this name is loaded."""

    grpc_code = "NOT_FOUND"
    reason = "INDEX_VERSION_UNKNOWN"


class SidecarInvalidError(InputError):
    """A picture's sidecar is not XMP, so that nobody can say what it says about the picture."""

    reason = "SIDECAR_INVALID"


class HasPositionError(InputError):
    """A picture says already where it was taken, which no guess may overwrite."""

    reason = "HAS_POSITION"


class ExifInvalidError(InputError):
    """A picture's EXIF is damaged, so that nothing can be added to it safely."""

    reason = "EXIF_INVALID"


class WriteUnsupportedError(InputError):
    """A position cannot be written into a file of this kind."""

    reason = "WRITE_UNSUPPORTED"


class FileChangedError(InputError):
    """A file is not what it was when a write to it was prepared or done: it is somebody else's by now."""

    reason = "FILE_CHANGED"


class FileNotWritableError(InputError):
    """The system refuses to write a picture, its sidecar or its backup."""

    reason = "FILE_NOT_WRITABLE"


class ShardInvalidError(InputError):
    """A tar shard is damaged, compressed or no tar at all, or a picture in it cannot be read where it lies."""

    reason = "SHARD_INVALID"


class UsageError(GeoSurgeError):
    """A flag, a setting or a recipe is wrong."""

    grpc_code = "FAILED_PRECONDITION"
    reason = "USAGE"
    exit_code = 2


class ConfigurationError(UsageError):
    """A configuration file or recipe holds a wrong or unknown value."""

    reason = "CONFIGURATION_INVALID"


class CredentialsMissingError(UsageError):
    """The server asks for credentials, and the call came without any that it accepts."""

    grpc_code = "UNAUTHENTICATED"
    reason = "CREDENTIALS_MISSING"


class CredentialsInvalidError(CredentialsMissingError):
    """The server does not know the token."""

    reason = "CREDENTIALS_INVALID"


class CredentialsExpiredError(CredentialsMissingError):
    """The last day of the token has passed."""

    reason = "CREDENTIALS_EXPIRED"


class PermissionDeniedError(UsageError):
    """The token is valid, but its role may not call the method."""

    grpc_code = "PERMISSION_DENIED"
    reason = "PERMISSION_DENIED"


class OutputNotWritableError(UsageError):
    """A file of results cannot be written where it should be: the disk is full, or the folder is not writable."""

    reason = "OUTPUT_NOT_WRITABLE"


class RunConflictError(UsageError):
    """A directory holds another run than the one asked for, or none, or one that is under way."""

    grpc_code = "FAILED_PRECONDITION"
    reason = "RUN_CONFLICT"


class NothingFoundError(UsageError):
    """There is not one picture in what was named, so that something else was meant."""

    grpc_code = "NOT_FOUND"
    reason = "NOTHING_FOUND"


class LedgerError(GeoSurgeError):
    """What a bulk run resumes from cannot be read or written."""

    reason = "LEDGER_UNUSABLE"


class BundleError(GeoSurgeError):
    """An index bundle cannot be used."""

    grpc_code = "FAILED_PRECONDITION"
    reason = "BUNDLE_INVALID"
    exit_code = 3


class BundleNotFoundError(BundleError):
    """There is no bundle at the path or of the name given."""

    grpc_code = "NOT_FOUND"
    reason = "BUNDLE_NOT_FOUND"


class BundlePartialError(BundleError):
    """A bundle misses files, or its manifest."""

    reason = "BUNDLE_PARTIAL"


class BundleCorruptError(BundleError):
    """A file of a bundle is not what the manifest says."""

    reason = "BUNDLE_CORRUPT"


class BundleSchemaError(BundleError):
    """A bundle's manifest is of a schema that this engine does not read."""

    reason = "BUNDLE_SCHEMA_UNSUPPORTED"


class BundleEncoderMismatchError(BundleError):
    """A bundle's encoder does not produce the vectors that its indexes hold."""

    reason = "BUNDLE_ENCODER_MISMATCH"


class BundleInconsistentError(BundleError):
    """The parts of a bundle (indexes, tree, manifest) contradict each other."""

    reason = "BUNDLE_INCONSISTENT"


class StoreError(BundleError):
    """An index store cannot do what was asked of it."""

    reason = "STORE_INVALID"


class EncoderError(GeoSurgeError):
    """An encoder cannot be built, loaded or run."""

    grpc_code = "FAILED_PRECONDITION"
    reason = "ENCODER_UNAVAILABLE"
    exit_code = 3


class VersionError(GeoSurgeError):
    """The versions that a server has loaded cannot be changed as asked; they stay as they are."""

    grpc_code = "FAILED_PRECONDITION"
    reason = "VERSION_INVALID"
    exit_code = 3


class VersionInUseError(VersionError):
    """The version is active, about to be, or the canary: it cannot be unloaded, and an active one is no canary."""

    reason = "VERSION_IN_USE"


class VersionNotLoadedError(VersionError):
    """The version is not in memory."""

    reason = "VERSION_NOT_LOADED"


class VersionDoesNotFitError(VersionError):
    """There is no room to load another version."""

    reason = "VERSION_DOES_NOT_FIT"


class LoadImpossibleError(VersionError):
    """The machine lets the server load no version: its scratch directory or its open files are at fault, no bundle."""

    reason = "LOAD_IMPOSSIBLE"


class LoadSupersededError(VersionError):
    """A load gave up because a newer request wants something else."""

    grpc_code = "ABORTED"
    reason = "LOAD_SUPERSEDED"


class ServiceError(GeoSurgeError):
    """The engine cannot take the request now."""

    grpc_code = "UNAVAILABLE"
    reason = "UNAVAILABLE"
    exit_code = 3


class OverloadedError(ServiceError):
    """All permits are taken; try again after ``retry_after_seconds``."""

    grpc_code = "RESOURCE_EXHAUSTED"
    reason = "OVERLOADED"

    def __init__(self, message: str = "", *, retry_after_seconds: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class PeerOverloadedError(OverloadedError):
    """One client address holds as many permits as one may; others are served."""

    reason = "PEER_OVERLOADED"


class NoActiveVersionError(ServiceError):
    """No index version is active: the server is exchanging one for another that does not fit beside it."""

    reason = "NO_ACTIVE_VERSION"


class StageCrashedError(ServiceError):
    """A thread that every request needs has ended; the server stops, to be started again."""

    grpc_code = "INTERNAL"
    reason = "STAGE_CRASHED"


class StreamLimitError(ServiceError):
    """The stream has had as many items as one may have; another stream takes the rest."""

    reason = "STREAM_LIMIT"


class MessageTooLargeError(ServiceError):
    """A message is larger than the server reads, or the transport carries."""

    grpc_code = "RESOURCE_EXHAUSTED"
    reason = "MESSAGE_TOO_LARGE"


class DeadlineExceededError(ServiceError):
    """The deadline passed before an answer was ready."""

    grpc_code = "DEADLINE_EXCEEDED"
    reason = "DEADLINE_EXCEEDED"


class ShuttingDownError(ServiceError):
    """The server is stopping and takes no new requests."""

    reason = "SHUTTING_DOWN"
