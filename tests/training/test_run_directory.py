from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
from support.pictures import picture_recipe, write_pictures
from support.recipes import write_recipe

from geosurge.errors import ConfigurationError
from geosurge_training.building.build import build
from geosurge_training.building.calibrate import calibrate
from geosurge_training.data.open_source import open_source
from geosurge_training.encoders import build_encoder
from geosurge_training.fitting.fit import fit
from geosurge_training.partitions.make import make_partition
from geosurge_training.recipe import Recipe, load_recipe
from geosurge_training.run_directory import bundle_path, claim_images, claim_run, run_of

Rows = list[list[str]]


def rewrite(table: Path, change: Callable[[Rows], Rows]) -> None:
    with table.open(newline="") as file:
        heading, *rows = csv.reader(file)
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([heading, *change(rows)])


def move(rows: Rows) -> Rows:
    return [[path, str(float(latitude) + 1e-6), longitude] for path, latitude, longitude in rows]


def rename(rows: Rows) -> Rows:
    return [[f"./{path}", *coordinates] for path, *coordinates in rows]


def digest_of(recipe: Recipe, run: Path) -> str:
    claim_images(open_source(recipe, build_encoder(recipe), run), run)
    return (run / "images.sha256").read_text()


def test_a_run_has_one_recipe_whatever_it_is_called_and_wherever_its_data_are(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    recipe, run = picture_recipe(tmp_path, "steps = 3"), tmp_path / "run"
    claim_run(recipe, run)
    elsewhere = recipe.data.model_copy(update={"table": Path("elsewhere.csv")})
    claim_run(recipe.model_copy(update={"name": "other", "data": elsewhere}), run)
    with pytest.raises(ConfigurationError, match="holds a run of another recipe"):
        claim_run(recipe.model_copy(update={"seed": 4}), run)
    assert run_of(recipe) == Path("runs/tiny-world")
    assert bundle_path(recipe, run) == run / "tiny-world"


@pytest.mark.parametrize(
    "change",
    [move, rename, lambda rows: rows[::-1], lambda rows: rows[:40]],
    ids=["place", "name", "order", "count"],
)
def test_training_images_that_changed_are_noticed(tmp_path: Path, change: Callable[[Rows], Rows]) -> None:
    write_pictures(tmp_path)
    recipe, run = picture_recipe(tmp_path, "steps = 3"), tmp_path / "run"
    before = digest_of(recipe, run)
    assert digest_of(recipe, run) == before
    rewrite(tmp_path / "pictures.csv", change)
    with pytest.raises(ConfigurationError, match=r"run was begun with other training images: .*--run"):
        digest_of(recipe, run)
    assert digest_of(recipe, tmp_path / "new") != before


def test_a_moved_folder_and_another_recipe_have_the_same_images(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    before = digest_of(picture_recipe(tmp_path, "steps = 3"), tmp_path / "run")
    moved = tmp_path / "moved"
    moved.mkdir()
    (tmp_path / "pictures.csv").rename(moved / "pictures.csv")
    assert digest_of(picture_recipe(moved, "steps = 9"), tmp_path / "run") == before


def test_every_step_of_a_run_wants_the_images_that_it_was_begun_with(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    recipe, run = picture_recipe(tmp_path, 'steps = 2\nnegatives = "all_cells"'), tmp_path / "run"
    fit(recipe, run, stop_after=1)
    build(recipe, run)
    rewrite(tmp_path / "pictures.csv", move)
    for step in (fit, build, calibrate):
        with pytest.raises(ConfigurationError, match="begun with other training images"):
            step(recipe, run)
    (run / "partition.npz").unlink()
    with pytest.raises(ConfigurationError, match="begun with other training images"):
        make_partition(recipe, run)


@pytest.mark.parametrize("left", ["partition.npz", "checkpoint-000000001"])
def test_a_run_that_does_not_say_which_images_it_was_begun_with_is_refused(tmp_path: Path, left: str) -> None:
    write_pictures(tmp_path)
    recipe, run = picture_recipe(tmp_path, 'steps = 2\nnegatives = "all_cells"'), tmp_path / "run"
    fit(recipe, run, stop_after=1)
    kept = tmp_path / "kept"
    kept.mkdir()
    (run / left).rename(kept / left)
    with pytest.raises(ConfigurationError, match=r"kept has a partition or a checkpoint but no images\.sha256"):
        fit(recipe, kept)
    assert not (kept / "images.sha256").exists()


def test_rendered_images_need_no_digest(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path / "recipe.toml"))
    claim_images(open_source(recipe, build_encoder(recipe), tmp_path), tmp_path / "run")
    assert not (tmp_path / "run").exists()
