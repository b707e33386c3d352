"""Turns a checkpoint into an index bundle."""

from __future__ import annotations

import logging
from pathlib import Path

from geosurge.errors import ConfigurationError
from geosurge_training.building.bundling import GOLDEN_QUERIES, write_bundle
from geosurge_training.building.gallery import encode_references
from geosurge_training.data.open_source import open_source
from geosurge_training.encoders import build_encoder
from geosurge_training.fitting.checkpoint import latest_checkpoint, load_checkpoint
from geosurge_training.fitting.geocells import GeocellEmbeddings
from geosurge_training.fitting.trainable import Trainable
from geosurge_training.partitions.load import load_partition
from geosurge_training.recipe import Recipe
from geosurge_training.run_directory import PARTITION_FILE, bundle_path, claim_images, claim_run

_LOGGER = logging.getLogger(__name__)


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
    partition = load_partition(run / PARTITION_FILE)
    geocells = GeocellEmbeddings(partition.cell_counts, recipe.encoder.fusion.dimension, head=recipe.training.head)
    model = Trainable(build_encoder(recipe), geocells)
    steps = load_checkpoint(checkpoint, model)
    encoder = model.encoder.eval().round_to_storage()

    source = open_source(recipe, encoder, run)
    claim_images(source, run)
    golden_pixels = next(source.held_out(GOLDEN_QUERIES, recipe.seed, GOLDEN_QUERIES)).pixels
    size = recipe.bundle.gallery_size
    bundle = write_bundle(
        bundle_path(recipe, run),
        partition,
        geographic=[table.detach().numpy() for table in geocells.embeddings()],
        temperatures=geocells.temperatures().tolist(),
        encoder=encoder,
        golden_embeddings=encoder.encode(golden_pixels.numpy()),
        about=recipe.bundle,
        training=f"{recipe.data.source}, {steps} steps of {recipe.training.batch_size} images",
        references=encode_references(source, encoder, size) if size else None,
    )
    _LOGGER.info("built %s from %s", bundle, checkpoint)
    return bundle
