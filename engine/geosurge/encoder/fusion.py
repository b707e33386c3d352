"""Latent cross-attention of a semantic map with an image's tokens (GeoSURGE, arXiv 2510.01448, section 3.2).

Semantic tokens are the queries and RGB tokens the keys and values; three blocks of attention, MLP, residuals and
LayerNorm; the fused class token is normalised, projected and scaled to unit length: the visual embedding `v`.

Where the paper does not say, OURS:

- attention runs in `latent_width` (64) between tokens of `width` (128), with pre-norm;
- the query sequence has a class token of its own, learned;
- keys and values are the RGB tokens *and the query sequence itself*, as in a Perceiver resampler. With RGB tokens alone
  nothing would ever flow from one query to another, so the class token could not see the semantic map;
- both sequences get learned position embeddings, so that layout matters and not only content;
- without any block (the paper's ablation "no fusion") `v` comes straight from the vision tower: its class token where
  it has one, else the mean of its tokens, through the same LayerNorm, projection and scaling, without a semantic map;
- with `vision_skip`, that embedding and the fused one are added before they are scaled. The class token begins as the
  same vector for every image, and all that the image says of itself has to pass the narrow attention; the skip lets
  the fusion begin where the vision tower alone would be.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geosurge.errors import EncoderError


@dataclass(frozen=True)
class FusionConfig:
    """Sizes of the fusion module.

    Attributes:
        dimension: Length of the visual embedding `v`.
        width: Width of the fused tokens.
        latent_width: Width in which attention is done.
        heads: Attention heads; they share `latent_width`.
        blocks: Number of cross-attention blocks; 0 is no fusion, and then the other sizes but `dimension` mean nothing.
        mlp_ratio: Hidden width of each MLP, in units of `width`.
        dropout: Dropout on attention and MLP outputs while training.
        vision_skip: Add the vision tower's own embedding to the fused one; nothing to add to without blocks.
    """

    dimension: int = 768
    width: int = 128
    latent_width: int = 64
    heads: int = 4
    blocks: int = 3
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    vision_skip: bool = False

    def __post_init__(self) -> None:
        """Checks the sizes.

        Raises:
            EncoderError: A size is not usable.
        """
        for name, least in (("dimension", 1), ("width", 1), ("latent_width", 1), ("heads", 1), ("blocks", 0)):
            if getattr(self, name) < least:
                raise EncoderError(f"fusion: {name} is {getattr(self, name)}; it must be at least {least}")
        if self.latent_width % self.heads:
            raise EncoderError(f"fusion: latent_width {self.latent_width} is not divisible by {self.heads} heads")
        if int(self.width * self.mlp_ratio) < 1:
            raise EncoderError(f"fusion: mlp_ratio {self.mlp_ratio} leaves the MLPs without hidden units")
        if not 0.0 <= self.dropout < 1.0:
            raise EncoderError(f"fusion: dropout is {self.dropout}; it must be at least 0 and less than 1")


class LatentCrossAttention(nn.Module):
    """Multi-head attention from queries to a context, in a width narrower than the tokens'."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.query = nn.Linear(config.width, config.latent_width)
        self.key_value = nn.Linear(config.width, 2 * config.latent_width)
        self.output = nn.Linear(config.latent_width, config.width)

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        """Attends.

        Args:
            queries: (n, q, width).
            context: (n, t, width).

        Returns:
            (n, q, width).
        """
        query, key, value = self._project(queries, context)
        attended = F.scaled_dot_product_attention(query, key, value)
        projected: Tensor = self.output(attended.transpose(1, 2).flatten(2))
        return projected

    def weights(self, queries: Tensor, context: Tensor) -> Tensor:
        """Attention weights of the same call, for inspection.

        Args:
            queries: (n, q, width).
            context: (n, t, width).

        Returns:
            (n, heads, q, t); each row sums to one.
        """
        query, key, _ = self._project(queries, context)
        scores: Tensor = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
        return scores.softmax(dim=-1)

    def _project(self, queries: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        key, value = self.key_value(context).chunk(2, dim=-1)
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query(queries), key, value)
        )
        return query, key, value


class FusionBlock(nn.Module):
    """Cross-attention and an MLP, each after a LayerNorm and inside a residual."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        hidden = int(config.width * config.mlp_ratio)
        self.query_norm = nn.LayerNorm(config.width)
        self.context_norm = nn.LayerNorm(config.width)
        self.attention = LatentCrossAttention(config)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp = nn.Sequential(nn.Linear(config.width, hidden), nn.GELU(), nn.Linear(hidden, config.width))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, queries: Tensor, rgb: Tensor, *, first: int | None = None) -> Tensor:
        """Updates the queries.

        Args:
            queries: (n, q, width).
            rgb: (n, t, width).
            first: Update and return only so many of the first queries; all of them stay in the context.

        Returns:
            (n, q, width), or (n, first, width).
        """
        normalised, context = self.attention_inputs(queries, rgb)
        queries = queries[:, :first] + self.dropout(self.attention(normalised[:, :first], context))
        updated: Tensor = queries + self.dropout(self.mlp(self.mlp_norm(queries)))
        return updated

    def attention_inputs(self, queries: Tensor, rgb: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised queries, and the context of RGB tokens followed by the queries, all normalised."""
        normalised = self.query_norm(queries)
        return normalised, torch.cat([self.context_norm(rgb), normalised], dim=1)


