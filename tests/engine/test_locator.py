from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import h3
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from support.bundles import geographic_embeddings, make_bundle, make_levels

from geosurge import s2
from geosurge.bundle import finish_bundle, read_manifest
from geosurge.bundle.manifest import Manifest, decode_embedding, render_manifest
from geosurge.encoder import EncoderConfig, FusionConfig, ImageEncoder, SegmentationConfig, VisionConfig
from geosurge.errors import (
    BundleCorruptError,
    BundleEncoderMismatchError,
    BundleError,
    BundleInconsistentError,
    BundlePartialError,
    BundleSchemaError,
    EmbeddingInvalidError,
    EncoderMissingError,
    ImageEmptyError,
    ImageNotDecodableError,
    ImageTooLargeError,
    InputNotReadableError,
    OptionOutOfRangeError,
    RegionCellUnknownError,
    RegionEmptyError,
)
from geosurge.geodesy import great_circle_km
from geosurge.images import ImageLimits
from geosurge.location import LocateOptions, Location, Timings
from geosurge.locator import MAX_BEAM_WIDTH, MAX_REGION_TOKENS, MAX_TOP_K, REACHED_LEAVES, Locator
from geosurge.posterior import leaf_posterior
from geosurge.search import LeafHits
from geosurge.store import activate, publish

LEVEL_COUNTS = (4, 9, 40)
DIMENSION = 16
LEVELS = len(LEVEL_COUNTS)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundles") / "tiny", level_counts=LEVEL_COUNTS, dimension=DIMENSION)


@pytest.fixture(scope="module")
def locator(bundle: Path) -> Iterator[Locator]:
    with Locator.open(bundle) as opened:
        yield opened


def tiny_encoder(seed: int = 0) -> ImageEncoder:
    torch.manual_seed(seed)
    resnet = {
        "model_type": "resnet",
        "layer_type": "basic",
        "embedding_size": 8,
        "hidden_sizes": [8, 8],
        "depths": [1, 1],
    }
    segformer = {
        "model_type": "segformer",
        "num_encoder_blocks": 2,
        "hidden_sizes": [8, 8],
        "depths": [1, 1],
        "num_attention_heads": [1, 1],
        "sr_ratios": [2, 1],
        "patch_sizes": [7, 3],
        "strides": [4, 2],
        "mlp_ratios": [2, 2],
        "decoder_hidden_size": 8,
        "num_labels": 3,
    }
    config = EncoderConfig(
        VisionConfig(resnet, 32),
        SegmentationConfig(segformer, 32, 3),
        FusionConfig(dimension=DIMENSION, width=16, latent_width=8, heads=2, blocks=1),
    )
    return ImageEncoder(config).eval()


@pytest.fixture(scope="module")
def image_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bundles") / "seeing"
    return make_bundle(directory, level_counts=LEVEL_COUNTS, encoder=tiny_encoder(), name="seeing")


@pytest.fixture(scope="module")
def image_locator(image_bundle: Path) -> Iterator[Locator]:
    with Locator.open(image_bundle) as opened:
        yield opened


def queries(count: int, seed: int = 5) -> NDArray[np.float32]:
    """Embeddings of random leaves, blurred until neighbours take part in the posterior."""
    rng = np.random.default_rng(seed)
    leaves = geographic_embeddings([rows.parents for rows in make_levels(LEVEL_COUNTS)[0]], DIMENSION)[-1]
    blurred = leaves[rng.integers(0, len(leaves), count)] + 0.15 * rng.standard_normal((count, DIMENSION))
    return np.asarray(blurred / np.linalg.norm(blurred, axis=1, keepdims=True), dtype=np.float32)


def picture(seed: int = 0, side: int = 48) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def locations(results: list[Location | Exception]) -> list[Location]:
    assert all(isinstance(result, Location) for result in results), results
    return [replace(result, timings=Timings()) for result in results if isinstance(result, Location)]


def locate_one(locator: Locator, embedding: NDArray[np.float32], **options: object) -> Location:
    return locations(locator.locate_embeddings(embedding[None], [LocateOptions(**options)]))[0]


def textbook_posterior(locator: Locator, embedding: NDArray[np.float32]) -> NDArray[np.float64]:
    """Leaf probabilities by the product of each level's softmax, in float64 and without an index."""
    parents = [locator.tree.parents(level) for level in range(1, LEVELS + 1)]
    log_scores = np.zeros(1)
    for level, cells in enumerate(geographic_embeddings(parents, DIMENSION)):
        similarities = cells.astype(np.float64) @ embedding.astype(np.float64) / locator.manifest.temperatures[level]
        own = similarities - similarities.max() - math.log(np.exp(similarities - similarities.max()).sum())
        log_scores = own + (log_scores[parents[level]] if level else 0.0)
    weights = np.exp(log_scores - log_scores.max())
    return weights / weights.sum()


