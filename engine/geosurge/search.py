"""Coarse-to-fine search over composite embeddings: the hierarchy as a chain of FAISS indexes.

GeoSURGE (arXiv 2510.01448, inference) scores a leaf by the product of its own softmax probability and those of all its
ancestors, ``P_l(c | v) = exp(v . g_lc / tau_l) / Z_l(v)``. Every normaliser ``Z_l`` depends on the image alone, so

    log score(leaf) = v . h_leaf - sum_l log Z_l(v),        h_lc = h_(l-1, parent(c)) + g_lc / tau_l,        h_0 = 0

and ranking by the product is ranking by one inner product with the leaf's composite ``h``, at every level.

What is stored, one FAISS file a level, readable by any FAISS program:

- level 1: ``IndexFlatIP`` over ``n_1`` composites;
- level l > 1: ``IndexIVFFlat`` or ``IndexIVFScalarQuantizer`` (inner product, no residuals) whose inverted list *p*
  holds the children of cell *p* of the level above and whose ids are the ordinals of its own level. The coarse
  quantizer is empty: a preassigned search never reads it.

What a query costs with a beam of ``w``: ``n_1`` inner products, then the children of ``w`` cells a level, whatever the
number of leaves; exact search costs one inner product a leaf.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from geosurge.errors import (
    BundleCorruptError,
    BundleInconsistentError,
    BundlePartialError,
    EmbeddingInvalidError,
    OptionOutOfRangeError,
    UsageError,
)

try:
    import faiss
except ImportError as error:
    raise ImportError(
        "FAISS is not installed: install exactly one of geosurge[cpu] and geosurge[gpu] (both own the module `faiss`)"
    ) from error

_FaissIndex: TypeAlias = Any
"""A FAISS index; FAISS's type stubs lack the methods and members that are used here."""

_Pointer: TypeAlias = Any
"""The address of an array, as FAISS's C interface takes it."""

_GPU_SELECTION_LIMIT = 2048
"""The largest k and nprobe of FAISS's GPU kernels."""

_BLAS_THRESHOLD = 16 * 768
"""Components of a batch from which FAISS scans level 1 by a matrix product; it pays from about 16 queries of 768-d."""

_PART_SIZES = (4, 128)
"""Fewest and most queries that one thread takes at a time: fewer cost more in Python than they gain."""

_QUERY_BLOCK = 256
_LEAF_BLOCK = 65_536
"""Exact search holds at most ``_QUERY_BLOCK * _LEAF_BLOCK`` scores (64 MiB) at a time."""


class _Cells:
    """The ``k`` best cells of a level for each of ``n`` queries, as arrays that FAISS fills, and where they lie."""

    __slots__ = ("k", "ordinals", "ordinals_pointer", "scores", "scores_pointer")

    def __init__(self, n: int, k: int) -> None:
        self.k = k
        self.ordinals = np.empty((n, k), np.int64)
        self.scores = np.empty((n, k), np.float32)
        self.ordinals_pointer = faiss.swig_ptr(self.ordinals)
        self.scores_pointer = faiss.swig_ptr(self.scores)


