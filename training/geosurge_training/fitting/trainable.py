"""What is trained, and what trains it."""

from __future__ import annotations

import torch
from torch import nn

from geosurge.encoder import ImageEncoder
from geosurge_training.fitting.geocells import GeocellEmbeddings


class Trainable(nn.Module):
    """The encoder and the geographic embeddings, trained together."""

    def __init__(self, encoder: ImageEncoder, geocells: GeocellEmbeddings) -> None:
        super().__init__()
        self.encoder = encoder
        self.geocells = geocells


def make_optimiser(model: Trainable, rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW; vectors, biases, norms, geographic embeddings and temperatures do not decay.

    OURS: the paper names one weight decay and not what it is for. A geographic embedding is divided by its length, so
    that decay would not regularise it: it would only shorten it, which makes its steps longer, those of cells that are
    seldom seen the most. Embeddings and the classifier that they are compared with are treated alike.
    """
    trained = [parameter for parameter in model.encoder.parameters() if parameter.requires_grad]
    geocells = [parameter for parameter in model.geocells.parameters() if parameter.requires_grad]
    decaying = [parameter for parameter in trained if parameter.ndim > 1]
    others = [parameter for parameter in trained if parameter.ndim <= 1] + geocells
    groups = [{"params": decaying, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate)