def test_every_part_of_an_answer_agrees_with_the_textbook_posterior(locator: Locator) -> None:
    for embedding in queries(10):
        location = locate_one(locator, embedding, exact=True, top_k=7)
        expected = textbook_posterior(locator, embedding)
        order = np.argsort(-expected)
        assert location.probability == pytest.approx(expected[order[0]], rel=1e-3)
        tokens = locator.tree.tokens(LEVELS, order[:7])
        assert [alternative.token for alternative in location.alternatives] == tokens
        assert [alternative.probability for alternative in location.alternatives] == pytest.approx(
            expected[order[:7]].tolist(), rel=1e-3
        )
        ancestors = locator.tree.ancestors(np.arange(LEVEL_COUNTS[-1]))
        for level, cell in enumerate(location.path, start=1):
            own = ancestors[order[0], level - 1]
            assert (cell.level, cell.token) == (level, locator.tree.tokens(level, [own])[0])
            assert cell.probability == pytest.approx(expected[ancestors[:, level - 1] == own].sum(), rel=1e-3)


def test_the_path_narrows_down_to_the_first_alternative(locator: Locator) -> None:
    for location in locations(locator.locate_embeddings(queries(20), [LocateOptions()] * 20)):
        assert [cell.level for cell in location.path] == [1, 2, 3]
        masses = [cell.probability for cell in location.path]
        assert masses == sorted(masses, reverse=True)
        assert location.path[-1].token == location.alternatives[0].token
        assert location.path[-1].probability == pytest.approx(location.probability)


def test_the_beam_at_full_width_equals_exact(locator: Locator) -> None:
    embeddings = queries(25)
    width = max(LEVEL_COUNTS)
    beam = locations(locator.locate_embeddings(embeddings, [LocateOptions(beam_width=width, top_k=20)] * 25))
    exact = locations(locator.locate_embeddings(embeddings, [LocateOptions(exact=True, top_k=20)] * 25))
    for one, other in zip(beam, exact, strict=True):
        assert one.radius_km == pytest.approx(other.radius_km, rel=1e-3)
        assert one.probability == pytest.approx(other.probability, rel=1e-5)
        assert [a.token for a in one.alternatives] == [a.token for a in other.alternatives]
        assert [a.probability for a in one.alternatives] == pytest.approx(
            [a.probability for a in other.alternatives], rel=1e-4
        )
        assert one.credible_region.tokens == other.credible_region.tokens
        assert (one.place, one.h3_cell, one.index_version) == (other.place, other.h3_cell, other.index_version)


def test_a_beam_is_never_narrower_than_the_calibrated_one(tmp_path: Path) -> None:
    """A beam of one would be certain of leaves that share their probability with others."""
    with Locator.open(make_bundle(tmp_path / "bushy", level_counts=(40, 60, 200), dimension=8)) as bushy:
        embeddings = np.random.default_rng(0).standard_normal((30, 8)).astype(np.float32)
        usual = locations(bushy.locate_embeddings(embeddings, [LocateOptions()] * 30))
        narrow = locations(bushy.locate_embeddings(embeddings, [LocateOptions(beam_width=1)] * 30))
        wide = locations(bushy.locate_embeddings(embeddings, [LocateOptions(beam_width=60)] * 30))
        exact = locations(bushy.locate_embeddings(embeddings, [LocateOptions(exact=True)] * 30))
    assert narrow == usual
    assert wide != usual
    for one, other in zip(wide, exact, strict=True):
        assert one.probability == pytest.approx(other.probability, rel=1e-4)


