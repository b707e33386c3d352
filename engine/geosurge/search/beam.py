"""Beam search: down the levels, keeping the best children of what was kept above."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from geosurge.errors import BundleInconsistentError
from geosurge.search.hits import LeafHits
from geosurge.search.library import FaissIndex, FoundRows, Pointer, faiss, one_openmp_thread, probing


@dataclass(frozen=True, eq=False)
class Levels:
    """The open index of each level, coarsest first: all on the CPU, or all on one GPU.

    Attributes:
        indexes: FAISS indexes.
        paths: The files that they are of, to name in errors.
        cell_counts: Cells of each level.
        selection_limit: The largest number of cells that FAISS can select there; ``None`` where there is no limit.
    """

    indexes: tuple[FaissIndex, ...]
    paths: tuple[Path, ...]
    cell_counts: tuple[int, ...]
    selection_limit: int | None = None

    def id_out_of_range(self, level: int, ordinal: int) -> BundleInconsistentError:
        """What is wrong with a level, counted from 0, whose file holds an ordinal that no cell of it has."""
        return BundleInconsistentError(
            f"{self.paths[level]}: holds the id {ordinal}, but level {level + 1} has {self.cell_counts[level]} cells; "
            "build the bundle again"
        )


def beam_search(levels: Levels, embeddings: NDArray[np.float32], *, width: int, hits: int, reachable: int) -> LeafHits:
    """Search the queries of a batch on the calling thread alone.

    Args:
        levels: Where to search.
        embeddings: ``(n, d)`` float32, C-contiguous, finite; n at least 1.
        width: Cells kept a level.
        hits: Leaves to return.
        reachable: Leaves that ``width`` cells can have at most, at least ``hits``.

    Returns:
        Hits of shape ``(n, hits)``, padded where a query reaches fewer leaves.

    Raises:
        BundleInconsistentError: A file holds an id that its level does not have.
    """
    n, leaf_level = len(embeddings), len(levels.indexes) - 1
    queries = faiss.swig_ptr(embeddings)
    with one_openmp_thread():
        beam: FoundRows | None = None
        for level in range(leaf_level):
            beam = _search_level(levels, level, n, queries, k=min(width, levels.cell_counts[level]), beam=beam)
        # FAISS cuts and orders equal scores as its heap pleases: look past the cut until it is not through a tie.
        limit = min(reachable, levels.selection_limit or reachable)
        fetched = min(hits + 1, limit)
        while True:
            leaves = _search_level(levels, leaf_level, n, queries, k=fetched, beam=beam)
            if not _order_ties(leaves, hits) or fetched == limit:
                return _leaf_hits(levels, leaves, hits)
            fetched = min(2 * fetched, limit)


def _search_level(levels: Levels, level: int, n: int, queries: Pointer, *, k: int, beam: FoundRows | None) -> FoundRows:
    """The ``k`` best children of ``beam`` for each of ``n`` queries, or the ``k`` best cells of the first level."""
    found = FoundRows(n, k)
    # The `_c` methods are FAISS's own: its Python wrapper takes nprobe from the index, which is state that threads
    # share, and refuses to be told another.
    if beam is None:
        levels.indexes[level].search_c(n, queries, k, found.scores_pointer, found.ordinals_pointer)
        return found
    try:
        levels.indexes[level].search_preassigned_c(
            n,
            queries,
            k,
            beam.ordinals_pointer,
            beam.scores_pointer,
            found.scores_pointer,
            found.ordinals_pointer,
            False,
            probing(beam.k),
        )
    except RuntimeError as error:
        worst = int(beam.ordinals.max())
        if worst < levels.cell_counts[level - 1]:
            raise
        raise levels.id_out_of_range(level - 1, worst) from error
    return found


def _leaf_hits(levels: Levels, leaves: FoundRows, k: int) -> LeafHits:
    """The first ``k`` of what FAISS found, with missing hits marked."""
    ordinals, scores = leaves.ordinals, leaves.scores
    # One pass for both: -1, a missing hit, is the largest number without a sign.
    if int(ordinals.view(np.uint64).max()) >= levels.cell_counts[-1]:
        worst = int(ordinals.max())
        if worst >= levels.cell_counts[-1]:
            raise levels.id_out_of_range(len(levels.indexes) - 1, worst)
        scores[ordinals < 0] = -np.inf
    if leaves.k == k:
        return LeafHits(ordinals, scores)
    return LeafHits(np.ascontiguousarray(ordinals[:, :k]), np.ascontiguousarray(scores[:, :k]))


def _order_ties(leaves: FoundRows, k: int) -> bool:
    """Order equal scores by ordinal, and tell whether the ``k``-th of a query equals the last that was fetched."""
    ordinals, scores = leaves.ordinals, leaves.scores
    tied = scores[:, 1:] == scores[:, :-1]
    if not tied.any():
        return False
    rows = np.flatnonzero(tied.any(axis=1))
    order = np.lexsort((ordinals[rows], -scores[rows]), axis=1)
    ordinals[rows] = np.take_along_axis(ordinals[rows], order, axis=1)
    scores[rows] = np.take_along_axis(scores[rows], order, axis=1)
    return bool(((scores[:, k - 1] == scores[:, -1]) & (ordinals[:, -1] >= 0)).any())
