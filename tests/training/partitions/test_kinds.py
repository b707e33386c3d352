"""Each kind of partition through everything that is done with one: training, building, serving, measuring."""

from __future__ import annotations

import json
from pathlib import Path

import h3
import numpy as np
import pytest
from support.recipes import write_recipe
from typer.testing import CliRunner

from geosurge.bundle import open_bundle
from geosurge.bundle.verifying import verify_bundle
from geosurge.commands.cli import app as engine_app
from geosurge.errors import CellKindUnsupportedError
from geosurge.location import LocateOptions, Location
from geosurge.locator import Locator
from geosurge_training.building import build as build_module
from geosurge_training.building import calibrate as calibrate_module
from geosurge_training.cli import app
from geosurge_training.data.blue_marble import BlueMarble
from geosurge_training.evaluation import evaluate as evaluate_module
from geosurge_training.evaluation.evaluate import evaluate_views
from geosurge_training.fitting import fit as fit_module
from geosurge_training.partitions import make as make_module
from geosurge_training.partitions.leaf_finder import leaf_finder
from geosurge_training.partitions.load import load_partition

THRESHOLDS = {
    "s2": 'kind = "s2"\ntau_min = 8\ntau_max = [400, 120]',
    "h3": 'kind = "h3"\ntau_min = 8\ntau_max = [400, 120]\nmax_h3_resolution = 6',
    "entity": 'kind = "administrative"\ntau_min = [8, 8, 8, 6]',
}


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module", params=list(THRESHOLDS))
def built(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, world: BlueMarble
) -> tuple[str, Path]:
    """A kind and a run with it, calibrated."""
    folder = tmp_path_factory.mktemp(request.param)
    recipe = write_recipe(folder / "recipe.toml", steps=4)
    text = recipe.read_text().replace("tau_min = 8\ntau_max = [400, 120]", THRESHOLDS[request.param])
    # After so few steps a narrow beam misses what the full scan finds.
    recipe.write_text(text.replace("default_beam_width = 16", "default_beam_width = 300"))
    with pytest.MonkeyPatch.context() as patch:
        for module in (make_module, fit_module, build_module, calibrate_module):
            patch.setattr(module, "open_source", lambda *arguments: world)
        for step in ("partition", "fit", "build", "calibrate"):
            run(step, recipe, "--run", folder / "run")
    return request.param, folder / "run"


def test_a_bundle_says_its_kind_and_verifies(built: tuple[str, Path]) -> None:
    kind, directory = built
    partition = load_partition(directory / "partition.npz")
    bundle = open_bundle(directory / "tiny-world")
    assert verify_bundle(bundle.path).ok
    assert (bundle.manifest.cell_kind, partition.cell_kind) == (kind, kind)
    assert tuple(level.cells for level in bundle.manifest.levels) == partition.cell_counts
    assert [level.s2_level_min is None for level in bundle.manifest.levels] == [kind != "s2"] * len(partition.levels)


def test_a_bundle_locates_like_any_other(built: tuple[str, Path], world: BlueMarble) -> None:
    kind, directory = built
    partition = load_partition(directory / "partition.npz")
    batch = next(world.held_out(8, 5, 8))
    with Locator.open(directory / "tiny-world") as locator:
        embeddings = locator.encoder.encode(batch.pixels.numpy())
        answers = locator.locate_embeddings(embeddings, [LocateOptions()] * 8)
        region = partition.levels[0].tokens[1]
        (inside,) = locator.locate_embeddings(embeddings[:1], [LocateOptions(region_tokens=(region,))])
    for answer in answers:
        assert isinstance(answer, Location)
        assert len(answer.path) == len(partition.levels)
        ordinals = partition.assign([answer.latitude_deg], [answer.longitude_deg])[0]
        assert answer.place is not None
        for cell, level in zip(answer.path, partition.levels, strict=True):
            assert cell.token in level.tokens
        if locator.manifest.point_estimator == "leaf" and kind != "h3":
            # The mean of a leaf's samples is in the leaf: but for hexagons, whose union is not convex.
            assert [level.tokens[ordinal] for level, ordinal in zip(partition.levels, ordinals, strict=True)] == [
                cell.token for cell in answer.path
            ]
        assert answer.radius_km > 0
        assert answer.credible_region.area_km2 > 0
    assert isinstance(inside, Location)
    assert inside.path[0].token == region


def test_a_region_may_name_an_h3_cell_inside_a_leaf(built: tuple[str, Path]) -> None:
    kind, directory = built
    if kind != "h3":
        return
    leaf = load_partition(directory / "partition.npz").levels[-1].tokens[3]
    with Locator.open(directory / "tiny-world") as locator:
        embedding = np.eye(locator.index.dimension, dtype=np.float32)[:1]
        inside = LocateOptions(region_tokens=(h3.cell_to_center_child(leaf, 9),))
        (answer,) = locator.locate_embeddings(embedding, [inside])
    assert isinstance(answer, Location)
    assert answer.path[-1].token == leaf


def test_the_tree_of_a_grid_knows_the_path_of_a_coordinate(built: tuple[str, Path]) -> None:
    kind, directory = built
    partition = load_partition(directory / "partition.npz")
    with Locator.open(directory / "tiny-world") as locator:
        if kind == "entity":
            with pytest.raises(CellKindUnsupportedError, match="named places for cells"):
                locator.tree.path(10.0, 20.0)
            return
        rng = np.random.default_rng(2)
        latitude, longitude = rng.uniform(-60, 75, 200), rng.uniform(-180, 180, 200)
        for north, east, row in zip(latitude, longitude, partition.assign(latitude, longitude).tolist(), strict=True):
            path = [(cell.level, cell.ordinal) for cell in locator.tree.path(north, east)]
            assert path == [(level, ordinal) for level, ordinal in enumerate(row, start=1) if ordinal >= 0]


def test_evaluation_knows_the_true_leaf(
    built: tuple[str, Path], world: BlueMarble, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, directory = built
    monkeypatch.setattr(evaluate_module, "BlueMarble", lambda image_size: world)
    figures = evaluate_views(directory / "tiny-world", views=30, seed=4).figures
    assert figures.recall_vs_area is not None
    assert figures.calibration is not None
    assert 0 <= figures.calibration.value <= 1
    partition = load_partition(directory / "partition.npz")
    with Locator.open(directory / "tiny-world") as locator:
        find = leaf_finder(locator.tree)
    assert find is not None
    rng = np.random.default_rng(3)
    points = rng.uniform(-89, 89, 500), rng.uniform(-180, 180, 500)
    np.testing.assert_array_equal(find(*points), partition.assign(*points)[:, -1])


def test_inspect_tells_the_kind(built: tuple[str, Path]) -> None:
    kind, directory = built
    result = CliRunner().invoke(engine_app, ["index", "inspect", str(directory / "tiny-world")], catch_exceptions=False)
    assert {"s2": "S2 cells", "h3": "H3 cells", "entity": "administrative entities"}[kind] in result.stdout
    assert ("S2 levels" in result.stdout) == (kind == "s2")
    told = CliRunner().invoke(engine_app, ["index", "inspect", str(directory / "tiny-world"), "--json"])
    assert json.loads(told.stdout)["manifest"]["cell_kind"] == kind
