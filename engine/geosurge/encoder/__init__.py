"""The fusion encoder: a vision tower and a semantic map, joined by latent cross-attention, give one unit vector."""

from geosurge.encoder.fusion import FusionConfig
from geosurge.encoder.model import EncoderConfig, ImageEncoder
from geosurge.encoder.segmentation import SegmentationConfig
from geosurge.encoder.vision import VisionConfig

__all__ = ["EncoderConfig", "FusionConfig", "ImageEncoder", "SegmentationConfig", "VisionConfig"]
