"""Adds a gallery to a bundle that exists: a copy of it, with references, calibrated anew."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from pathlib import Path

from geosurge.bundle import Bundle, open_bundle
from geosurge.bundle.manifest import CalibrationInfo
from geosurge.bundle.verifying import verify_bundle
from geosurge.cells import CellTree
from geosurge.encoder import ImageEncoder
from geosurge.errors import ConfigurationError
from geosurge.store import resolve_bundle
from geosurge_training.building.bundling import aside_of, check_bundle_place, finish_aside, place_aside
from geosurge_training.building.calibrate import calibrate_on_source
from geosurge_training.building.gallery import encode_references, write_gallery
from geosurge_training.data.open_source import open_source
from geosurge_training.partitions.leaf_finder import require_leaf_finder
from geosurge_training.partitions.load import load_partition
from geosurge_training.recipe import Recipe, StoredData
from geosurge_training.run_directory import (
    IMAGES_DIGEST_FILE,
    PARTITION_FILE,
    RECIPE_DIGEST_FILE,
    claim_images,
    claim_run,
)


def add_gallery(recipe: Recipe, run: Path, bundle_or_store: Path, out: Path, count: int) -> CalibrationInfo:
    """Copies a bundle, stores the embeddings of training images in the copy, and calibrates that.

    Args:
        recipe: The recipe that the bundle was trained with: its source gives the references and the held-out images.
        run: Directory of the run that made the bundle: tells that the recipe and the images are still those, so that
            no held-out image was trained on. Need not exist for rendered images, which cannot change.
        bundle_or_store: The bundle, or a store whose active bundle is meant; it stays as it is.
        out: The new bundle's directory, whose last part is its name; must not exist.
        count: References, at most; a source that has fewer training images gives those.

    Returns:
        The calibration of the new bundle. What makes its points is told in its manifest: the gallery if that helps.

    Raises:
        ConfigurationError: The recipe or the run is not that of the bundle, its source cannot be used, `out` exists or
            is no bundle's name, or as in `calibrate_bundle`.
        BundleError: The bundle is missing or damaged.
    """
    path = resolve_bundle(bundle_or_store)
    for problem in verify_bundle(path).problems:
        raise problem.error
    bundle = open_bundle(path)
    manifest = bundle.manifest
    if bundle.encoder_path is None or not manifest.domain.training.startswith(f"{recipe.data.source},"):
        raise ConfigurationError(
            f"the bundle {path} was not trained with this recipe, whose source is {recipe.data.source}, but on "
            f"{manifest.domain.training!r}"
        )
    if out.exists():
        raise ConfigurationError(f"{out} exists; give another --out")
    check_bundle_place(out)
    _check_run(recipe, run, bundle)
    encoder = ImageEncoder.load(bundle.encoder_path, recipe.training.device)
    source = open_source(recipe, encoder, run)
    claim_images(source, run)
    aside = aside_of(out)
    before = manifest.gallery
    replaced = set() if before is None else {before.file, before.coordinates_file}
    for file in set(manifest.files) - replaced:
        (aside / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path / file, aside / file)
    with CellTree.open(bundle.tree_path) as tree:
        gallery = write_gallery(
            aside,
            encode_references(source, encoder, count),
            require_leaf_finder(tree),
            tree.cell_counts[-1],
            manifest.levels[-1].storage,
        )
    changes = {
        "name": out.name,
        "create_time": datetime.now(UTC),
        "calibration": None,
        "point_estimator": "leaf",
        "gallery": gallery,
    }
    # A bundle that stands in its place is a calibrated one, whenever this is cut off.
    calibration = calibrate_on_source(finish_aside(out, manifest.model_copy(update=changes)), recipe, run)
    place_aside(out)
    return calibration


def _check_run(recipe: Recipe, run: Path, bundle: Bundle) -> None:
    """Refuses a run that is another recipe's, or, where images can change, one that did not make the bundle."""
    if not isinstance(recipe.data, StoredData):
        if (run / RECIPE_DIGEST_FILE).exists():
            claim_run(recipe, run)
        return
    for marker in (RECIPE_DIGEST_FILE, IMAGES_DIGEST_FILE):
        if not (run / marker).exists():
            raise ConfigurationError(
                f"{run / marker} is missing, so that nothing says which images the bundle {bundle.path} was trained on "
                "and which were held out; give --run, the directory of the run that made it"
            )
    claim_run(recipe, run)
    own = load_partition(run / PARTITION_FILE).cell_counts
    cells = tuple(level.cells for level in bundle.manifest.levels)
    if tuple(own) != cells:
        raise ConfigurationError(
            f"the bundle {bundle.path} was not made by the run in {run}: it has {cells} cells on its levels, and the "
            f"run's partition has {tuple(own)}; give --run, the directory of the run that made it"
        )