def test_large_batches_are_cut_for_the_beam_and_for_the_scan(locator: Locator, monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings = queries(10)
    sizes: dict[str, list[int]] = {"search": [], "exact": []}

    def spy(name: str) -> None:
        method = getattr(locator.index, name)

        def counted(rows: NDArray[np.float32], **options: Any) -> LeafHits:
            sizes[name].append(len(rows))
            hits: LeafHits = method(rows, **options)
            return hits

        monkeypatch.setattr(locator.index, name, counted)

    spy("search")
    spy("exact")
    for options, scores in ((LocateOptions(), REACHED_LEAVES), (LocateOptions(exact=True), LEVEL_COUNTS[-1])):
        whole = locations(locator.locate_embeddings(embeddings, [options] * 10))
        with monkeypatch.context() as patch:
            patch.setattr("geosurge.locator._MAX_SCORES", 4 * scores)
            parts = locations(locator.locate_embeddings(embeddings, [options] * 10))
        assert [one.path[-1].token for one in parts] == [one.path[-1].token for one in whole]
    assert sizes == {"search": [10, 4, 4, 2], "exact": [10, 4, 4, 2]}


def test_the_search_finds_the_leaves_that_answers_are_made_of(locator: Locator) -> None:
    embeddings = queries(6)
    region = locator.tree.tokens(1, [2])
    for options in (LocateOptions(), LocateOptions(exact=True), LocateOptions(region_tokens=tuple(region))):
        hits = locator.search(embeddings, options)
        posterior = leaf_posterior(hits.scores, locator.calibration.temperature)
        for row, answer in enumerate(locations(locator.locate_embeddings(embeddings, [options] * 6))):
            shown = [alternative.token for alternative in answer.alternatives]
            assert shown == locator.tree.tokens(locator.tree.level_count, hits.ordinals[row, : len(shown)])
            assert answer.probability == pytest.approx(posterior[row, 0])


def test_the_search_of_crops_averages_their_probabilities(locator: Locator) -> None:
    crops = queries(8).reshape(4, 2, -1)
    exact = LocateOptions(exact=True)
    together = locator.search(crops, exact)
    first, second = (locator.search(crops[:, crop].copy(), exact) for crop in (0, 1))
    temperature = locator.calibration.temperature
    for row in range(4):
        expected = np.zeros(locator.tree.cell_counts[-1])
        for hits in (first, second):
            expected[hits.ordinals[row]] += leaf_posterior(hits.scores, temperature)[row] / 2
        found = leaf_posterior(together.scores, temperature)[row]
        np.testing.assert_allclose(found, expected[together.ordinals[row]], atol=1e-6)


def test_the_search_refuses_what_no_query_may_ask(locator: Locator) -> None:
    with pytest.raises(OptionOutOfRangeError, match="top_k"):
        locator.search(queries(1), LocateOptions(top_k=0))
    with pytest.raises(EmbeddingInvalidError, match="components"):
        locator.search(np.ones((1, 3), np.float32))


def test_golden_queries_get_their_recorded_leaves(locator: Locator) -> None:
    assert locator.manifest.golden_queries
    for golden in locator.manifest.golden_queries:
        location = locate_one(locator, decode_embedding(golden.embedding), exact=True, top_k=len(golden.leaves))
        assert tuple(alternative.token for alternative in location.alternatives) == golden.leaves


def test_the_answer_of_a_leaf_estimator_is_the_leafs_mean_with_its_place(locator: Locator) -> None:
    assert locator.manifest.point_estimator == "leaf"
    location = locate_one(locator, queries(1)[0])
    cell = locator.tree.find(location.path[-1].token, LEVELS)
    assert (location.latitude_deg, location.longitude_deg) == pytest.approx(
        (cell.mean.latitude_deg, cell.mean.longitude_deg)
    )
    assert location.place is not None
    assert (location.place.city, location.place.country_code) == (cell.place.city, cell.place.country_code)
    assert location.alternatives[0].place == location.place
    assert location.index_version == "tiny"


def test_the_bundle_says_how_the_point_is_estimated(tmp_path: Path, locator: Locator) -> None:
    path = make_bundle(
        tmp_path / "mean", level_counts=LEVEL_COUNTS, dimension=DIMENSION, point_estimator="posterior_mean"
    )
    with Locator.open(path) as other:
        moved = 0
        for embedding in queries(20):
            location = locate_one(other, embedding)
            cell = other.tree.find(location.path[-1].token, LEVELS)
            shift = great_circle_km(
                location.latitude_deg, location.longitude_deg, cell.mean.latitude_deg, cell.mean.longitude_deg
            )
            assert float(shift) <= 8 * cell.spread_km
            moved += float(shift) > 1.0
        assert moved > 0


def test_the_bundles_temperature_flattens_the_posterior(tmp_path: Path, locator: Locator) -> None:
    path = make_bundle(tmp_path / "hot", level_counts=LEVEL_COUNTS, dimension=DIMENSION, calibration_temperature=4.0)
    with Locator.open(path) as hot:
        for embedding in queries(10):
            expected = textbook_posterior(locator, embedding) ** (1 / 4.0)
            flat = locate_one(hot, embedding, exact=True)
            assert flat.probability == pytest.approx((expected / expected.sum()).max(), rel=1e-3)


def test_the_radius_grows_with_the_confidence(locator: Locator) -> None:
    for embedding in queries(10):
        radii = [locate_one(locator, embedding, confidence_level=level).radius_km for level in (0.1, 0.5, 0.9, 0.99)]
        assert radii == sorted(radii)


def test_the_credible_region_holds_the_confidence_level(locator: Locator) -> None:
    for embedding in queries(10):
        expected = textbook_posterior(locator, embedding)
        region = locate_one(locator, embedding, exact=True, confidence_level=0.8).credible_region
        cells = [locator.tree.find(token, LEVELS) for token in region.tokens]
        assert region.probability >= 0.8
        assert region.probability == pytest.approx(sum(expected[cell.ordinal] for cell in cells), rel=1e-3)
        assert region.area_km2 == pytest.approx(sum(cell.area_km2 for cell in cells))
        density = [expected[cell.ordinal] / cell.area_km2 for cell in cells]
        assert density == sorted(density, reverse=True)


def test_the_radius_is_recalibrated(bundle: Path, tmp_path: Path, locator: Locator) -> None:
    copy = tmp_path / "recalibrated"
    shutil.copytree(bundle, copy)
    manifest = read_manifest(copy)
    assert manifest.calibration is not None
    calibration = manifest.calibration.model_copy(update={"posterior_masses": (0.0, 0.7, 0.98, 1.0)})
    finish_bundle(copy, manifest.model_copy(update={"calibration": calibration}))
    with Locator.open(copy) as other:
        for embedding in queries(5):
            recalibrated = locate_one(other, embedding, confidence_level=0.9)
            plain = locate_one(locator, embedding, confidence_level=0.98)
            assert recalibrated.radius_km == plain.radius_km
            assert recalibrated.confidence_level == 0.9


def test_the_h3_cell_holds_the_estimate(locator: Locator) -> None:
    location = locate_one(locator, queries(1)[0], h3_resolution=7)
    assert location.h3_cell == h3.latlng_to_cell(location.latitude_deg, location.longitude_deg, 7)
    assert locate_one(locator, queries(1)[0]).h3_cell is None


def leaves_under(locator: Locator, token: str) -> set[str]:
    cell = locator.tree.find(token)
    first, end = locator.tree.leaf_range(cell.level, cell.ordinal)
    return set(locator.tree.tokens(LEVELS, np.arange(first, end)))


@pytest.mark.parametrize("level", [1, 2, 3])
def test_a_region_restricts_the_answer_to_cells_of_any_level(locator: Locator, level: int) -> None:
    embedding = queries(1)[0]
    expected = textbook_posterior(locator, embedding)
    tokens = locator.tree.tokens(level, [0, LEVEL_COUNTS[level - 1] // 2])
    allowed = set().union(*(leaves_under(locator, token) for token in tokens))
    inside = np.isin(locator.tree.tokens(LEVELS, np.arange(LEVEL_COUNTS[-1])), list(allowed))
    location = locate_one(locator, embedding, region_tokens=tuple(tokens), top_k=100)
    assert {alternative.token for alternative in location.alternatives} == allowed
    assert location.probability == pytest.approx(expected[inside].max() / expected[inside].sum(), rel=1e-3)
    assert set(location.credible_region.tokens) <= allowed


def test_cells_of_a_region_may_overlap_and_repeat(locator: Locator) -> None:
    embedding = queries(1)[0]
    parent = locator.tree.tokens(1, [1])[0]
    children = locator.tree.tokens(2, np.array(locator.tree.children(1, 1)))
    plain = locate_one(locator, embedding, region_tokens=(parent,))
    assert locate_one(locator, embedding, region_tokens=(*children, parent, parent)) == plain
    assert locate_one(locator, embedding, region_tokens=tuple(reversed(children))) == plain


def test_a_region_of_everything_is_no_region(locator: Locator) -> None:
    embedding = queries(1)[0]
    everything = tuple(locator.tree.tokens(1, np.arange(LEVEL_COUNTS[0])))
    assert locate_one(locator, embedding, region_tokens=everything) == locate_one(locator, embedding, exact=True)


def test_a_region_may_name_s2_cells_above_those_of_the_index(locator: Locator) -> None:
    embedding = queries(1)[0]
    ids = s2.token_to_cell_id(locator.tree.tokens(LEVELS, np.arange(LEVEL_COUNTS[-1])))
    face = s2.cell_id_to_parent(ids[:1], 0)
    token = s2.cell_id_to_token(face)[0]
    inside = s2.cell_id_to_parent(ids, 0) == face[0]
    location = locate_one(locator, embedding, region_tokens=(token,), top_k=100)
    expected = set(np.array(locator.tree.tokens(LEVELS, np.arange(LEVEL_COUNTS[-1])))[inside])
    assert {alternative.token for alternative in location.alternatives} == expected
    assert 0 < inside.sum() < LEVEL_COUNTS[-1]


def test_a_region_without_leaves_is_refused_with_its_own_reason(locator: Locator) -> None:
    covered = {int(cell) for cell in s2.cell_id_to_parent(s2.token_to_cell_id(locator.tree.tokens(1, [0, 1, 2, 3])), 2)}
    all_cells = s2.latlng_to_cell_id(*np.meshgrid(np.linspace(-89, 89, 60), np.linspace(-179, 179, 120)), s2_level=2)
    elsewhere = next(cell for cell in np.unique(all_cells) if int(cell) not in covered)
    token = s2.cell_id_to_token([elsewhere])[0]
    with pytest.raises(RegionEmptyError, match=token):
        locator.validate_options(LocateOptions(region_tokens=(token,)))
    kept = locator.tree.tokens(1, [2])[0]
    locator.validate_options(LocateOptions(region_tokens=(token, kept)))


def test_a_cell_smaller_than_a_leaf_stands_for_the_leaf_around_it(locator: Locator) -> None:
    leaf = s2.token_to_cell_id(locator.tree.tokens(LEVELS, [3]))
    smaller = s2.cell_id_to_token(s2.cell_id_to_children(leaf)[0])
    lowest, highest = s2.cell_id_to_token(np.concatenate(s2.cell_id_range(leaf)))
    own, other = locator.tree.tokens(LEVELS, [3, 20])
    embedding = queries(1)[0]
    for token in (*smaller, lowest, highest):
        location = locate_one(locator, embedding, region_tokens=(token,))
        assert [alternative.token for alternative in location.alternatives] == [own]
    both = locate_one(locator, embedding, region_tokens=(smaller[2], other))
    assert {alternative.token for alternative in both.alternatives} == {own, other}


def test_a_region_is_resolved_once(locator: Locator, monkeypatch: pytest.MonkeyPatch) -> None:
    embedding = queries(1)[0]
    options = LocateOptions(region_tokens=tuple(locator.tree.tokens(2, [1, 4])))
    locator.validate_options(options)

    def refuse(tokens: object) -> None:
        raise AssertionError(f"{tokens} are looked up again")

    with monkeypatch.context() as patch:
        patch.setattr(s2, "token_to_cell_id", refuse)
        patch.setattr(locator.tree, "find", refuse)
        assert isinstance(locator.locate_embeddings(embedding[None], [options])[0], Location)


@pytest.mark.parametrize("token", ["nowhere", "", "ffffffffffffffff", "\x00", "zz\udc80"])
def test_a_region_with_an_unknown_cell_is_refused_by_name(locator: Locator, token: str) -> None:
    good = locator.tree.tokens(1, [0])[0]
    with pytest.raises(RegionCellUnknownError) as caught:
        locator.validate_options(LocateOptions(region_tokens=(good, token)))
    assert repr(token) in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, r"top_k is 0; .* from 1 to 100"),
        ({"top_k": MAX_TOP_K + 1}, "top_k is 101"),
        ({"top_k": 2.5}, r"top_k is 2\.5"),
        ({"beam_width": 0}, "beam_width is 0"),
        ({"beam_width": MAX_BEAM_WIDTH + 1}, "beam_width is 2049"),
        ({"confidence_level": 0.0}, "confidence_level is 0"),
        ({"confidence_level": 1.0}, "confidence_level is 1"),
        ({"confidence_level": math.nan}, "confidence_level is nan"),
        ({"confidence_level": math.inf}, "confidence_level is inf"),
        ({"h3_resolution": -1}, "h3_resolution is -1"),
        ({"h3_resolution": 16}, "h3_resolution is 16"),
        ({"region_tokens": ("1",) * (MAX_REGION_TOKENS + 1)}, "1001 cells, at most 1000"),
    ],
)
def test_options_out_of_range_are_refused(locator: Locator, options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionOutOfRangeError, match=message):
        locator.validate_options(LocateOptions(**options))  # type: ignore[arg-type]


