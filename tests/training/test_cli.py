"""The whole of training through its command line, on a tiny world and on pictures from disk."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.recipes import write_recipe
from typer.testing import CliRunner

from geosurge import store as stores
from geosurge.bundle import open_bundle
from geosurge.bundle.verifying import verify_bundle
from geosurge.errors import BundleCorruptError, BundleNotFoundError, ConfigurationError
from geosurge.location import Location
from geosurge.locator import Locator
from geosurge_training.cli import app
from geosurge_training.data.blue_marble import BlueMarble


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe and its run, built and calibrated."""
    folder = tmp_path_factory.mktemp("world")
    recipe, directory = write_recipe(folder / "recipe.toml"), folder / "run"
    for step in ("partition", "fit", "build", "calibrate"):
        run(step, recipe, "--run", directory)
    return recipe, directory


def test_every_step_leaves_what_the_next_one_needs(trained: tuple[Path, Path]) -> None:
    _, directory = trained
    bundle = open_bundle(directory / "tiny-world")
    assert [level.cells for level in bundle.manifest.levels] == sorted(level.cells for level in bundle.manifest.levels)
    assert bundle.manifest.calibration is not None
    assert bundle.manifest.calibration.sample_count == 40
    assert bundle.manifest.golden_queries
    assert len(bundle.manifest.golden_images) == 2
    assert verify_bundle(bundle.path).ok


def test_a_repeated_fit_does_nothing_and_a_repeated_build_gives_the_same_index(trained: tuple[Path, Path]) -> None:
    recipe, directory = trained
    before = open_bundle(directory / "tiny-world").manifest
    log = (directory / "log.csv").read_text()
    run("fit", recipe, "--run", directory)
    run("build", recipe, "--run", directory)
    run("calibrate", recipe, "--run", directory)
    after = open_bundle(directory / "tiny-world").manifest
    assert after.files == before.files
    assert after.calibration == before.calibration
    assert (directory / "log.csv").read_text() == log


def test_evaluate_prints_the_figures_as_json(trained: tuple[Path, Path]) -> None:
    _, directory = trained
    output = run("evaluate", directory / "tiny-world", "--views", "30", "--seed", "7", "--json")
    (line,) = output.splitlines()
    figures = json.loads(line)
    assert figures["count"] == 30
    assert list(figures["within_km"]) == ["1", "25", "200", "750", "2500"]
    shares = [share["value"] for share in figures["within_km"].values()]
    assert shares == sorted(shares)
    assert 0 < figures["median_km"]["value"] < 20016
    assert 0 <= figures["radius_coverage"]["value"] <= 1


def test_evaluate_depends_on_its_seed_alone(trained: tuple[Path, Path]) -> None:
    bundle = trained[1] / "tiny-world"
    first, again, other = (
        json.loads(run("evaluate", bundle, "--views", "20", "--seed", seed, "--json")) for seed in ("7", "7", "8")
    )
    assert first == again
    assert first["median_km"] != other["median_km"]


def test_the_views_that_a_bundle_was_calibrated_on_do_not_measure_it(trained: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigurationError, match=r"calibrated on the views of seed 11 \(60 held-out .* another --seed"):
        run("evaluate", trained[1] / "tiny-world", "--views", "10", "--seed", "11")


def test_evaluate_writes_a_table_for_people(trained: tuple[Path, Path]) -> None:
    output = run("evaluate", trained[1] / "tiny-world", "--views", "10")
    assert "median error" in output
    assert "within 200 km" in output


