"""The partition of a run: made once from the recipe's training coordinates."""

from __future__ import annotations

from pathlib import Path

from geosurge.grids import H3, S2
from geosurge_training.aside import written_aside
from geosurge_training.data.open_source import open_source
from geosurge_training.data.source import ImageSource
from geosurge_training.encoders import build_encoder
from geosurge_training.partitions.adaptive import adaptive_partition
from geosurge_training.partitions.entities import administrative_partition
from geosurge_training.partitions.interface import Partition
from geosurge_training.partitions.samples import CoordinateChunks
from geosurge_training.recipe import H3PartitionSection, PartitionSection, Recipe, S2PartitionSection
from geosurge_training.run_directory import PARTITION_FILE, claim_images, claim_run


def partition_samples(section: PartitionSection, chunks: CoordinateChunks) -> Partition:
    """Makes the partition that a recipe asks for.

    Args:
        section: What is asked for.
        chunks: Coordinates that can be iterated several times; see `adaptive_partition`.

    Returns:
        The partition.

    Raises:
        ConfigurationError: The section and the samples make no partition; the message says why.
        CoordinateOutOfRangeError: A coordinate is not on the globe.
    """
    if isinstance(section, S2PartitionSection):
        return adaptive_partition(
            chunks,
            section.tau_min_per_level,
            section.tau_max,
            grid=S2,
            start_resolution=section.start_s2_level,
            max_resolution=section.max_s2_level,
        )
    if isinstance(section, H3PartitionSection):
        return adaptive_partition(
            chunks,
            section.tau_min_per_level,
            section.tau_max,
            grid=H3,
            start_resolution=section.start_h3_resolution,
            max_resolution=section.max_h3_resolution,
        )
    return administrative_partition(chunks, section.tau_min_per_level)


def make_partition(recipe: Recipe, run: Path, source: ImageSource | None = None) -> Path:
    """Partitions the training coordinates; skips what is already there.

    Args:
        recipe: The recipe.
        run: Directory of the run.
        source: The recipe's source, where it is open already.

    Returns:
        The partition's file.
    """
    path = run / PARTITION_FILE
    claim_run(recipe, run)
    if not path.exists():
        source = source or open_source(recipe, build_encoder(recipe), run)
        claim_images(source, run)
        partition = partition_samples(recipe.partition, source.coordinate_chunks())
        with written_aside(path) as aside:
            partition.save(aside)
    return path
