from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from numpy.typing import NDArray
from support.bundles import tiny_encoder

from geosurge.bundle import read_manifest
from geosurge.bundle.manifest import PointEstimator
from geosurge.bundle.verifying import verify_bundle
from geosurge.density import Kernel
from geosurge.errors import ConfigurationError
from geosurge.geodesy import great_circle_km, latlng_to_unit_vector
from geosurge.location import LocateOptions, Location
from geosurge.locator import Locator
from geosurge.search import ReferenceLists
from geosurge_training.building.bundling import write_bundle
from geosurge_training.building.calibrate import calibrate_bundle
from geosurge_training.building.embedded import EmbeddedBatch
from geosurge_training.building.gallery import NEIGHBOURS, encode_references, write_gallery
from geosurge_training.building.kernels import KERNELS
from geosurge_training.data.blue_marble import BlueMarble
from geosurge_training.partitions.adaptive import adaptive_partition
from geosurge_training.recipe import BundleSection

DIMENSION = 48
ABOUT = BundleSection(description="a", can="b", cannot="c", default_beam_width=16)


def places(seed: int, count: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    rng = np.random.default_rng(seed)
    return rng.uniform(40, 55, count), rng.uniform(-5, 20, count)


def embeddings_of(latitude_deg: NDArray[np.float64], longitude_deg: NDArray[np.float64]) -> NDArray[np.float32]:
    """Random Fourier features of the place: near embeddings are near places."""
    rng = np.random.default_rng(0)
    waves = 12.0 * rng.normal(size=(3, DIMENSION))
    rows = np.cos(latlng_to_unit_vector(latitude_deg, longitude_deg) @ waves + rng.uniform(0, 2 * np.pi, DIMENSION))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def batches(seed: int, count: int, *, at_random: bool = False) -> Iterator[EmbeddedBatch]:
    latitude_deg, longitude_deg = places(seed, count)
    shown = places(seed + 1, count) if at_random else (latitude_deg, longitude_deg)
    embeddings = embeddings_of(*shown)
    for start in range(0, count, 100):
        rows = slice(start, start + 100)
        yield EmbeddedBatch(embeddings[rows], latitude_deg[rows], longitude_deg[rows])


PARTITION = adaptive_partition([places(1, 4000)], (8, 8), (600, 150))
LEAVES = (lambda *coordinates: PARTITION.assign(*coordinates)[:, -1], PARTITION.cell_counts[-1])


def build(path: Path, references: Iterator[EmbeddedBatch] | None) -> Path:
    levels = [embeddings_of(level.mean_latitude_deg, level.mean_longitude_deg) for level in PARTITION.levels]
    return write_bundle(
        path,
        PARTITION,
        geographic=levels,
        temperatures=[0.05, 0.05],
        encoder=tiny_encoder(dimension=DIMENSION),
        golden_embeddings=embeddings_of(*places(2, 8)),
        about=ABOUT,
        training="places",
        references=references,
    )


def calibrated(path: Path, point_estimator: PointEstimator | None = None) -> PointEstimator:
    calibrate_bundle(path, batches(3, 300), "places", point_estimator=point_estimator)
    assert verify_bundle(path).ok
    return read_manifest(path).point_estimator


@pytest.fixture(scope="module")
def helpful(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibrated bundle with references that know better than their leaves."""
    path = build(tmp_path_factory.mktemp("gallery") / "helpful", batches(5, 3000))
    calibrated(path)
    return path


def test_references_stand_leaf_by_leaf_beside_their_coordinates(tmp_path: Path) -> None:
    outside = EmbeddedBatch(np.ones((1, DIMENSION), np.float32), np.array([-80.0]), np.array([0.0]))
    info = write_gallery(tmp_path, [outside, *batches(5, 300), outside], *LEAVES, "fp32")
    assert (info.references, info.neighbours) == (300, NEIGHBOURS)
    coordinates = np.load(tmp_path / info.coordinates_file).astype(np.float64)
    leaves = PARTITION.assign(*places(5, 300))[:, -1]
    assert coordinates == pytest.approx(np.stack(places(5, 300), axis=1)[np.argsort(leaves, kind="stable")], abs=1e-5)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["coordinates.npy", "gallery", "references.faiss"]


def test_a_gallery_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no image of the gallery lies in a leaf"):
        write_gallery(tmp_path, [], *LEAVES, "fp32")


@pytest.mark.parametrize(("storage", "within_km"), [("fp32", 0.01), ("fp16", 20.0), ("sq8", 60.0)])
def test_a_reference_is_its_own_nearest_neighbour_as_far_as_it_is_stored(
    tmp_path: Path, storage: Literal["fp32", "fp16", "sq8"], within_km: float
) -> None:
    info = write_gallery(tmp_path, batches(5, 500), *LEAVES, storage)
    embeddings, leaves = embeddings_of(*places(5, 500)), PARTITION.assign(*places(5, 500))[:, -1]
    ids, similarities = ReferenceLists.open(tmp_path / info.file).search(embeddings, leaves[:, np.newaxis].copy(), 1)
    found = np.load(tmp_path / info.coordinates_file)[ids[:, 0]]
    assert great_circle_km(*found.T, *places(5, 500)).max() < within_km
    assert similarities == pytest.approx(1.0, abs=0.02)


def test_a_gallery_that_helps_makes_the_points_and_keeps_the_radii_right(helpful: Path) -> None:
    manifest = read_manifest(helpful)
    assert manifest.point_estimator == "kernel_density"
    assert manifest.gallery is not None
    assert manifest.gallery.to_kernel() in KERNELS
    assert manifest.calibration is not None
    medians = manifest.calibration.median_error_km
    assert set(medians) == {"leaf", "posterior_mean", "kernel_density"}
    assert medians["kernel_density"] < 0.7 * min(medians["leaf"], medians["posterior_mean"])

    truths = places(7, 400)
    with Locator.open(helpful) as locator:
        answers = locator.locate_embeddings(embeddings_of(*truths), [LocateOptions(confidence_level=0.8)] * 400)
    located = [answer for answer in answers if isinstance(answer, Location)]
    points = np.array([(answer.latitude_deg, answer.longitude_deg, answer.radius_km) for answer in located])
    errors = great_circle_km(points[:, 0], points[:, 1], *truths)
    assert np.median(errors) == pytest.approx(medians["kernel_density"], rel=0.4)
    assert np.mean(errors <= points[:, 2]) == pytest.approx(0.8, abs=0.08)


def test_a_gallery_that_does_not_help_is_left_off_unless_asked_for(tmp_path: Path) -> None:
    path = build(tmp_path / "useless", batches(5, 3000, at_random=True))
    assert calibrated(path) in ("leaf", "posterior_mean")
    manifest = read_manifest(path)
    assert manifest.calibration is not None
    assert "kernel_density" in manifest.calibration.median_error_km
    assert calibrated(path, "kernel_density") == "kernel_density"


def test_held_out_images_must_be_enough_and_lie_where_the_cells_are(tmp_path: Path) -> None:
    path = build(tmp_path / "plain", None)
    before = read_manifest(path)
    with pytest.raises(ConfigurationError, match="29 held-out images are too few"):
        calibrate_bundle(path, batches(3, 29), "places")
    elsewhere = [
        EmbeddedBatch(batch.embeddings, batch.latitude_deg - 90, batch.longitude_deg) for batch in batches(3, 90)
    ]
    with pytest.raises(ConfigurationError, match="of none of 90 held-out images does the search reach the leaf"):
        calibrate_bundle(path, elsewhere, "places")
    assert read_manifest(path) == before


def test_no_spot_fits_and_tests(tmp_path: Path) -> None:
    path = build(tmp_path / "plain", None)
    at = np.concatenate([np.arange(50), np.full(30, 50), np.arange(51, 71)])
    latitude_deg, longitude_deg = (values[at] for values in places(3, 71))
    held_out = EmbeddedBatch(embeddings_of(latitude_deg, longitude_deg), latitude_deg, longitude_deg)
    # Two thirds of 100 would end among the 30 of one spot.
    assert calibrate_bundle(path, [held_out], "places").sample_count == 80


def test_a_bundle_without_a_gallery_is_calibrated_with_what_it_has(tmp_path: Path) -> None:
    path = build(tmp_path / "plain", None)
    assert read_manifest(path).gallery is None
    for asked in ("leaf", "posterior_mean"):
        assert calibrated(path, asked) == asked  # type: ignore[arg-type]
    calibration = read_manifest(path).calibration
    assert calibration is not None
    medians = calibration.median_error_km
    assert calibrated(path) == min(medians, key=lambda name: medians[name])
    with pytest.raises(ConfigurationError, match=r"bundle\.gallery_size"):
        calibrated(path, "kernel_density")


def test_the_kernels_that_are_tried_hold_the_published_weights_and_no_two_alike() -> None:
    assert len(set(KERNELS)) == len(KERNELS)
    assert any(kernel.power == Kernel().power and kernel.share == 1.0 and kernel.snap for kernel in KERNELS)


def test_references_are_the_first_training_images(world: BlueMarble) -> None:
    encoder = tiny_encoder()
    found = list(encode_references(world, encoder, 300))
    assert sum(len(batch.embeddings) for batch in found) == 300
    first = world.train_batch(0, 256)
    assert np.array_equal(found[0].latitude_deg, first.latitude_deg)
    assert found[0].embeddings == pytest.approx(encoder.encode(first.pixels.numpy()), abs=1e-5)
