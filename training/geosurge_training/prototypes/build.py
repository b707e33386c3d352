"""An index bundle from one's own pictures with known places, without training.

The pictures are encoded once (`encoding`). Most of them make the cells (`cells`) and their prototypes; a part that
these never see fits the strength and the temperatures (`shrinkage`), and another part (`split`) calibrates the bundle.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from geosurge.bundle.manifest import CalibrationInfo
from geosurge.encoder import ImageEncoder
from geosurge_training.building.bundling import GOLDEN_QUERIES, check_bundle_place, write_bundle
from geosurge_training.building.calibrate import calibrate_bundle
from geosurge_training.partitions.interface import Partition
from geosurge_training.partitions.make import partition_samples
from geosurge_training.prototypes.cells import partition_section
from geosurge_training.prototypes.encoding import EncodedPictures, encode_pictures
from geosurge_training.prototypes.pictures import Pictures
from geosurge_training.prototypes.shrinkage import CellSums, Prototypes, fit_prototypes, sum_cells
from geosurge_training.prototypes.split import PictureSplit, split_pictures
from geosurge_training.recipe import BundleSection, PartitionKind, PartitionSection
from geosurge_training.run_directory import PARTITION_FILE

_LOGGER = logging.getLogger(__name__)
_ROWS_AT_ONCE: Final = 1 << 13


@dataclass(frozen=True)
class PrototypeOptions:
    """How an index is made.

    Attributes:
        cells: Kind of the cells.
        tau_max: When they are split; see `partition_section`.
        tau_min: How many pictures they need; likewise.
        shrink: Whether means lean on the parents'; plain means otherwise.
        gallery: Whether the bundle gets the pictures' embeddings, to place queries inside leaves.
        seed: Seed of the split into parts.
    """

    cells: PartitionKind = "s2"
    tau_max: tuple[float, ...] | None = None
    tau_min: tuple[float, ...] | None = None
    shrink: bool = True
    gallery: bool = False
    seed: int = 0


@dataclass(frozen=True)
class PrototypeIndex:
    """What was made.

    Attributes:
        path: The bundle, calibrated.
        partition: Its cells.
        prototypes: Their embeddings, and what was fitted.
        calibration: What the manifest says of the calibration.
        picture_count: Pictures that there were.
        usable_count: Those that could be used.
    """

    path: Path
    partition: Partition
    prototypes: Prototypes
    calibration: CalibrationInfo
    picture_count: int
    usable_count: int


def partition_pictures(encoded: EncodedPictures, parts: PictureSplit, section: PartitionSection) -> Partition:
    """The cells of the pictures that make the means."""
    latitude_deg, longitude_deg = encoded.coordinates[parts.means].T
    return partition_samples(section, [(latitude_deg, longitude_deg)])


def fit_pictures(encoded: EncodedPictures, parts: PictureSplit, partition: Partition, *, shrink: bool) -> Prototypes:
    """The prototypes of the cells, from the pictures that make the means and those that fit.

    Raises:
        ConfigurationError: Too few of those that fit lie in a leaf.
    """
    fitting = next(encoded.batches(parts.fitting, len(parts.fitting)))
    leaves = partition.assign(fitting.latitude_deg, fitting.longitude_deg)[:, -1]
    return fit_prototypes(_sum_means(encoded, parts.means, partition), fitting.embeddings, leaves, shrink=shrink)


def build_prototypes(
    pictures: Pictures,
    encoder: ImageEncoder,
    out: Path,
    *,
    about: BundleSection,
    training: str,
    options: PrototypeOptions | None = None,
) -> PrototypeIndex:
    """Makes an index of pictures with known places.

    Args:
        pictures: The pictures.
        encoder: The encoder, its weights as they are stored.
        out: Directory of the embeddings, the partition and the bundle, which takes its name.
        about: What the bundle says of itself and how it stores its vectors.
        training: What it was made from, in words.
        options: How.

    Returns:
        The bundle, for `geosurge index publish` to take, and what went into it.

    Raises:
        ConfigurationError: The pictures are too few, too many cannot be used, or the options do not fit them.
        BundleError: What was built does not verify.
    """
    options = options or PrototypeOptions()
    check_bundle_place(out)
    encoded = encode_pictures(pictures, encoder, out)
    parts = split_pictures(encoded, options.seed)
    section = partition_section(options.cells, len(parts.means), options.tau_max, options.tau_min)
    partition = partition_pictures(encoded, parts, section)
    partition.save(out / PARTITION_FILE)
    _LOGGER.info("partition: %s cells", ", ".join(str(count) for count in partition.cell_counts))
    prototypes = fit_pictures(encoded, parts, partition, shrink=options.shrink)
    _LOGGER.info(
        "strength %.3g pictures; temperatures %s; held-out loss %.4f nats",
        prototypes.strength,
        " ".join(f"{value:.3g}" for value in prototypes.temperatures),
        prototypes.negative_log_likelihood,
    )
    path = write_bundle(
        out / out.name,
        partition,
        geographic=prototypes.embeddings,
        temperatures=prototypes.temperatures,
        encoder=encoder,
        golden_embeddings=np.array(encoded.embeddings[parts.calibration[:GOLDEN_QUERIES]]),
        about=about,
        training=training,
        references=encoded.batches(parts.means) if options.gallery else None,
    )
    calibration = calibrate_bundle(
        path,
        encoded.batches(parts.calibration),
        f"{pictures.title}, held out of the prototypes",
    )
    return PrototypeIndex(path, partition, prototypes, calibration, pictures.count, len(encoded.usable))


def _sum_means(encoded: EncodedPictures, rows: npt.NDArray[np.int64], partition: Partition) -> list[CellSums]:
    """Sums of the embeddings of pictures by cell, read block by block."""
    batches = (
        (batch.embeddings, partition.assign(batch.latitude_deg, batch.longitude_deg))
        for batch in encoded.batches(rows, _ROWS_AT_ONCE)
    )
    return sum_cells(batches, [level.parents for level in partition.levels], encoded.embeddings.shape[1])