def test_options_at_their_bounds_are_answered(locator: Locator) -> None:
    for options in (
        LocateOptions(top_k=1, beam_width=1, confidence_level=1e-9, h3_resolution=0),
        LocateOptions(top_k=MAX_TOP_K, beam_width=MAX_BEAM_WIDTH, confidence_level=1 - 1e-9, h3_resolution=15),
    ):
        location = locations(locator.locate_embeddings(queries(1), [options]))[0]
        assert len(location.alternatives) == min(options.top_k, LEVEL_COUNTS[-1])
        assert 0 < location.radius_km < 20_016


def test_an_embedding_is_scaled_to_unit_length(locator: Locator) -> None:
    row = queries(1)[0]
    for factor in (1e-300, 0.25, 3.0, 1e300):
        scaled = locator.normalise_embedding(row.astype(np.float64) * factor)
        assert scaled.dtype == np.float32
        assert scaled == pytest.approx(row, abs=1e-6)
    assert locator.normalise_embedding(row.tolist()) == pytest.approx(row, abs=1e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.0] * DIMENSION, "zero"),
        ([1.0] * (DIMENSION - 1), r"shape \(15,\).*needs \(16,\)"),
        ([], r"shape \(0,\)"),
        ([[1.0] * DIMENSION], r"shape \(1, 16\)"),
        ([1.0] * 3 + [math.nan] * (DIMENSION - 3), "value 3 of the embedding is nan"),
        ([math.inf] + [1.0] * (DIMENSION - 1), "value 0 of the embedding is inf"),
        (["a"] * DIMENSION, "not a sequence of 16 numbers"),
        ([[1.0], [1.0, 2.0]], "not a sequence of 16 numbers"),
    ],
)
def test_a_bad_embedding_is_refused(locator: Locator, values: object, message: str) -> None:
    with pytest.raises(EmbeddingInvalidError, match=message):
        locator.normalise_embedding(values)  # type: ignore[arg-type]


