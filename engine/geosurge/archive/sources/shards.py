"""Tar shards as WebDataset writes them: where the members lie, and a window on one of them.

A shard is not unpacked: a member's bytes lie in one piece, so that its offset and size are all that a reader needs.
"""

from __future__ import annotations

import contextlib
import enum
import io
import os
import tarfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from geosurge.archive.sources.paths import shown
from geosurge.errors import ShardInvalidError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

SHARD_EXTENSION: Final = b"tar"

_COMPRESSED: Final = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "Zstandard"}
_MAX_HEADER_BYTES: Final = 1 << 20


class MemberKind(enum.Enum):
    """What a member is."""

    FILE = enum.auto()
    FOLDER = enum.auto()
    HARD_LINK = enum.auto()
    SYMBOLIC_LINK = enum.auto()
    SPARSE_FILE = enum.auto()
    SPECIAL = enum.auto()


@dataclass(frozen=True, slots=True)
class Member:
    """One member of a shard.

    Attributes:
        name: Its name as it is written there.
        kind: What it is.
        size: Bytes of content.
        offset: Where in the shard they begin.
    """

    name: bytes
    kind: MemberKind
    size: int
    offset: int


def read_latest_members(shard: io.BufferedReader, name: str) -> Iterator[Member]:
    """Reads the headers of a shard, of a name that comes more than once only the last, as unpacking leaves it.

    They are read twice, so that little more than 8 bytes are kept of each: which is the last shows only at the end.

    Args:
        shard: The shard.
        name: What messages call it.

    Yields:
        The members in their order, those of names that come more than once at the end.

    Raises:
        ShardInvalidError: As `read_members`.
        OSError: As `read_members`.
    """
    hashes = array("q")
    # What is wrong comes up again, after the members before it.
    with contextlib.suppress(ShardInvalidError, OSError):
        hashes.extend(hash(member.name) for member in read_members(shard, name))
    distinct, counts = np.unique(np.asarray(hashes), return_counts=True)
    repeated = set(distinct[counts > 1].tolist())
    latest: dict[bytes, Member] = {}
    try:
        for member in read_members(shard, name):
            if hash(member.name) in repeated:
                latest[member.name] = member
            else:
                yield member
    except (ShardInvalidError, OSError):
        yield from latest.values()
        raise
    yield from latest.values()


def read_members(shard: io.BufferedReader, name: str) -> Iterator[Member]:
    """Reads the headers of a shard.

    Args:
        shard: The shard.
        name: What messages call it.

    Yields:
        The members that are wholly there, in their order; two may have the same name, as in a shard that was appended
        to.

    Raises:
        ShardInvalidError: The shard is compressed or no tar, or damaged after the members that have been yielded.
        OSError: It cannot be read.
    """
    if kind := _compression(shard):
        raise ShardInvalidError(f"{name} is compressed with {kind}; unpack it to a plain tar")
    size = os.fstat(shard.fileno()).st_size
    headers = _Headers(shard.raw)
    try:
        headers.seek(0)
        with tarfile.open(fileobj=headers, mode="r:", encoding="utf-8", errors="surrogateescape") as archive:
            place = 0
            while not _is_end(headers, place):
                header = tarfile.TarInfo.fromtarfile(archive)
                member = Member(_name(header), _kind(header), header.size, header.offset_data)
                if archive.offset <= place or member.size < 0:
                    raise tarfile.ReadError(f"the size in the header of {shown(member.name)} is impossible")
                if member.kind is MemberKind.FILE and member.offset + member.size > size:
                    raise tarfile.ReadError(f"it ends within {shown(member.name)}")
                place = archive.offset
                yield member
    except (tarfile.TarError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
        raise ShardInvalidError(f"{name} is damaged: {error}; copy or pack it again") from error
    finally:
        # What is not detached is closed together with the shard when it is collected.
        headers.detach()


def open_member(shard: io.BufferedReader, offset: int, size: int) -> io.BufferedReader:
    """A file of just one member's bytes; closing it closes the shard."""
    return io.BufferedReader(_Window(shard, offset, size))


class _Headers(io.BufferedReader):
    """A shard, of which a header is read only if it has a header's size."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


class _Window(io.RawIOBase):
    def __init__(self, shard: io.BufferedReader, offset: int, size: int) -> None:
        self._shard, self._offset, self._size, self._place = shard, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise ValueError(f"negative seek position {start + offset}")
        self._place = start + offset
        return self._place

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        view = memoryview(buffer)
        wanted = max(min(len(view), self._size - self._place), 0)
        data = os.pread(self._shard.fileno(), wanted, self._offset + self._place)
        view[: len(data)] = data
        self._place += len(data)
        return len(data)

    def close(self) -> None:
        self._shard.close()
        super().close()


def _compression(shard: io.BufferedReader) -> str:
    head = shard.peek(8)
    return next((kind for signature, kind in _COMPRESSED.items() if head.startswith(signature)), "")


def _name(member: tarfile.TarInfo) -> bytes:
    return member.name.encode("utf-8", "surrogateescape")


def _kind(member: tarfile.TarInfo) -> MemberKind:
    if member.issparse():
        return MemberKind.SPARSE_FILE
    if member.isreg():
        return MemberKind.FILE
    if member.isdir():
        return MemberKind.FOLDER
    if member.islnk():
        return MemberKind.HARD_LINK
    return MemberKind.SYMBOLIC_LINK if member.issym() else MemberKind.SPECIAL


def _is_end(headers: _Headers, place: int) -> bool:
    """Whether no header is at a place; then the place of the next byte to be read is there again.

    Raises:
        tarfile.ReadError: The shard ends there without the zeros that it should end with, or goes on after them.
    """
    headers.seek(place)
    block = headers.read(tarfile.BLOCKSIZE)
    if not block:
        raise tarfile.ReadError("its end is missing")
    if block.strip(b"\0"):
        headers.seek(place)
        return False
    while chunk := headers.read(_MAX_HEADER_BYTES):
        if chunk.strip(b"\0"):
            raise tarfile.ReadError(f"it goes on after its end at byte {place}")
    return True
