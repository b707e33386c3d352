from __future__ import annotations

import numpy as np

from geosurge.search import LeafHits


def test_positions_are_where_the_wanted_leaves_stand() -> None:
    ordinals = np.array([[5, 2, 9], [4, 0, -1], [-1, -1, -1], [7, 3, 1], [4, 0, -1]])
    hits = LeafHits(ordinals, np.zeros(ordinals.shape, np.float32))
    assert hits.positions_of(np.array([9, 4, 3, 8, -1])).tolist() == [2, 0, -1, -1, -1]


def test_no_queries_and_no_hits_have_no_positions() -> None:
    for shape, expected in (((0, 3), []), ((2, 0), [-1, -1])):
        hits = LeafHits(np.empty(shape, np.int64), np.empty(shape, np.float32))
        assert hits.positions_of(np.zeros(shape[0], np.int64)).tolist() == expected
