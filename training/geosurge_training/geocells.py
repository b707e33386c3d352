"""Geographic embeddings: a learned table and a learned temperature per level, and the loss that trains them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Negatives = Literal["batch", "all_cells"]


class GeocellEmbeddings(nn.Module):
    """Geographic embeddings `g` and temperatures `tau` of every level (GeoSURGE, arXiv 2510.01448, section 3.3).

    Per level the loss is InfoNCE from image to geography on cosine similarities,
    -log( exp(v . g+ / tau) / sum_j exp(v . g_j / tau) ), and levels are summed. OURS: with `batch` negatives the sum
    runs over the *distinct* cells of the batch, so that two images of one cell do not push each other away; with
    `all_cells` it runs over the whole level, which is the softmax that inference uses.
    """

    def __init__(self, cell_counts: Sequence[int], dimension: int, initial_temperature: float = 0.07) -> None:
        super().__init__()
        self.tables = nn.ParameterList(
            nn.Parameter(F.normalize(torch.randn(count, dimension), dim=-1)) for count in cell_counts
        )
        self.log_temperatures = nn.Parameter(torch.full((len(cell_counts),), initial_temperature).log())

    def temperatures(self) -> Tensor:
        """Temperature of each level, (L,)."""
        return self.log_temperatures.exp()

    def unit_embeddings(self) -> list[Tensor]:
        """Geographic embeddings of each level, (n_l, d) with unit rows."""
        return [F.normalize(table, dim=-1) for table in self.tables]

    def loss(self, visual: Tensor, ordinals: Tensor, negatives: Negatives) -> Tensor:
        """InfoNCE of each level.

        Args:
            visual: (n, d) unit visual embeddings.
            ordinals: (n, L) int64 cell of each image on each level; -1 where no cell holds it, which leaves the image
                out of that level's loss.
            negatives: Which cells stand in the denominator.

        Returns:
            (L,) mean loss of each level, zero where no image of the batch has a cell. Their sum is the training loss.
        """
        losses = []
        temperatures = self.temperatures()
        for level, table in enumerate(self.tables):
            known = ordinals[:, level] >= 0
            targets, queries = ordinals[known, level], visual[known]
            if len(targets) == 0:
                losses.append(visual.sum() * 0.0)
                continue
            if negatives == "batch":
                cells, targets = torch.unique(targets, return_inverse=True)
                table = table[cells]  # noqa: PLW2901 - the level's table, restricted
            logits = queries @ F.normalize(table, dim=-1).T / temperatures[level]
            losses.append(F.cross_entropy(logits.float(), targets))
        return torch.stack(losses)
