"""Coarse-to-fine search over composite embeddings: the hierarchy as a chain of FAISS indexes.

GeoSURGE (arXiv 2510.01448, inference) scores a leaf by the product of its own softmax probability and those of all its
ancestors, ``P_l(c | v) = exp(v . g_lc / tau_l) / Z_l(v)``. Every normaliser ``Z_l`` depends on the image alone, so

    log score(leaf) = v . h_leaf - sum_l log Z_l(v),        h_lc = h_(l-1, parent(c)) + g_lc / tau_l,        h_0 = 0

and ranking by the product is ranking by one inner product with the leaf's composite ``h``, at every level.

What is stored, one FAISS file a level, readable by any FAISS program:

- level 1: ``IndexFlatIP`` over ``n_1`` composites;
- level l > 1: ``IndexIVFFlat`` or ``IndexIVFScalarQuantizer`` (inner product, no residuals) whose inverted list *p*
  holds the children of cell *p* of the level above and whose ids are the ordinals of its own level. The coarse
  quantizer is empty: a preassigned search never reads it.

What a query costs with a beam of ``w``: ``n_1`` inner products, then the children of ``w`` cells a level, whatever the
number of leaves; exact search costs one inner product a leaf.

The references of a gallery are one more index of the second kind, whose list *p* is leaf *p*. FAISS is read and asked
in this folder alone.
"""

from geosurge.search.hierarchy import HierarchicalIndex
from geosurge.search.hits import LeafHits
from geosurge.search.ranges import merge_ranges
from geosurge.search.references import ReferenceLists

__all__ = ["HierarchicalIndex", "LeafHits", "ReferenceLists", "merge_ranges"]
