"""Transformers backbones from configuration or from pretrained files, and what both towers do to their pixels.

Nothing here downloads silently: a pretrained backbone is a local directory, or a hub id together with a revision, and a
file that is not at hand is an `EncoderError` that names it and says how to get it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from geosurge.errors import EncoderError


def backbone_config(settings: Mapping[str, Any]) -> PretrainedConfig:
    """Builds a transformers configuration.

    Args:
        settings: Fields of the configuration, `model_type` among them.

    Returns:
        The configuration object of that model type.

    Raises:
        EncoderError: `model_type` is missing or unknown to the installed transformers.
    """
    fields = dict(settings)
    model_type = fields.pop("model_type", None)
    if model_type is None:
        raise EncoderError("a backbone needs a `model_type`, for example 'clip_vision_model' or 'resnet'")
    try:
        return AutoConfig.for_model(model_type, **fields)
    except ValueError as error:
        raise EncoderError(f"backbone model_type {model_type!r} is not known to transformers: {error}") from error


def load_pretrained(auto_class: Any, source: str, revision: str | None) -> Any:  # noqa: ANN401 - transformers is untyped
    """Loads a pretrained backbone from a directory or from an explicit hub id and revision.

    Args:
        auto_class: Transformers auto class or model class to load with.
        source: Local directory, or hub id such as `openai/clip-vit-large-patch14-336`.
        revision: Commit of the hub repository; required unless `source` is a directory.

    Returns:
        The model in float32.

    Raises:
        EncoderError: The source is a hub id without a revision, or a file is missing.
    """
    if not Path(source).is_dir() and revision is None:
        raise EncoderError(
            f"backbone {source!r} is not a local directory; to load it from the hub give its `revision` (a commit), "
            "so that a rebuilt encoder is the same encoder"
        )
    try:
        return auto_class.from_pretrained(source, revision=revision, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise EncoderError(
            f"backbone {source!r} cannot be loaded: {error}. Fetch it where there is a network with "
            f"`hf download {source} --revision {revision or 'REVISION'} --local-dir DIR` and give DIR instead."
        ) from error


def normalise_pixels(pixels: Tensor, image_size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Brings canonical pixels to a tower's size and colour statistics.

    Args:
        pixels: (n, 3, s, s) uint8, or float already in 0 to 255.
        image_size: Side that the tower wants; antialiased bicubic where it differs from `s`.
        mean: Mean of each channel, in units of 0 to 1.
        std: Standard deviation of each channel, in units of 0 to 1.

    Returns:
        (n, 3, image_size, image_size) float32.
    """
    scaled = pixels.to(torch.float32) / 255.0
    if scaled.shape[-1] != image_size:
        size = (image_size, image_size)
        scaled = F.interpolate(scaled, size=size, mode="bicubic", antialias=True, align_corners=False)
    shape = (1, -1, 1, 1)
    return (scaled - scaled.new_tensor(mean).view(shape)) / scaled.new_tensor(std).view(shape)
