from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError
from support.bundles import make_bundle

from geosurge.bundle import Bundle, finish_bundle, open_bundle, read_manifest
from geosurge.bundle.manifest import CalibrationInfo, FileInfo, GalleryInfo, Manifest, parse_manifest, render_manifest
from geosurge.bundle.verifying import verify_bundle
from geosurge.cells import CellTree
from geosurge.density import Kernel, reference_weights
from geosurge.errors import BundleCorruptError, BundleInconsistentError, BundlePartialError, UsageError
from geosurge.gallery import SEARCHED_LEAVES, Gallery
from geosurge.geodesy import great_circle_km, latlng_to_unit_vector, unit_vector_to_latlng
from geosurge.location import LocateOptions, Location
from geosurge.locator import Locator
from geosurge.posterior import LeafShapes, Posteriors, infer, leaf_shapes
from geosurge_training.building.indexing import write_reference_lists

LEVEL_COUNTS = (4, 12, 120)
DIMENSION = 16
REFERENCES = 600
FILE, COORDINATES = "gallery/references.faiss", "gallery/coordinates.npy"
INFO = GalleryInfo(
    references=REFERENCES,
    file=FILE,
    coordinates_file=COORDINATES,
    storage="fp32",
    neighbours=8,
    power=6.0,
    share=0.5,
    spreads=4.0,
    snap=False,
)


def unit_rows(seed: int, count: int) -> NDArray[np.float32]:
    rows = np.random.default_rng(seed).normal(size=(count, DIMENSION))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