def test_one_bad_item_costs_no_other(locator: Locator) -> None:
    embeddings = queries(6)
    embeddings[1] = math.nan
    embeddings[4] = 0.0
    options = [LocateOptions()] * 6
    options[2] = LocateOptions(top_k=0)
    options[5] = LocateOptions(region_tokens=("nowhere",))
    results = locator.locate_embeddings(embeddings, options)
    kinds = [
        Location,
        EmbeddingInvalidError,
        OptionOutOfRangeError,
        Location,
        EmbeddingInvalidError,
        RegionCellUnknownError,
    ]
    assert [type(result) for result in results] == kinds
    for row in (0, 3):
        assert locations([results[row]])[0] == locate_one(locator, embeddings[row])


def test_a_mixed_batch_answers_each_row_as_if_it_were_alone(locator: Locator) -> None:
    embeddings = queries(12)
    region = tuple(locator.tree.tokens(1, [0]))
    kinds = [
        LocateOptions(),
        LocateOptions(beam_width=20),
        LocateOptions(exact=True),
        LocateOptions(region_tokens=region),
    ]
    options = [replace(kinds[row % 4], top_k=1 + row) for row in range(12)]
    for row, location in enumerate(locations(locator.locate_embeddings(embeddings, options))):
        alone = locations(locator.locate_embeddings(embeddings[row : row + 1], options[row : row + 1]))[0]
        assert [a.token for a in location.alternatives] == [a.token for a in alone.alternatives]
        assert location.probability == pytest.approx(alone.probability, rel=1e-5)
        assert location.radius_km == pytest.approx(alone.radius_km, rel=1e-3)


