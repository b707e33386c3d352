"""Nested adaptive S2 partitions: which geocells a training set can teach, level by level.

The algorithm is that of Müller-Budack et al. (ISN, ECCV 2018), on which GeoSURGE (arXiv 2510.01448) builds: start from
the S2 cells of a coarse S2 level; drop the cells with at most ``tau_min`` samples; replace each cell that has more
than ``tau_max`` by its children as long as its S2 level allows, and drop the children with at most ``tau_min``. Level
l+1 goes on splitting the kept cells of level l with its own thresholds, so levels are nested by construction; a cell
that needs no split appears again as its own only child. Samples in dropped cells belong to no cell of that level or of
finer ones.

This project's decision where the papers are silent: a cell whose children would all be dropped is not split. Every
kept cell therefore has a kept child on the next level, down to the leaves. It matters only where ``tau_max < 4 *
tau_min``.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Final, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from geosurge.errors import ConfigurationError, CoordinateOutOfRangeError
from geosurge.geodesy import (
    EARTH_RADIUS_KM,
    MAX_S2_LEVEL,
    CellIdArray,
    Float64Array,
    Int64Array,
    cell_id_range,
    cell_id_to_children,
    cell_id_to_parent,
    cell_id_to_s2_level,
    latlng_to_cell_id,
    latlng_to_unit_vector,
    unit_vector_to_latlng,
    validate_coordinates,
)

CoordinateChunks: TypeAlias = Iterable[tuple[npt.NDArray[np.floating], npt.NDArray[np.floating]]]

# S2 levels that one pass over the samples counts at once: 4^6 descendants of a cell at most.
_S2_LEVELS_A_PASS: Final = 6

# Samples worked on at once: bounds temporaries to some ten megabytes whatever the size of a chunk.
_BLOCK_SAMPLES: Final = 1 << 17

_FORMAT_VERSION: Final = 1

_Number = TypeVar("_Number", np.int64, np.float64)


@dataclass(frozen=True)
class PartitionLevel:
    """The cells of one level, in ascending order of id, which is the order of their ordinals.

    Attributes:
        cell_ids: (n,) uint64 S2 cell ids, disjoint.
        parents: (n,) int64 ordinals on the level before, non-decreasing; -1 on level 1.
        sample_counts: (n,) int64 samples in each cell.
        mean_latitude_deg: (n,) float64 latitude of the direction of the sum of the samples' unit vectors.
        mean_longitude_deg: (n,) float64 longitude of it.
        spread_km: (n,) float64 root mean square great-circle distance of the samples to the mean.
    """

    cell_ids: CellIdArray
    parents: Int64Array
    sample_counts: Int64Array
    mean_latitude_deg: Float64Array
    mean_longitude_deg: Float64Array
    spread_km: Float64Array


@dataclass(frozen=True)
class Partition:
    """Nested levels of disjoint cells, coarsest first.

    Attributes:
        levels: The levels, 1 to L.

    Raises:
        ValueError: On construction, if cells of a level overlap or are out of order, a parent does not contain its
            child, or a cell has no child on the next level.
    """

    levels: tuple[PartitionLevel, ...]

    def __post_init__(self) -> None:
        _check_nested(self.levels)

    @property
    def cell_counts(self) -> tuple[int, ...]:
        """Number of cells of each level."""
        return tuple(len(level.cell_ids) for level in self.levels)

    def assign(self, latitude_deg: npt.ArrayLike, longitude_deg: npt.ArrayLike) -> Int64Array:
        """Cells of samples on every level.

        Args:
            latitude_deg: (n,) latitudes.
            longitude_deg: (n,) longitudes.

        Returns:
            (n, L) int64 ordinals; -1 where a sample is in no cell of that level.

        Raises:
            CoordinateOutOfRangeError: A coordinate is not on the globe.
        """
        leaf_ids = latlng_to_cell_id(latitude_deg, longitude_deg).reshape(-1)
        return self._intervals.ordinals[self._intervals.find(leaf_ids)]

    def save(self, path: Path) -> None:
        """Write the partition as an uncompressed .npz of plain arrays; equal partitions make equal files.

        Args:
            path: File to write.
        """
        arrays: dict[str, npt.NDArray[np.generic]] = {
            "format_version": np.array(_FORMAT_VERSION),
            "level_count": np.array(len(self.levels)),
        }
        for number, level in enumerate(self.levels, start=1):
            arrays |= {_array_name(number, column.name): getattr(level, column.name) for column in fields(level)}
        with path.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)

    @classmethod
    def load(cls, path: Path) -> Partition:
        """Read a partition that `save` wrote.

        Args:
            path: File to read.

        Returns:
            The partition.

        Raises:
            ConfigurationError: The file is missing, damaged, of another format, or its levels are not nested.
        """
        try:
            with np.load(path, allow_pickle=False) as archive:
                version = int(archive["format_version"])
                if version != _FORMAT_VERSION:
                    raise ConfigurationError(
                        f"{path} is a partition of format {version}; this version reads format {_FORMAT_VERSION}: "
                        "compute the partition again"
                    )
                return cls(
                    tuple(
                        PartitionLevel(**{c.name: archive[_array_name(number, c.name)] for c in fields(PartitionLevel)})
                        for number in range(1, int(archive["level_count"]) + 1)
                    )
                )
        except (OSError, KeyError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
            raise ConfigurationError(f"{path} is not a readable partition ({error}): compute it again") from error

    @cached_property
    def _intervals(self) -> _Intervals:
        return _Intervals.of([level.cell_ids for level in self.levels])


@dataclass(frozen=True)
class _Intervals:
    """The range of leaf ids, cut at every border of every cell of every level.

    Inside an interval, every leaf id is in the same cells. One binary search therefore answers for all levels.

    Attributes:
        starts: (m,) uint64 first leaf id of each interval, ascending from 0.
        ordinals: (m, L) int64 cell on each level, -1 for none.
    """

    starts: CellIdArray
    ordinals: Int64Array = field(repr=False)

    @classmethod
    def of(cls, cell_ids: Sequence[CellIdArray]) -> _Intervals:
        """Intervals of the levels' ascending cell ids."""
        first, last = cell_id_range(np.unique(np.concatenate(cell_ids)))
        starts = np.unique(np.concatenate([np.zeros(1, dtype=np.uint64), first, last + np.uint64(1)]))
        return cls(starts, np.stack([_containing(ids, starts) for ids in cell_ids], axis=1))

    def find(self, leaf_ids: CellIdArray) -> Int64Array:
        """Rows of the intervals that hold leaf ids."""
        return np.searchsorted(self.starts, leaf_ids, side="right") - 1


