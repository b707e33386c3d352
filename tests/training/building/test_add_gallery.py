"""A gallery for a bundle of pictures: only with the run that made it, and in its place only when it is calibrated."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from support.pictures import picture_recipe, write_pictures

from geosurge.bundle import read_manifest
from geosurge.bundle.verifying import verify_bundle
from geosurge.errors import ConfigurationError
from geosurge_training.building.add_gallery import add_gallery
from geosurge_training.building.build import build
from geosurge_training.fitting.fit import fit
from geosurge_training.recipe import Recipe


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    write_pictures(tmp_path)
    return picture_recipe(tmp_path, 'steps = 8\nnegatives = "all_cells"')


@pytest.fixture
def bundle(tmp_path: Path, recipe: Recipe) -> Path:
    fit(recipe, tmp_path / "run")
    return build(recipe, tmp_path / "run")


def test_the_run_that_made_a_bundle_gives_it_a_gallery(tmp_path: Path, recipe: Recipe, bundle: Path) -> None:
    before = read_manifest(bundle)
    calibration = add_gallery(recipe, tmp_path / "run", bundle, tmp_path / "out", 20)
    manifest = read_manifest(tmp_path / "out")
    assert verify_bundle(tmp_path / "out").ok
    assert manifest.calibration == calibration
    assert manifest.gallery is not None
    assert manifest.gallery.references == 20
    assert read_manifest(bundle) == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_bundle_that_cannot_be_calibrated_is_not_put_in_its_place(
    tmp_path: Path, recipe: Recipe, bundle: Path
) -> None:
    few = recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update={"count": 20})})
    with pytest.raises(ConfigurationError, match="20 held-out images are too few"):
        add_gallery(few, tmp_path / "run", bundle, tmp_path / "out", 20)
    assert not (tmp_path / "out").exists()


def test_a_run_that_is_missing_or_another_proves_nothing(tmp_path: Path, recipe: Recipe, bundle: Path) -> None:
    def refused(recipe: Recipe, run: Path, why: str) -> None:
        with pytest.raises(ConfigurationError, match=why):
            add_gallery(recipe, run, bundle, tmp_path / "out", 20)
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / ".out.tmp").exists()

    refused(recipe, tmp_path / "nowhere", r"recipe\.sha256 is missing, .* give --run")
    assert not (tmp_path / "nowhere").exists()
    refused(recipe.model_copy(update={"seed": 8}), tmp_path / "run", "holds a run of another recipe")
    coarse = recipe.model_copy(update={"partition": recipe.partition.model_copy(update={"tau_max": [80.0, 40.0]})})
    fit(coarse, tmp_path / "coarse")
    refused(coarse, tmp_path / "coarse", r"was not made by the run in .* give --run")
    table = tmp_path / "pictures.csv"
    with table.open(newline="") as file:
        rows = list(csv.reader(file))
    with table.open("w", newline="") as file:
        csv.writer(file).writerows(rows[:-4])
    refused(recipe, tmp_path / "run", "begun with other training images")
