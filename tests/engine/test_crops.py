from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.bundles import make_bundle, tiny_encoder

from geosurge.crops import average_predictions
from geosurge.errors import EmbeddingInvalidError
from geosurge.location import LocateOptions, Location
from geosurge.locator import Locator
from geosurge.posterior import leaf_posterior
from geosurge.search import LeafHits


def random_hits(images: int, crops: int, reached: int, leaves: int, seed: int) -> LeafHits:
    """Leaves in the order of their scores; every crop misses some."""
    rng = np.random.default_rng(seed)
    ordinals = np.argsort(rng.random((images * crops, leaves)), axis=1)[:, :reached]
    scores = -np.sort(-rng.normal(0, 3, ordinals.shape), axis=1).astype(np.float32)
    for row, missing in enumerate(rng.integers(0, reached, len(ordinals))):
        ordinals[row, reached - missing :] = -1
        scores[row, reached - missing :] = -np.inf
    return LeafHits(ordinals, scores)


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 10), st.integers(1, 12), st.floats(0.3, 5), st.integers(0, 2**31))
def test_leaves_have_the_mean_of_their_probabilities(
    images: int, crops: int, reached: int, temperature: float, seed: int
) -> None:
    hits = random_hits(images, crops, reached, 20, seed)
    found = average_predictions(hits, crops, temperature)
    for image in range(images):
        means = dict.fromkeys(range(20), 0.0)
        for row in range(image * crops, (image + 1) * crops):
            weights = [math.exp(score / temperature) for score in hits.scores[row].tolist()]
            for leaf, weight in zip(hits.ordinals[row].tolist(), weights, strict=True):
                if leaf >= 0:
                    means[leaf] += weight / math.fsum(weights) / crops
        best = sorted((mean for mean in means.values() if mean > 0.0), reverse=True)
        leaves = found.ordinals[image][found.ordinals[image] >= 0].tolist()
        assert len(set(leaves)) == len(leaves) == len(best)
        assert [means[leaf] for leaf in leaves] == pytest.approx(best, rel=1e-4)
        kept = np.exp(found.scores[image, : len(best)].astype(np.float64) / temperature)
        assert kept == pytest.approx(np.array(best), rel=1e-4)
        assert (found.scores[image, len(best) :] == -np.inf).all()


def test_crops_that_agree_predict_what_one_does() -> None:
    one = random_hits(5, 1, 8, 20, 3)
    same = LeafHits(one.ordinals.repeat(10, axis=0), one.scores.repeat(10, axis=0))
    found = average_predictions(same, 10, 2.0)
    reached = (one.ordinals >= 0).any(axis=0)
    assert np.array_equal(found.ordinals, one.ordinals[:, reached])
    assert leaf_posterior(found.scores, 2.0) == pytest.approx(leaf_posterior(one.scores[:, reached], 2.0), abs=1e-6)


@pytest.fixture(scope="module")
def locator(tmp_path_factory: pytest.TempPathFactory) -> Locator:
    path = make_bundle(tmp_path_factory.mktemp("crops") / "bundle", level_counts=(4, 12, 60), encoder=tiny_encoder())
    return Locator.open(path)


def without_timings(location: object) -> Location:
    assert isinstance(location, Location)
    return replace(location, timings=Location.__dataclass_fields__["timings"].default_factory())


@pytest.mark.parametrize("options", [LocateOptions(), LocateOptions(exact=True)])
def test_crops_are_averaged_before_the_answer_is_made(locator: Locator, options: LocateOptions) -> None:
    embeddings = np.random.default_rng(1).normal(size=(3, 4, locator.manifest.dimension)).astype(np.float32)
    answers = locator.locate_embeddings(embeddings, [options] * 3)
    for crops, answer in zip(embeddings, answers, strict=True):
        alone = locator.locate_embeddings(crops, [replace(options, top_k=60)] * 4)
        assert isinstance(answer, Location)
        means = dict.fromkeys((alternative.token for alternative in answer.alternatives), 0.0)
        for location in alone:
            assert isinstance(location, Location)
            for alternative in location.alternatives:
                if alternative.token in means:
                    means[alternative.token] += alternative.probability / 4
        assert [found.probability for found in answer.alternatives] == pytest.approx(list(means.values()), rel=1e-4)
    one = locator.locate_embeddings(embeddings[:, :1], [options] * 3)
    flat = locator.locate_embeddings(embeddings[:, 0], [options] * 3)
    assert list(map(without_timings, one)) == list(map(without_timings, flat))


def test_one_bad_crop_spoils_its_image_alone(locator: Locator) -> None:
    embeddings = np.ones((2, 5, locator.manifest.dimension), np.float32)
    embeddings[1, 3, 2] = np.nan
    good, bad = locator.locate_embeddings(embeddings, [LocateOptions()] * 2)
    assert isinstance(good, Location)
    assert isinstance(bad, EmbeddingInvalidError)


def test_images_are_located_by_their_crops(locator: Locator) -> None:
    noise = np.random.default_rng(2).integers(0, 256, (60, 80, 3), np.uint8)
    image, preprocessing = Image.fromarray(noise), locator.encoder.preprocessing
    for count in (1, 5, 10):
        embeddings = locator.encode(preprocessing.crops(image, count))[np.newaxis]
        (expected,) = locator.locate_embeddings(embeddings, [LocateOptions()])
        (found,) = locator.locate([image], crops=count)
        assert isinstance(found, Location)
        assert isinstance(expected, Location)
        assert (found.latitude_deg, found.probability) == (expected.latitude_deg, expected.probability)