class VisionHead(nn.Module):
    """The vision tower's tokens alone, made an embedding: what stands in the fusion module's place without fusion."""

    def __init__(self, config: FusionConfig, vision_width: int, token_count: int, cells: int) -> None:
        """Builds the module.

        Args:
            config: Sizes; only `dimension` counts.
            vision_width: Width of the vision tower's tokens.
            token_count: Number of the vision tower's tokens.
            cells: Those of them that are the patch grid; any before them are class tokens.
        """
        super().__init__()
        self.config = config
        self.has_class_token = token_count > cells
        self.norm = nn.LayerNorm(vision_width)
        self.projection = nn.Linear(vision_width, config.dimension)

    def forward(self, rgb: Tensor) -> Tensor:
        """Embeds.

        Args:
            rgb: (n, token_count, vision_width) tokens of the vision tower.

        Returns:
            (n, dimension) float32, unit rows: the visual embedding `v`.
        """
        return F.normalize(self.unscaled(rgb).float(), dim=-1)

    def unscaled(self, rgb: Tensor) -> Tensor:
        """The embedding before it is scaled to unit length; (n, dimension)."""
        pooled = rgb[:, 0] if self.has_class_token else rgb.mean(dim=1)
        projected: Tensor = self.projection(self.norm(pooled))
        return projected


class Fusion(nn.Module):
    """Joins RGB tokens and class fractions into one unit vector."""

    def __init__(self, config: FusionConfig, vision_width: int, token_count: int, class_count: int, cells: int) -> None:
        """Builds the module.

        Args:
            config: Sizes, with at least one block.
            vision_width: Width of the vision tower's tokens.
            token_count: Number of the vision tower's tokens.
            class_count: Number of semantic classes.
            cells: Rows times columns of the patch grid, the number of semantic tokens.
        """
        super().__init__()
        self.config = config
        self.vision_projection = nn.Linear(vision_width, config.width)
        self.vision_position = nn.Parameter(torch.randn(token_count, config.width) * 0.02)
        self.semantic_projection = nn.Linear(class_count, config.width)
        self.semantic_position = nn.Parameter(torch.randn(cells, config.width) * 0.02)
        self.class_token = nn.Parameter(torch.randn(config.width) * 0.02)
        self.blocks = nn.ModuleList(FusionBlock(config) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(config.width)
        self.projection = nn.Linear(config.width, config.dimension)
        self.skip = VisionHead(config, vision_width, token_count, cells) if config.vision_skip else None

    def forward(self, rgb: Tensor, fractions: Tensor) -> Tensor:
        """Fuses.

        Args:
            rgb: (n, token_count, vision_width) tokens of the vision tower.
            fractions: (n, cells, class_count) class fractions.

        Returns:
            (n, dimension) float32, unit rows: the visual embedding `v`.
        """
        queries, context = self._embed(rgb, fractions)
        for number, block in enumerate(self.blocks, start=1):
            # Of the last block's output only the class token is read.
            queries = block(queries, context, first=1 if number == len(self.blocks) else None)
        embedding = self.projection(self.norm(queries[:, 0]))
        if self.skip is not None:
            embedding = embedding + self.skip.unscaled(rgb)
        return F.normalize(embedding.float(), dim=-1)

    @torch.no_grad()
    def attention_weights(self, rgb: Tensor, fractions: Tensor) -> list[Tensor]:
        """Attention weights of every block, for inspection.

        Args:
            rgb: As for `forward`.
            fractions: As for `forward`.

        Returns:
            For each block (n, heads, 1 + cells, token_count + 1 + cells): from the class token and the semantic tokens
            to the RGB tokens, the class token and the semantic tokens.
        """
        queries, context = self._embed(rgb, fractions)
        weights = []
        for block in self.blocks:
            assert isinstance(block, FusionBlock)
            weights.append(block.attention.weights(*block.attention_inputs(queries, context)))
            queries = block(queries, context)
        return weights

    def _embed(self, rgb: Tensor, fractions: Tensor) -> tuple[Tensor, Tensor]:
        context = self.vision_projection(rgb) + self.vision_position
        semantic = self.semantic_projection(fractions) + self.semantic_position
        class_token = self.class_token.expand(semantic.shape[0], 1, -1)
        return torch.cat([class_token.to(semantic.dtype), semantic], dim=1), context
