"""What a scan finds: where a picture is, and what it was when it was found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import BinaryIO

from geosurge.archive.sources.paths import open_regular, shown
from geosurge.archive.sources.shards import open_member
from geosurge.errors import GeoSurgeError


@dataclass(frozen=True, slots=True)
class Found:
    """A picture that was found, or something that may hold pictures and cannot be read.

    Attributes:
        path: Absolute path of the file; of a picture in a shard that of the shard.
        member: Name in the shard, as it is written there; empty for a file of its own.
        size: Bytes.
        mtime_ns: When the file, or the shard, was last changed.
        offset: Where in the shard the picture begins.
        error: Why it cannot be read, where that is known already.
        sidecars: What its sidecars were, as far as somebody has looked (see `geosurge.archive.sidecar_states`).
    """

    path: bytes
    member: bytes = b""
    size: int = 0
    mtime_ns: int = 0
    offset: int = 0
    error: GeoSurgeError | None = None
    sidecars: str = ""

    @property
    def name(self) -> str:
        r"""The path as outputs show it: ``\xNN`` for what is not UTF-8; of a picture in a shard ``SHARD/MEMBER``."""
        return f"{shown(self.path)}/{shown(self.member)}" if self.member else shown(self.path)

    @property
    def is_member(self) -> bool:
        """Whether the picture lies in a shard."""
        return bool(self.member)

    def open(self) -> BinaryIO:
        """Opens the picture, of a shard just this member, to be read; a context manager.

        Raises:
            OSError: It cannot be read, or is no regular file.
        """
        file = open_regular(self.path)
        return open_member(file, self.offset, self.size) if self.member else file