def test_answers_do_not_depend_on_how_a_batch_is_cut_into_blocks(
    locator: Locator, monkeypatch: pytest.MonkeyPatch
) -> None:
    embeddings = queries(9)
    options = [LocateOptions(top_k=1 + row, confidence_level=0.1 * (row + 1), exact=True) for row in range(9)]
    whole = locations(locator.locate_embeddings(embeddings, options))
    monkeypatch.setattr("geosurge.locator._POSTERIOR_BLOCK", 2 * LEVEL_COUNTS[-1])
    parts = locations(locator.locate_embeddings(embeddings, options))
    for one, other in zip(whole, parts, strict=True):
        assert [a.token for a in one.alternatives] == [a.token for a in other.alternatives]
        assert [a.probability for a in one.alternatives] == pytest.approx([a.probability for a in other.alternatives])
        assert (one.radius_km, one.latitude_deg) == pytest.approx((other.radius_km, other.latitude_deg))
        assert one.credible_region.tokens == other.credible_region.tokens
        assert [cell.token for cell in one.path] == [cell.token for cell in other.path]


def test_rows_of_another_dimension_are_refused_each(locator: Locator) -> None:
    results = locator.locate_embeddings(np.ones((2, DIMENSION + 1), np.float32), [LocateOptions(), LocateOptions()])
    assert [type(result) for result in results] == [EmbeddingInvalidError] * 2
    assert r"shape (17,), index version 'tiny' needs (16,)" in str(results[1])


