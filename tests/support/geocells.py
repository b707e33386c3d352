"""The loss of a batch that is not in parts."""

from __future__ import annotations

from torch import Tensor

from geosurge_training.fitting.geocells import GeocellEmbeddings, Labels, Negatives, known_counts


def whole_loss(module: GeocellEmbeddings, visual: Tensor, ordinals: Tensor, negatives: Negatives) -> Tensor:
    """Mean loss of each level, (L,), of (n, d) visual embeddings in the cells of (n, L) ordinals."""
    return module.losses(visual, Labels(ordinals), module.candidates(ordinals, negatives), known_counts(ordinals))