def adaptive_partition(
    chunks: CoordinateChunks,
    tau_min: Sequence[float],
    tau_max: Sequence[float],
    start_s2_level: int = 2,
    max_s2_level: int = MAX_S2_LEVEL,
) -> Partition:
    """Partition the Earth by the density of samples, on as many nested levels as there are thresholds.

    Every kept cell of level l has more than ``tau_min[l]`` samples. It has at most ``tau_max[l]``, unless it is of
    ``max_s2_level`` (many samples at one coordinate) or all its children have at most ``tau_min[l]``.

    The samples are streamed: counting takes one pass for every six S2 levels that are reached, means and spreads one
    pass each. Besides one chunk, memory holds 16 bytes for each distinct occupied cell of the S2 level being counted
    (a small multiple while chunks are merged); only cells inside those that still have more than ``tau_max[-1]``
    samples are counted, at most 4,096 in each. No Python object is made for a sample. The result does not depend on
    how the samples are cut into chunks, to the last bit.

    Args:
        chunks: Pairs of (n,) latitudes and (n,) longitudes in degrees. They are iterated several times and must be the
            same each time: a list or an object with ``__iter__``, not a generator.
        tau_min: Samples that a cell must exceed to be kept; one value a level, non-increasing; fractions are fine.
        tau_max: Samples above which a cell is split; one value a level, non-increasing.
        start_s2_level: S2 level at which level 1 starts.
        max_s2_level: S2 level beyond which nothing is split.

    Returns:
        The partition, with ``len(tau_max)`` levels.

    Raises:
        ConfigurationError: The thresholds or S2 levels are not usable, the chunks cannot be iterated again or change
            between passes, or no cell has more than ``tau_min[0]`` samples.
        CoordinateOutOfRangeError: A coordinate is not on the globe; the message names its chunk and row.
    """
    thresholds = _checked_thresholds(tau_min, tau_max)
    if not 0 <= start_s2_level <= max_s2_level <= MAX_S2_LEVEL:
        raise ConfigurationError(
            f"start_s2_level is {start_s2_level} and max_s2_level {max_s2_level}: "
            f"they must satisfy 0 <= start <= max <= {MAX_S2_LEVEL}"
        )
    if isinstance(chunks, Iterator):
        raise ConfigurationError(
            "the coordinates are an iterator, which can be read only once: "
            "pass a list, or an object whose __iter__ starts over"
        )
    tree, sample_count = _count(chunks, thresholds[-1][1], start_s2_level, max_s2_level)
    cell_ids = _refine(tree, thresholds, start_s2_level, max_s2_level)
    return Partition(_describe(chunks, sample_count, cell_ids))