def test_a_gallery_is_added_to_a_copy_which_can_be_measured(trained: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, directory = trained
    before = open_bundle(directory / "tiny-world").manifest
    arguments = ("gallery", recipe, "--run", directory, "--references", "300")
    output = run(*arguments, "--out", tmp_path / "with-gallery")
    assert open_bundle(directory / "tiny-world").manifest == before
    assert verify_bundle(tmp_path / "with-gallery").ok
    manifest = open_bundle(tmp_path / "with-gallery").manifest
    assert manifest.name == "with-gallery"
    assert manifest.gallery is not None
    assert 250 < manifest.gallery.references <= 300
    assert manifest.calibration is not None
    assert set(manifest.calibration.median_error_km) == {"leaf", "posterior_mean", "kernel_density"}
    assert f"points by {manifest.point_estimator}; median errors on 60 held-out images" in output
    kernel = ("evaluate", tmp_path / "with-gallery", "--views", "20", "--point-estimator", "kernel_density", "--json")
    assert json.loads(run(*kernel))["point_estimator"] == "kernel_density"

    # A bundle that has a gallery gets another one, and the copy of a store's active bundle needs no run.
    store = tmp_path / "store"
    stores.publish(store, tmp_path / "with-gallery", activate=True)
    elsewhere = ("gallery", recipe, "--run", tmp_path / "no-run", "--bundle", store, "--references", "200")
    run(*elsewhere, "--out", tmp_path / "smaller")
    smaller = open_bundle(tmp_path / "smaller").manifest.gallery
    assert smaller is not None
    assert smaller.references <= 200
    assert verify_bundle(tmp_path / "smaller").ok
    with pytest.raises(ConfigurationError, match="exists"):
        CliRunner().invoke(app, [*map(str, elsewhere), "--out", str(tmp_path / "smaller")], catch_exceptions=False)
    other = write_recipe(tmp_path / "other.toml", data='source = "table"\ntable = "pictures.csv"', segmenter_steps=0)
    with pytest.raises(ConfigurationError, match="not trained with this recipe, whose source is table"):
        CliRunner().invoke(
            app,
            ["gallery", str(other), "--bundle", str(store), "--references", "9", "--out", str(tmp_path / "none")],
            catch_exceptions=False,
        )


def test_steps_out_of_order_say_what_is_missing(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.toml")
    with pytest.raises(ConfigurationError, match="run `geosurge-train fit` first"):
        CliRunner().invoke(app, ["build", str(recipe), "--run", str(tmp_path)], catch_exceptions=False)
    with pytest.raises(BundleNotFoundError):
        CliRunner().invoke(app, ["calibrate", str(recipe), "--run", str(tmp_path)], catch_exceptions=False)


def test_pictures_on_disk_become_an_index_that_locates_them(tmp_path: Path) -> None:
    world = BlueMarble(48)
    batch = world.train_batch(0, 320)
    with (tmp_path / "pictures.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "latitude_deg", "longitude_deg"])
        for number, pixels in enumerate(batch.pixels.numpy()):
            Image.fromarray(pixels.transpose(1, 2, 0)).save(tmp_path / f"{number}.jpg")
            rows.writerow([f"{number}.jpg", batch.latitude_deg[number], batch.longitude_deg[number]])
    data = 'source = "table"\ntable = "pictures.csv"\nheld_out_share = 0.2'
    recipe = write_recipe(tmp_path / "recipe.toml", data=data, segmenter_steps=0, negatives="batch")
    recipe.write_text(recipe.read_text().replace("[400, 120]", "[60, 30]").replace("tau_min = 8", "tau_min = 2"))
    # After so few steps the cells of a level are hardly told apart.
    recipe.write_text(recipe.read_text().replace("default_beam_width = 16", "default_beam_width = 64"))
    for step in ("fit", "build", "calibrate"):
        run(step, recipe, "--run", tmp_path / "run")
    bundle = tmp_path / "run" / "tiny-world"
    with Locator.open(bundle) as locator:
        (answer,) = locator.locate([tmp_path / "0.jpg"])
    assert isinstance(answer, Location)
    assert answer.index_version == "tiny-world"
    assert np.isfinite([answer.latitude_deg, answer.longitude_deg, answer.radius_km]).all()

    (tmp_path / "1.jpg").write_bytes(b"no picture")
    figures = json.loads(run("evaluate", bundle, "--dataset", tmp_path / "pictures.csv", "--json"))
    assert (figures["count"], figures["failed"]) == (319, 1)
    with pytest.raises(ConfigurationError, match="--dataset"):
        CliRunner().invoke(app, ["evaluate", str(bundle)], catch_exceptions=False)


def test_a_bundle_that_was_damaged_after_it_was_built_is_not_calibrated(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    recipe, directory = trained
    copy = tmp_path / "run"
    shutil.copytree(directory, copy)
    file = copy / "tiny-world" / "level-2.faiss"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(BundleCorruptError, match=r"level-2\.faiss"):
        CliRunner().invoke(app, ["calibrate", str(recipe), "--run", str(copy)], catch_exceptions=False)


def test_a_run_is_not_built_with_another_recipe(trained: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, directory = trained
    described = tmp_path / "described.toml"
    described.write_text(recipe.read_text().replace("A tiny world, for tests.", "The same world."))
    run("build", described, "--run", directory)
    assert open_bundle(directory / "tiny-world").manifest.description == "The same world."
    run("build", recipe, "--run", directory)
    run("calibrate", recipe, "--run", directory)
    larger = tmp_path / "larger.toml"
    larger.write_text(recipe.read_text().replace("image_size = 32", "image_size = 64"))
    with pytest.raises(ConfigurationError, match="another recipe"):
        CliRunner().invoke(app, ["build", str(larger), "--run", str(directory)], catch_exceptions=False)
