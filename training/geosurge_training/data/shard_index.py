"""An index of tar shards as WebDataset writes them: where in which shard each image lies, kept in a file.

A sample is a run of members that share a key: the path up to the first dot of the file's name. What follows the dot
tells what a member is: an image (`IMAGE_EXTENSIONS`), or `json` with the coordinates; others are not looked at. A
sample that has the one without the other is in the index, so that it can be counted.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from geosurge.archive.sources.shards import Member, MemberKind, read_members
from geosurge.errors import ConfigurationError, ShardInvalidError
from geosurge_training.aside import written_aside
from geosurge_training.progress import track

SHARD_INDEX_FILE: Final = "shards.arrow"
"""What the index is called in the directory of a run."""

IMAGE_EXTENSIONS: Final = frozenset({"jpg", "jpeg", "png", "webp", "tif", "tiff", "gif", "bmp"})
_JSON_EXTENSION: Final = "json"
_MAX_JSON_BYTES: Final = 1 << 20
_CHUNK: Final = 1 << 16
_SCHEMA: Final = pa.schema(
    {
        "key": pa.large_string(),
        "shard": pa.int32(),
        "offset": pa.int64(),
        "size": pa.int64(),
        "latitude_deg": pa.float64(),
        "longitude_deg": pa.float64(),
    }
)
_MADE_FROM: Final = b"made_from"
_FORMAT: Final = 2
"""Of the index's file; one of another format is made again."""

_NO_IMAGE: Final = -1


@dataclass(frozen=True)
class ShardIndex:
    """Where the images of n samples lie in shards.

    Attributes:
        shards: The shards.
        keys: n texts, an Arrow array.
        shard: (n,) int32, index into `shards`.
        offset: (n,) int64, where in the shard the image begins; -1 where the sample has none.
        size: (n,) int64, its bytes.
        latitude_deg: (n,) float64; NaN where the shard does not say.
        longitude_deg: (n,) float64; NaN where the shard does not say.
    """

    shards: tuple[Path, ...]
    keys: pa.LargeStringArray
    shard: npt.NDArray[np.int32]
    offset: npt.NDArray[np.int64]
    size: npt.NDArray[np.int64]
    latitude_deg: npt.NDArray[np.float64]
    longitude_deg: npt.NDArray[np.float64]

    @property
    def has_image(self) -> npt.NDArray[np.bool_]:
        """(n,) whether the sample has an image."""
        return np.asarray(self.offset != _NO_IMAGE)

    def read(self, row: int) -> bytes:
        """The encoded image of a row that has one.

        Raises:
            OSError: It cannot be read, or the shard has been cut off since.
        """
        size = int(self.size[row])
        with self.shards[self.shard[row]].open("rb", buffering=0) as shard:
            data = os.pread(shard.fileno(), size, int(self.offset[row]))
        if len(data) < size:
            raise OSError(f"{shard.name} has been cut off")
        return data

    def take(self, rows: npt.NDArray[np.int64]) -> ShardIndex:
        """Some of the rows, in the order given."""
        return ShardIndex(
            self.shards,
            self.keys.take(pa.array(rows)),
            self.shard[rows],
            self.offset[rows],
            self.size[rows],
            self.latitude_deg[rows],
            self.longitude_deg[rows],
        )


def open_index(file: Path, shards: Sequence[Path], json_fields: tuple[str, str] | None) -> ShardIndex:
    """Opens the index of shards, and makes it first where it is missing or was made of others.

    Args:
        file: Where the index is kept.
        shards: The shards. They are the same as before where names, sizes and times of change are.
        json_fields: Names of latitude and longitude in a sample's JSON; none leaves the JSON alone.

    Raises:
        ConfigurationError: A shard cannot be read, is damaged, or there is no image in any of them.
    """
    try:
        told = [[shard.name, (status := shard.stat()).st_size, status.st_mtime_ns] for shard in shards]
    except OSError as error:
        raise ConfigurationError(f"a shard cannot be read: {error}") from error
    made_from = json.dumps([_FORMAT, json_fields, told]).encode()
    table = _load(file, made_from)
    if table is None:
        with written_aside(file) as aside:
            _write(aside, shards, json_fields, made_from)
        table = _load(file, made_from)
        assert table is not None
    keys, *numbers = (table.column(name).combine_chunks() for name in _SCHEMA.names)
    index = ShardIndex(tuple(shards), keys, *(np.asarray(column) for column in numbers))
    if not index.has_image.any():
        raise ConfigurationError(
            f"there is no image in {', '.join(map(str, shards[:3]))}: none of the members ends in "
            f"{', '.join(sorted(IMAGE_EXTENSIONS))}"
        )
    return index