@dataclass(frozen=True)
class _CountTree:
    """Sample counts of cells of all S2 levels that can be looked at, by ascending id."""

    cell_ids: CellIdArray
    counts: Int64Array

    def count(self, cell_ids: CellIdArray) -> Int64Array:
        """Counts of cells; 0 for those that are not in the tree."""
        rows = np.minimum(np.searchsorted(self.cell_ids, cell_ids), len(self.cell_ids) - 1)
        return np.where(self.cell_ids[rows] == cell_ids, self.counts[rows], 0)


class _Histogram:
    """Counts by cell id, merged chunk by chunk in time proportional to n log n of what is put in."""

    def __init__(self) -> None:
        self._ids = np.empty(0, dtype=np.uint64)
        self._counts = np.empty(0, dtype=np.int64)
        self._pending: list[tuple[CellIdArray, Int64Array]] = []
        self._pending_rows = 0

    def add(self, cell_ids: CellIdArray) -> None:
        """Count each of (n,) cell ids once."""
        ids, counts = np.unique(cell_ids, return_counts=True)
        self._pending.append((ids, counts))
        self._pending_rows += len(ids)
        # Merging only when as much is pending as is merged keeps the sum of all merges within a factor of two.
        if self._pending_rows > max(len(self._ids), _BLOCK_SAMPLES):
            self._merge()

    def result(self) -> tuple[CellIdArray, Int64Array]:
        """Ascending distinct ids and their counts."""
        self._merge()
        return self._ids, self._counts

    def _merge(self) -> None:
        if not self._pending:
            return
        ids = np.concatenate([self._ids, *(ids for ids, _ in self._pending)])
        counts = np.concatenate([self._counts, *(counts for _, counts in self._pending)])
        order = np.argsort(ids, kind="stable")
        self._ids, self._counts = _sum_runs(ids[order], counts[order])
        self._pending, self._pending_rows = [], 0


def _array_name(level: int, column: str) -> str:
    return f"level_{level}_{column}"


def _containing(cell_ids: CellIdArray, descendant_ids: CellIdArray) -> Int64Array:
    """Rows of the ascending, disjoint cells that contain other cells or leaf ids; -1 for none."""
    if len(cell_ids) == 0:
        return np.full(descendant_ids.shape, -1, dtype=np.int64)
    first, last = cell_id_range(cell_ids)
    rows = np.searchsorted(first, descendant_ids, side="right") - 1
    return np.where((rows >= 0) & (descendant_ids <= last[rows]), rows, -1)


def _sum_runs(ids: CellIdArray, counts: Int64Array) -> tuple[CellIdArray, Int64Array]:
    """Distinct ids of an ascending array and the sum of the counts of each."""
    if len(ids) == 0:
        return ids, counts
    starts = np.flatnonzero(np.concatenate([[True], ids[1:] != ids[:-1]]))
    return ids[starts], np.add.reduceat(counts, starts)


def _sum_cells(cell_ids: CellIdArray, intervals: _Intervals, values: npt.NDArray[_Number]) -> npt.NDArray[_Number]:
    """Sum of a value of the intervals over each cell's run of intervals."""
    first, last = cell_id_range(cell_ids)
    borders = np.stack([intervals.find(first), intervals.find(last) + 1], axis=1).reshape(-1)
    padded = np.concatenate([values, np.zeros(1, dtype=values.dtype)])
    return np.asarray(np.add.reduceat(padded, borders)[::2])


