"""The references of a gallery, by the leaf that they lie in."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from geosurge.errors import BundleInconsistentError
from geosurge.search.files import LIST_KINDS, check_inner_product, check_runs, list_sizes, read_index
from geosurge.search.library import FaissIndex, FoundRows, faiss, one_openmp_thread, probing


class ReferenceLists:
    """References of a gallery by leaf: an IVF index (inner product, no residuals) whose list *p* is leaf *p*.

    The file is memory-mapped and stays on the CPU: a query reads the lists of a few leaves, whatever their number.
    Searches from several threads may overlap. Made by `open`.

    Attributes:
        count: References.
        dimension: Components of an embedding.
        list_count: Leaves.
    """

    def __init__(self, index: FaissIndex) -> None:
        self.count = int(index.ntotal)
        self.dimension = int(index.d)
        self.list_count = int(index.nlist)
        self._index: FaissIndex | None = index

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a file.

        Args:
            path: The file.

        Raises:
            BundlePartialError: It does not exist.
            BundleCorruptError: It is truncated or is not a FAISS index.
            BundleInconsistentError: It is of another kind or metric, or its ids are not 0, 1, ... along the lists.
        """
        index = read_index(path)
        if not isinstance(index, LIST_KINDS):
            raise BundleInconsistentError(f"{path}: is a {type(index).__name__}; references need lists")
        check_inner_product(path, index)
        check_runs(path, index)
        return cls(index)

    def search(
        self, embeddings: NDArray[np.float32], leaves: NDArray[np.int64], k: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Find the references in some leaves that are nearest to each query.

        Args:
            embeddings: ``(n, dimension)`` float32, C-contiguous, unit rows.
            leaves: ``(n, m)`` int64, C-contiguous, ordinals of the leaves to look in; -1 pads.
            k: References to return.

        Returns:
            ``(n, k)`` int64 references, best first, and ``(n, k)`` float32 inner products; -1 and -inf where a query's
            leaves hold fewer.

        Raises:
            ValueError: The lists are closed.
        """
        if self._index is None:
            raise ValueError("the references are closed; open them again")
        found = FoundRows(len(embeddings), k)
        if len(embeddings) == 0:
            return found.ordinals, found.scores
        # Without residuals the scores of the lists count for nothing, but FAISS wants some.
        list_scores = np.zeros(leaves.shape, np.float32)
        with one_openmp_thread():
            self._index.search_preassigned_c(
                len(embeddings),
                faiss.swig_ptr(embeddings),
                k,
                faiss.swig_ptr(leaves),
                faiss.swig_ptr(list_scores),
                found.scores_pointer,
                found.ordinals_pointer,
                False,
                probing(leaves.shape[1]),
            )
        found.scores[found.ordinals < 0] = -np.inf
        return found.ordinals, found.scores

    def leaves(self) -> NDArray[np.int64]:
        """``(count,)``: the leaf of each reference, in the order of the references.

        Raises:
            ValueError: The lists are closed.
        """
        if self._index is None:
            raise ValueError("the references are closed; open them again")
        return np.repeat(np.arange(self.list_count), list_sizes(self._index))

    def close(self) -> None:
        """Let go of the file."""
        self._index = None