def test_an_item_says_what_is_wrong_with_it_in_a_batch_as_alone(locator: Locator) -> None:
    embeddings = queries(4).astype(np.float64)
    embeddings[0, 3], embeddings[1], embeddings[2, 7] = math.nan, 0.0, -math.inf
    results = locator.locate_embeddings(embeddings, [LocateOptions()] * 4)
    for row in range(3):
        with pytest.raises(EmbeddingInvalidError) as alone:
            locator.normalise_embedding(embeddings[row])
        assert str(results[row]) == str(alone.value)
    assert isinstance(results[3], Location)


def test_an_empty_batch_has_no_answers(locator: Locator) -> None:
    assert locator.locate_embeddings(np.empty((0, DIMENSION), np.float32), []) == []


def test_lengths_that_differ_are_a_mistake_of_the_caller(locator: Locator) -> None:
    with pytest.raises(ValueError, match="2 embeddings but 1 options"):
        locator.locate_embeddings(queries(2), [LocateOptions()])


def test_timings_are_of_this_query(locator: Locator) -> None:
    result = locator.locate_embeddings(queries(1), [LocateOptions()])[0]
    assert isinstance(result, Location)
    assert result.timings.search_ms > 0
    assert result.timings.posterior_ms > 0
    assert result.timings.encode_ms == result.timings.decode_ms == 0
    together = locator.locate_embeddings(queries(3), [LocateOptions()] * 3)
    assert len({result.timings for result in together if isinstance(result, Location)}) == 1


def test_a_beam_reaches_more_leaves_than_it_shows(tmp_path: Path) -> None:
    path = make_bundle(tmp_path / "wide", level_counts=(50, 2000), dimension=8)
    with Locator.open(path) as wide:
        embedding = np.random.default_rng(0).standard_normal(8).astype(np.float32)
        few = locate_one(wide, embedding, top_k=1, beam_width=40)
        many = locate_one(wide, embedding, top_k=100, beam_width=40)
        assert few.probability == many.probability
        assert few.radius_km == many.radius_km
        assert sum(alternative.probability for alternative in many.alternatives) < 1
        assert REACHED_LEAVES >= 10 * MAX_TOP_K


def test_an_index_without_encoder_refuses_images_and_says_why(locator: Locator) -> None:
    with pytest.raises(EncoderMissingError, match="send an embedding of 16 values"):
        locator.locate([picture()])
    with pytest.raises(EncoderMissingError):
        locator.preprocess(picture())


def test_images_are_located_as_their_embeddings_are(image_locator: Locator) -> None:
    images = [picture(seed) for seed in range(5)]
    located = locations(image_locator.locate(images, LocateOptions(exact=True), batch_size=2))
    for data, location in zip(images, located, strict=True):
        embedding = image_locator.encode(image_locator.preprocess(data)[None])[0]
        alone = locate_one(image_locator, embedding, exact=True)
        assert location.path[-1].token == alone.path[-1].token
        assert location.probability == pytest.approx(alone.probability, rel=1e-4)
    assert len({location.probability for location in located}) == 5


