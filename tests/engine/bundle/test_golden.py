from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.bundles import BEAM_WIDTH, geographic_embeddings, make_bundle, make_levels

from geosurge.bundle import open_bundle, read_manifest
from geosurge.bundle.golden import record_golden_queries
from geosurge.bundle.manifest import (
    decode_embedding,
)
from geosurge.bundle.verifying import verify_bundle
from geosurge.cells import CellTree
from geosurge.search import HierarchicalIndex


@pytest.mark.parametrize("storage", ["fp16", "sq8"])
def test_golden_queries_survive_compressed_storage(tmp_path: Path, storage: Any) -> None:
    path = make_bundle(tmp_path / "tiny", storage=storage, level_counts=(3, 3, 8, 60))
    assert read_manifest(path).golden_queries
    assert verify_bundle(path).ok


def test_golden_queries_are_those_on_which_beam_and_scan_agree(tmp_path: Path) -> None:
    path = make_bundle(tmp_path / "tiny", level_counts=(30, 60, 200), dimension=4)
    bundle = open_bundle(path)
    embeddings = np.random.default_rng(4).standard_normal((40, 4)).astype(np.float32)
    with CellTree.open(bundle.tree_path) as tree, HierarchicalIndex.open(bundle.level_paths) as index:
        narrow = record_golden_queries(tree, index, embeddings, width=2, k=5)
        full = record_golden_queries(tree, index, embeddings, width=60, k=5)
        assert len(full) == 40
        assert 0 < len(narrow) < 40
        for query in narrow:
            hits = index.search(decode_embedding(query.embedding)[None], width=2, k=5)
            assert tuple(tree.tokens(3, hits.ordinals[0])) == query.leaves


def test_golden_scores_are_the_textbook_product(whole: Path) -> None:
    manifest = read_manifest(whole)
    levels, _ = make_levels((4, 9, 20))
    parents = [level.parents for level in levels]
    embeddings = [g.astype(np.float64) for g in geographic_embeddings(parents, 16)]
    for query in manifest.golden_queries:
        image = decode_embedding(query.embedding).astype(np.float64)
        logits = [g @ image / tau for g, tau in zip(embeddings, manifest.temperatures, strict=True)]
        log_scores = logits[2] + logits[1][parents[2]] + logits[0][parents[1]][parents[2]]
        best = np.argsort(-log_scores)[: len(query.leaves)]
        assert [levels[2].tokens[row] for row in best] == list(query.leaves)
        np.testing.assert_allclose(query.scores, log_scores[best], rtol=1e-5)
    assert manifest.default_beam_width == BEAM_WIDTH