REFERENCE_EMBEDDINGS = unit_rows(1, REFERENCES)
QUERIES = unit_rows(2, 20)
# Two leaves of three have references.
REFERENCE_LEAVES = np.sort(3 * np.random.default_rng(3).integers(0, 40, REFERENCES) + np.arange(REFERENCES) % 2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a gallery that makes its points."""
    path = make_bundle(tmp_path_factory.mktemp("gallery") / "whole", level_counts=LEVEL_COUNTS, dimension=DIMENSION)
    with CellTree.open(path / "cells.lmdb") as tree:
        coordinates = np.stack([tree.leaves.latitude_deg, tree.leaves.longitude_deg], axis=1)[REFERENCE_LEAVES]
        around = coordinates + np.random.default_rng(4).normal(0.0, 0.5, (REFERENCES, 2))
        around = np.stack([np.clip(around[:, 0], -90, 90), (around[:, 1] + 180) % 360 - 180], axis=1).astype("<f4")
        is_inside = tree.find_leaves(*around.astype(np.float64).T) == REFERENCE_LEAVES
        assert is_inside.mean() > 0.5
        around[~is_inside] = coordinates[~is_inside]
    (path / "gallery").mkdir()
    write_lists(path, REFERENCE_LEAVES)
    np.save(path / COORDINATES, around)
    return refinish(path, point_estimator="kernel_density", gallery=INFO)


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "copy")


def write_lists(path: Path, leaves: NDArray[np.int64], leaf_count: int = LEVEL_COUNTS[-1]) -> None:
    write_reference_lists(
        path / FILE,
        REFERENCE_EMBEDDINGS[: len(leaves)],
        leaves=leaves,
        order=np.argsort(leaves, kind="stable"),
        leaf_count=leaf_count,
        storage="fp32",
    )


def refinish(path: Path, **changes: object) -> Path:
    """Makes hashes and manifest fit whatever was changed, as a builder with a bug would."""
    finish_bundle(path, read_manifest(path).model_copy(update=changes))
    return path


def posteriors_of(locator: Locator) -> tuple[LeafShapes, Posteriors]:
    columns = locator.tree.leaves
    leaves = leaf_shapes(columns.latitude_deg, columns.longitude_deg, columns.spread_km, columns.area_km2)
    hits = locator.index.exact(QUERIES, k=LEVEL_COUNTS[-1])
    return leaves, infer(hits.ordinals, hits.scores, leaves, locator.calibration.temperature, "leaf")


def located(locator: Locator, options: LocateOptions) -> list[Location]:
    answers = locator.locate_embeddings(QUERIES, [options] * len(QUERIES))
    assert all(isinstance(answer, Location) for answer in answers)
    return [answer for answer in answers if isinstance(answer, Location)]


def test_a_bundle_with_a_gallery_verifies_and_names_its_files(whole: Path) -> None:
    assert verify_bundle(whole).ok, verify_bundle(whole).problems
    assert {FILE, COORDINATES} < set(read_manifest(whole).files)


def test_neighbours_are_the_nearest_references_of_the_likeliest_leaves(whole: Path) -> None:
    coordinates = np.load(whole / COORDINATES)
    with Locator.open(whole) as locator:
        leaves, posteriors = posteriors_of(locator)
        assert locator.gallery is not None
        components = locator.gallery.components(QUERIES, posteriors, leaves)
        for row, query in enumerate(QUERIES):
            searched = posteriors.ordinals[row, :SEARCHED_LEAVES]
            assert components.leaves[row] == pytest.approx(leaves.unit_vectors[searched])
            inside = np.flatnonzero(np.isin(REFERENCE_LEAVES, searched))
            assert 0 < len(inside) < REFERENCES
            nearest = inside[np.argsort(-(REFERENCE_EMBEDDINGS[inside] @ query))][: INFO.neighbours]
            assert components.similarities[row] == pytest.approx(REFERENCE_EMBEDDINGS[nearest] @ query, abs=1e-6)
            expected = latlng_to_unit_vector(coordinates[nearest, 0], coordinates[nearest, 1])
            assert components.references[row] == pytest.approx(expected, abs=1e-12)


def test_missing_neighbours_weigh_nothing(whole: Path) -> None:
    with Locator.open(whole) as locator:
        leaves, posteriors = posteriors_of(locator)
        # Every third leaf is empty.
        empty = Posteriors(**(vars(posteriors) | {"ordinals": np.full((len(QUERIES), 1), 2)}))
        assert locator.gallery is not None
        components = locator.gallery.components(QUERIES, empty, leaves)
        assert not reference_weights(components.similarities, INFO.power).any()


def test_points_move_and_radii_hold_the_mass_around_them(whole: Path) -> None:
    options = LocateOptions(exact=True)
    with Locator.open(whole) as locator, Locator.open(whole, point_estimator="leaf") as plain:
        answers, leaf_answers = located(locator, options), located(plain, options)
        leaves, posteriors = posteriors_of(locator)
        assert locator.gallery is not None
        points = locator.gallery.points(QUERIES, posteriors, leaves)
        around = posteriors.around(points, leaves)
    expected = np.stack(unit_vector_to_latlng(points), axis=1)
    found = np.array([(answer.latitude_deg, answer.longitude_deg) for answer in answers])
    assert great_circle_km(*found.T, *expected.T) == pytest.approx(0.0, abs=1e-3)
    # The calibration of the bundle is the identity.
    held = around.mass_within(np.array([answer.radius_km for answer in answers]))
    assert (held >= options.confidence_level - 1e-5).all()
    for answer, leaf_answer in zip(answers, leaf_answers, strict=True):
        assert answer.alternatives == leaf_answer.alternatives
    moved = [
        (answer.latitude_deg, answer.longitude_deg) != (leaf_answer.latitude_deg, leaf_answer.longitude_deg)
        for answer, leaf_answer in zip(answers, leaf_answers, strict=True)
    ]
    assert any(moved)


@pytest.mark.parametrize("temperature", [0.02, 0.1, 1.0])
def test_a_point_depends_on_its_query_alone(copy: Path, temperature: float) -> None:
    """Neither on the other queries, nor on how many leaves are shown, however few leaves the posterior needs."""
    calibration = CalibrationInfo(
        temperature=temperature,
        confidence_levels=(),
        posterior_masses=(),
        expected_calibration_error=0.1,
        sample_count=1,
        source="a test",
    )
    with Locator.open(refinish(copy, calibration=calibration)) as locator:
        together = located(locator, LocateOptions(exact=True, top_k=1))
        alone = [
            locator.locate_embeddings(QUERIES[row : row + 1], [LocateOptions(exact=True, top_k=9)])[0]
            for row in range(len(QUERIES))
        ]
    for first, second in zip(together, alone, strict=True):
        assert isinstance(second, Location)
        found = first.latitude_deg, first.longitude_deg
        assert great_circle_km(*found, second.latitude_deg, second.longitude_deg) == pytest.approx(0.0, abs=0.01)


def test_a_region_restricts_the_references_too(whole: Path) -> None:
    with Locator.open(whole) as locator:
        token = locator.tree.tokens(1, np.array([0]))[0]
        inside = np.isin(REFERENCE_LEAVES, np.arange(*locator.tree.leaf_range(1, 0)))
        assert locator.gallery is not None
        locator.gallery.info = INFO.with_kernel(Kernel(power=6.0, share=1.0, spreads=0.01))
        coordinates = np.load(whole / COORDINATES)[inside]
        for answer in located(locator, LocateOptions(region_tokens=(token,))):
            distances = great_circle_km(answer.latitude_deg, answer.longitude_deg, *coordinates.T)
            assert distances.min() < 1.0


def test_files_may_be_removed_once_the_bundle_is_assembled(copy: Path) -> None:
    with Locator.assemble(open_bundle(copy), None) as locator:
        before = located(locator, LocateOptions())
        shutil.rmtree(copy)
        again = located(locator, LocateOptions())
        assert [a.latitude_deg for a in again] == [b.latitude_deg for b in before]


@pytest.mark.parametrize("file", [FILE, COORDINATES])
def test_damage_is_found_in_its_file(copy: Path, file: str) -> None:
    data = bytearray((copy / file).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / file).write_bytes(data)
    report = verify_bundle(copy)
    assert [problem.file for problem in report.problems] == [file]
    with pytest.raises(BundleCorruptError, match=file):
        Locator.open(copy)
    (copy / file).unlink()
    with pytest.raises(BundlePartialError, match=file):
        open_bundle(copy)


def test_galleries_that_do_not_fit_their_bundle_are_found_in_their_file(copy: Path) -> None:
    def check(message: str, file: str) -> None:
        problem = verify_bundle(refinish(copy)).problems[0]
        assert problem.file == file
        assert isinstance(problem.error, BundleInconsistentError | BundleCorruptError)
        with pytest.raises(type(problem.error), match=message):
            Locator.open(copy)

    good = {file: (copy / file).read_bytes() for file in (FILE, COORDINATES)}
    write_lists(copy, REFERENCE_LEAVES, LEVEL_COUNTS[-1] + 1)
    check("has 121 lists where the manifest says 120", FILE)
    write_lists(copy, REFERENCE_LEAVES[:-1])
    check("has 599 references where the manifest says 600", FILE)
    (copy / FILE).write_bytes(b"not an index")
    check("not a FAISS index", FILE)
    shutil.copy(copy / "level-1.faiss", copy / FILE)
    check("references need lists", FILE)
    shutil.copy(copy / "level-3.faiss", copy / FILE)
    check("references where the manifest says", FILE)
    (copy / FILE).write_bytes(good[FILE])
    for coordinates, message in (
        (np.zeros((REFERENCES, 3), np.float32), r"must be float32 of \(600, 2\)"),
        (np.zeros((REFERENCES, 2)), "must be float32"),
        (np.full((REFERENCES, 2), 91, np.float32), "off the globe"),
        (np.full((REFERENCES, 2), np.nan, np.float32), "off the globe"),
    ):
        np.save(copy / COORDINATES, coordinates)
        check(message, COORDINATES)
    np.save(copy / COORDINATES, np.array([[None]]), allow_pickle=True)
    check("not a numpy array", COORDINATES)
    (copy / COORDINATES).write_bytes(good[COORDINATES])
    assert verify_bundle(refinish(copy)).ok


def test_references_out_of_the_order_of_their_leaves_are_refused(copy: Path) -> None:
    write_reference_lists(
        copy / FILE,
        REFERENCE_EMBEDDINGS,
        leaves=REFERENCE_LEAVES,
        order=np.arange(REFERENCES)[::-1],
        leaf_count=LEVEL_COUNTS[-1],
        storage="fp32",
    )
    with pytest.raises(BundleInconsistentError, match="where the ordinals 0 to"):
        Gallery.open(open_bundle(refinish(copy)))


def test_a_reference_in_the_list_of_another_leaf_is_found(copy: Path) -> None:
    coordinates = np.load(copy / COORDINATES)
    row = int(np.flatnonzero(np.diff(REFERENCE_LEAVES))[5])
    coordinates[[row, row + 1]] = coordinates[[row + 1, row]]
    np.save(copy / COORDINATES, coordinates)
    (problem,) = verify_bundle(refinish(copy)).problems
    assert problem.file == COORDINATES
    lies, stands = REFERENCE_LEAVES[row + 1], REFERENCE_LEAVES[row]
    expected = f"reference {row} lies in leaf {lies} and stands in the list of leaf {stands}"
    assert expected in str(problem.error)


def test_a_gallery_is_checked_wherever_its_files_are_and_whatever_lies_beside_them(copy: Path) -> None:
    (copy / "gallery" / "notes.txt").write_text("not listed")
    np.save(copy / COORDINATES, np.zeros((REFERENCES, 3), np.float32))
    manifest = read_manifest(copy)
    size = (copy / COORDINATES).stat().st_size
    digest = hashlib.sha256((copy / COORDINATES).read_bytes()).hexdigest()
    files = manifest.files | {COORDINATES: FileInfo(size=size, sha256=digest)}
    (copy / "manifest.json").write_bytes(render_manifest(manifest.model_copy(update={"files": files}))[1])
    assert [problem.file for problem in verify_bundle(copy).problems] == ["gallery/notes.txt", COORDINATES]


def test_manifests_without_a_gallery_are_written_as_before(whole: Path, tmp_path: Path) -> None:
    plain = read_manifest(make_bundle(tmp_path / "plain"))
    assert b"gallery" not in render_manifest(plain)[1]
    assert b"median_error_km" not in render_manifest(plain)[1]
    kept = read_manifest(whole)
    assert parse_manifest(render_manifest(kept)[1], "manifest.json") == kept
    with pytest.raises(ValidationError, match="needs a gallery"):
        Manifest.model_validate(dict(plain) | {"point_estimator": "kernel_density"})


def test_a_gallery_that_makes_no_points_is_not_opened_but_can_be_asked_for(copy: Path, tmp_path: Path) -> None:
    refinish(copy, point_estimator="posterior_mean")
    with Locator.open(copy) as locator:
        assert locator.gallery is None
    with Locator.open(copy, point_estimator="kernel_density") as locator:
        assert locator.gallery is not None
        assert locator.calibration.confidence_levels == ()
    plain = make_bundle(tmp_path / "plain")
    with pytest.raises(UsageError, match="has no gallery"):
        Locator.open(plain, point_estimator="kernel_density")
    with pytest.raises(BundleInconsistentError, match="has no gallery"):
        Gallery.open(Bundle(plain, read_manifest(plain)))
