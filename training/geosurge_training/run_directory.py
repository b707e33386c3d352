"""The directory of a run: what its files are called, and whose run it is."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Final

from geosurge.errors import ConfigurationError
from geosurge_training.aside import written_aside
from geosurge_training.data.source import ImageSource, NumberedSource
from geosurge_training.fitting.checkpoint import latest_checkpoint
from geosurge_training.recipe import Recipe

RECIPE_DIGEST_FILE: Final = "recipe.sha256"
IMAGES_DIGEST_FILE: Final = "images.sha256"
PARTITION_FILE: Final = "partition.npz"
SEGMENTER_FILE: Final = "segmenter.safetensors"
LOG_FILE: Final = "log.csv"
HELD_OUT_LOG_FILE: Final = "held-out.csv"


def run_of(recipe: Recipe) -> Path:
    """Where a recipe's run is kept, unless somebody says otherwise."""
    return Path("runs") / recipe.name


def bundle_path(recipe: Recipe, run: Path) -> Path:
    """Where `build` leaves the bundle of a run, for `geosurge index publish` to take."""
    return run / recipe.name


def claim_run(recipe: Recipe, run: Path) -> None:
    """Marks a directory as this recipe's run, or refuses one that is another's.

    What tells recipes apart is what the weights depend on: the seed, data, partition, encoder and training sections,
    without the data's paths, so that a moved folder or a better description is no other recipe.

    Args:
        recipe: The recipe.
        run: Directory of the run, made when missing.

    Raises:
        ConfigurationError: The directory holds a run of another recipe.
    """
    sections = {"seed", "data", "partition", "encoder", "training"}
    unlike = {
        "data": {"table", "images", "held_out_table", "shards", "coordinates"},
        "training": {"device", "devices", "micro_batch_size", "tower_cache", "checkpoint_every", "log_every"},
    }
    told = recipe.model_dump(mode="json", include=sections, exclude=unlike, exclude_defaults=True)
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    if _claim(run / RECIPE_DIGEST_FILE, digest) != digest:
        raise ConfigurationError(
            f"{run} holds a run of another recipe (its data, partition, encoder or training section differs); "
            "give another --run directory or remove it"
        )


def claim_images(source: ImageSource, run: Path) -> None:
    """Marks a directory as a run on these training images, or refuses one on others; what is rendered never changes.

    Args:
        source: The recipe's source.
        run: Directory of the run, made when missing.

    Raises:
        ConfigurationError: The run was begun with images of other names or coordinates, or in another order; or there
            is a partition or a checkpoint, and nothing says of which images.
    """
    if not isinstance(source, NumberedSource):
        return
    begun = (run / PARTITION_FILE).exists() or latest_checkpoint(run) is not None
    if begun and not (run / IMAGES_DIGEST_FILE).exists():
        raise ConfigurationError(
            f"{run} has a partition or a checkpoint but no {IMAGES_DIGEST_FILE}, so that nothing says which images "
            "they were made from: some of them may be held out now; give another --run directory or remove it"
        )
    digest = source.train_digest()
    if _claim(run / IMAGES_DIGEST_FILE, digest) != digest:
        raise ConfigurationError(
            f"{run} was begun with other training images: names or coordinates in the table or the shards have changed "
            "since, or which of them are held out; restore them, give another --run directory or remove it"
        )


def _claim(marker: Path, digest: str) -> str:
    """What a marker says; it is made first where it is missing."""
    if not marker.exists():
        with written_aside(marker) as aside:
            aside.write_text(digest + "\n")
    return marker.read_text().strip()
