"""An index of pictures without training: the default encoder, and what it makes of views and of files."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from support.archives import write_views
from typer.testing import CliRunner

from geosurge.bundle import open_bundle
from geosurge.bundle.verifying import verify_bundle
from geosurge.errors import ConfigurationError, UsageError
from geosurge.geodesy import great_circle_km
from geosurge.location import Location
from geosurge.locator import Locator
from geosurge_training.cli import app
from geosurge_training.evaluation.evaluate import evaluate_views

DEFAULT = Path(__file__).parents[3] / "indexes"
REPORT_SEED = 777
"""Of views that nothing was fitted to and no default was chosen by."""


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, ["prototypes", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def within_200_km(bundle: Path, views: int) -> float:
    figures = evaluate_views(bundle, views=views, seed=REPORT_SEED).figures
    return figures.within_km[200].value


def test_wrong_usage_is_refused(tmp_path: Path) -> None:
    for arguments in (
        [],
        ["--views", "9", "--images", str(tmp_path)],
        ["--views", "9", "--cells", "hex"],
        ["--views", "9", "--tau-max", "9;8"],
        ["--views", "9", "--activate"],
    ):
        with pytest.raises(UsageError):
            run("--encoder", DEFAULT, "--out", tmp_path / "out", *arguments)
    for name in ("two words", "CURRENT"):
        with pytest.raises(ConfigurationError, match=f"'{name}' cannot be a bundle's name: .* starts with"):
            run("--encoder", DEFAULT, "--out", tmp_path / name, "--views", "9")


def test_pictures_on_disk_become_an_index_that_is_published_and_locates(tmp_path: Path) -> None:
    truths = write_views(tmp_path / "pictures", 1000, side=96)
    names = list(truths)
    asked, kept = names[:40], names[40:]
    table = tmp_path / "pictures.csv"
    with table.open("w", newline="") as file:
        rows = [(name, *truths[name]) for name in kept] + [("gone.jpg", 1.0, 2.0), ("zero.jpg", 0.0, 0.0)]
        csv.writer(file).writerows([("path", "latitude_deg", "longitude_deg"), *rows])
    out = tmp_path / "mine"
    arguments = ("--images", table, "--root", tmp_path / "pictures", "--encoder", DEFAULT, "--out", out, "--gallery")
    printed = run(*arguments, "--publish", tmp_path / "store", "--activate")
    assert "960 of 961 pictures" in printed
    assert f"published mine in {tmp_path / 'store'} and activated it" in printed
    manifest = open_bundle(out / "mine").manifest
    assert manifest.calibration is not None
    assert manifest.gallery is not None
    assert "961 pictures of pictures.csv" in manifest.domain.training
    with pytest.raises(UsageError, match="has a bundle mine already"):
        run(*arguments, "--publish", tmp_path / "store")
    files = {name: manifest.files[name].sha256 for name in manifest.files if name.endswith(".faiss")}
    run(*arguments, "--beam-width", "48")
    again = open_bundle(out / "mine").manifest
    assert (manifest.default_beam_width, again.default_beam_width) == (64, 48)
    assert {name: again.files[name].sha256 for name in files} == files
    with Locator.open(tmp_path / "store") as locator:
        answers = locator.locate([(tmp_path / "pictures" / name).read_bytes() for name in asked])
    errors = [
        float(great_circle_km(answer.latitude_deg, answer.longitude_deg, *truths[name]))
        for answer, name in zip(answers, asked, strict=True)
        if isinstance(answer, Location)
    ]
    assert len(errors) == len(asked)
    # Places drawn at random on land are some 9,000 km apart; 960 views are some 400 km apart.
    assert np.median(errors) < 600


def test_four_thousand_views_locate_most_of_what_the_trained_bundle_does(tmp_path: Path) -> None:
    run("--views", "4000", "--seed", "2", "--encoder", DEFAULT, "--out", tmp_path / "views")
    assert verify_bundle(tmp_path / "views" / "views").ok
    # 0.727 against 0.991 of 3,000 views: a share of 0.73.
    assert within_200_km(tmp_path / "views" / "views", 400) > 0.65 * within_200_km(DEFAULT, 400)


@pytest.mark.slow
def test_twenty_thousand_views_locate_as_well_as_four_fifths_of_the_trained_bundle(tmp_path: Path) -> None:
    run("--views", "20000", "--seed", "1", "--encoder", DEFAULT, "--out", tmp_path / "views")
    # 0.965 against 0.991 of 3,000 views: a share of 0.97.
    assert within_200_km(tmp_path / "views" / "views", 2000) > 0.8 * within_200_km(DEFAULT, 2000)
