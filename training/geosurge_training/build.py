"""Turns a checkpoint into an index bundle."""

from __future__ import annotations

import logging
import shutil
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from PIL import Image

from geosurge.bundle import finish_bundle, record_golden_queries, verify_bundle
from geosurge.cells import CellRows, CellTree, write_cell_tree
from geosurge.encoder import ImageEncoder
from geosurge.errors import BundleInconsistentError, ConfigurationError
from geosurge.geodesy import cell_id_to_area_km2, cell_id_to_outline, cell_id_to_s2_level, cell_id_to_token
from geosurge.manifest import (
    ENCODER_DIRECTORY,
    GOLDEN_DIRECTORY,
    TREE_FILE,
    Domain,
    EncoderInfo,
    GoldenImage,
    LevelInfo,
    Manifest,
    encode_embedding,
    installed_library_versions,
)
from geosurge.search import HierarchicalIndex
from geosurge_training.checkpoint import latest_checkpoint, load_checkpoint
from geosurge_training.fit import PARTITION_FILE, Trainable, claim_run
from geosurge_training.geocells import GeocellEmbeddings
from geosurge_training.indexing import composite_embeddings, write_level_indexes
from geosurge_training.partition import Partition, PartitionLevel
from geosurge_training.places import nearest_places
from geosurge_training.recipe import Recipe
from geosurge_training.sources import build_encoder, open_source

_LOGGER = logging.getLogger(__name__)
_GOLDEN_QUERIES, _GOLDEN_LEAVES = 16, 5
_GOLDEN_IMAGE_SIZES = ((160, 120), (120, 144))
"""Width and height: neither square nor the encoder's size, so that shrinking and cropping are checked too."""


def bundle_path(recipe: Recipe, run: Path) -> Path:
    """Where `build` leaves the bundle of a run, for `geosurge index publish` to take."""
    return run / recipe.name


def build(recipe: Recipe, run: Path) -> Path:
    """Builds the bundle of a run's newest checkpoint; a bundle built before is replaced.

    The encoder's weights are rounded to their storage type first, so that everything that follows (golden queries,
    calibration, evaluation) is measured on what is stored.

    Args:
        recipe: The run's recipe.
        run: Directory of the run.

    Returns:
        The bundle's directory; it is not calibrated yet.

    Raises:
        ConfigurationError: The run has no checkpoint, or is another recipe's.
        BundleError: What was built does not verify.
    """
    checkpoint = latest_checkpoint(run)
    if checkpoint is None:
        raise ConfigurationError(f"{run} has no checkpoint; run `geosurge-train fit` first")
    claim_run(recipe, run)
    partition = Partition.load(run / PARTITION_FILE)
    geocells = GeocellEmbeddings(partition.cell_counts, recipe.encoder.fusion.dimension)
    model = Trainable(build_encoder(recipe), geocells)
    steps = load_checkpoint(checkpoint, model)
    encoder = model.encoder.eval().round_to_storage()

    final = bundle_path(recipe, run)
    aside = run / f".{final.name}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    parents = [level.parents for level in partition.levels]
    temperatures = geocells.temperatures().tolist()
    geographic = [table.detach().numpy() for table in geocells.unit_embeddings()]
    paths = write_level_indexes(
        aside, composite_embeddings(geographic, temperatures, parents), parents, recipe.bundle.storage
    )
    write_cell_tree((aside / TREE_FILE).parent, [_cell_rows(level) for level in partition.levels], store_outlines=False)
    encoder.save(aside / ENCODER_DIRECTORY)

    golden_pixels = next(open_source(recipe, encoder).held_out(_GOLDEN_QUERIES, recipe.seed, _GOLDEN_QUERIES)).pixels
    golden_embeddings = encoder.encode(golden_pixels.numpy())
    with CellTree.open((aside / TREE_FILE).parent) as tree, HierarchicalIndex.open(paths) as index:
        golden_queries = record_golden_queries(
            tree, index, golden_embeddings, width=recipe.bundle.default_beam_width, k=_GOLDEN_LEAVES
        )
    if len(golden_queries) < len(golden_pixels) // 2:
        raise BundleInconsistentError(
            f"the beam of {recipe.bundle.default_beam_width} finds other leaves than the full scan for "
            f"{len(golden_pixels) - len(golden_queries)} of {len(golden_pixels)} held-out images: raise "
            "bundle.default_beam_width, or train longer"
        )
    golden_images = _write_golden_images(aside, encoder)
    manifest = Manifest(
        name=recipe.name,
        create_time=datetime.now(UTC),
        description=recipe.bundle.description,
        domain=Domain(
            can=recipe.bundle.can,
            cannot=recipe.bundle.cannot,
            training=f"{recipe.data.source}, {steps} steps of {recipe.training.batch_size} images",
        ),
        levels=tuple(
            _level_info(number, level, path.name, recipe)
            for number, (level, path) in enumerate(zip(partition.levels, paths, strict=True), start=1)
        ),
        dimension=encoder.dimension,
        temperatures=tuple(temperatures),
        default_beam_width=recipe.bundle.default_beam_width,
        point_estimator="leaf",
        encoder=EncoderInfo(
            sha256=encoder.fingerprint,
            preprocessing_id=encoder.preprocessing.id,
            vision=str(encoder.config.vision.backbone["model_type"]),
            segmentation=str(encoder.config.segmentation.backbone["model_type"]),
            parameters=sum(encoder.parameter_counts().values()),
        ),
        calibration=None,
        library_versions=installed_library_versions(),
        golden_queries=golden_queries,
        golden_images=golden_images,
    )
    finish_bundle(aside, manifest)
    for problem in verify_bundle(aside).problems:
        raise problem.error
    shutil.rmtree(final, ignore_errors=True)
    aside.rename(final)
    _LOGGER.info("built %s from %s", final, checkpoint)
    return final


def _cell_rows(level: PartitionLevel) -> CellRows:
    return CellRows(
        tokens=cell_id_to_token(level.cell_ids),
        parents=level.parents,
        mean_latitude_deg=level.mean_latitude_deg,
        mean_longitude_deg=level.mean_longitude_deg,
        spread_km=level.spread_km,
        area_km2=cell_id_to_area_km2(level.cell_ids),
        sample_counts=level.sample_counts,
        outlines=list(cell_id_to_outline(level.cell_ids)),
        s2_levels=cell_id_to_s2_level(level.cell_ids),
        places=nearest_places(level.mean_latitude_deg, level.mean_longitude_deg),
    )


def _level_info(number: int, level: PartitionLevel, file: str, recipe: Recipe) -> LevelInfo:
    s2_levels = cell_id_to_s2_level(level.cell_ids)
    return LevelInfo(
        level=number,
        cells=len(level.cell_ids),
        file=file,
        storage="fp32" if number == 1 else recipe.bundle.storage,
        s2_level_min=int(s2_levels.min()),
        s2_level_max=int(s2_levels.max()),
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
