"""Writes the gallery of a bundle: embeddings of training images with their coordinates, leaf by leaf."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from geosurge.bundle.manifest import GALLERY_DIRECTORY, GalleryInfo
from geosurge.density import Kernel
from geosurge.encoder import ImageEncoder
from geosurge.errors import ConfigurationError
from geosurge_training.building.embedded import EmbeddedBatch, embed
from geosurge_training.building.indexing import write_reference_lists
from geosurge_training.data.source import ImageSource, prefetch, rebatch
from geosurge_training.partitions.entities import LeafFinder
from geosurge_training.progress import track

_LOGGER = logging.getLogger(__name__)
_BATCH_SIZE = 256

NEIGHBOURS: Final = 32
"""References that take part in a density. Revisiting Im2GPS takes 100; on the Blue Marble world, 25 to 200 of 20,000
references gave medians that differed by 0.1 km."""


def encode_references(source: ImageSource, encoder: ImageEncoder, count: int) -> Iterator[EmbeddedBatch]:
    """Embeds the first training images, each once.

    Args:
        source: The images.
        encoder: Its weights as the bundle stores them, in evaluation mode.
        count: Images to embed, at most; a source that has fewer gives those.

    Yields:
        Batches in the order of training.
    """
    if source.train_count is not None:
        count = min(count, source.train_count)
    steps = range(-(-count // _BATCH_SIZE))
    with track("gallery", len(steps)) as progress:
        for batch in embed(rebatch(prefetch(source, steps, _BATCH_SIZE), count, _BATCH_SIZE), encoder):
            yield batch
            progress.advance()


def write_gallery(
    directory: Path,
    references: Iterable[EmbeddedBatch],
    find_leaf: LeafFinder,
    leaf_count: int,
    storage: Literal["fp32", "fp16", "sq8"],
) -> GalleryInfo:
    """Writes the files of a gallery into a bundle's directory.

    References that lie in no leaf are left out. Embeddings wait on the disk until the leaf of every reference is known;
    memory holds the coordinates, and the embeddings as they are stored.

    Args:
        directory: The bundle's.
        references: Embedded images.
        find_leaf: Which of the bundle's leaves holds a coordinate.
        leaf_count: How many leaves there are.
        storage: Of the embeddings.

    Returns:
        What the manifest has to say of it; the kernel is the published one until the bundle is calibrated.

    Raises:
        ConfigurationError: No reference lies in a leaf.
    """
    folder = directory / GALLERY_DIRECTORY
    folder.mkdir()
    dimension = left_out = 0
    leaves: list[npt.NDArray[np.int64]] = []
    coordinates: list[npt.NDArray[np.float32]] = []
    with tempfile.TemporaryFile(dir=directory) as waiting:
        for batch in references:
            stored = np.stack([batch.latitude_deg, batch.longitude_deg], axis=1).astype("<f4")
            # The leaf of the coordinate that is stored: on the edge of a leaf, rounding leads into its neighbour.
            found = find_leaf(*stored.astype(np.float64).T)
            inside = found >= 0
            left_out += int((~inside).sum())
            dimension = batch.embeddings.shape[1]
            waiting.write(batch.embeddings[inside].tobytes())
            leaves.append(found[inside])
            coordinates.append(stored[inside])
        joined = np.concatenate([np.empty(0, np.int64), *leaves])
        if not len(joined):
            raise ConfigurationError("no image of the gallery lies in a leaf; take more images, or none")
        waiting.flush()
        embeddings = np.memmap(waiting, np.float32, "r", shape=(len(joined), dimension))
        order = np.argsort(joined, kind="stable")
        file, coordinates_file = folder / "references.faiss", folder / "coordinates.npy"
        write_reference_lists(file, embeddings, leaves=joined, order=order, leaf_count=leaf_count, storage=storage)
        np.save(coordinates_file, np.concatenate(coordinates)[order])
    _LOGGER.info("gallery of %d references; %d more lie in no leaf", len(joined), left_out)
    kernel = Kernel()
    return GalleryInfo(
        references=len(joined),
        file=file.relative_to(directory).as_posix(),
        coordinates_file=coordinates_file.relative_to(directory).as_posix(),
        storage=storage,
        neighbours=NEIGHBOURS,
        power=kernel.power,
        share=kernel.share,
        spreads=kernel.spreads,
        snap=kernel.snap,
    )
