"""One prediction from those of several crops of an image: the mean of their probabilities.

GeoSURGE (arXiv 2510.01448, inference) averages the predictions of ten crops. With the inner products of this engine,
the mean of the scores is the score of the mean embedding, which is one search instead of many; the mean of the
probabilities is not. On views of the Blue Marble world, where each corner shows another place, the first takes the
median error of five crops from 41 to 39 km and the second to 26 km: hence probabilities.
"""

from __future__ import annotations

import numpy as np

from geosurge.posterior import leaf_posterior
from geosurge.search import LeafHits


def average_predictions(hits: LeafHits, crops: int, temperature: float) -> LeafHits:
    """Averages the probabilities that the crops of each image give to each leaf.

    A leaf that a crop's beam did not reach has no probability from it.

    Args:
        hits: (n * crops, k) leaves of the crops, those of an image one after the other.
        crops: Crops of each image.
        temperature: Divides the scores.

    Returns:
        (n, m) leaves that any crop of the image reached, the largest mean first; their scores are the logarithms of the
        means times the temperature.
    """
    count = len(hits.ordinals) // crops
    shares = leaf_posterior(hits.scores, temperature) / crops
    images = np.repeat(np.arange(count), crops)[:, np.newaxis]
    leaf_count = int(hits.ordinals.max(initial=0)) + 1
    keys, place = np.unique((images * leaf_count + hits.ordinals)[shares > 0.0], return_inverse=True)
    means = np.bincount(place, shares[shares > 0.0], len(keys))
    image, leaf = np.divmod(keys, leaf_count)
    order = np.lexsort((leaf, -means, image))
    image, leaf, means = image[order], leaf[order], means[order]
    rank = np.arange(len(image)) - np.searchsorted(image, np.arange(count))[image]
    width = int(rank.max(initial=0)) + 1
    ordinals = np.full((count, width), -1, dtype=np.int64)
    scores = np.full((count, width), -np.inf, dtype=np.float32)
    ordinals[image, rank] = leaf
    scores[image, rank] = temperature * np.log(means)
    return LeafHits(ordinals, scores)
