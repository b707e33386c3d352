"""A study of three variants with real processes: each is measured once, and kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.recipes import write_recipe

from geosurge.errors import ConfigurationError
from geosurge_training.ablations.run import RESULT_FILE, Result, run_study
from geosurge_training.ablations.study import BASE, Variant
from geosurge_training.recipe import Recipe, load_recipe

VARIANTS = (
    Variant("shrunken-means", "shrunken means", {}, built_by="shrunken means"),
    Variant(BASE, "", {}),
    Variant("blocks-0", "no fusion", {"encoder.fusion.blocks": 0}),
)


def small_recipe(folder: Path) -> Recipe:
    path = write_recipe(folder / "recipe.toml", steps=4)
    # A network that has learned nothing needs a wide beam.
    path.write_text(path.read_text().replace("default_beam_width = 16", "default_beam_width = 1000"))
    return load_recipe(path)


def study(folder: Path, *, views: int = 100) -> list[Result]:
    return run_study(small_recipe(folder), VARIANTS, [1], folder / "runs", views=views, jobs=2)


def test_a_study_measures_each_variant_once_and_keeps_what_came_out(tmp_path: Path) -> None:
    shrunken, base, unfused = study(tmp_path)

    names = ["shrunken-means", BASE, "blocks-0"]
    assert [(result.variant, result.seed) for result in (shrunken, base, unfused)] == [(name, 1) for name in names]
    assert (shrunken.parameters, len(shrunken.cells)) == (base.parameters, 7)
    assert unfused.parameters < base.parameters
    assert base.cells == unfused.cells
    kept = tmp_path / "runs" / BASE / "1" / RESULT_FILE
    fields = json.loads(kept.read_text())
    assert fields["median_km"] == base.median_km > 0

    # What is kept is taken as it is, so that a study that was cut off goes on.
    kept.write_text(json.dumps({**fields, "median_km": 123.0}))
    assert study(tmp_path)[1].median_km == 123.0

    with pytest.raises(ConfigurationError, match="was measured on 100 views, not 50; remove it"):
        study(tmp_path, views=50)


def test_a_failure_is_told_before_what_waits_is_done(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    damaged = runs / "first" / "1" / RESULT_FILE
    damaged.parent.mkdir(parents=True)
    damaged.write_text("{")
    names = ("first", "second", "third", "fourth", "fifth")
    varied = [Variant(name, name, {}) for name in names]
    with pytest.raises(ConfigurationError, match=r"first/1/result\.json is damaged"):
        run_study(small_recipe(tmp_path), varied, [1], runs, views=100, jobs=1)
    # One process has at most two more in hand.
    assert not any((runs / name).exists() for name in names[3:])