def _check_nested(levels: Sequence[PartitionLevel]) -> None:
    if not levels:
        raise ValueError("a partition needs at least one level")
    coarser: CellIdArray | None = None
    for number, level in enumerate(levels, start=1):
        ids = level.cell_ids
        if len(ids) == 0 or any(getattr(level, column.name).shape != ids.shape for column in fields(level)):
            raise ValueError(f"level {number} has no cells, or columns of different lengths")
        first, last = cell_id_range(ids)
        if not (first[1:] > last[:-1]).all():
            raise ValueError(f"the cells of level {number} overlap or are not in ascending order")
        expected = np.full(len(ids), -1, dtype=np.int64) if coarser is None else _containing(coarser, ids)
        if not np.array_equal(level.parents, expected):
            raise ValueError(f"the parents of level {number} are not the cells that contain its cells a level before")
        if coarser is not None and not np.array_equal(np.unique(expected), np.arange(len(coarser))):
            raise ValueError(f"a cell of level {number} has no parent, or a cell of the level before has no child")
        coarser = ids


def _checked_thresholds(tau_min: Sequence[float], tau_max: Sequence[float]) -> list[tuple[float, float]]:
    minima, maxima = [float(value) for value in tau_min], [float(value) for value in tau_max]
    if not maxima or len(minima) != len(maxima):
        raise ConfigurationError(
            f"tau_min has {len(minima)} values and tau_max {len(maxima)}: give each one value a level"
        )
    for name, values in (("tau_min", minima), ("tau_max", maxima)):
        for level, value in enumerate(values, start=1):
            if not (np.isfinite(value) and value >= 0):
                raise ConfigurationError(f"{name} of level {level} is {value}: it must be finite and not negative")
            if level > 1 and value > values[level - 2]:
                raise ConfigurationError(
                    f"{name} rises from {values[level - 2]} on level {level - 1} to {value} on level {level}: "
                    "levels are nested, so thresholds must not rise from coarse to fine"
                )
    for level, (low, high) in enumerate(zip(minima, maxima, strict=True), start=1):
        if low >= high:
            raise ConfigurationError(f"tau_min {low} of level {level} must be less than its tau_max {high}")
    return list(zip(minima, maxima, strict=True))


def _blocks(chunks: CoordinateChunks) -> Iterator[tuple[Float64Array, Float64Array]]:
    """Validated blocks of at most `_BLOCK_SAMPLES` samples, in order."""
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
        for start in range(0, len(latitude), _BLOCK_SAMPLES):
            block = slice(start, start + _BLOCK_SAMPLES)
            yield latitude[block].astype(np.float64), longitude[block].astype(np.float64)


def _check_same_samples(expected: int, seen: int) -> None:
    if seen != expected:
        raise ConfigurationError(
            f"the coordinates gave {expected} samples on the first pass and {seen} on a later one: "
            "chunks must be the same each time they are iterated"
        )


def _count(
    chunks: CoordinateChunks, smallest_tau_max: float, start_s2_level: int, max_s2_level: int
) -> tuple[_CountTree, int]:
    """Counts of the start cells and of the children of all cells that may be split, and the number of samples."""
    tree: list[tuple[CellIdArray, Int64Array]] = []
    active: CellIdArray | None = None
    coarse = start_s2_level
    total = 0
    while True:
        fine = min(coarse + _S2_LEVELS_A_PASS, max_s2_level)
        histogram = _Histogram()
        seen = 0
        for latitude_deg, longitude_deg in _blocks(chunks):
            cell_ids = latlng_to_cell_id(latitude_deg, longitude_deg, fine)
            seen += len(cell_ids)
            histogram.add(cell_ids if active is None else cell_ids[_containing(active, cell_ids) >= 0])
        if active is None:
            total = seen
        _check_same_samples(total, seen)
        ids, counts = histogram.result()
        occupied = {fine: (ids, counts)}
        for s2_level in range(fine - 1, coarse - 1, -1):
            finer_ids, finer_counts = occupied[s2_level + 1]
            occupied[s2_level] = _sum_runs(cell_id_to_parent(finer_ids, s2_level), finer_counts)
        if active is None:
            tree.append(occupied[coarse])
        for s2_level in range(coarse, fine):
            coarser_ids, coarser_counts = occupied[s2_level]
            dense = coarser_ids[coarser_counts > smallest_tau_max]
            finer_ids, finer_counts = occupied[s2_level + 1]
            inside = _containing(dense, finer_ids) >= 0
            tree.append((finer_ids[inside], finer_counts[inside]))
        active = ids[counts > smallest_tau_max]
        if fine == max_s2_level or len(active) == 0:
            break
        coarse = fine
    cell_ids = np.concatenate([ids for ids, _ in tree])
    order = np.argsort(cell_ids)
    return _CountTree(cell_ids[order], np.concatenate([counts for _, counts in tree])[order]), total


