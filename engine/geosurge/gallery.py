"""The gallery of a bundle: reference embeddings with coordinates, which place a query inside its leaf.

References stand in the order of the leaves that they lie in, so that those of a leaf are one run of rows: the
embeddings are a FAISS IVF index whose list *p* is leaf *p*, the coordinates an array beside it. Both are memory-mapped,
and a query touches the runs of its `SEARCHED_LEAVES` likeliest leaves alone; what becomes of them is told in
`geosurge.density`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from geosurge.bundle import Bundle
from geosurge.bundle.manifest import GalleryInfo
from geosurge.cells import CellTree
from geosurge.density import Components, densest_points
from geosurge.errors import BundleCorruptError, BundleInconsistentError, BundlePartialError, CoordinateOutOfRangeError
from geosurge.geodesy import Float64Array, latlng_to_unit_vector, validate_coordinates
from geosurge.posterior import LeafShapes, Posteriors
from geosurge.search import ReferenceLists

SEARCHED_LEAVES: Final = 64
"""Leaves of a query whose references are looked at, and that take part in its density."""

_CHECKED_AT_ONCE: Final = 1 << 16


class Gallery:
    """The references of one bundle, opened; made by `open`.

    Searches from several threads may overlap.

    Attributes:
        info: What the manifest says of it.
    """

    def __init__(self, info: GalleryInfo, lists: ReferenceLists, coordinates: NDArray[np.float32]) -> None:
        self.info = info
        self._lists = lists
        self._coordinates = coordinates

    @classmethod
    def open(cls, bundle: Bundle) -> Gallery:
        """Opens the gallery of a bundle; its files may be removed when this has returned.

        Args:
            bundle: The bundle.

        Raises:
            BundlePartialError: A file is missing.
            BundleCorruptError: A file is truncated, or is not what it should be.
            BundleInconsistentError: The bundle has no gallery, or its files do not fit each other, the manifest or the
                leaves, or a coordinate is none.
        """
        info, manifest = bundle.manifest.gallery, bundle.manifest
        if info is None:
            raise BundleInconsistentError(f"{bundle.path} has no gallery; build the bundle with one")
        lists = ReferenceLists.open(bundle.path / info.file)
        for what, actual, wanted in (
            ("references", lists.count, info.references),
            ("lists", lists.list_count, manifest.levels[-1].cells),
            ("dimensions", lists.dimension, manifest.dimension),
        ):
            if actual != wanted:
                raise BundleInconsistentError(
                    f"{bundle.path / info.file}: has {actual} {what} where the manifest says {wanted}"
                )
        return cls(info, lists, _open_coordinates(bundle.path / info.coordinates_file, info.references))

    def points(self, embeddings: NDArray[np.float32], posteriors: Posteriors, leaves: LeafShapes) -> Float64Array:
        """Where the densities of queries are highest.

        Args:
            embeddings: (n, d) float32, C-contiguous, unit rows.
            posteriors: Of the same queries.
            leaves: The leaves that the posteriors were inferred with.

        Returns:
            (n, 3) unit vectors.
        """
        return densest_points(self.components(embeddings, posteriors, leaves), self.info.to_kernel())

    def components(self, embeddings: NDArray[np.float32], posteriors: Posteriors, leaves: LeafShapes) -> Components:
        """What the densities of queries are made of: their likeliest leaves, and the nearest references inside.

        Args:
            embeddings: (n, d) float32, C-contiguous, unit rows.
            posteriors: Of the same queries.
            leaves: The leaves that the posteriors were inferred with.
        """
        ordinals = np.ascontiguousarray(posteriors.ordinals[:, :SEARCHED_LEAVES])
        found, similarities = self._lists.search(embeddings, ordinals, self.info.neighbours)
        # Those that are missing weigh nothing, wherever they are.
        coordinates = self._coordinates[np.maximum(found, 0)]
        return Components(
            similarities,
            latlng_to_unit_vector(coordinates[..., 0], coordinates[..., 1]),
            posteriors.probabilities[:, :SEARCHED_LEAVES],
            leaves.unit_vectors.take(ordinals, axis=0),
            posteriors.disc_radius_km[:, 0] / math.sqrt(2.0),
        )

    def check(self, tree: CellTree) -> None:
        """Looks at every reference, whether it lies in the leaf in whose list it stands.

        Args:
            tree: The bundle's cells. What coordinates administrative ones hold is not known here, and not checked.

        Raises:
            BundleInconsistentError: One lies elsewhere.
        """
        if tree.grid is None:
            return
        leaves = self._lists.leaves()
        for start in range(0, len(leaves), _CHECKED_AT_ONCE):
            rows = slice(start, start + _CHECKED_AT_ONCE)
            actual = tree.find_leaves(*self._coordinates[rows].astype(np.float64).T)
            elsewhere = np.flatnonzero(actual != leaves[rows])
            if elsewhere.size:
                raise BundleInconsistentError(
                    f"{self.info.coordinates_file}: reference {start + elsewhere[0]} lies in leaf "
                    f"{actual[elsewhere[0]]} and stands in the list of leaf {leaves[rows][elsewhere[0]]}; build the "
                    "gallery again"
                )

    def close(self) -> None:
        """Lets go of the files."""
        self._lists.close()
        self._coordinates = np.empty((0, 2), np.float32)


def _open_coordinates(path: Path, count: int) -> NDArray[np.float32]:
    try:
        coordinates = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise BundlePartialError(f"{path}: there is no such file; build or copy the bundle again") from error
    except (OSError, ValueError, EOFError) as error:
        raise BundleCorruptError(f"{path}: truncated or not a numpy array ({error}); copy the bundle again") from error
    if coordinates.shape != (count, 2) or coordinates.dtype != np.dtype("<f4"):
        raise BundleInconsistentError(
            f"{path}: holds {coordinates.dtype} of shape {coordinates.shape}; it must be float32 of ({count}, 2)"
        )
    try:
        validate_coordinates(coordinates[:, 0], coordinates[:, 1])
    except CoordinateOutOfRangeError as error:
        raise BundleInconsistentError(f"{path}: {error}; build the bundle again") from error
    return np.asarray(coordinates)
