"""Golden queries and images: recorded answers that tell whether a bundle is still what was built."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from geosurge.bundle.files import Problem
from geosurge.bundle.manifest import GoldenImage, GoldenQuery, decode_embedding, encode_embedding
from geosurge.bundle.opening import Bundle
from geosurge.cells import CellTree
from geosurge.errors import BundleCorruptError, BundleEncoderMismatchError, BundleInconsistentError, ImageError

if TYPE_CHECKING:
    from geosurge.preprocessing import Preprocessing
    from geosurge.search import HierarchicalIndex

GOLDEN_COSINE_TOLERANCE = 1e-3
"""Cosine distance allowed between a golden image's embedding and the recorded one."""

# A score sums seven similarities of up to 1 / 0.07 in float32; machines differ in the order of the additions.
_SCORE_RELATIVE_TOLERANCE = 1e-4
_SCORE_ABSOLUTE_TOLERANCE = 1e-3


class Encoder(Protocol):
    """What verification needs of an encoder; `geosurge.encoder.model.ImageEncoder` is one."""

    @property
    def dimension(self) -> int:
        """Length of the embeddings."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 over configuration and weights."""

    @property
    def preprocessing(self) -> Preprocessing:
        """The way from an image to pixels."""

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embeddings of a batch of pixels."""


def record_golden_queries(
    tree: CellTree, index: HierarchicalIndex, embeddings: NDArray[np.float32], *, width: int, k: int
) -> tuple[GoldenQuery, ...]:
    """Records what an index answers, for its manifest.

    An embedding for which the beam of the given width finds other leaves than the full scan is left out, because both
    must give a golden query's answer.

    Args:
        tree: The tree of the bundle.
        index: Its indexes.
        embeddings: (n, d) float32, unit rows.
        width: The bundle's default beam width.
        k: Leaves to record.
    """
    exact = index.exact(embeddings, k=k)
    beam = index.search(embeddings, width=width, k=k)
    queries = []
    for row, embedding in enumerate(embeddings):
        found = exact.ordinals[row] >= 0
        query = GoldenQuery(
            embedding=encode_embedding(embedding),
            leaves=tuple(tree.tokens(tree.level_count, exact.ordinals[row][found])),
            scores=tuple(exact.scores[row][found].tolist()),
        )
        if _answers(query, tree, beam.ordinals[row], beam.scores[row]):
            queries.append(query)
    return tuple(queries)


def golden_query_problems(bundle: Bundle, tree: CellTree, index: HierarchicalIndex) -> Iterator[Problem]:
    """Golden queries that the full scan or the default beam answers otherwise than recorded."""
    manifest = bundle.manifest
    for number, query in enumerate(manifest.golden_queries):
        embedding = decode_embedding(query.embedding)[None]
        k = max(len(query.leaves), 1)
        answers = {
            "a full scan": index.exact(embedding, k=k),
            f"a beam of {manifest.default_beam_width}": index.search(embedding, width=manifest.default_beam_width, k=k),
        }
        for name, hits in answers.items():
            if not _answers(query, tree, hits.ordinals[0], hits.scores[0]):
                yield Problem(
                    manifest.levels[-1].file,
                    BundleInconsistentError(
                        f"{bundle.path}: {name} answers golden query {number} with other leaves or scores than recorded"
                    ),
                )


def golden_image_problems(bundle: Bundle, encoder: Encoder, image: GoldenImage) -> Iterator[Problem]:
    """A golden image that cannot be read, or whose embedding is not the recorded one."""
    file = bundle.path / image.file
    try:
        pixels = encoder.preprocessing.decode(file.read_bytes())
    except (ImageError, OSError) as error:
        yield Problem(image.file, BundleCorruptError(f"{file} cannot be read as an image: {error}"))
        return
    embedding = encoder.encode(pixels[None])[0].astype(np.float64)
    recorded = decode_embedding(image.embedding).astype(np.float64)
    distance = 1 - embedding @ recorded / (np.linalg.norm(embedding) * np.linalg.norm(recorded))
    if not distance <= GOLDEN_COSINE_TOLERANCE:
        yield Problem(
            image.file,
            BundleEncoderMismatchError(
                f"{bundle.path}: its encoder's embedding of {image.file} is {distance:.3g} away from the recorded one "
                f"(cosine distance; {GOLDEN_COSINE_TOLERANCE:g} is allowed)"
            ),
        )


def _answers(query: GoldenQuery, tree: CellTree, ordinals: NDArray[np.int64], scores: NDArray[np.float32]) -> bool:
    """Whether a search found the leaves of a golden query, up to the order of leaves that score alike."""
    found = ordinals >= 0
    given = dict(zip(tree.tokens(tree.level_count, ordinals[found]), scores[found].tolist(), strict=True))
    if len(given) != len(query.leaves) or not _alike(sorted(given.values()), sorted(query.scores)):
        return False
    last = min(query.scores, default=0.0)
    return all(
        _alike([given[leaf]], [score]) if leaf in given else _alike([score], [last])
        for leaf, score in zip(query.leaves, query.scores, strict=True)
    )


def _alike(scores: Sequence[float], others: Sequence[float]) -> bool:
    return bool(np.allclose(scores, others, rtol=_SCORE_RELATIVE_TOLERANCE, atol=_SCORE_ABSOLUTE_TOLERANCE))
