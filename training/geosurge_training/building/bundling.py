"""Writes an index bundle from its parts, wherever they come from: training, or prototypes of one's own pictures."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from geosurge.bundle import finish_bundle
from geosurge.bundle.golden import record_golden_queries
from geosurge.bundle.manifest import (
    ENCODER_DIRECTORY,
    GOLDEN_DIRECTORY,
    TREE_FILE,
    Domain,
    EncoderInfo,
    GoldenImage,
    LevelInfo,
    Manifest,
    check_bundle_name,
    encode_embedding,
    installed_library_versions,
)
from geosurge.bundle.verifying import verify_bundle
from geosurge.cells import CellRows, CellTree, write_cell_tree
from geosurge.encoder import ImageEncoder
from geosurge.errors import BundleInconsistentError, ConfigurationError
from geosurge.search import HierarchicalIndex
from geosurge_training.building.embedded import EmbeddedBatch
from geosurge_training.building.gallery import write_gallery
from geosurge_training.building.indexing import composite_embeddings, write_level_indexes
from geosurge_training.partitions.interface import Partition
from geosurge_training.recipe import BundleSection

GOLDEN_QUERIES = 16
"""Held-out images whose answers a bundle records."""
_GOLDEN_LEAVES = 5
_GOLDEN_IMAGE_SIZES = ((160, 120), (120, 144))
"""Width and height: neither square nor the encoder's size, so that shrinking and cropping are checked too."""
Storage: TypeAlias = Literal["fp32", "fp16", "sq8"]


def write_bundle(
    final: Path,
    partition: Partition,
    *,
    geographic: Sequence[NDArray[np.float32]],
    temperatures: Sequence[float],
    encoder: ImageEncoder,
    golden_embeddings: NDArray[np.float32],
    about: BundleSection,
    training: str,
    references: Iterable[EmbeddedBatch] | None = None,
) -> Path:
    """Writes and verifies a bundle; one of this name written before is replaced.

    Args:
        final: The bundle's directory; its last part is the bundle's name.
        partition: The cells.
        geographic: (n_l, d) unit embeddings of the cells of each level, coarsest first.
        temperatures: Temperature of each level.
        encoder: Its weights as they are stored (`ImageEncoder.round_to_storage`), in evaluation mode.
        golden_embeddings: (n, d) embeddings of held-out images, whose answers the bundle records.
        about: What the bundle says of itself and how it stores its vectors.
        training: What it was trained on, in words.
        references: Embedded images for a gallery; by default the bundle gets none.

    Returns:
        The bundle's directory; it is not calibrated yet.

    Raises:
        BundleError: What was written does not verify, or the beam misses what the full scan finds for more than half
            of the golden embeddings.
    """
    aside = aside_of(final)
    parents = [level.parents for level in partition.levels]
    paths = write_level_indexes(aside, composite_embeddings(geographic, temperatures, parents), parents, about.storage)
    rows = [partition.cell_rows(level) for level in range(1, len(parents) + 1)]
    write_cell_tree((aside / TREE_FILE).parent, rows, store_outlines=False)
    encoder.save(aside / ENCODER_DIRECTORY)
    with CellTree.open((aside / TREE_FILE).parent) as tree, HierarchicalIndex.open(paths) as index:
        golden_queries = record_golden_queries(
            tree, index, golden_embeddings, width=about.default_beam_width, k=_GOLDEN_LEAVES
        )
    if len(golden_queries) < len(golden_embeddings) // 2:
        raise BundleInconsistentError(
            f"the beam of {about.default_beam_width} finds other leaves than the full scan for "
            f"{len(golden_embeddings) - len(golden_queries)} of {len(golden_embeddings)} held-out images: train "
            "longer, or raise it (bundle.default_beam_width of a recipe, --beam-width of `geosurge-train prototypes`)"
        )
    golden_images = _write_golden_images(aside, encoder)
    gallery = None
    if references is not None:
        gallery = write_gallery(
            aside,
            references,
            lambda latitude_deg, longitude_deg: partition.assign(latitude_deg, longitude_deg)[:, -1],
            partition.cell_counts[-1],
            about.storage,
        )
    manifest = Manifest(
        name=final.name,
        create_time=datetime.now(UTC),
        description=about.description,
        domain=Domain(can=about.can, cannot=about.cannot, training=training),
        cell_kind=partition.cell_kind,
        levels=tuple(
            _level_info(number, level_rows, path.name, about.storage)
            for number, (level_rows, path) in enumerate(zip(rows, paths, strict=True), start=1)
        ),
        dimension=encoder.dimension,
        temperatures=tuple(temperatures),
        default_beam_width=about.default_beam_width,
        point_estimator="leaf",
        encoder=EncoderInfo(
            sha256=encoder.fingerprint,
            preprocessing_id=encoder.preprocessing.id,
            vision=str(encoder.config.vision.backbone["model_type"]),
            segmentation=str(encoder.config.segmentation.backbone["model_type"]),
            parameters=sum(encoder.parameter_counts().values()),
        ),
        calibration=None,
        gallery=gallery,
        library_versions=installed_library_versions(),
        golden_queries=golden_queries,
        golden_images=golden_images,
    )
    finish_aside(final, manifest)
    return place_aside(final)


def check_bundle_place(final: Path) -> None:
    """Refuses, before the work, a directory whose name cannot be a bundle's.

    Raises:
        ConfigurationError: It cannot.
    """
    try:
        check_bundle_name(final.name)
    except ValueError as error:
        raise ConfigurationError(f"{final.name!r} cannot be a bundle's name: {error}") from error


def aside_of(final: Path) -> Path:
    """Makes an empty directory in which the files of a bundle come together; one left by a run before is removed."""
    aside = _aside(final)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    return aside


def finish_aside(final: Path, manifest: Manifest) -> Path:
    """Makes a bundle of the files in `aside_of` and verifies it; it is not in its place yet.

    Args:
        final: Where the bundle will be.
        manifest: See `geosurge.bundle.finish_bundle`.

    Returns:
        Where the bundle is.

    Raises:
        BundleError: It does not verify.
    """
    aside = _aside(final)
    finish_bundle(aside, manifest)
    for problem in verify_bundle(aside).problems:
        raise problem.error
    return aside


def place_aside(final: Path) -> Path:
    """Puts a finished bundle in its place, whatever is there, and returns that place."""
    shutil.rmtree(final, ignore_errors=True)
    _aside(final).rename(final)
    return final


def _aside(final: Path) -> Path:
    return final.with_name(f".{final.name}.tmp")


def _level_info(number: int, rows: CellRows, file: str, storage: Storage) -> LevelInfo:
    return LevelInfo(
        level=number,
        cells=len(rows.tokens),
        file=file,
        storage="fp32" if number == 1 else storage,
        s2_level_min=None if rows.s2_levels is None else int(rows.s2_levels.min()),
        s2_level_max=None if rows.s2_levels is None else int(rows.s2_levels.max()),
    )


def _write_golden_images(directory: Path, encoder: ImageEncoder) -> tuple[GoldenImage, ...]:
    """Pictures of coloured clouds: a bundle travels, and nobody's photographs should travel in it."""
    (directory / GOLDEN_DIRECTORY).mkdir()
    golden = []
    for number, size in enumerate(_GOLDEN_IMAGE_SIZES, start=1):
        file = f"{GOLDEN_DIRECTORY}/{number}.png"
        coarse = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
        picture.save(directory / file, "PNG")
        embedding = encoder.encode(encoder.preprocessing.apply(picture)[None])[0]
        golden.append(GoldenImage(file=file, embedding=encode_embedding(embedding)))
    return tuple(golden)
