"""Nested adaptive partitions of S2 or H3 cells: which geocells a training set can teach, level by level.

The algorithm is that of Müller-Budack et al. (ISN, ECCV 2018), on which GeoSURGE (arXiv 2510.01448) builds, both for
S2: start from the cells of a coarse S2 level; drop the cells with at most ``tau_min`` samples; replace each cell that
has more than ``tau_max`` by its children as long as its S2 level allows, and drop the children with at most
``tau_min``. Level l+1 goes on splitting the kept cells of level l with its own thresholds, so levels are nested by
construction; a cell that needs no split appears again as its own only child. Samples in dropped cells belong to no cell
of that level or of finer ones.

This project's decisions where the papers are silent: a cell whose children would all be dropped is not split. Every
kept cell therefore has a kept child on the next level, down to the leaves. It matters only where ``tau_max <
tau_min`` times the number of children, 4 or 7. H3 cells are split by the same rules, and a child is inside its parent
by H3's index and not quite by its outline (`geosurge.hexagons`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from geosurge.errors import ConfigurationError
from geosurge.geodesy import Float64Array, Int64Array
from geosurge.grids import S2, Grid, containing
from geosurge.s2 import CellIdArray
from geosurge_training.partitions.grid import GridLevel, GridPartition, Intervals
from geosurge_training.partitions.samples import (
    BLOCK_SAMPLES,
    CoordinateChunks,
    check_repeatable,
    check_same_samples,
    describe_cells,
    sample_blocks,
    sum_tiles,
)

# Resolutions that one pass over the samples counts at once: 4^6 and 7^4 descendants of a cell at most.
_RESOLUTIONS_A_PASS: Final = {"s2": 6, "h3": 4}


def adaptive_partition(
    chunks: CoordinateChunks,
    tau_min: Sequence[float],
    tau_max: Sequence[float],
    *,
    grid: Grid = S2,
    start_resolution: int = 2,
    max_resolution: int | None = None,
) -> GridPartition:
    """Partition the Earth by the density of samples, on as many nested levels as there are thresholds.

    Every kept cell of level l has more than ``tau_min[l]`` samples. It has at most ``tau_max[l]``, unless it is of
    ``max_resolution`` (many samples at one coordinate) or all its children have at most ``tau_min[l]``.

    The samples are streamed: counting takes one pass for every six S2 levels or four H3 resolutions that are reached,
    means and spreads one pass each. Besides one chunk, memory holds 16 bytes for each distinct occupied cell of the
    resolution being counted (a small multiple while chunks are merged); only cells inside those that still have more
    than ``tau_max[-1]`` samples are counted, at most 4,096 in each. Of S2, no Python object is made for a sample; of
    H3, one for each of a block. The result does not depend on how the samples are cut into chunks, to the last bit.

    Args:
        chunks: Pairs of (n,) latitudes and (n,) longitudes in degrees. They are iterated several times and must be the
            same each time: a list or an object with ``__iter__``, not a generator.
        tau_min: Samples that a cell must exceed to be kept; one value a level, non-increasing; fractions are fine.
        tau_max: Samples above which a cell is split; one value a level, non-increasing.
        grid: Whose cells: S2's levels or H3's resolutions.
        start_resolution: Resolution at which level 1 starts. There are 96 cells of S2 level 2, 122 of H3 resolution 0.
        max_resolution: Resolution beyond which nothing is split; ``None`` is the grid's finest.

    Returns:
        The partition, with ``len(tau_max)`` levels.

    Raises:
        ConfigurationError: The thresholds or resolutions are not usable, the chunks cannot be iterated again or change
            between passes, or no cell has more than ``tau_min[0]`` samples.
        CoordinateOutOfRangeError: A coordinate is not on the globe; the message names its chunk and row.
    """
    thresholds = _checked_thresholds(tau_min, tau_max)
    finest = grid.max_resolution if max_resolution is None else max_resolution
    if not 0 <= start_resolution <= finest <= grid.max_resolution:
        raise ConfigurationError(
            f"the {grid.resolution_name}s go from {start_resolution} to {finest}: "
            f"they must satisfy 0 <= start <= max <= {grid.max_resolution}"
        )
    check_repeatable(chunks)
    tree, sample_count = _count(grid, chunks, thresholds[-1][1], start_resolution, finest)
    cell_ids = _refine(tree, thresholds, start_resolution, finest)
    return GridPartition(_describe(grid, chunks, sample_count, cell_ids))


@dataclass(frozen=True)
class _CountTree:
    """Sample counts of cells of all resolutions that can be looked at, by ascending id."""

    grid: Grid
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
        if self._pending_rows > max(len(self._ids), BLOCK_SAMPLES):
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
        self._ids, self._counts = _sum_equal(ids[order], counts[order])
        self._pending, self._pending_rows = [], 0


def _sum_equal(ids: CellIdArray, counts: Int64Array) -> tuple[CellIdArray, Int64Array]:
    """Distinct ids of an ascending array and the sum of the counts of each."""
    if len(ids) == 0:
        return ids, counts
    starts = np.flatnonzero(np.concatenate([[True], ids[1:] != ids[:-1]]))
    return ids[starts], np.add.reduceat(counts, starts)


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


def _count(
    grid: Grid, chunks: CoordinateChunks, smallest_tau_max: float, start_resolution: int, max_resolution: int
) -> tuple[_CountTree, int]:
    """Counts of the start cells and of the children of all cells that may be split, and the number of samples."""
    tree: list[tuple[CellIdArray, Int64Array]] = []
    active: CellIdArray | None = None
    coarse = start_resolution
    total = 0
    while True:
        fine = min(coarse + _RESOLUTIONS_A_PASS[grid.cell_kind], max_resolution)
        histogram = _Histogram()
        seen = 0
        for latitude_deg, longitude_deg in sample_blocks(chunks):
            cell_ids = grid.latlng_to_id(latitude_deg, longitude_deg, fine)
            seen += len(cell_ids)
            histogram.add(cell_ids if active is None else cell_ids[containing(grid, active, cell_ids) >= 0])
        if active is None:
            total = seen
        check_same_samples(total, seen)
        ids, counts = histogram.result()
        occupied = {fine: (ids, counts)}
        for resolution in range(fine - 1, coarse - 1, -1):
            finer_ids, finer_counts = occupied[resolution + 1]
            occupied[resolution] = _sum_equal(grid.id_to_parent(finer_ids, resolution), finer_counts)
        if active is None:
            tree.append(occupied[coarse])
        for resolution in range(coarse, fine):
            coarser_ids, coarser_counts = occupied[resolution]
            dense = coarser_ids[coarser_counts > smallest_tau_max]
            finer_ids, finer_counts = occupied[resolution + 1]
            inside = containing(grid, dense, finer_ids) >= 0
            tree.append((finer_ids[inside], finer_counts[inside]))
        active = ids[counts > smallest_tau_max]
        if fine == max_resolution or len(active) == 0:
            break
        coarse = fine
    cell_ids = np.concatenate([ids for ids, _ in tree])
    order = np.argsort(cell_ids)
    return _CountTree(grid, cell_ids[order], np.concatenate([counts for _, counts in tree])[order]), total


def _refine(
    tree: _CountTree, thresholds: Sequence[tuple[float, float]], start_resolution: int, max_resolution: int
) -> list[CellIdArray]:
    """Ascending ids of the kept cells of each level."""
    grid = tree.grid
    cells = tree.cell_ids[grid.id_to_resolution(tree.cell_ids) == start_resolution]
    counts = tree.count(cells)
    cells = cells[counts > thresholds[0][0]]
    if len(cells) == 0:
        raise ConfigurationError(
            f"no cell of {grid.resolution_name} {start_resolution} has more than tau_min = {thresholds[0][0]} samples: "
            f"the fullest has {int(counts.max(initial=0))} of {int(counts.sum())}; lower tau_min or pass more "
            "coordinates"
        )
    levels = []
    for low, high in thresholds:
        final: list[CellIdArray] = []
        while len(cells):
            splitting = (tree.count(cells) > high) & (grid.id_to_resolution(cells) < max_resolution)
            final.append(cells[~splitting])
            parents = cells[splitting]
            children = grid.id_to_children(parents)
            kept = tree.count(children) > low
            fertile = kept.any(axis=1)
            final.append(parents[~fertile])
            cells = children[kept]
        cells = np.sort(np.concatenate(final))
        levels.append(cells)
    return levels


def _describe(
    grid: Grid, chunks: CoordinateChunks, sample_count: int, cell_ids: Sequence[CellIdArray]
) -> tuple[GridLevel, ...]:
    """Counts, means and spreads of the cells of each level."""
    intervals = Intervals.of(grid, cell_ids)

    def find(latitude_deg: Float64Array, longitude_deg: Float64Array) -> Int64Array:
        return intervals.find(grid.latlng_to_id(latitude_deg, longitude_deg, grid.max_resolution))

    sums = sum_tiles(chunks, find, len(intervals.starts))
    check_same_samples(sample_count, int(sums.counts.sum()))
    levels = []
    for level, statistics in enumerate(describe_cells(chunks, find, intervals.ordinals, sums)):
        ids = cell_ids[level]
        parents = np.full(len(ids), -1, dtype=np.int64) if level == 0 else containing(grid, cell_ids[level - 1], ids)
        levels.append(GridLevel(**vars(statistics), grid=grid, cell_ids=ids, parents=parents))
    return tuple(levels)
