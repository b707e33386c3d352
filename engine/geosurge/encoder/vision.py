"""The vision tower: any transformers vision model that yields a grid of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AutoModel, CLIPVisionModel

from geosurge.encoder.backbones import backbone_config, load_pretrained, normalise_pixels
from geosurge.errors import EncoderError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class VisionConfig:
    """Configuration of the vision tower.

    Attributes:
        backbone: Fields of the transformers configuration, `model_type` among them.
        image_size: Side of the square that the tower sees, pixels.
        mean: Channel means, 0 to 1.
        std: Channel standard deviations, 0 to 1.
        frozen: The weights are not trained and the tower runs without gradients.
    """

    backbone: Mapping[str, Any]
    image_size: int
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    frozen: bool = True

    @classmethod
    def clip_vit_large_336(cls) -> Self:
        """CLIP ViT-L/14 at 336 pixels, the tower of GeoSURGE (`openai/clip-vit-large-patch14-336`)."""
        return cls(
            backbone={
                "model_type": "clip_vision_model",
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "projection_dim": 768,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "patch_size": 14,
                "image_size": 336,
            },
            image_size=336,
        )


@dataclass(frozen=True)
class VisionTokens:
    """What the tower saw.

    Attributes:
        tokens: (n, t, c): the grid's tokens row by row, after any class token the model has.
        grid: Rows and columns of the grid.
    """

    tokens: Tensor
    grid: tuple[int, int]


class VisionTower(nn.Module):
    """Runs a transformers vision model and returns its tokens.

    Convolutional models give a (n, c, h, w) map and transformers (n, t, c) sequences; both come out as sequences. The
    last hidden state is read, never a pooled or projected feature: the model's own helpers for those changed their
    return type between transformers 4 and 5.

    Attributes:
        config: The configuration.
        backbone: The transformers model.
        grid: Rows and columns of the grid of tokens.
        width: Width of a token.
        token_count: Number of tokens, class tokens included.
    """

    def __init__(self, config: VisionConfig, backbone: nn.Module | None = None) -> None:
        """Builds the tower, in evaluation mode.

        Args:
            config: The configuration.
            backbone: The model, where it is at hand already; otherwise it is built with random weights.

        Raises:
            EncoderError: The configuration is wrong, or the model cannot be used as a vision tower.
        """
        super().__init__()
        self.config = config
        self.backbone = _build(config.backbone) if backbone is None else backbone
        if config.frozen:
            self.requires_grad_(requires_grad=False)
        self.eval()
        self.grid, self.width, self.token_count = _grid_of(_probe(self.backbone, config), config, self.backbone)

    @classmethod
    def from_pretrained(
        cls, source: str, revision: str | None = None, *, image_size: int | None = None, frozen: bool = True
    ) -> Self:
        """Loads a vision tower from a directory or a hub id and revision; of a CLIP model, the vision half.

        Args:
            source: Local directory or hub id.
            revision: Commit of the hub repository.
            image_size: Side of the square that the tower sees, pixels; by default the model's own.
            frozen: See `VisionConfig.frozen`.

        Returns:
            The tower, with a configuration that rebuilds it without the source.

        Raises:
            EncoderError: A file is missing or damaged, or the model cannot be used as a vision tower of this size.
        """
        pretrained = load_pretrained(_class_of, source, revision)
        config = VisionConfig(
            pretrained.settings,
            image_size or _own_image_size(pretrained.backbone),
            pretrained.mean or CLIP_MEAN,
            pretrained.std or CLIP_STD,
            frozen,
        )
        return cls(config, pretrained.backbone)

    def train(self, mode: bool = True) -> Self:
        """Switches training mode; a frozen tower stays in evaluation mode."""
        return super().train(mode and not self.config.frozen)

    def forward(self, pixels: Tensor) -> VisionTokens:
        """Encodes canonical pixels.

        Args:
            pixels: (n, 3, s, s) uint8.

        Returns:
            The tokens of the last layer.
        """
        inputs = normalise_pixels(pixels, self.config.image_size, self.config.mean, self.config.std)
        # Convolutions run faster in this layout, on CPUs as on tensor cores.
        inputs = inputs.contiguous(memory_format=torch.channels_last)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.frozen):
            hidden = self.backbone(inputs).last_hidden_state
        if hidden.ndim == 4:
            hidden = hidden.flatten(2).transpose(1, 2)
        return VisionTokens(hidden, self.grid)


def _build(settings: Mapping[str, Any]) -> nn.Module:
    """Builds a vision model with random weights."""
    auto_class: Any = AutoModel
    model: nn.Module = auto_class.from_config(backbone_config(settings))
    return model


def _class_of(model_type: str) -> Any:  # noqa: ANN401 - transformers is untyped
    """Class to load a pretrained model with; CLIP's files hold a text tower too, which is left out."""
    return CLIPVisionModel if model_type in ("clip", "clip_vision_model") else AutoModel


def _own_image_size(backbone: nn.Module) -> int:
    """Side that a model was made for; 224 pixels where it does not say, the size that convolutional models train at."""
    size = getattr(backbone.config, "image_size", None) or 224
    return int(size if isinstance(size, int) else size[0])


def _probe(backbone: nn.Module, config: VisionConfig) -> Tensor:
    """Last hidden state of a black image."""
    model_type = config.backbone.get("model_type")
    if getattr(backbone, "main_input_name", None) != "pixel_values":
        raise EncoderError(f"backbone {model_type!r} does not take images; it cannot be used as a vision tower")
    try:
        with torch.no_grad():
            outputs = backbone(torch.zeros(1, 3, config.image_size, config.image_size))
    except (RuntimeError, ValueError) as error:
        raise EncoderError(
            f"backbone {model_type!r} cannot see a square of {config.image_size} pixels: {error}"
        ) from error
    hidden = outputs.get("last_hidden_state")
    if hidden is None or hidden.ndim not in (3, 4):
        raise EncoderError(f"backbone {model_type!r} gives no tokens; it cannot be used as a vision tower")
    tokens: Tensor = hidden
    return tokens


def _grid_of(hidden: Tensor, config: VisionConfig, backbone: nn.Module) -> tuple[tuple[int, int], int, int]:
    """Reads grid, token width and token count off one output of the backbone."""
    if hidden.ndim == 4:
        rows, columns = int(hidden.shape[2]), int(hidden.shape[3])
        return (rows, columns), int(hidden.shape[1]), rows * columns
    count, width = int(hidden.shape[1]), int(hidden.shape[2])
    patch = getattr(backbone.config, "patch_size", None)
    side = config.image_size // patch if isinstance(patch, int) else isqrt(count)
    if side * side > count:
        # A hierarchical transformer merged its patches on the way: its tokens are the grid and nothing else.
        side = isqrt(count)
        if side * side != count:
            raise EncoderError(
                f"backbone {config.backbone['model_type']!r} gave {count} tokens for a {config.image_size}-pixel "
                "image, which are no square grid; it cannot be used as a vision tower"
            )
    return (side, side), width, count
