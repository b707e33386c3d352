"""What is done to one picture before it is located: looking for its position, and reading and decoding it.

Tasks and their outcomes travel between processes (see `geosurge.archive.pool`). Neither torch nor FAISS is needed here.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from geosurge.archive.metadata.positions import Claim, read_claims, sidecar_paths
from geosurge.archive.rows import Position, Reason
from geosurge.archive.sources import Found
from geosurge.archive.sources.paths import not_readable
from geosurge.errors import (
    GeoSurgeError,
    ImageError,
    ImageFormatUnsupportedError,
    ImagePlugInMissingError,
    ImageTooLargeError,
    ImageTooManyPixelsError,
    ImageTooSmallError,
    InputChangedError,
)
from geosurge.images import ImageLimits
from geosurge.preprocessing import Preprocessing

_READ_BYTES: Final = 1 << 20

_LIMIT_ERRORS: Final = (
    ImageTooLargeError,
    ImageTooManyPixelsError,
    ImageTooSmallError,
    ImageFormatUnsupportedError,
)


@dataclass(frozen=True)
class Failure(Reason):
    """Why nothing came of a picture.

    Attributes:
        is_final: Whether the same bytes would fail again, whoever is asked.
    """

    is_final: bool = False

    @classmethod
    def of(cls, error: GeoSurgeError, *, by_server: bool = False) -> Self:
        """What an error says.

        Args:
            error: The error.
            by_server: Whether a server set the limits, which those of another one, or its own tomorrow, may not be.
        """
        if by_server and isinstance(error, _LIMIT_ERRORS):
            return cls(error.reason, f"{error} (by the limits of the server; the next run asks again)")
        # A plug-in may be there the next time.
        is_final = isinstance(error, ImageError) and not isinstance(error, ImagePlugInMissingError)
        return cls(error.reason, str(error), is_final=is_final)


@dataclass(frozen=True)
class Looked:
    """What a picture says of itself.

    Attributes:
        position: Its position, if it has any; somebody else's goes before a guess of this engine.
        run_id: The run that guessed the position; empty where it is somebody else's.
    """

    position: Position | None
    run_id: str = ""


@dataclass(frozen=True)
class Decoded:
    """A picture that was read.

    Attributes:
        content_hash: SHA-256 of its bytes.
        query: (3, s, s) uint8 canonical pixels; or the encoded image, where nobody here decodes.
        decode_ms: Time that decoding took.
    """

    content_hash: bytes
    query: NDArray[np.uint8] | bytes
    decode_ms: float = 0.0


@dataclass(frozen=True)
class Unusable:
    """A picture that was read and cannot be decoded."""

    content_hash: bytes
    failure: Failure


Outcome = Looked | Decoded | Unusable | Failure


class Task(Protocol):
    """Something that a process does for a picture."""

    @property
    def key(self) -> int:
        """Tells the outcomes apart."""

    def run(self) -> Outcome:
        """Does it; runs in a process of the pool.

        Raises:
            GeoSurgeError: Nothing came of it.
        """


@dataclass(frozen=True)
class Look:
    """Looks whether a picture has a position; reads no pixels."""

    key: int
    found: Found

    def run(self) -> Looked:
        """Looks."""
        return look(self.found)


def look(found: Found) -> Looked:
    """Reads the metadata of a picture, and those beside it.

    Raises:
        GeoSurgeError: The picture or a sidecar cannot be read, so that nobody knows whether it has a position.
    """
    if found.error is not None:
        raise found.error
    sidecars = [] if found.is_member else sidecar_paths(Path(os.fsdecode(found.path)))
    try:
        with found.open() as file:
            claim = _best(read_claims(file, sidecars))
            return Looked(None) if claim is None else Looked(claim.position, claim.run_id)
    except OSError as error:
        raise not_readable(found.path, error) from error


def _best(claims: Iterable[Claim]) -> Claim | None:
    guess: Claim | None = None
    for claim in claims:
        if not claim.run_id:
            return claim
        guess = guess or claim
    return guess


@dataclass(frozen=True)
class Decode:
    """Reads a picture and brings it to canonical pixels.

    Attributes:
        preprocessing: How; ``None`` leaves decoding to somebody else.
        limits: What is accepted.
    """

    key: int
    found: Found
    preprocessing: Preprocessing | None
    limits: ImageLimits

    def run(self) -> Decoded | Unusable:
        """Reads, hashes and decodes."""
        digest, data = hashlib.sha256(), bytearray()
        try:
            with self.found.open() as file:
                while chunk := file.read(_READ_BYTES):
                    digest.update(chunk)
                    # The rest of a huge file is only hashed.
                    if len(data) <= self.limits.max_bytes:
                        data += chunk
            check_unchanged(self.found)
        except OSError as error:
            raise not_readable(self.found.path, error) from error
        content_hash, begun = digest.digest(), time.perf_counter()
        try:
            if len(data) > self.limits.max_bytes:
                raise ImageTooLargeError(
                    f"the image has {self.found.size} bytes, the limit is {self.limits.max_bytes}; send a smaller or "
                    "more compressed picture"
                )
            if self.preprocessing is None:
                return Decoded(content_hash, bytes(data))
            pixels = self.preprocessing.decode(bytes(data), self.limits)
        except ImageError as error:
            return Unusable(content_hash, Failure.of(error, by_server=self.preprocessing is None))
        return Decoded(content_hash, pixels, 1000 * (time.perf_counter() - begun))


def check_unchanged(found: Found) -> None:
    """Refuses a picture that is another by now than the one that was found.

    Raises:
        InputChangedError: It is.
        InputNotReadableError: It is gone.
    """
    try:
        status = Path(os.fsdecode(found.path)).stat()
    except OSError as error:
        raise not_readable(found.path, error) from error
    if status.st_mtime_ns != found.mtime_ns or not (found.is_member or status.st_size == found.size):
        raise InputChangedError(f"{found.name} changed while the run was under way; run the command again")
