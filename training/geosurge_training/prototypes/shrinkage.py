"""Geographic embeddings without training: means of the cells' own pictures, each leaning on its parent's.

**Model.** An image of cell c is embedded around the cell's direction, and that around its parent's direction:

    v | c ~ vMF(m_c, a),      m_c ~ vMF(m_parent(c), b)

with von Mises-Fisher distributions on the unit sphere of concentrations a and b. The density of m_c given the cell's
n_c pictures is proportional to exp((a * sum of the v + b * m_parent) . m_c): it is conjugate, and the most probable
direction is

    m_c = normalised(sum of the v + k * m_parent(c)),      k = b / a.

(The Gaussian hierarchical model gives the same direction, with k the ratio of the variance within cells to that between
them.) k, the *strength*, counts in pictures: a cell with k pictures lies half way. k = 0 gives plain means. Level 1
leans on the mean direction of all pictures. A cell that has all of its parent's pictures, as one that was not divided
has, *is* its parent for all that is known, and takes its prototype: nothing is between the two for a strength to
measure. m_parent counts as known when m_c is found, level by level; it has seen the pictures of c too, and the fitted
strength answers for that. One strength serves all levels: with one each, held-out views of the Blue Marble world were
less likely, in partitions of coarse and of fine leaves alike (`tests/benchmarks/sparse_cells.py` measures the rest).

**Fit.** The strength and the temperatures of all levels are fitted together: they maximise the likelihood of the true
leaves of held-out pictures under the softmax over all leaves of the composite scores,

    P(leaf | v) = exp(v . h_leaf) / sum over leaves,      h_leaf = sum over its path of m_lc / tau_l,

which is what the engine ranks by and calibrates. For fixed prototypes it is convex in the 1 / tau_l. Fitting each
level's softmax alone, as training does, asks each level to answer by itself and lets their product count the same
evidence seven times over. The 1 / tau_l must not fall from coarse to fine: the likelihood is that of leaves alone, but
a beam ranks the cells of every level by their composites, to which a level that says nothing of its own would leave its
parents' order. GeoSURGE (arXiv 2510.01448) names sparse cells as an open question; all of this is this project's
decision.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import Tensor

from geosurge.errors import ConfigurationError

MIN_FITTING_PICTURES: Final = 30
"""Held-out pictures whose leaf is known that a fit needs."""

_STRENGTHS: Final = (1e-3, 1e3)
_STEPS: Final = (0.05, 500.0)
_FIRST_STRENGTH: Final = 1.0
_FIRST_TEMPERATURE: Final = 0.05
_QUERIES_AT_ONCE: Final = 256


@dataclass(frozen=True)
class CellSums:
    """What is known of the n cells of one level.

    Attributes:
        sums: (n, d) float64 sum of the embeddings of each cell's pictures.
        counts: (n,) int64 number of them.
        parents: (n,) int64 ordinals on the level before; -1 on level 1.
    """

    sums: npt.NDArray[np.float64]
    counts: npt.NDArray[np.int64]
    parents: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Prototypes:
    """Fitted cell embeddings.

    Attributes:
        embeddings: (n_l, d) float32 unit rows of each level.
        strength: Of the leaning, in pictures; 0 for plain means.
        temperatures: Temperature of each level.
        negative_log_likelihood: Mean over the pictures that they were fitted on, nats.
    """

    embeddings: list[npt.NDArray[np.float32]]
    strength: float
    temperatures: tuple[float, ...]
    negative_log_likelihood: float


def sum_cells(
    batches: Iterable[tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]],
    parents: Sequence[npt.NDArray[np.int64]],
    dimension: int,
) -> list[CellSums]:
    """Sums embeddings by cell.

    Args:
        batches: (m, d) embeddings and (m, L) cells of each on every level, -1 for none.
        parents: Parents of the cells of each level.
        dimension: d.

    Returns:
        The sums of each level.
    """
    levels = [CellSums(np.zeros((len(rows), dimension)), np.zeros(len(rows), np.int64), rows) for rows in parents]
    for embeddings, ordinals in batches:
        for level, cells in enumerate(levels):
            order = np.argsort(ordinals[:, level], kind="stable")
            order = order[ordinals[order, level] >= 0]
            present, starts, counts = np.unique(ordinals[order, level], return_index=True, return_counts=True)
            if len(present):
                cells.sums[present] += np.add.reduceat(embeddings[order].astype(np.float64), starts)
                cells.counts[present] += counts
    return levels


def shrunken_means(levels: Sequence[CellSums], strength: float) -> list[npt.NDArray[np.float32]]:
    """Prototypes of every cell; see the module.

    Args:
        levels: Sums of each level, coarsest first.
        strength: Not negative; 0 gives plain means.

    Returns:
        (n_l, d) float32 unit rows of each level; a row of zeros where a cell has no picture, or pictures that cancel
        out, and nothing to lean on.
    """
    means = _shrunken_means(_Tree(levels), torch.tensor(strength, dtype=torch.float32))
    return [level.numpy() for level in means]


def fit_prototypes(
    levels: Sequence[CellSums],
    embeddings: npt.NDArray[np.float32],
    leaves: npt.NDArray[np.int64],
    *,
    shrink: bool = True,
) -> Prototypes:
    """Fits the strength and the temperatures on held-out pictures; see the module.

    Args:
        levels: Sums of each level, coarsest first.
        embeddings: (m, d) of pictures that are not in the sums.
        leaves: (m,) their leaves; those with -1, in no cell, are left out.
        shrink: Whether a strength is fitted; otherwise means are plain.

    Returns:
        The prototypes.

    Raises:
        ConfigurationError: Fewer than `MIN_FITTING_PICTURES` pictures have a leaf.
    """
    known = leaves >= 0
    if known.sum() < MIN_FITTING_PICTURES:
        raise ConfigurationError(
            f"{known.sum()} of {len(leaves)} held-out pictures lie in cells of the others, and temperatures are fitted "
            f"on {MIN_FITTING_PICTURES} at least: give more pictures, or larger cells (raise tau_max)"
        )
    tree, count = _Tree(levels), len(levels)
    queries, truths = torch.from_numpy(embeddings[known]), torch.from_numpy(leaves[known])

    def split(point: Tensor) -> tuple[Tensor, Tensor]:
        strength = point[0].exp() if shrink else torch.zeros(())
        return strength, 1.0 / point[-count:].exp().cumsum(dim=0)

    def loss_and_gradient(values: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        point = torch.tensor(values, dtype=torch.float32, requires_grad=True)
        strength, temperatures = split(point)
        composites = _leaf_composites(tree, _shrunken_means(tree, strength), temperatures)
        # A leaf of its own: the graph behind the composites is walked once, not once for each block of queries.
        leaf_vectors = composites.detach().requires_grad_()
        loss = 0.0
        for start in range(0, len(truths), _QUERIES_AT_ONCE):
            block = slice(start, start + _QUERIES_AT_ONCE)
            scores = queries[block] @ leaf_vectors.T
            part = F.cross_entropy(scores, truths[block], reduction="sum") / len(truths)
            part.backward()  # type: ignore[no-untyped-call]
            loss += float(part.detach())
        composites.backward(leaf_vectors.grad)  # type: ignore[no-untyped-call]
        assert point.grad is not None
        return loss, point.grad.numpy().astype(np.float64)

    # Equal steps from level to level, all levels together as one softmax of the first temperature.
    first_step = 2.0 / (_FIRST_TEMPERATURE * count * (count + 1))
    start = [np.log(_FIRST_STRENGTH)] * shrink + [np.log(first_step)] * count
    bounds = [np.log(_STRENGTHS)] * shrink + [np.log(_STEPS)] * count
    found = minimize(loss_and_gradient, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"ftol": 1e-6})
    strength, temperatures = split(torch.tensor(found.x, dtype=torch.float32))
    return Prototypes(
        embeddings=shrunken_means(levels, float(strength)),
        strength=float(strength),
        temperatures=tuple(temperatures.tolist()),
        negative_log_likelihood=float(found.fun),
    )


class _Tree:
    """The sums as tensors, and what the levels have to do with one another.

    Attributes:
        root: (1, d) mean direction of all pictures.
        sums: (n_l, d) of each level.
        parents: (n_l,) of each level; all 0 on level 1, for the root.
        is_parent: (n_l, 1) of each level: the cell has all of its parent's pictures.
        path: (n_L,) of each level: the ancestor of every leaf.
    """

    def __init__(self, levels: Sequence[CellSums]) -> None:
        self.root = F.normalize(torch.from_numpy(levels[0].sums.sum(axis=0, keepdims=True)).float(), dim=-1)
        self.sums = [torch.from_numpy(level.sums).float() for level in levels]
        self.parents = [torch.from_numpy(np.maximum(level.parents, 0)) for level in levels]
        counts = [torch.from_numpy(level.counts) for level in levels]
        self.is_parent = [torch.zeros(len(counts[0]), 1, dtype=torch.bool)] + [
            (own == above[rows])[:, None]
            for own, above, rows in zip(counts[1:], counts, self.parents[1:], strict=False)
        ]
        path = [torch.arange(len(counts[-1]))]
        for rows in reversed(self.parents[1:]):
            path.append(rows[path[-1]])
        self.path = path[::-1]


def _shrunken_means(tree: _Tree, strength: Tensor) -> list[Tensor]:
    means: list[Tensor] = []
    above = tree.root
    for level, sums in enumerate(tree.sums):
        leaning = above[tree.parents[level]]
        own = F.normalize(sums + strength * leaning, dim=-1)
        above = torch.where(tree.is_parent[level], leaning, own)
        means.append(above)
    return means


def _leaf_composites(tree: _Tree, means: Sequence[Tensor], temperatures: Tensor) -> Tensor:
    """(n_L, d) composites of the leaves."""
    scaled = [mean[rows] / temperature for mean, rows, temperature in zip(means, tree.path, temperatures, strict=True)]
    return torch.stack(scaled).sum(dim=0)
