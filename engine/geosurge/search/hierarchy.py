"""The open indexes of a bundle: coarse to fine with a beam, or exactly."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from geosurge.errors import BundleInconsistentError, EmbeddingInvalidError, OptionOutOfRangeError
from geosurge.search.beam import Levels, beam_search
from geosurge.search.exact import exact_search
from geosurge.search.files import check_levels, check_runs, list_sizes, read_index
from geosurge.search.hits import LeafHits
from geosurge.search.library import GPU_SELECTION_LIMIT, FaissIndex, faiss, faiss_gpu
from geosurge.search.ranges import merge_ranges

_BLAS_THRESHOLD = 16 * 768
"""Components of a batch from which FAISS scans level 1 by a matrix product; it pays from about 16 queries of 768-d."""

_PART_SIZES = (4, 128)
"""Fewest and most queries that one thread takes at a time: fewer cost more in Python than they gain."""


class HierarchicalIndex:
    """The open indexes of one bundle, level 1 to L, with a beam search and an exact search over them.

    Made by `open`. On a CPU the files are memory-mapped, searches from several threads may overlap, and a batch is
    spread over as many threads as FAISS had when the index was opened (``OMP_NUM_THREADS``). Each of them walks down
    all levels with its own queries: FAISS's OpenMP threads would wait for one another after every level, which takes
    many times as long as the search itself while other threads, such as an encoder's, keep the cores busy.

    A FAISS GPU index is not thread-safe even for reads: there, one lock serialises searches. The GPU path is held
    against the CPU's by a test that runs where FAISS sees a GPU.

    Attributes:
        device: ``"cpu"`` or ``"cuda:N"``.
        dimension: Components of an embedding.
        cell_counts: Cells of each level, coarsest first.
    """

    def __init__(self, paths: Sequence[Path], indexes: Sequence[FaissIndex], device: str) -> None:
        self.device = device
        self.dimension = int(indexes[0].d)
        self.cell_counts = tuple(int(index.ntotal) for index in indexes)
        # What the files hold, and what is searched: the same, or its clones on a GPU.
        self._files: Levels | None = Levels(tuple(indexes), tuple(paths), self.cell_counts)
        self._searched: Levels | None = self._files
        self._leaf_matrix: torch.Tensor | None = None
        self._leaf_matrix_lock = threading.Lock()
        self._search_lock: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        self._thread_count = faiss.omp_get_max_threads()
        self._threads: ThreadPoolExecutor | None = ThreadPoolExecutor(self._thread_count, "geosurge-search")
        self._threads_process = os.getpid()
        self._gpu_resources: Any = None
        self._largest_families = _cumulative_family_sizes(indexes[-1]) if len(indexes) > 1 else None

    @classmethod
    def open(cls, paths: Sequence[Path], device: str = "cpu") -> Self:
        """Open the index files of one bundle.

        Args:
            paths: One FAISS file a level, level 1 first.
            device: ``"cpu"``, ``"cuda"`` (the first GPU) or ``"cuda:N"``.

        Raises:
            BundlePartialError: A file does not exist.
            BundleCorruptError: A file is truncated or is not a FAISS index.
            BundleInconsistentError: A file is of another kind, dimension or metric than its level demands, or has
                another number of lists than the level above has cells.
            UsageError: The device is unknown, or FAISS cannot use it.
        """
        if not paths:
            raise BundleInconsistentError("no index files were given; a bundle has one for each level, at least one")
        gpu = faiss_gpu(device)
        paths = [Path(path) for path in paths]
        indexes = [read_index(path) for path in paths]
        check_levels(paths, indexes)
        faiss.cvar.distance_compute_blas_threshold = min(faiss.cvar.distance_compute_blas_threshold, _BLAS_THRESHOLD)
        opened = cls(paths, indexes, "cpu" if gpu is None else f"cuda:{gpu}")
        if gpu is not None:
            opened._move_to_gpu(gpu)
        return opened

    @property
    def level_count(self) -> int:
        """Number of levels."""
        return len(self.cell_counts)

    def close(self) -> None:
        """Let go of all files and memory; searches under way finish, later ones raise ``ValueError``."""
        with self._search_lock:
            self._files = self._searched = None
            # Idle threads end with the last reference to their pool, and a search under way still holds one.
            self._threads = None
            self._leaf_matrix = None
            self._gpu_resources = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def release_leaves(self) -> None:
        """Let go of the matrix that `exact` decoded; the next call decodes it again."""
        with self._leaf_matrix_lock:
            self._leaf_matrix = None

    def child_counts(self, level: int) -> NDArray[np.int64]:
        """Children of each cell of a level on the next level.

        Args:
            level: 1 to L - 1.

        Returns:
            ``(n,)``: the sizes of the inverted lists of level ``level + 1``.
        """
        return list_sizes(_unless_closed(self._files).indexes[level])

    def check(self) -> None:
        """Read every id of every level: list *p* must hold exactly the ordinals that follow those of list *p - 1*.

        Raises:
            BundleInconsistentError: An id is missing, repeated, out of order or out of range.
        """
        files = _unless_closed(self._files)
        for path, index in zip(files.paths[1:], files.indexes[1:], strict=True):
            check_runs(path, index)

    def search(self, embeddings: NDArray[np.float32], *, width: int, k: int) -> LeafHits:
        """Find the best leaves by beam search from the coarsest level down.

        Every level but the last keeps the ``width`` best children of the cells kept above; the last returns the ``k``
        best children of the ``width`` cells kept on the level before it. With ``width`` at least the size of every
        level but the last, the answer is that of `exact`.

        Args:
            embeddings: ``(n, dimension)`` float32, C-contiguous, finite.
            width: Cells kept a level, at least 1; at most 2048 on a GPU.
            k: Leaves to return, at least 1; clamped to the leaves that ``width`` cells can have.

        Returns:
            Hits of shape ``(n, k)``, padded where a query reaches fewer leaves.

        Raises:
            EmbeddingInvalidError: The embeddings have another number of components than the index.
            OptionOutOfRangeError: ``width`` or ``k`` is below 1, or over the limit of a GPU.
            ValueError: The array is not C-contiguous float32 of two dimensions, or the index is closed.
            BundleInconsistentError: A file holds an id that its level does not have.
        """
        self._check_embeddings(embeddings)
        levels, threads = _unless_closed(self._searched), self._own_threads()
        limit = levels.selection_limit
        self._check_count("beam width", width, min(width, max(self.cell_counts[:-1], default=1)), limit)
        kept = min(width, self.cell_counts[-2]) if self.level_count > 1 else 0
        reachable = self.cell_counts[-1] if self._largest_families is None else int(self._largest_families[kept - 1])
        hits = min(k, reachable)
        self._check_count("k", k, hits, limit)
        if len(embeddings) == 0:
            return LeafHits(np.empty((0, hits), np.int64), np.empty((0, hits), np.float32))
        search_part = functools.partial(beam_search, levels, width=width, hits=hits, reachable=reachable)
        smallest, largest = _PART_SIZES
        part = min(max(-(-len(embeddings) // self._thread_count), smallest), largest)
        if len(embeddings) <= part or limit is not None or threads is None:
            with self._search_lock:
                return search_part(embeddings)
        starts = range(0, len(embeddings), part)
        found = list(threads.map(search_part, [embeddings[start : start + part] for start in starts]))
        return LeafHits(
            np.concatenate([hits.ordinals for hits in found]), np.concatenate([hits.scores for hits in found])
        )

    def exact(
        self, embeddings: NDArray[np.float32], *, k: int, leaf_ranges: Sequence[tuple[int, int]] | None = None
    ) -> LeafHits:
        """Find the best leaves by scoring every leaf, or every leaf of some ranges.

        The first call decodes the leaf level into one ``(n_leaves, dimension)`` float32 matrix, which stays in memory
        until `release_leaves`.

        Args:
            embeddings: ``(n, dimension)`` float32, C-contiguous, finite.
            k: Leaves to return, at least 1; clamped to the number of candidates.
            leaf_ranges: Half-open ranges of leaf ordinals to search, in any order, possibly overlapping; ``None`` is
                all leaves.

        Returns:
            Hits of shape ``(n, min(k, candidates))``.

        Raises:
            EmbeddingInvalidError: The embeddings have another number of components than the index.
            OptionOutOfRangeError: ``k`` is below 1.
            ValueError: The array is not C-contiguous float32 of two dimensions, a range is not within the leaves, or
                the index is closed.
        """
        self._check_embeddings(embeddings)
        self._check_count("k", k, 1, None)
        ranges = merge_ranges([(0, self.cell_counts[-1])] if leaf_ranges is None else leaf_ranges, self.cell_counts[-1])
        hits = min(k, sum(stop - start for start, stop in ranges))
        if len(embeddings) == 0 or hits == 0:
            return LeafHits(np.empty((len(embeddings), hits), np.int64), np.empty((len(embeddings), hits), np.float32))
        with self._search_lock:
            return exact_search(embeddings, self._leaves(), ranges, hits)

    def _own_threads(self) -> ThreadPoolExecutor | None:
        """The pool of this process: a forked one inherits its parent's pool without the threads, and would wait."""
        if self._threads is not None and self._threads_process != os.getpid():
            self._threads = ThreadPoolExecutor(self._thread_count, "geosurge-search")
            self._threads_process = os.getpid()
        return self._threads

    def _leaves(self) -> torch.Tensor:
        with self._leaf_matrix_lock:
            if self._leaf_matrix is None:
                leaf_index = _unless_closed(self._files).indexes[-1]
                matrix = torch.from_numpy(leaf_index.reconstruct_n(0, self.cell_counts[-1]))
                on_gpu = self._gpu_resources is not None and torch.cuda.is_available()
                self._leaf_matrix = matrix.to(self.device) if on_gpu else matrix
            return self._leaf_matrix

    def _move_to_gpu(self, gpu: int) -> None:
        # On a GPU an id out of range is a read out of bounds, not an exception.
        self.check()
        files = _unless_closed(self._files)
        resources = faiss.StandardGpuResources()
        options = faiss.GpuClonerOptions()
        if hasattr(options, "use_cuvs"):
            # cuVS has neither scalar-quantised lists nor preassigned search.
            options.use_cuvs = False
        clones = []
        for level, index in enumerate(files.indexes):
            if level == 0:
                clones.append(faiss.index_cpu_to_gpu(resources, gpu, index, options))
                continue
            # A GPU clone demands one centroid a list, although a preassigned search never looks at them.
            quantizer = faiss.downcast_index(index.quantizer)
            quantizer.reset()
            quantizer.add(files.indexes[level - 1].reconstruct_n(0, self.cell_counts[level - 1]))
            clones.append(faiss.index_cpu_to_gpu(resources, gpu, index, options))
            quantizer.reset()
        self._gpu_resources = resources
        self._searched = Levels(tuple(clones), files.paths, self.cell_counts, GPU_SELECTION_LIMIT)
        self._search_lock = threading.Lock()

    def _check_embeddings(self, embeddings: NDArray[np.float32]) -> None:
        if embeddings.dtype != np.float32 or embeddings.ndim != 2 or not embeddings.flags.c_contiguous:
            raise ValueError(
                f"embeddings must be a C-contiguous float32 array of shape (n, {self.dimension}), not "
                f"{embeddings.dtype} of shape {embeddings.shape}"
                f"{'' if embeddings.flags.c_contiguous else ', not contiguous'}"
            )
        if embeddings.shape[1] != self.dimension:
            raise EmbeddingInvalidError(
                f"an embedding has {embeddings.shape[1]} components where this index has {self.dimension}; "
                "use the encoder that the bundle was built with"
            )

    def _check_count(self, name: str, asked: int, needed: int, limit: int | None) -> None:
        """Refuse an ``asked`` count below 1, or whose ``needed`` part (after clamping) a GPU cannot select."""
        if asked < 1:
            raise OptionOutOfRangeError(f"{name} is {asked}; it must be at least 1")
        if limit is not None and needed > limit:
            raise OptionOutOfRangeError(
                f"{name} is {asked}; on {self.device} FAISS keeps at most {limit}: ask for fewer, or search exactly"
            )


def _unless_closed(levels: Levels | None) -> Levels:
    if levels is None:
        raise ValueError("the index is closed; open it again")
    return levels


def _cumulative_family_sizes(index: FaissIndex) -> NDArray[np.int64]:
    """``(nlist,)``: the most children that 1, 2, ... cells can have together."""
    return np.cumsum(np.sort(list_sizes(index))[::-1])
