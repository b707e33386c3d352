"""Streams of samples: validated, and summed up by cell without keeping any."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from geosurge.errors import ConfigurationError, CoordinateOutOfRangeError
from geosurge.geodesy import (
    EARTH_RADIUS_KM,
    Float64Array,
    Int64Array,
    latlng_to_unit_vector,
    unit_vector_to_latlng,
    validate_coordinates,
)

CoordinateChunks: TypeAlias = Iterable[tuple[npt.NDArray[np.floating], npt.NDArray[np.floating]]]
"""Pairs of (n,) latitudes and (n,) longitudes in degrees, the same each time they are iterated."""

FindTiles: TypeAlias = Callable[[Float64Array, Float64Array], Int64Array]
"""(n,) latitudes and (n,) longitudes to the (n,) tiles that hold them."""

# Samples worked on at once: bounds temporaries to some ten megabytes whatever the size of a chunk.
BLOCK_SAMPLES: Final = 1 << 17

_Number = TypeVar("_Number", np.int64, np.float64)


@dataclass(frozen=True)
class TileSums:
    """What was seen in each of the tiles that cells are made of.

    Attributes:
        counts: (m,) int64 samples.
        vectors: (3, m) float64 sums of their unit vectors.
    """

    counts: Int64Array
    vectors: Float64Array


@dataclass(frozen=True)
class CellStatistics:
    """Samples of the n cells of one level.

    Attributes:
        sample_counts: (n,) int64.
        mean_latitude_deg: (n,) float64 latitude of the direction of the sum of the samples' unit vectors.
        mean_longitude_deg: (n,) float64 longitude of it.
        spread_km: (n,) float64 root mean square great-circle distance to the mean.
    """

    sample_counts: Int64Array
    mean_latitude_deg: Float64Array
    mean_longitude_deg: Float64Array
    spread_km: Float64Array


def check_repeatable(chunks: CoordinateChunks) -> None:
    """Refuses chunks that can be read only once.

    Raises:
        ConfigurationError: They are an iterator.
    """
    if isinstance(chunks, Iterator):
        raise ConfigurationError(
            "the coordinates are an iterator, which can be read only once: "
            "pass a list, or an object whose __iter__ starts over"
        )


def check_same_samples(expected: int, seen: int) -> None:
    """Refuses chunks that change.

    Raises:
        ConfigurationError: Two passes gave different numbers of samples.
    """
    if seen != expected:
        raise ConfigurationError(
            f"the coordinates gave {expected} samples on the first pass and {seen} on a later one: "
            "chunks must be the same each time they are iterated"
        )


def sample_blocks(chunks: CoordinateChunks) -> Iterator[tuple[Float64Array, Float64Array]]:
    """Validated blocks of at most `BLOCK_SAMPLES` samples, in order.

    Raises:
        ConfigurationError: A chunk's arrays are not of one length and one dimension.
        CoordinateOutOfRangeError: A coordinate is not on the globe; the message names its chunk and row.
    """
    for number, (latitude_deg, longitude_deg) in enumerate(chunks):
        latitude = np.asarray(latitude_deg)
        longitude = np.asarray(longitude_deg)
        if latitude.ndim != 1 or latitude.shape != longitude.shape:
            raise ConfigurationError(
                f"chunk {number}: latitudes of shape {latitude.shape} and longitudes of shape {longitude.shape}: "
                "both must be one-dimensional and equally long"
            )
        try:
            validate_coordinates(latitude, longitude)
        except CoordinateOutOfRangeError as error:
            raise CoordinateOutOfRangeError(f"chunk {number}, {error}") from None
        for start in range(0, len(latitude), BLOCK_SAMPLES):
            block = slice(start, start + BLOCK_SAMPLES)
            yield latitude[block].astype(np.float64), longitude[block].astype(np.float64)


def sum_tiles(chunks: CoordinateChunks, find: FindTiles, tile_count: int) -> TileSums:
    """Sums samples up by tile, in one pass; the result does not depend on the cut into chunks.

    Args:
        chunks: The samples.
        find: Which tile each is in.
        tile_count: Number of tiles, m.
    """
    counts = np.zeros(tile_count, dtype=np.int64)
    vectors = np.zeros((3, tile_count))
    for latitude_deg, longitude_deg in sample_blocks(chunks):
        tiles = find(latitude_deg, longitude_deg)
        counts += np.bincount(tiles, minlength=tile_count)
        directions = latlng_to_unit_vector(latitude_deg, longitude_deg)
        for axis in range(3):
            # One addition at a time, in the order of the samples: the sum cannot depend on the cut into chunks.
            np.add.at(vectors[axis], tiles, directions[:, axis])
    return TileSums(counts, vectors)


def describe_cells(
    chunks: CoordinateChunks, find: FindTiles, ordinals: Int64Array, sums: TileSums
) -> list[CellStatistics]:
    """Counts, means and spreads of the cells of each level; takes one pass over the samples.

    Args:
        chunks: The samples.
        find: Which tile each is in.
        ordinals: (m, L) cell of each tile on each level, -1 for none. The tiles of a cell are one contiguous run, and
            every ordinal from 0 to the largest of its level stands there.
        sums: Of the same samples.

    Returns:
        L statistics.

    Raises:
        ConfigurationError: The samples are not the same as before.
    """
    level_counts = [sum_runs(column, sums.counts) for column in ordinals.T]
    means = []
    for column in ordinals.T:
        directions = np.stack([sum_runs(column, axis) for axis in sums.vectors], axis=1)
        means.append(directions / np.linalg.norm(directions, axis=1, keepdims=True))

    squares = [np.zeros(len(mean)) for mean in means]
    seen = 0
    for latitude_deg, longitude_deg in sample_blocks(chunks):
        tiles = find(latitude_deg, longitude_deg)
        seen += len(tiles)
        vectors = latlng_to_unit_vector(latitude_deg, longitude_deg)
        for level, mean in enumerate(means):
            cells = ordinals[tiles, level]
            inside = cells >= 0
            cells = cells[inside]
            chord = np.linalg.norm(vectors[inside] - mean[cells], axis=1)
            np.add.at(squares[level], cells, np.square(2.0 * np.arcsin(np.minimum(0.5 * chord, 1.0))))
    check_same_samples(int(sums.counts.sum()), seen)
    return [
        CellStatistics(counts, *unit_vector_to_latlng(mean), EARTH_RADIUS_KM * np.sqrt(square / counts))
        for counts, mean, square in zip(level_counts, means, squares, strict=True)
    ]


def sum_runs(ordinals: Int64Array, values: npt.NDArray[_Number]) -> npt.NDArray[_Number]:
    """Sums of a value of the tiles over each cell's run of tiles.

    Args:
        ordinals: (m,) cell of each tile, -1 for none; every ordinal from 0 to the largest is one contiguous run.
        values: (m,) values.
    """
    tiles = np.flatnonzero(ordinals >= 0)
    _, first, lengths = np.unique(ordinals[tiles], return_index=True, return_counts=True)
    starts = tiles[first]
    borders = np.stack([starts, starts + lengths], axis=1).reshape(-1)
    padded = np.concatenate([values, np.zeros(1, dtype=values.dtype)])
    return np.asarray(np.add.reduceat(padded, borders)[::2])
