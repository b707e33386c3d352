"""Geographic embeddings: a learned table and a learned temperature per level, and the loss that trains them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geosurge_training.fitting.label_smoothing import LabelSmoothing

Negatives = Literal["batch", "all_cells"]
Head = Literal["embeddings", "classifier"]


@dataclass(frozen=True)
class Candidates:
    """The cells of one level that stand in the denominator of a batch's loss.

    Attributes:
        cells: (c,) int64 distinct ordinals, ascending; None for all cells of the level.
        embeddings: (c, d) what the visual embedding is compared with.
    """

    cells: Tensor | None
    embeddings: Tensor

    def positions(self, ordinals: Tensor) -> Tensor:
        """Where cells stand among the candidates: (n,) int64 from (n,) ordinals, all of them candidates."""
        return ordinals if self.cells is None else torch.searchsorted(self.cells, ordinals)

    def detached(self) -> Candidates:
        """The same cells, with embeddings that collect gradients of their own."""
        return replace(self, embeddings=self.embeddings.detach().requires_grad_())


@dataclass(frozen=True)
class Labels:
    """Where n images were taken.

    Attributes:
        ordinals: (n, L) int64 cell of each image on each level; -1 where no cell holds it, which leaves the image out
            of that level's loss.
        directions: (n, 3) float64 unit vectors; only label smoothing reads them.
    """

    ordinals: Tensor
    directions: Tensor | None = None

    def cut(self, rows: slice) -> Labels:
        """Some of the images, in their order."""
        return Labels(self.ordinals[rows], None if self.directions is None else self.directions[rows])


class GeocellEmbeddings(nn.Module):
    """Geographic embeddings `g` and temperatures `tau` of every level (GeoSURGE, arXiv 2510.01448, section 3.3).

    Per level the loss is InfoNCE from image to geography on cosine similarities,
    -log( exp(v . g+ / tau) / sum_j exp(v . g_j / tau) ), and levels are summed. OURS: with `batch` negatives the sum
    runs over the *distinct* cells of the batch, so that two images of one cell do not push each other away; with
    `all_cells` it runs over the whole level, which is the softmax that inference uses.

    OURS: tables start with random directions. The mean visual embeddings of the cells would be another start, but the
    fusion module is not trained yet then, and theirs would be means of what a random network says.

    The head `classifier` is plain classification, for comparison: the rows are weights of any length, and the
    temperature does not learn. It only scales the weights; that it is the initial one of the embeddings lets both heads
    start from the same logits and take steps of the same size.
    """

    def __init__(
        self,
        cell_counts: Sequence[int],
        dimension: int,
        initial_temperature: float = 0.07,
        head: Head = "embeddings",
    ) -> None:
        super().__init__()
        self.head = head
        self.tables = nn.ParameterList(
            nn.Parameter(F.normalize(torch.randn(count, dimension), dim=-1)) for count in cell_counts
        )
        self.log_temperatures = nn.Parameter(
            torch.full((len(cell_counts),), initial_temperature).log(), requires_grad=head == "embeddings"
        )

    def temperatures(self) -> Tensor:
        """Temperature of each level, (L,)."""
        return self.log_temperatures.exp()

    def embeddings(self) -> list[Tensor]:
        """What visual embeddings are compared with on each level, (n_l, d); unit rows unless the head classifies."""
        return [self._compared(table) for table in self.tables]

    def candidates(self, ordinals: Tensor, negatives: Negatives) -> list[Candidates]:
        """Cells in the denominators of a batch's losses.

        Args:
            ordinals: (n, L) int64 cell of each image of the whole batch on each level, -1 for none.
            negatives: Which cells stand in the denominator.

        Returns:
            The candidates of each level.
        """
        if negatives == "all_cells":
            return [Candidates(None, embeddings) for embeddings in self.embeddings()]
        chosen = [torch.unique(level[level >= 0]) for level in ordinals.T]
        return [
            Candidates(cells, self._compared(table[cells])) for cells, table in zip(chosen, self.tables, strict=True)
        ]

    def losses(
        self,
        visual: Tensor,
        labels: Labels,
        candidates: Sequence[Candidates],
        counts: Sequence[int],
        smoothing: LabelSmoothing | None = None,
    ) -> Tensor:
        """What images contribute to the loss of each level of the batch that they are a part of.

        Args:
            visual: (n, d) unit visual embeddings.
            labels: Where the n images were taken.
            candidates: Those of the whole batch.
            counts: Number of images of the whole batch that have a cell, of each level.
            smoothing: Soft targets; without it the image's own cell is the target.

        Returns:
            (L,) sum of the images' losses over the count, zero where none of them has a cell.
        """
        losses = []
        temperatures = self.temperatures()
        for level, candidate in enumerate(candidates):
            known = labels.ordinals[:, level] >= 0
            if not known.any():
                losses.append(visual.sum() * 0.0)
                continue
            if smoothing is None:
                targets = candidate.positions(labels.ordinals[known, level])
            else:
                assert labels.directions is not None
                targets = smoothing.targets(level, labels.directions[known], candidate.cells)
            logits = visual[known] @ candidate.embeddings.T / temperatures[level]
            losses.append(F.cross_entropy(logits.float(), targets, reduction="sum") / counts[level])
        return torch.stack(losses)

    def _compared(self, rows: Tensor) -> Tensor:
        return F.normalize(rows, dim=-1) if self.head == "embeddings" else rows


def known_counts(ordinals: Tensor) -> list[int]:
    """Number of images that have a cell on each level, from their (n, L) ordinals."""
    counts: list[int] = (ordinals >= 0).sum(dim=0).tolist()
    return counts
