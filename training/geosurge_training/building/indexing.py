"""From learned cell embeddings to the FAISS files of an index bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np
from numpy.typing import NDArray

_ADDED_ROWS = 65_536
"""References that are read from the disk at a time."""
_FP16_MAX = float(np.finfo(np.float16).max)


def composite_embeddings(
    geographic: Sequence[NDArray[np.float32]],
    temperatures: Sequence[float],
    parents: Sequence[NDArray[np.int64]],
) -> list[NDArray[np.float32]]:
    """Multiply the similarities down the hierarchy once, so that a search takes one inner product a cell.

    ``h_lc = h_(l-1, parent(c)) + g_lc / tau_l`` with ``h_0 = 0``: by GeoSURGE's scoring (arXiv 2510.01448, inference),
    ``v . h`` is the logarithm of the running product of softmax probabilities up to a constant of the image. Sums are
    accumulated in float64 and rounded once.

    Args:
        geographic: ``(n_l, d)`` embeddings of the cells of each level, coarsest first; unit rows in GeoSURGE.
        temperatures: The learned temperature of each level, positive.
        parents: ``(n_l,)`` ordinals on the level above, non-decreasing; those of level 1 are not read.

    Returns:
        ``(n_l, d)`` float32 composites of each level.

    Raises:
        ValueError: Lengths or dimensions disagree, a value is not finite, a temperature is not positive, or a level's
            parents are out of order or out of range.
    """
    _check_tree(geographic, parents)
    if len(temperatures) != len(geographic):
        raise ValueError(f"there are {len(temperatures)} temperatures for {len(geographic)} levels; give one a level")
    composites: list[NDArray[np.float32]] = []
    running: NDArray[np.float64] | None = None
    for level, (vectors, temperature) in enumerate(zip(geographic, temperatures, strict=True), start=1):
        if not (np.isfinite(temperature) and temperature > 0):
            raise ValueError(f"the temperature of level {level} is {temperature}; it must be positive and finite")
        scaled = vectors.astype(np.float64) / temperature
        running = scaled if running is None else running[parents[level - 1]] + scaled
        composites.append(running.astype(np.float32))
    return composites


def write_level_indexes(
    directory: Path,
    composites: Sequence[NDArray[np.float32]],
    parents: Sequence[NDArray[np.int64]],
    storage: Literal["fp32", "fp16", "sq8"] = "fp32",
) -> list[Path]:
    """Write ``level-1.faiss`` to ``level-L.faiss``; the same input gives the same bytes.

    Level 1 is an ``IndexFlatIP`` whatever the storage (a scalar-quantised first level costs milliseconds a call). List
    *p* of a deeper level holds the children of parent *p*, with their ordinals as ids; its coarse quantizer is empty.

    Args:
        directory: An existing directory; files of these names are replaced.
        composites: ``(n_l, d)`` float32 composites of each level, coarsest first.
        parents: ``(n_l,)`` ordinals on the level above, non-decreasing; those of level 1 are not read.
        storage: Of the deeper levels: ``fp32``, ``fp16`` (half the size) or ``sq8`` (a quarter: 8 bits a component,
            scaled to the range of each component on each level).

    Returns:
        The files written, level 1 first.

    Raises:
        ValueError: As in `composite_embeddings`, an unknown storage, or composites too large for ``fp16``.
    """
    _check_tree(composites, parents)
    if storage not in ("fp32", "fp16", "sq8"):
        raise ValueError(f"the storage {storage!r} is unknown; use fp32, fp16 or sq8")
    paths = []
    for level, vectors in enumerate(composites, start=1):
        contiguous = np.ascontiguousarray(vectors, dtype=np.float32)
        index: faiss.Index
        if level == 1:
            index = faiss.IndexFlatIP(contiguous.shape[1])
            index.add(contiguous)
        else:
            if storage == "fp16" and float(np.abs(contiguous).max()) > _FP16_MAX:
                raise ValueError(
                    f"level {level} has composites over {_FP16_MAX}, the largest fp16 number; use fp32 or sq8"
                )
            index = _inverted_file(contiguous, parents[level - 1], len(composites[level - 2]), storage)
        path = directory / f"level-{level}.faiss"
        faiss.write_index(index, str(path))
        paths.append(path)
    return paths


def write_reference_lists(
    path: Path,
    embeddings: NDArray[np.float32],
    *,
    leaves: NDArray[np.int64],
    order: NDArray[np.int64],
    leaf_count: int,
    storage: Literal["fp32", "fp16", "sq8"],
) -> None:
    """Write the references of a gallery as an inverted file: list *p* holds those in leaf *p*, with ids 0, 1, ... on.

    Args:
        path: The file; replaced.
        embeddings: ``(n, d)`` float32 unit rows; may be a memory map, of which blocks are read.
        leaves: ``(n,)`` the leaf of each, 0 to ``leaf_count - 1``.
        order: ``(n,)`` rows in the order of their leaves.
        leaf_count: Number of lists.
        storage: As in `write_level_indexes`.
    """
    index = _empty_inverted_file(embeddings.shape[1], leaf_count, storage)
    if storage != "fp32":
        index.sq.train(np.asarray(embeddings))
    for start in range(0, len(order), _ADDED_ROWS):
        rows = order[start : start + _ADDED_ROWS]
        _add(index, np.ascontiguousarray(embeddings[rows]), start, leaves[rows])
    faiss.write_index(index, str(path))


def _inverted_file(
    vectors: NDArray[np.float32], parents: NDArray[np.int64], parent_count: int, storage: str
) -> faiss.IndexIVF:
    index = _empty_inverted_file(vectors.shape[1], parent_count, storage)
    if storage != "fp32":
        index.sq.train(vectors)
    _add(index, vectors, 0, parents)
    inverted_file: faiss.IndexIVF = index
    return inverted_file


# FAISS's type stubs know neither sq.train's array nor add_core.
def _empty_inverted_file(dimension: int, list_count: int, storage: str) -> Any:  # noqa: ANN401
    quantizer = faiss.IndexFlatIP(dimension)
    index: Any
    if storage == "fp32":
        index = faiss.IndexIVFFlat(quantizer, dimension, list_count, faiss.METRIC_INNER_PRODUCT)
    else:
        kind = faiss.ScalarQuantizer.QT_fp16 if storage == "fp16" else faiss.ScalarQuantizer.QT_8bit
        by_residual = False
        index = faiss.IndexIVFScalarQuantizer(
            quantizer, dimension, list_count, kind, faiss.METRIC_INNER_PRODUCT, by_residual
        )
    # There is nothing to train: the tree has already said which list every vector belongs to.
    index.is_trained = True
    return index


def _add(index: Any, vectors: NDArray[np.float32], first: int, lists: NDArray[np.int64]) -> None:  # noqa: ANN401
    ids = np.arange(first, first + len(vectors), dtype=np.int64)
    assignment = np.ascontiguousarray(lists, dtype=np.int64)
    index.add_core(len(vectors), faiss.swig_ptr(vectors), faiss.swig_ptr(ids), faiss.swig_ptr(assignment))


def _check_tree(vectors: Sequence[NDArray[np.float32]], parents: Sequence[NDArray[np.int64]]) -> None:
    """Check shapes, finiteness, and that the children of every cell are one contiguous, ascending run."""
    if not vectors or len(vectors) != len(parents):
        raise ValueError(
            f"there are {len(vectors)} levels of vectors and {len(parents)} of parents; give one or more of both"
        )
    for level, (rows, above) in enumerate(zip(vectors, parents, strict=True), start=1):
        if rows.ndim != 2 or len(rows) == 0 or rows.shape[1] != vectors[0].shape[1]:
            raise ValueError(
                f"level {level} has vectors of shape {rows.shape}; it must be (cells, {vectors[0].shape[-1]}), "
                "at least one cell"
            )
        if not np.isfinite(rows).all():
            raise ValueError(f"level {level} has vectors that are not finite, first in row {_first_not_finite(rows)}")
        if level == 1:
            continue
        if above.shape != (len(rows),) or not np.issubdtype(above.dtype, np.integer):
            raise ValueError(
                f"level {level} has parents of shape {above.shape} and type {above.dtype} for {len(rows)} cells"
            )
        if above.min() < 0 or above.max() >= len(vectors[level - 2]):
            raise ValueError(
                f"level {level} has parents {above.min()} to {above.max()}; level {level - 1} has the ordinals 0 to "
                f"{len(vectors[level - 2]) - 1}"
            )
        if (np.diff(above) < 0).any():
            row = int(np.flatnonzero(np.diff(above) < 0)[0]) + 1
            raise ValueError(
                f"level {level} has parent {above[row]} in row {row} after parent {above[row - 1]}; "
                "parents must not decrease, so that the children of a cell are one run"
            )


def _first_not_finite(rows: NDArray[np.float32]) -> int:
    return int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])
