"""Opens FAISS files, and checks that they are what the hierarchy and a gallery need."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geosurge.errors import BundleCorruptError, BundleInconsistentError, BundlePartialError
from geosurge.search.library import FaissIndex, faiss

LIST_KINDS: tuple[type, ...] = (faiss.IndexIVFFlat, faiss.IndexIVFScalarQuantizer)
"""Indexes with inverted lists that hold vectors as they are, or each component alone in fewer bits."""


def read_index(path: Path) -> FaissIndex:
    """Opens a file, whose lists stay on the disk and are memory-mapped.

    Raises:
        BundlePartialError: It does not exist.
        BundleCorruptError: It is truncated or is not a FAISS index.
    """
    if not path.is_file():
        raise BundlePartialError(f"{path}: there is no such file; build or copy the bundle again")
    try:
        index: FaissIndex = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
    except (RuntimeError, MemoryError) as error:
        raise BundleCorruptError(
            f"{path}: truncated or not a FAISS index ({_last_line(error)}); copy or build the bundle again"
        ) from error
    has_lists = isinstance(index, faiss.IndexIVF) and index.nlist > 0
    lists: Any = faiss.downcast_InvertedLists(index.invlists) if has_lists else None
    is_mapped = isinstance(lists, faiss.OnDiskInvertedLists)
    if is_mapped:
        # FAISS maps what there is without comparing it to the header; a read past the end would kill the process.
        first, last = lists.lists.at(0), lists.lists.at(lists.nlist - 1)
        entry_bytes = lists.code_size + 8
        end = last.offset + last.capacity * entry_bytes
        if end != lists.totsize or first.offset + index.ntotal * entry_bytes != end:
            raise BundleCorruptError(
                f"{path}: has {lists.totsize} bytes where its header announces "
                f"{first.offset + index.ntotal * entry_bytes}; copy or build the bundle again"
            )
    return index


def _last_line(error: BaseException) -> str:
    return str(error).strip().rsplit("\n", 1)[-1]


def check_levels(paths: Sequence[Path], indexes: Sequence[FaissIndex]) -> None:
    """Check each level's kind, metric and dimension, and that its lists are the cells of the level above.

    Raises:
        BundleInconsistentError: They are not; names the file.
    """
    for level, (path, index) in enumerate(zip(paths, indexes, strict=True), start=1):
        kinds: tuple[type, ...] = (faiss.IndexFlat,) if level == 1 else LIST_KINDS
        is_allowed = isinstance(index, kinds)
        if not is_allowed:
            allowed = " or ".join(kind.__name__ for kind in kinds)
            raise BundleInconsistentError(f"{path}: is a {type(index).__name__}; level {level} must be {allowed}")
        check_inner_product(path, index)
        if index.d != indexes[0].d:
            raise BundleInconsistentError(f"{path}: has {index.d} dimensions where {paths[0]} has {indexes[0].d}")
        if index.ntotal == 0:
            raise BundleInconsistentError(f"{path}: holds no cells; every level needs at least one")
        if level == 1:
            continue
        if index.nlist != indexes[level - 2].ntotal:
            raise BundleInconsistentError(
                f"{path}: has {index.nlist} lists where {paths[level - 2]} has {indexes[level - 2].ntotal} cells"
            )


def check_inner_product(path: Path, index: FaissIndex) -> None:
    """Check that an index ranks by inner product with vectors as they are.

    Raises:
        BundleInconsistentError: It does not.
    """
    if index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise BundleInconsistentError(
            f"{path}: has FAISS metric {index.metric_type}; it must be the inner product ({faiss.METRIC_INNER_PRODUCT})"
        )
    if getattr(index, "by_residual", False):
        raise BundleInconsistentError(f"{path}: stores residuals; vectors must be stored as they are")


def check_runs(path: Path, index: FaissIndex) -> None:
    """Check that list *p* holds exactly the ids that follow those of list *p - 1*, from 0 on.

    Raises:
        BundleInconsistentError: One does not.
    """
    lists, expected = index.invlists, 0
    for parent in range(index.nlist):
        size = lists.list_size(parent)
        # An empty list has no ids to point at.
        ids = faiss.rev_swig_ptr(lists.get_ids(parent), size) if size else np.empty(0, np.int64)
        if not np.array_equal(ids, np.arange(expected, expected + size)):
            raise BundleInconsistentError(
                f"{path}: list {parent} holds the ids {ids[:4].tolist()}{'...' if size > 4 else ''} where the "
                f"ordinals {expected} to {expected + size - 1} belong; build the bundle again"
            )
        expected += size
    if expected != index.ntotal:
        raise BundleInconsistentError(
            f"{path}: the lists hold {expected} vectors where the header says {index.ntotal}; build the bundle again"
        )


def list_sizes(index: FaissIndex) -> NDArray[np.int64]:
    """``(nlist,)``: the vectors in each list."""
    return np.fromiter(map(index.invlists.list_size, range(index.nlist)), np.int64, index.nlist)
