"""The encoder that an index is made with, and what the index says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from geosurge.bundle import open_bundle
from geosurge.bundle.manifest import ENCODER_DIRECTORY, Manifest
from geosurge.encoder import ImageEncoder
from geosurge.errors import ConfigurationError
from geosurge.store import resolve_bundle
from geosurge_training.prototypes.pictures import Pictures, ViewPictures
from geosurge_training.recipe import BundleSection

BEAM_WIDTH: Final = 64
"""Means tell the cells of coarse levels apart less well than what was trained to."""


def open_encoder(path: Path, device: str = "cpu") -> tuple[ImageEncoder, Manifest]:
    """Opens the encoder of a bundle.

    Args:
        path: The bundle, or a store whose active bundle is meant.
        device: Torch device to put it on.

    Returns:
        The encoder, and what its bundle says.

    Raises:
        BundleError: There is no such bundle.
        ConfigurationError: It has no encoder.
        EncoderError: Its encoder cannot be read.
    """
    bundle = open_bundle(resolve_bundle(path))
    if bundle.manifest.encoder is None:
        raise ConfigurationError(f"the bundle {bundle.path} has no encoder; give one that has")
    return ImageEncoder.load(bundle.path / ENCODER_DIRECTORY, device), bundle.manifest


def about_pictures(pictures: Pictures, encoder: Manifest, beam_width: int = BEAM_WIDTH) -> tuple[BundleSection, str]:
    """What a bundle says of itself, and what it says that it was made from.

    Args:
        pictures: The pictures.
        encoder: Manifest of the encoder's bundle.
        beam_width: Its default beam width.
    """
    is_same_world = isinstance(pictures, ViewPictures)
    about = BundleSection(
        description=f"Prototypes of {pictures.title}, made without training.",
        can=encoder.domain.can if is_same_world else "pictures like those that it was made from, at the same places",
        cannot=encoder.domain.cannot if is_same_world else "pictures of other kinds, and places that it has none of",
        storage="fp16",
        default_beam_width=beam_width,
    )
    return about, f"{pictures.title}: prototypes with the encoder of {encoder.name} ({encoder.domain.training})"