def test_bytes_paths_and_pictures_get_the_same_answer(image_locator: Locator, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(picture())
    images = [picture(), path, str(path), Image.open(path)]
    results = locations(image_locator.locate(images))
    assert all(result == results[0] for result in results)


def test_bad_images_are_reported_in_their_place(image_bundle: Path, tmp_path: Path) -> None:
    with Locator.open(image_bundle, limits=ImageLimits(max_bytes=50_000)) as limited:
        images = [picture(0), b"", b"not an image", tmp_path / "missing.png", bytes(60_000), picture(1)]
        results = limited.locate(images)
        kinds = [Location, ImageEmptyError, ImageNotDecodableError, InputNotReadableError, ImageTooLargeError, Location]
        assert [type(result) for result in results] == kinds
        assert isinstance(results[0], Location)
        assert results[0].timings.decode_ms > 0
        assert results[0].timings.encode_ms > 0
        only_bad = limited.locate([b"", b"x"])
        assert [type(result) for result in only_bad] == [ImageEmptyError, ImageNotDecodableError]


def test_options_are_for_all_images_or_for_each(image_locator: Locator) -> None:
    images = [picture(0), picture(1)]
    results = image_locator.locate(images, [LocateOptions(top_k=1), LocateOptions(top_k=0)])
    assert isinstance(results[0], Location)
    assert len(results[0].alternatives) == 1
    assert isinstance(results[1], OptionOutOfRangeError)
    assert image_locator.locate([]) == []
    with pytest.raises(ValueError, match="2 images but 1 options"):
        image_locator.locate(images, [LocateOptions()])


def test_a_store_opens_its_active_bundle(bundle: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    publish(store, bundle, name="a")
    publish(store, bundle, name="b")
    activate(store, "b")
    with Locator.open(store) as opened:
        assert opened.index_version == "b"
    with Locator.open(store / "a") as opened:
        assert opened.index_version == "a"


def rewrite_manifest(directory: Path, change: Callable[[Manifest], Manifest]) -> None:
    _, data = render_manifest(change(read_manifest(directory)))
    (directory / "manifest.json").write_bytes(data)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def newer_schema(directory: Path) -> None:
    manifest = json.loads((directory / "manifest.json").read_text())
    (directory / "manifest.json").write_text(json.dumps(manifest | {"schema_version": 99}))


def other_tree(directory: Path) -> None:
    manifest = read_manifest(directory)
    other = make_bundle(directory.parent / "other", level_counts=(4, 9, 41), dimension=DIMENSION)
    shutil.copytree(other / "cells.lmdb", directory / "cells.lmdb", dirs_exist_ok=True)
    finish_bundle(directory, manifest)


def other_leaf_vectors(directory: Path) -> None:
    manifest = read_manifest(directory)
    other = make_bundle(directory.parent / "other", level_counts=LEVEL_COUNTS, dimension=DIMENSION + 4)
    for level in range(1, LEVELS + 1):
        shutil.copyfile(other / f"level-{level}.faiss", directory / f"level-{level}.faiss")
    finish_bundle(directory, manifest)


def other_encoder(directory: Path) -> None:
    manifest = read_manifest(directory)
    tiny_encoder(seed=1).save(directory / "encoder")
    finish_bundle(directory, manifest)


def unusable_calibration(directory: Path) -> None:
    def change(manifest: Manifest) -> Manifest:
        assert manifest.calibration is not None
        calibration = manifest.calibration.model_copy(update={"confidence_levels": (0.1, 0.5, 0.9, 0.95)})
        return manifest.model_copy(update={"calibration": calibration})

    rewrite_manifest(directory, change)


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda path: (path / "manifest.json").unlink(), BundlePartialError),
        (lambda path: (path / "level-2.faiss").unlink(), BundlePartialError),
        (lambda path: shutil.rmtree(path / "encoder"), BundlePartialError),
        (newer_schema, BundleSchemaError),
        (lambda path: flip(path / "level-3.faiss"), BundleCorruptError),
        (lambda path: flip(path / "cells.lmdb" / "data.mdb"), BundleCorruptError),
        (lambda path: flip(path / "encoder" / "model.safetensors"), BundleCorruptError),
        (lambda path: flip(path / "manifest.json"), BundleCorruptError),
        (other_tree, BundleInconsistentError),
        (other_leaf_vectors, BundleInconsistentError),
        (unusable_calibration, BundleCorruptError),
        (other_encoder, BundleEncoderMismatchError),
    ],
)
def test_a_bundle_that_is_not_whole_is_refused(
    image_bundle: Path, tmp_path: Path, spoil: Callable[[Path], None], error: type[BundleError]
) -> None:
    copy = tmp_path / "spoilt"
    shutil.copytree(image_bundle, copy)
    spoil(copy)
    with pytest.raises(error) as caught:
        Locator.open(copy)
    assert type(caught.value) is error
    assert str(copy) in str(caught.value)


def test_closing_twice_does_nothing(bundle: Path) -> None:
    opened = Locator.open(bundle)
    opened.close()
    opened.close()
    with pytest.raises(ValueError, match="closed"):
        opened.locate_embeddings(queries(1), [LocateOptions()])