def _load(file: Path, made_from: bytes) -> pa.Table | None:
    try:
        with pa.OSFile(str(file)) as source, pa.ipc.open_file(source) as reader:
            known = reader.schema.metadata or {}
            return reader.read_all() if known.get(_MADE_FROM) == made_from else None
    except (OSError, pa.ArrowInvalid):
        return None


def _write(file: Path, shards: Sequence[Path], json_fields: tuple[str, str] | None, made_from: bytes) -> None:
    schema = _SCHEMA.with_metadata({_MADE_FROM: made_from})
    with (
        pa.OSFile(str(file), "wb") as sink,
        pa.ipc.new_file(sink, schema) as writer,
        track("index shards", len(shards)) as progress,
    ):
        for number, shard in enumerate(shards):
            for rows in _index_shard(shard, number, json_fields):
                writer.write_batch(rows.batch(schema))
            progress.advance()


@dataclass
class _Sample:
    key: str
    image: Member | None = None
    has_json: bool = False
    coordinates: tuple[float, float] = (np.nan, np.nan)

    @property
    def counts(self) -> bool:
        return self.has_json or self.image is not None


@dataclass
class _Rows:
    shard: int
    keys: list[str] = field(default_factory=list)
    offsets: array[int] = field(default_factory=lambda: array("q"))
    sizes: array[int] = field(default_factory=lambda: array("q"))
    latitudes: array[float] = field(default_factory=lambda: array("d"))
    longitudes: array[float] = field(default_factory=lambda: array("d"))

    def add(self, sample: _Sample) -> None:
        offset, size = (_NO_IMAGE, 0) if sample.image is None else (sample.image.offset, sample.image.size)
        self.keys.append(sample.key)
        self.offsets.append(offset)
        self.sizes.append(size)
        self.latitudes.append(sample.coordinates[0])
        self.longitudes.append(sample.coordinates[1])

    def batch(self, schema: pa.Schema) -> pa.RecordBatch:
        shard = np.full(len(self.keys), self.shard, dtype=np.int32)
        numbers = (np.array(column) for column in (self.offsets, self.sizes, self.latitudes, self.longitudes))
        return pa.record_batch([pa.array(self.keys, pa.large_string()), shard, *numbers], schema=schema)


def _index_shard(path: Path, number: int, json_fields: tuple[str, str] | None) -> Iterator[_Rows]:
    try:
        with path.open("rb") as shard:
            rows = _Rows(number)
            for sample in _samples(shard.fileno(), read_members(shard, str(path)), json_fields):
                rows.add(sample)
                if len(rows.keys) == _CHUNK:
                    yield rows
                    rows = _Rows(number)
            yield rows
    except ShardInvalidError as error:
        raise ConfigurationError(str(error)) from error
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from error


def _samples(shard: int, members: Iterable[Member], json_fields: tuple[str, str] | None) -> Iterator[_Sample]:
    """The samples that have an image or a JSON."""
    sample = _Sample("")
    for member in members:
        if member.kind is not MemberKind.FILE:
            continue
        key, extension = _split(member.name.decode("utf-8", "replace"))
        if key != sample.key:
            if sample.counts:
                yield sample
            sample = _Sample(key)
        if extension in IMAGE_EXTENSIONS:
            sample.image = member
        elif extension == _JSON_EXTENSION:
            sample.has_json = True
            if json_fields is not None and member.size <= _MAX_JSON_BYTES:
                sample.coordinates = _coordinates(os.pread(shard, member.size, member.offset), json_fields)
    if sample.counts:
        yield sample


def _split(name: str) -> tuple[str, str]:
    folder, slash, file = name.removeprefix("./").rpartition("/")
    stem, _, extension = file.partition(".")
    return folder + slash + stem, extension.lower()


def _coordinates(data: bytes, json_fields: tuple[str, str]) -> tuple[float, float]:
    """Latitude and longitude of a sample's JSON; NaN where it says none."""
    try:
        told: Any = json.loads(data)
        latitude_deg, longitude_deg = (float(told[name]) for name in json_fields)
    except (ValueError, KeyError, TypeError):
        return np.nan, np.nan
    return latitude_deg, longitude_deg
