"""Bundles of models that differ from the paper's: plain classification, and an encoder without fusion."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.torch import load_file
from support.pictures import picture_recipe, write_pictures

from geosurge.bundle import open_bundle
from geosurge.bundle.verifying import verify_bundle
from geosurge.encoder import ImageEncoder
from geosurge.search import HierarchicalIndex
from geosurge_training.building.build import build
from geosurge_training.fitting.checkpoint import latest_checkpoint
from geosurge_training.fitting.fit import fit
from geosurge_training.partitions.load import load_partition
from geosurge_training.recipe import Recipe, load_recipe

Array = NDArray[np.float64]


def without_fusion(path: Path) -> Recipe:
    text = path.read_text()
    assert text.count("\nblocks = 2") == 1
    path.write_text(text.replace("\nblocks = 2", "\nblocks = 0"))
    return load_recipe(path)


def log_probabilities(rows: Array, temperature: float, visual: Array) -> Array:
    logits = visual @ rows.T / temperature
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("head", ["classifier", "embeddings"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "not fused"])
def test_a_bundle_ranks_leaves_by_the_products_of_the_trained_models_own_softmaxes(
    tmp_path: Path, head: str, fused: bool
) -> None:
    write_pictures(tmp_path)
    recipe = picture_recipe(tmp_path, f'steps = 8\nhead = "{head}"\nnegatives = "all_cells"')
    if not fused:
        recipe = without_fusion(tmp_path / "recipe.toml")
    run = tmp_path / "run"
    fit(recipe, run)
    bundle = open_bundle(build(recipe, run))
    assert verify_bundle(bundle.path).ok

    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None
    trained = load_file(checkpoint / "model.safetensors")
    partition = load_partition(run / "partition.npz")
    assert bundle.encoder_path is not None
    encoder = ImageEncoder.load(bundle.encoder_path)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 32, 32), np.uint8)
    visual = encoder.encode(pixels)
    total = np.zeros((5, 1))
    for number, level in enumerate(partition.levels):
        rows = trained[f"geocells.tables.{number}"].double().numpy()
        temperature = float(trained["geocells.log_temperatures"].double()[number].exp())
        if head == "embeddings":
            rows /= np.linalg.norm(rows, axis=1, keepdims=True)
            assert temperature != pytest.approx(0.07)
        else:
            assert temperature == pytest.approx(0.07)
            assert not np.allclose(np.linalg.norm(rows, axis=1), 1.0, atol=1e-4)
        own = log_probabilities(rows, temperature, visual.astype(np.float64))
        total = own + (total if number == 0 else total[:, level.parents])
    with HierarchicalIndex.open(bundle.level_paths) as index:
        hits = index.exact(visual, k=total.shape[1])
    # Equal up to a constant of the image, and to the half precision that the recipe stores vectors in.
    tolerance = 0.03
    for row in range(5):
        expected = total[row][hits.ordinals[row]]
        np.testing.assert_allclose(
            hits.scores[row] - hits.scores[row].mean(), expected - expected.mean(), atol=tolerance
        )
        assert np.ptp(expected) > 30 * tolerance