def _refine(
    tree: _CountTree, thresholds: Sequence[tuple[float, float]], start_s2_level: int, max_s2_level: int
) -> list[CellIdArray]:
    """Ascending ids of the kept cells of each level."""
    cells = tree.cell_ids[cell_id_to_s2_level(tree.cell_ids) == start_s2_level]
    counts = tree.count(cells)
    cells = cells[counts > thresholds[0][0]]
    if len(cells) == 0:
        raise ConfigurationError(
            f"no cell of S2 level {start_s2_level} has more than tau_min = {thresholds[0][0]} samples: the fullest has "
            f"{int(counts.max(initial=0))} of {int(counts.sum())}; lower tau_min or pass more coordinates"
        )
    levels = []
    for low, high in thresholds:
        final: list[CellIdArray] = []
        while len(cells):
            splitting = (tree.count(cells) > high) & (cell_id_to_s2_level(cells) < max_s2_level)
            final.append(cells[~splitting])
            parents = cells[splitting]
            children = cell_id_to_children(parents)
            kept = tree.count(children) > low
            fertile = kept.any(axis=1)
            final.append(parents[~fertile])
            cells = children[kept]
        cells = np.sort(np.concatenate(final))
        levels.append(cells)
    return levels


def _describe(
    chunks: CoordinateChunks, sample_count: int, cell_ids: Sequence[CellIdArray]
) -> tuple[PartitionLevel, ...]:
    """Counts, means and spreads of the cells of each level."""
    intervals = _Intervals.of(cell_ids)
    size = len(intervals.starts)
    counts = np.zeros(size, dtype=np.int64)
    sums = np.zeros((3, size))
    seen = 0
    for latitude_deg, longitude_deg in _blocks(chunks):
        rows = intervals.find(latlng_to_cell_id(latitude_deg, longitude_deg))
        seen += len(rows)
        counts += np.bincount(rows, minlength=size)
        vectors = latlng_to_unit_vector(latitude_deg, longitude_deg)
        for axis in range(3):
            # One addition at a time, in the order of the samples: the sum cannot depend on the cut into chunks.
            np.add.at(sums[axis], rows, vectors[:, axis])
    _check_same_samples(sample_count, seen)

    level_counts = [_sum_cells(ids, intervals, counts) for ids in cell_ids]
    means = []
    for ids in cell_ids:
        directions = np.stack([_sum_cells(ids, intervals, sums[axis]) for axis in range(3)], axis=1)
        means.append(directions / np.linalg.norm(directions, axis=1, keepdims=True))

    squares = [np.zeros(len(ids)) for ids in cell_ids]
    seen = 0
    for latitude_deg, longitude_deg in _blocks(chunks):
        rows = intervals.find(latlng_to_cell_id(latitude_deg, longitude_deg))
        seen += len(rows)
        vectors = latlng_to_unit_vector(latitude_deg, longitude_deg)
        for level, mean in enumerate(means):
            ordinals = intervals.ordinals[rows, level]
            inside = ordinals >= 0
            ordinals = ordinals[inside]
            chord = np.linalg.norm(vectors[inside] - mean[ordinals], axis=1)
            np.add.at(squares[level], ordinals, np.square(2.0 * np.arcsin(np.minimum(0.5 * chord, 1.0))))
    _check_same_samples(sample_count, seen)

    levels = []
    for level, ids in enumerate(cell_ids):
        latitude, longitude = unit_vector_to_latlng(means[level])
        parents = np.full(len(ids), -1, dtype=np.int64) if level == 0 else _containing(cell_ids[level - 1], ids)
        spread_km = EARTH_RADIUS_KM * np.sqrt(squares[level] / level_counts[level])
        levels.append(PartitionLevel(ids, parents, level_counts[level], latitude, longitude, spread_km))
    return tuple(levels)
