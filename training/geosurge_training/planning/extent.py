"""How many images and cells a run has: counted where the data are at hand, else as stated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from geosurge.encoder import ImageEncoder
from geosurge.errors import ConfigurationError
from geosurge_training.data.open_source import open_source
from geosurge_training.data.shard_index import SHARD_INDEX_FILE
from geosurge_training.data.source import ImageSource
from geosurge_training.partitions.make import partition_samples
from geosurge_training.recipe import BlueMarbleData, PartitionSection, Recipe, S2PartitionSection, TableData

MP16_IMAGES: Final = 4_723_695
"""Images of MP-16, as published (Müller-Budack et al., ECCV 2018)."""

PUBLISHED_TAU_MIN: Final = 50.0
PUBLISHED_TAU_MAX: Final = (25000.0, 10000.0, 5000.0, 2000.0, 1000.0, 750.0, 500.0)
PUBLISHED_CELL_COUNTS: Final = (684, 1744, 3298, 7202, 12893, 16150, 21673)
"""Cells of MP-16 with these thresholds, as reported by the line of work that GeoSURGE (arXiv 2510.01448) follows."""


@dataclass(frozen=True)
class Extent:
    """Sizes of a run that do not depend on its encoder.

    Attributes:
        train_count: Images of an epoch; None where images never repeat.
        cell_counts: Cells of each level, coarsest first.
        origins: Where the two figures come from, in words.
    """

    train_count: int | None
    cell_counts: tuple[int, ...]
    origins: tuple[str, str]


def find_extent(
    recipe: Recipe,
    encoder: ImageEncoder,
    run: Path,
    *,
    images: int | None = None,
    cells: Sequence[int] | None = None,
) -> Extent:
    """Finds out how many training images and cells there are.

    What is stated goes before what can be counted: in the recipe's table, or in shards that a run has indexed already.
    No image is opened. Cells of a partition with the paper's thresholds are otherwise the published ones.

    Args:
        recipe: The recipe.
        encoder: The recipe's encoder; its weights are not read.
        run: Directory of the run, which need not exist.
        images: Training images, where they are not to be counted.
        cells: Cells of each level, likewise.

    Returns:
        The sizes.

    Raises:
        ConfigurationError: A figure is neither stated nor at hand, makes no sense, or the data cannot be used.
    """
    level_count, is_rendered = recipe.partition.level_count, isinstance(recipe.data, BlueMarbleData)
    if cells is not None and len(cells) != level_count:
        raise ConfigurationError(f"{len(cells)} counts of cells are stated, but the partition has {level_count} levels")
    if is_rendered and images is not None:
        raise ConfigurationError("a number of images is stated, but this recipe renders them and none is seen twice")
    source = None
    if _is_at_hand(recipe, run) and (cells is None or (images is None and not is_rendered)):
        source = open_source(recipe, encoder, run)
    train_count, images_origin = _images(recipe, source, images)
    cell_counts, cells_origin = _cells(recipe.partition, source, cells)
    return Extent(train_count, cell_counts, (images_origin, cells_origin))


def _is_at_hand(recipe: Recipe, run: Path) -> bool:
    match recipe.data:
        case BlueMarbleData():
            return True
        case TableData(table=table):
            return table.exists()
        case _:
            return (run / SHARD_INDEX_FILE).exists()


def _images(recipe: Recipe, source: ImageSource | None, stated: int | None) -> tuple[int | None, str]:
    if stated is not None:
        return stated, f"{stated:,} training images, as stated"
    if isinstance(recipe.data, BlueMarbleData):
        return None, "images are rendered, and none is seen twice"
    if source is None:
        place = recipe.data.table if isinstance(recipe.data, TableData) else "an index of the shards in the run"
        raise ConfigurationError(
            f"the number of training images is unknown, because there is no {place}: state it with --images "
            f"(MP-16 has {MP16_IMAGES})"
        )
    return source.train_count, f"{source.train_count:,} training images, counted"


def _cells(
    section: PartitionSection, source: ImageSource | None, stated: Sequence[int] | None
) -> tuple[tuple[int, ...], str]:
    if stated is not None:
        return tuple(stated), f"{sum(stated):,} cells, as stated"
    if source is not None:
        counts = tuple(partition_samples(section, source.coordinate_chunks()).cell_counts)
        return counts, f"{sum(counts):,} cells, those of the training coordinates"
    if _has_published_thresholds(section):
        total = sum(PUBLISHED_CELL_COUNTS)
        return PUBLISHED_CELL_COUNTS, f"{total:,} cells, as published for these thresholds on MP-16"
    raise ConfigurationError(
        "the number of cells is unknown, because the coordinates are not at hand: state it with --cells, one number a "
        "level (with the paper's thresholds the published numbers are taken)"
    )


def _has_published_thresholds(section: PartitionSection) -> bool:
    return (
        isinstance(section, S2PartitionSection)
        and (section.start_s2_level, section.max_s2_level) == (2, 30)
        and set(section.tau_min_per_level) == {PUBLISHED_TAU_MIN}
        and tuple(section.tau_max) == PUBLISHED_TAU_MAX
    )
