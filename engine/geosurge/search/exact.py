"""Exact search: every leaf's score, in blocks that bound memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from geosurge.search.hits import LeafHits
from geosurge.search.ranges import cut_ranges

_QUERY_BLOCK = 256
_LEAF_BLOCK = 65_536
"""At most ``_QUERY_BLOCK * _LEAF_BLOCK`` scores (64 MiB) are held at a time."""


@torch.inference_mode()
def exact_search(
    embeddings: NDArray[np.float32], leaves: torch.Tensor, ranges: Sequence[tuple[int, int]], k: int
) -> LeafHits:
    """Find the best leaves of some ranges.

    Args:
        embeddings: ``(n, d)`` float32 queries.
        leaves: ``(n_leaves, d)`` float32 composites, on any device.
        ranges: Ascending, disjoint half-open ranges of leaf ordinals with at least ``k`` leaves.
        k: Leaves to return, at least 1.

    Returns:
        Hits of shape ``(n, k)``.
    """
    ordinals = np.empty((len(embeddings), k), np.int64)
    scores = np.empty((len(embeddings), k), np.float32)
    blocks = list(cut_ranges(ranges, _LEAF_BLOCK))
    # torch warns of read-only arrays although nothing here writes to its inputs.
    queries = torch.from_numpy(embeddings if embeddings.flags.writeable else embeddings.copy())
    for start in range(0, len(queries), _QUERY_BLOCK):
        part = queries[start : start + _QUERY_BLOCK].to(leaves.device)
        best = _scan_leaves(part, leaves, blocks, k)
        scores[start : start + _QUERY_BLOCK] = best[0].cpu().numpy()
        ordinals[start : start + _QUERY_BLOCK] = best[1].cpu().numpy()
    return LeafHits(ordinals, scores)


def _scan_leaves(
    queries: torch.Tensor, leaves: torch.Tensor, blocks: Sequence[list[tuple[int, int]]], k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and ordinals, ``(n, k)``, of the best leaves; blocks ascend, so a tie goes to the earlier one."""
    found_scores: list[torch.Tensor] = []
    found_ordinals: list[torch.Tensor] = []

    def best_found() -> tuple[torch.Tensor, torch.Tensor]:
        scores, columns = _top_columns(torch.cat(found_scores, dim=1), min(k, sum(s.shape[1] for s in found_scores)))
        return scores, torch.cat(found_ordinals, dim=1).gather(1, columns)

    for block in blocks:
        if len(block) == 1:
            start, stop = block[0]
            rows, ordinals = leaves[start:stop], torch.arange(start, stop, device=leaves.device)
        else:
            ordinals = torch.cat([torch.arange(start, stop, device=leaves.device) for start, stop in block])
            rows = leaves[ordinals]
        scores = queries @ rows.T
        if k < len(rows):
            scores, columns = _top_columns(scores, k)
            ordinals = ordinals[columns]
        found_scores.append(scores)
        found_ordinals.append(ordinals.expand(scores.shape))
        # Cut only what has grown to twice what is wanted: all leaves of many blocks are then sorted once.
        if sum(s.shape[1] for s in found_scores) > 2 * k:
            scores, ordinals = best_found()
            found_scores[:], found_ordinals[:] = [scores], [ordinals]
    return best_found()


def _top_columns(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``k`` best values of each row, descending, and their columns; equal values by column.

    ``torch.topk`` neither orders equal values nor says which of them it keeps, so ties are settled by a stable sort:
    among the ``k`` always, over the whole row only where the cut goes through a tie.
    """
    if k == scores.shape[1]:
        values, columns = scores.sort(dim=1, descending=True, stable=True)
        return values, columns
    values, columns = scores.topk(k + 1, dim=1)
    cut_tie = values[:, -1] == values[:, -2]
    columns = columns[:, :k].sort(dim=1).values
    values, order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True)
    columns = columns.gather(1, order)
    if bool(cut_tie.any()):
        tied_values, tied_columns = scores[cut_tie].sort(dim=1, descending=True, stable=True)
        values[cut_tie], columns[cut_tie] = tied_values[:, :k], tied_columns[:, :k]
    return values, columns
