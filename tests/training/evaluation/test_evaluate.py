"""Evaluations of small bundles, against distances, places and searches computed in other ways."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import s2sphere
from PIL import Image
from support.bad_archive import picture
from support.bundles import make_bundle, tiny_encoder
from typer.testing import CliRunner

from geosurge.errors import ConfigurationError, EncoderMissingError, UsageError
from geosurge.location import LocateOptions, Location
from geosurge.locator import Locator
from geosurge_training.cli import app
from geosurge_training.evaluation.bootstrap import Bootstrap
from geosurge_training.evaluation.datasets import Dataset, open_dataset
from geosurge_training.evaluation.evaluate import Evaluation, EvaluationOptions, evaluate_images
from geosurge_training.places import nearest_places

COUNT = 60


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bundles") / "tiny"
    return make_bundle(
        directory, level_counts=(5, 15, 60), encoder=tiny_encoder(), calibration_temperature=1.7, name="tiny"
    )


@pytest.fixture(scope="module")
def table(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of noise, a third each in the answer's leaf, another leaf and anywhere; one is no picture."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(8)
    for number in range(COUNT):
        colours = rng.integers(0, 256, (3, 3, 3)).astype(np.uint8)
        Image.fromarray(colours).resize((64, 64)).save(folder / f"{number}.png")
    with Locator.open(bundle) as locator:
        answers = locator.locate([folder / f"{number}.png" for number in range(COUNT)], LocateOptions(exact=True))
        leaves = locator.tree.leaves
    with (folder / "truth.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "latitude_deg", "longitude_deg"])
        for number, answer in enumerate(answers):
            assert isinstance(answer, Location)
            leaf = int(rng.integers(0, len(leaves.latitude_deg)))
            places = (
                (answer.alternatives[0].latitude_deg, answer.alternatives[0].longitude_deg),
                (leaves.latitude_deg[leaf], leaves.longitude_deg[leaf]),
                (math.degrees(math.asin(rng.uniform(-1, 1))), rng.uniform(-180, 180)),
            )
            rows.writerow([f"{number}.png", *map(float, places[number % 3])])
        rows.writerow(["broken.png", 0, 0])
        rows.writerow(["missing.png", 0, 0])
    (folder / "broken.png").write_bytes(b"no picture")
    return folder / "truth.csv"


@pytest.fixture(scope="module")
def evaluation(bundle: Path, table: Path) -> Evaluation:
    return evaluate_images(bundle, open_dataset(table), EvaluationOptions(exact=True, bootstrap=Bootstrap(100)))


@pytest.fixture(scope="module")
def answers(bundle: Path, table: Path) -> list[tuple[Location, float, float]]:
    """Answers with all their leaves, and the truths."""
    dataset = open_dataset(table)
    found = []
    with Locator.open(bundle) as locator:
        located = locator.locate(dataset.images[:COUNT], LocateOptions(exact=True, top_k=100))
        for answer, latitude_deg, longitude_deg in zip(
            located, dataset.latitude_deg, dataset.longitude_deg, strict=False
        ):
            assert isinstance(answer, Location)
            found.append((answer, float(latitude_deg), float(longitude_deg)))
    return found


def vector(latitude_deg: float, longitude_deg: float) -> tuple[float, float, float]:
    latitude, longitude = math.radians(latitude_deg), math.radians(longitude_deg)
    return math.cos(latitude) * math.cos(longitude), math.cos(latitude) * math.sin(longitude), math.sin(latitude)


def distance_km(first: tuple[float, float], second: tuple[float, float]) -> float:
    """By the angle between two vectors: atan2 of the lengths of their cross and dot products."""
    (a, b, c), (x, y, z) = vector(*first), vector(*second)
    cross = math.hypot(b * z - c * y, c * x - a * z, a * y - b * x)
    return 6371.0088 * math.atan2(cross, a * x + b * y + c * z)


def holds(token: str, latitude_deg: float, longitude_deg: float) -> bool:
    point = s2sphere.CellId.from_lat_lng(s2sphere.LatLng.from_degrees(latitude_deg, longitude_deg))
    return bool(s2sphere.CellId.from_token(token).contains(point))


def test_distances_and_scores_equal_those_of_another_implementation(
    evaluation: Evaluation, answers: list[tuple[Location, float, float]]
) -> None:
    errors = [distance_km((answer.latitude_deg, answer.longitude_deg), truth) for answer, *truth in answers]
    np.testing.assert_allclose(evaluation.outcomes.error_km, errors, rtol=1e-9, atol=1e-9)
    figures = evaluation.figures
    assert figures.count == COUNT
    for threshold, share in figures.within_km.items():
        assert share.value == sum(error <= threshold for error in errors) / COUNT
    assert figures.mean_km.value == pytest.approx(math.fsum(errors) / COUNT)
    ordered = sorted(errors)
    assert figures.median_km.value == pytest.approx((ordered[COUNT // 2 - 1] + ordered[COUNT // 2]) / 2)
    scores = [5000 * math.exp(-error / 1492.7) for error in errors]
    assert figures.geoscore.value == pytest.approx(math.fsum(scores) / COUNT)
    inside = [error <= answer.radius_km for error, (answer, _, _) in zip(errors, answers, strict=True)]
    assert figures.radius_coverage.value == sum(inside) / COUNT


def test_searches_equal_a_walk_through_the_leaves_from_the_likeliest_on(
    bundle: Path, evaluation: Evaluation, answers: list[tuple[Location, float, float]]
) -> None:
    leaves = evaluation.outcomes.leaves
    assert leaves is not None
    expected, correct = [], []
    with Locator.open(bundle) as locator:
        areas = locator.tree.leaves.area_km2
        for answer, *truth in answers:
            searched = 0.0
            for cell in sorted(answer.alternatives, key=lambda cell: cell.probability, reverse=True):
                searched += areas[locator.tree.find(cell.token, finest=True).ordinal]
                if holds(cell.token, *truth):
                    break
            else:
                searched = math.inf
            expected.append(searched)
            correct.append(holds(answer.alternatives[0].token, *truth))
    assert 0 < sum(map(math.isinf, expected)) < COUNT // 2
    assert any(correct)
    np.testing.assert_allclose(leaves.search_area_km2, expected, rtol=1e-9)
    assert leaves.correct.tolist() == correct
    assert leaves.probability.tolist() == [answer.probability for answer, _, _ in answers]


def test_places_are_those_nearest_to_estimates_and_truths(
    evaluation: Evaluation, answers: list[tuple[Location, float, float]]
) -> None:
    hits = 0
    for answer, latitude_deg, longitude_deg in answers:
        (estimate,) = nearest_places(answer.latitude_deg, answer.longitude_deg)
        (truth,) = nearest_places(latitude_deg, longitude_deg)
        hits += estimate.country_code == truth.country_code
    assert 0 < hits < COUNT
    assert evaluation.figures.place_accuracy["country"].value == hits / COUNT


def test_bad_images_are_counted_by_their_reasons_and_cost_no_other(evaluation: Evaluation) -> None:
    assert evaluation.failures == {"IMAGE_NOT_DECODABLE": 1, "INPUT_NOT_READABLE": 1}
    assert evaluation.failed == 2
    assert evaluation.figures.count == COUNT


def test_what_a_beam_misses_is_never_found_and_what_it_reaches_takes_no_more_area(
    bundle: Path, table: Path, evaluation: Evaluation
) -> None:
    leaves = evaluate_images(bundle, open_dataset(table), EvaluationOptions(bootstrap=Bootstrap(100))).outcomes.leaves
    exact = evaluation.outcomes.leaves
    assert leaves is not None
    assert exact is not None
    reached = np.isfinite(leaves.search_area_km2)
    assert 0 < reached.sum() < np.isfinite(exact.search_area_km2).sum()
    assert (leaves.search_area_km2[reached] <= exact.search_area_km2[reached] * (1 + 1e-12)).all()


def test_crops_and_point_estimators_are_those_of_the_locator(bundle: Path, table: Path) -> None:
    dataset = open_dataset(table)
    options = EvaluationOptions(point_estimator="posterior_mean", crops=5, bootstrap=Bootstrap(100))
    evaluation = evaluate_images(bundle, dataset, options)
    with Locator.open(bundle, point_estimator="posterior_mean") as locator:
        located = locator.locate(dataset.images[:COUNT], crops=5)
    places = [(answer.latitude_deg, answer.longitude_deg) for answer in located if isinstance(answer, Location)]
    truths = zip(dataset.latitude_deg.tolist(), dataset.longitude_deg.tolist(), strict=True)
    errors = [distance_km(place, truth) for place, truth in zip(places, truths, strict=False)]
    np.testing.assert_allclose(evaluation.outcomes.error_km, errors, rtol=1e-6, atol=1e-3)
    assert (evaluation.to_dict()["crops"], evaluation.to_dict()["point_estimator"]) == (5, "posterior_mean")
    assert evaluation.outcomes.leaves is not None
    probabilities = [answer.probability for answer in located if isinstance(answer, Location)]
    np.testing.assert_allclose(evaluation.outcomes.leaves.probability, probabilities, rtol=1e-6)
    with pytest.raises(UsageError, match="has no gallery"):
        evaluate_images(bundle, dataset, EvaluationOptions(point_estimator="kernel_density"))


def test_ones_own_heic_is_read(bundle: Path, tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"{number}.heic").write_bytes(picture(number, "HEIF"))
    heic = Dataset("phone", [tmp_path / "0.heic", tmp_path / "1.heic"], np.zeros(2), np.zeros(2))
    assert len(evaluate_images(bundle, heic, EvaluationOptions(bootstrap=Bootstrap(100))).outcomes.error_km) == 2


def test_a_number_of_crops_that_nobody_makes_is_refused(bundle: Path) -> None:
    result = CliRunner().invoke(app, ["evaluate", str(bundle), "--crops", "7"])
    assert isinstance(result.exception, UsageError)
    assert "1, 5 or 10" in str(result.exception)


def test_nothing_located_is_an_error_and_so_is_a_bundle_without_an_encoder(bundle: Path, tmp_path: Path) -> None:
    nothing = Dataset("none", [tmp_path / "a.jpg"], np.zeros(1), np.zeros(1))
    with pytest.raises(ConfigurationError, match="none of 1 pictures could be located"):
        evaluate_images(bundle, nothing)
    without = make_bundle(tmp_path / "bare", level_counts=(4, 9, 20))
    with pytest.raises(EncoderMissingError):
        evaluate_images(without, nothing)


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, ["evaluate", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def check_estimate(figure: dict[str, Any]) -> None:
    low, high = figure["interval"]
    assert low <= high
    assert math.isfinite(figure["value"])


def test_the_command_prints_every_metric_with_its_interval(bundle: Path, table: Path, tmp_path: Path) -> None:
    output = run(bundle, "--dataset", table, "--resamples", "50", "--output", tmp_path / "out", "--json")
    (line,) = output.splitlines()
    figures = json.loads(line)
    assert figures == json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert (figures["count"], figures["failed"]) == (COUNT, 2)
    assert list(figures["within_km"]) == ["1", "25", "200", "750", "2500"]
    assert list(figures["place_accuracy"]) == ["country", "region", "subregion", "city"]
    for name in ("median_km", "mean_km", "geoscore", "recall_vs_area", "calibration", "radius_coverage"):
        check_estimate(figures[name])
    for share in [*figures["within_km"].values(), *figures["place_accuracy"].values()]:
        check_estimate(share)
    for point in figures["recall_vs_area"]["curve"]:
        check_estimate(point)
    assert sum(part["count"] for part in figures["calibration"]["bins"]) == COUNT
    assert figures["radius_coverage"]["confidence_level"] == 0.9
    assert figures["bootstrap"] == {"resamples": 50, "confidence_level": 0.95, "seed": 7}
    again = run(bundle, "--dataset", table, "--resamples", "50", "--json")
    assert json.loads(again) == figures


def test_a_benchmark_is_printed_beside_published_results(bundle: Path, table: Path, tmp_path: Path) -> None:
    lines = ["IMG_ID,LAT,LON"] + [f"{row}.png,10,20" for row in range(237)]
    (tmp_path / "im2gps.csv").write_text("\n".join(lines))
    output = run(bundle, "--dataset", tmp_path / "im2gps.csv", "--images", table.parent, "--benchmark", "im2gps")
    assert "Published on Im2GPS" in output
    assert "93.2" in output
    assert f"{237 - COUNT}" in output  # of which the table says that they are missing
    with pytest.raises(UsageError, match="--dataset"):
        CliRunner().invoke(app, ["evaluate", str(bundle), "--benchmark", "im2gps"], catch_exceptions=False)
    with pytest.raises(ConfigurationError, match="--dataset"):
        CliRunner().invoke(app, ["evaluate", str(bundle)], catch_exceptions=False)