@dataclass(frozen=True)
class LeafHits:
    """Leaves found for each query, best first, equal scores by ordinal.

    Attributes:
        ordinals: ``(n, k)`` int64 leaf ordinals, -1 where fewer than ``k`` leaves were reached.
        scores: ``(n, k)`` float32 composite inner products: the logarithm of the leaf's product of probabilities, up to
            one constant a query. -inf where the ordinal is -1.
    """

    ordinals: NDArray[np.int64]
    scores: NDArray[np.float32]


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

    def __init__(self, paths: Sequence[Path], indexes: Sequence[_FaissIndex], device: str) -> None:
        self.device = device
        self.dimension = int(indexes[0].d)
        self.cell_counts = tuple(int(index.ntotal) for index in indexes)
        self._paths = tuple(paths)
        self._cpu_indexes: tuple[_FaissIndex, ...] = tuple(indexes)
        self._indexes: tuple[_FaissIndex, ...] = self._cpu_indexes
        self._leaf_matrix: torch.Tensor | None = None
        self._leaf_matrix_lock = threading.Lock()
        self._search_lock: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        self._selection_limit: int | None = None
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
        gpu = _parse_device(device)
        paths = [Path(path) for path in paths]
        indexes = [_read_index(path) for path in paths]
        _check_levels(paths, indexes)
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
            self._indexes = self._cpu_indexes = ()
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
        return _list_sizes(self._open_indexes(self._cpu_indexes)[level])

    def check(self) -> None:
        """Read every id of every level: list *p* must hold exactly the ordinals that follow those of list *p - 1*.

        Raises:
            BundleInconsistentError: An id is missing, repeated, out of order or out of range.
        """
        indexes = self._open_indexes(self._cpu_indexes)
        for path, index in zip(self._paths[1:], indexes[1:], strict=True):
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
                    f"{path}: the lists hold {expected} cells where the header says {index.ntotal}; "
                    "build the bundle again"
                )

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
        self._check_count("beam width", width, min(width, max(self.cell_counts[:-1], default=1)))
        kept = min(width, self.cell_counts[-2]) if self.level_count > 1 else 0
        reachable = self.cell_counts[-1] if self._largest_families is None else int(self._largest_families[kept - 1])
        hits = min(k, reachable)
        self._check_count("k", k, hits)
        if len(embeddings) == 0:
            return LeafHits(np.empty((0, hits), np.int64), np.empty((0, hits), np.float32))
        indexes, threads = self._open_indexes(self._indexes), self._own_threads()
        search_part = functools.partial(self._search_part, indexes, width=width, hits=hits, reachable=reachable)
        smallest, largest = _PART_SIZES
        part = min(max(-(-len(embeddings) // self._thread_count), smallest), largest)
        if len(embeddings) <= part or self._selection_limit is not None or threads is None:
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
        self._check_count("k", k, 1)
        ranges = merge_ranges([(0, self.cell_counts[-1])] if leaf_ranges is None else leaf_ranges, self.cell_counts[-1])
        hits = min(k, sum(stop - start for start, stop in ranges))
        ordinals = np.empty((len(embeddings), hits), np.int64)
        scores = np.empty((len(embeddings), hits), np.float32)
        if ordinals.size == 0:
            return LeafHits(ordinals, scores)
        with self._search_lock, torch.inference_mode():
            leaves = self._leaves()
            blocks = list(_leaf_blocks(ranges))
            # torch warns of read-only arrays although nothing here writes to its inputs.
            queries = torch.from_numpy(embeddings if embeddings.flags.writeable else embeddings.copy())
            for start in range(0, len(queries), _QUERY_BLOCK):
                part = queries[start : start + _QUERY_BLOCK].to(leaves.device)
                best = _scan_leaves(part, leaves, blocks, hits)
                scores[start : start + _QUERY_BLOCK] = best[0].cpu().numpy()
                ordinals[start : start + _QUERY_BLOCK] = best[1].cpu().numpy()
        return LeafHits(ordinals, scores)

    def _search_part(
        self,
        indexes: tuple[_FaissIndex, ...],
        embeddings: NDArray[np.float32],
        *,
        width: int,
        hits: int,
        reachable: int,
    ) -> LeafHits:
        """Search some of the queries of a batch on the calling thread alone."""
        n, leaf_level = len(embeddings), self.level_count - 1
        queries = faiss.swig_ptr(embeddings)
        openmp_threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1)  # the calling thread's own setting, put back below
        try:
            beam: _Cells | None = None
            for level in range(leaf_level):
                k = min(width, self.cell_counts[level])
                beam = self._search_level(indexes, level, n, queries, k=k, beam=beam)
            # FAISS cuts and orders equal scores as its heap pleases: look past the cut until it is not through a tie.
            limit = min(reachable, self._selection_limit or reachable)
            fetched = min(hits + 1, limit)
            while True:
                leaves = self._search_level(indexes, leaf_level, n, queries, k=fetched, beam=beam)
                if not _order_ties(leaves, hits) or fetched == limit:
                    return self._leaf_hits(leaves, hits)
                fetched = min(2 * fetched, limit)
        finally:
            faiss.omp_set_num_threads(openmp_threads)

    def _search_level(
        self, indexes: tuple[_FaissIndex, ...], level: int, n: int, queries: _Pointer, *, k: int, beam: _Cells | None
    ) -> _Cells:
        """The ``k`` best children of ``beam`` for each of ``n`` queries, or the ``k`` best cells of the first level."""
        found = _Cells(n, k)
        # The `_c` methods are FAISS's own: its Python wrapper takes nprobe from the index, which is state that threads
        # share, and refuses to be told another.
        if beam is None:
            indexes[level].search_c(n, queries, k, found.scores_pointer, found.ordinals_pointer)
            return found
        try:
            indexes[level].search_preassigned_c(
                n,
                queries,
                k,
                beam.ordinals_pointer,
                beam.scores_pointer,
                found.scores_pointer,
                found.ordinals_pointer,
                False,
                _probing(beam.k),
            )
        except RuntimeError as error:
            worst = int(beam.ordinals.max())
            if worst < self.cell_counts[level - 1]:
                raise
            raise self._id_out_of_range(level - 1, worst) from error
        return found

    def _own_threads(self) -> ThreadPoolExecutor | None:
        """The pool of this process: a forked one inherits its parent's pool without the threads, and would wait."""
        if self._threads is not None and self._threads_process != os.getpid():
            self._threads = ThreadPoolExecutor(self._thread_count, "geosurge-search")
            self._threads_process = os.getpid()
        return self._threads

    def _leaf_hits(self, leaves: _Cells, k: int) -> LeafHits:
        """The first ``k`` of what FAISS found, with missing hits marked."""
        ordinals, scores = leaves.ordinals, leaves.scores
        # One pass for both: -1, a missing hit, is the largest number without a sign.
        if int(ordinals.view(np.uint64).max()) >= self.cell_counts[-1]:
            worst = int(ordinals.max())
            if worst >= self.cell_counts[-1]:
                raise self._id_out_of_range(self.level_count - 1, worst)
            scores[ordinals < 0] = -np.inf
        if leaves.k == k:
            return LeafHits(ordinals, scores)
        return LeafHits(np.ascontiguousarray(ordinals[:, :k]), np.ascontiguousarray(scores[:, :k]))

    def _leaves(self) -> torch.Tensor:
        with self._leaf_matrix_lock:
            if self._leaf_matrix is None:
                leaf_index = self._open_indexes(self._cpu_indexes)[-1]
                matrix = torch.from_numpy(leaf_index.reconstruct_n(0, self.cell_counts[-1]))
                on_gpu = self._gpu_resources is not None and torch.cuda.is_available()
                self._leaf_matrix = matrix.to(self.device) if on_gpu else matrix
            return self._leaf_matrix

    def _move_to_gpu(self, gpu: int) -> None:
        # On a GPU an id out of range is a read out of bounds, not an exception.
        self.check()
        resources = faiss.StandardGpuResources()
        options = faiss.GpuClonerOptions()
        if hasattr(options, "use_cuvs"):
            # cuVS has neither scalar-quantised lists nor preassigned search.
            options.use_cuvs = False
        clones = []
        for level, index in enumerate(self._cpu_indexes):
            if level == 0:
                clones.append(faiss.index_cpu_to_gpu(resources, gpu, index, options))
                continue
            # A GPU clone demands one centroid a list, although a preassigned search never looks at them.
            quantizer = faiss.downcast_index(index.quantizer)
            quantizer.reset()
            quantizer.add(self._cpu_indexes[level - 1].reconstruct_n(0, self.cell_counts[level - 1]))
            clones.append(faiss.index_cpu_to_gpu(resources, gpu, index, options))
            quantizer.reset()
        self._gpu_resources = resources
        self._indexes = tuple(clones)
        self._selection_limit = _GPU_SELECTION_LIMIT
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

    def _check_count(self, name: str, asked: int, needed: int) -> None:
        """Refuse an ``asked`` count below 1, or whose ``needed`` part (after clamping) a GPU cannot select."""
        if asked < 1:
            raise OptionOutOfRangeError(f"{name} is {asked}; it must be at least 1")
        if self._selection_limit is not None and needed > self._selection_limit:
            raise OptionOutOfRangeError(
                f"{name} is {asked}; on {self.device} FAISS keeps at most {self._selection_limit}: ask for fewer, or "
                "search exactly"
            )

    def _open_indexes(self, indexes: tuple[_FaissIndex, ...]) -> tuple[_FaissIndex, ...]:
        if not indexes:
            raise ValueError("the index is closed; open it again")
        return indexes

    def _id_out_of_range(self, level: int, ordinal: int) -> BundleInconsistentError:
        return BundleInconsistentError(
            f"{self._paths[level]}: holds the id {ordinal}, but level {level + 1} has {self.cell_counts[level]} cells; "
            "build the bundle again"
        )


@functools.lru_cache(maxsize=64)
def _probing(list_count: int) -> faiss.SearchParametersIVF:
    """Parameters of a search in so many lists, shared because FAISS only reads them and making them takes long."""
    parameters = faiss.SearchParametersIVF()
    parameters.nprobe = list_count
    return parameters


def _order_ties(leaves: _Cells, k: int) -> bool:
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


def _parse_device(device: str) -> int | None:
    """The number of the GPU, or ``None`` for the CPU."""
    if device == "cpu":
        return None
    kind, _, number = device.partition(":")
    if kind != "cuda" or (":" in device and not number.isdecimal()):
        raise UsageError(f"the device {device!r} is unknown; use cpu, cuda or cuda:N")
    gpu = int(number or 0)
    if not hasattr(faiss, "StandardGpuResources"):
        raise UsageError(
            f"the device {device!r} needs FAISS's GPU build, and the CPU build is installed; "
            "replace faiss-cpu by geosurge[gpu], or use cpu"
        )
    count = faiss.get_num_gpus()
    if gpu >= count:
        raise UsageError(f"the device {device!r} does not exist: FAISS sees {count} GPUs; use cpu or another GPU")
    return gpu


def _read_index(path: Path) -> _FaissIndex:
    if not path.is_file():
        raise BundlePartialError(f"{path}: there is no such file; build or copy the bundle again")
    try:
        index: _FaissIndex = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
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


def _check_levels(paths: Sequence[Path], indexes: Sequence[_FaissIndex]) -> None:
    """Check each level's kind, metric and dimension, and that its lists are the cells of the level above."""
    for level, (path, index) in enumerate(zip(paths, indexes, strict=True), start=1):
        kinds: tuple[type, ...] = (faiss.IndexFlat,)
        if level > 1:
            kinds = (faiss.IndexIVFFlat, faiss.IndexIVFScalarQuantizer)
        is_allowed = isinstance(index, kinds)
        if not is_allowed:
            allowed = " or ".join(kind.__name__ for kind in kinds)
            raise BundleInconsistentError(f"{path}: is a {type(index).__name__}; level {level} must be {allowed}")
        if index.metric_type != faiss.METRIC_INNER_PRODUCT:
            raise BundleInconsistentError(
                f"{path}: has FAISS metric {index.metric_type}; every level must have the inner product "
                f"({faiss.METRIC_INNER_PRODUCT})"
            )
        if index.d != indexes[0].d:
            raise BundleInconsistentError(f"{path}: has {index.d} dimensions where {paths[0]} has {indexes[0].d}")
        if index.ntotal == 0:
            raise BundleInconsistentError(f"{path}: holds no cells; every level needs at least one")
        if level == 1:
            continue
        if index.by_residual:
            raise BundleInconsistentError(f"{path}: stores residuals; composites must be stored as they are")
        if index.nlist != indexes[level - 2].ntotal:
            raise BundleInconsistentError(
                f"{path}: has {index.nlist} lists where {paths[level - 2]} has {indexes[level - 2].ntotal} cells"
            )


def _cumulative_family_sizes(index: _FaissIndex) -> NDArray[np.int64]:
    """``(nlist,)``: the most children that 1, 2, ... cells can have together."""
    return np.cumsum(np.sort(_list_sizes(index))[::-1])


def _list_sizes(index: _FaissIndex) -> NDArray[np.int64]:
    return np.fromiter(map(index.invlists.list_size, range(index.nlist)), np.int64, index.nlist)


def merge_ranges(ranges: Iterable[tuple[int, int]], leaf_count: int) -> list[tuple[int, int]]:
    """Ascending, disjoint, non-empty half-open ranges that cover the same leaves.

    Args:
        ranges: Half-open ranges of leaf ordinals, in any order.
        leaf_count: Number of leaves.

    Raises:
        ValueError: A range is not within the leaves.
    """
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if not 0 <= start <= stop <= leaf_count:
            raise ValueError(f"the leaf range [{start}, {stop}) is not within [0, {leaf_count})")
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        elif start < stop:
            merged.append((start, stop))
    return merged


def _leaf_blocks(ranges: Iterable[tuple[int, int]]) -> Iterable[list[tuple[int, int]]]:
    """The ranges, cut and packed into blocks of at most ``_LEAF_BLOCK`` leaves."""
    block: list[tuple[int, int]] = []
    room = _LEAF_BLOCK
    for range_start, stop in ranges:
        start = range_start
        while start < stop:
            taken = min(room, stop - start)
            block.append((start, start + taken))
            start += taken
            room -= taken
            if room == 0:
                yield block
                block, room = [], _LEAF_BLOCK
    if block:
        yield block


def _scan_leaves(
    queries: torch.Tensor, leaves: torch.Tensor, blocks: Sequence[list[tuple[int, int]]], k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and ordinals, ``(n, k)``, of the best leaves; blocks ascend, so a tie goes to the earlier one."""
    found_scores: list[torch.Tensor] = []
    found_ordinals: list[torch.Tensor] = []

    def best_found() -> tuple[torch.Tensor, torch.Tensor]:
        scores, columns = _top_columns(torch.cat(found_scores, dim=1), min(k, sum(s.shape[1] for s in found_scores)))
        return scores, torch.cat(found_ordinals, dim=1).gather(1, columns)

    for block in blocks:
        if len(block) == 1:
            start, stop = block[0]
            rows, ordinals = leaves[start:stop], torch.arange(start, stop, device=leaves.device)
        else:
            ordinals = torch.cat([torch.arange(start, stop, device=leaves.device) for start, stop in block])
            rows = leaves[ordinals]
        scores = queries @ rows.T
        if k < len(rows):
            scores, columns = _top_columns(scores, k)
            ordinals = ordinals[columns]
        found_scores.append(scores)
        found_ordinals.append(ordinals.expand(scores.shape))
        # Cut only what has grown to twice what is wanted: all leaves of many blocks are then sorted once.
        if sum(s.shape[1] for s in found_scores) > 2 * k:
            scores, ordinals = best_found()
            found_scores[:], found_ordinals[:] = [scores], [ordinals]
    return best_found()


def _top_columns(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``k`` best values of each row, descending, and their columns; equal values by column.

    ``torch.topk`` neither orders equal values nor says which of them it keeps, so ties are settled by a stable sort:
    among the ``k`` always, over the whole row only where the cut goes through a tie.
    """
    if k == scores.shape[1]:
        values, columns = scores.sort(dim=1, descending=True, stable=True)
        return values, columns
    values, columns = scores.topk(k + 1, dim=1)
    cut_tie = values[:, -1] == values[:, -2]
    columns = columns[:, :k].sort(dim=1).values
    values, order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True)
    columns = columns.gather(1, order)
    if bool(cut_tie.any()):
        tied_values, tied_columns = scores[cut_tie].sort(dim=1, descending=True, stable=True)
        values[cut_tie], columns[cut_tie] = tied_values[:, :k], tied_columns[:, :k]
    return values, columns
