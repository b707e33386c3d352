"""Real servers on free ports over small bundles, and the images to ask them."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from geosurge.encoder.fusion import FusionConfig
from geosurge.encoder.model import EncoderConfig, ImageEncoder
from geosurge.encoder.segmentation import SegmentationConfig
from geosurge.encoder.vision import VisionConfig
from geosurge.server.app import Server
from geosurge.settings import ServerSettings

DIMENSION = 16


def tiny_encoder() -> ImageEncoder:
    """An encoder with random weights that answers in a millisecond or two."""
    torch.manual_seed(0)
    vision = {
        "model_type": "resnet",
        "embedding_size": 8,
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
        "layer_type": "basic",
    }
    segmentation = {
        "model_type": "segformer",
        "num_labels": 3,
        "num_encoder_blocks": 2,
        "depths": [1, 1],
        "sr_ratios": [2, 1],
        "hidden_sizes": [8, 8],
        "patch_sizes": [7, 3],
        "strides": [4, 2],
        "num_attention_heads": [1, 1],
        "mlp_ratios": [2, 2],
        "decoder_hidden_size": 8,
    }
    config = EncoderConfig(
        vision=VisionConfig(backbone=vision, image_size=32),
        segmentation=SegmentationConfig(backbone=segmentation, image_size=32, class_count=3),
        fusion=FusionConfig(dimension=DIMENSION, width=16, latent_width=8, heads=2, blocks=1),
    )
    return ImageEncoder(config).eval()


def encoded_image(seed: int, file_format: str = "PNG", size: tuple[int, int] = (48, 40)) -> bytes:
    """A smooth random picture."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    content = io.BytesIO()
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(content, file_format)
    return content.getvalue()


def embedding(seed: int) -> NDArray[np.float32]:
    """A random query embedding of the tiny bundles' dimension."""
    return np.random.default_rng(seed).standard_normal(DIMENSION).astype(np.float32)


def settings_for(bundle: Path, **changes: Any) -> ServerSettings:
    """Settings of a server on a free port."""
    small: dict[str, Any] = {"index": bundle, "port": 0, "max_batch_size": 8, "decode_workers": 2, "grace_seconds": 5.0}
    return ServerSettings(**{**small, **changes})


@asynccontextmanager
async def running(settings: ServerSettings) -> AsyncIterator[tuple[Server, grpc.aio.Channel]]:
    """A server on this event loop, warmed up, and a channel to it; both are closed afterwards."""
    server = Server(settings)
    await server.start()
    try:
        async with grpc.aio.insecure_channel(server.address) as channel:
            yield server, channel
    finally:
        await server.stop(grace_seconds=0)
