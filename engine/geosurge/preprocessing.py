"""From an image to canonical pixels, which is what encoders read.

Everything here works without torch, so that a process that only decodes need not load it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from geosurge.images import DEFAULT_LIMITS, ImageLimits, decode_image

CropCount: TypeAlias = Literal[1, 5, 10]

CROP_SHARE: Final = 7 / 8
"""Side of the squares of `Preprocessing.crops`, of the image's shortest side."""


@dataclass(frozen=True)
class Preprocessing:
    """A way to canonical pixels; an index is only valid with the one that its embeddings were made with.

    Attributes:
        image_size: Side of the canonical square, pixels.
        jpeg_draft: JPEG is decoded at an eighth, a quarter or half of its size where that leaves both sides at least
            twice as long as they will be in canonical pixels: a photo of 12 megapixels takes a third of the time.
    """

    image_size: int
    jpeg_draft: bool = True

    @property
    def id(self) -> str:
        """Names it in manifests."""
        draft = "jpeg-draft-" if self.jpeg_draft else ""
        return f"{draft}shortest-side-{self.image_size}-bicubic-centre-crop-v1"

    def decode(self, data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> NDArray[np.uint8]:
        """Decodes an image to canonical pixels.

        Args:
            data: An encoded image.
            limits: What is accepted.

        Returns:
            (3, image_size, image_size) uint8.

        Raises:
            ImageError: The image cannot be used.
        """
        return self.apply(self._decoded(data, limits, self.image_size))

    def apply(self, image: Image.Image) -> NDArray[np.uint8]:
        """Brings an image to canonical pixels: shortest side to `image_size` (bicubic, antialiased), centre crop.

        Args:
            image: RGB, upright, any size.

        Returns:
            (3, image_size, image_size) uint8.
        """
        width, height = image.size
        shortest = min(width, height)
        return self._square(image, (width - shortest) / 2, (height - shortest) / 2, shortest)

    def decode_crops(self, data: bytes, count: CropCount, limits: ImageLimits = DEFAULT_LIMITS) -> NDArray[np.uint8]:
        """Decodes an image to the squares of `crops`.

        Args:
            data: An encoded image.
            count: How many.
            limits: What is accepted.

        Returns:
            (count, 3, image_size, image_size) uint8.

        Raises:
            ImageError: The image cannot be used.
        """
        # A smaller crop of the image fills the same square.
        side = self.image_size if count == 1 else math.ceil(self.image_size / CROP_SHARE)
        return self.crops(self._decoded(data, limits, side), count)

    def crops(self, image: Image.Image, count: CropCount) -> NDArray[np.uint8]:
        """Brings squares of an image to canonical pixels.

        GeoSURGE (arXiv 2510.01448, inference) averages the predictions of ten crops. OURS is their side, `CROP_SHARE`
        of the image's shortest, which is the field's 224 of 256 pixels.

        Args:
            image: RGB, upright, any size.
            count: 1 for what `apply` makes; 5 for smaller squares in the corners and the centre; 10 for those and their
                mirror images.

        Returns:
            (count, 3, image_size, image_size) uint8.
        """
        if count == 1:
            return self.apply(image)[np.newaxis]
        width, height = image.size
        side = min(width, height) * CROP_SHARE
        right, bottom = width - side, height - side
        corners = ((0.0, 0.0), (right, 0.0), (0.0, bottom), (right, bottom), (right / 2, bottom / 2))
        squares = np.stack([self._square(image, left, top, side) for left, top in corners])
        return squares if count == 5 else np.concatenate([squares, squares[..., ::-1]])

    def _decoded(self, data: bytes, limits: ImageLimits, side: int) -> Image.Image:
        """Decodes an image whose shortest side will be resized to so many pixels."""
        return decode_image(data, limits, side if self.jpeg_draft else None)

    def _square(self, image: Image.Image, left: float, top: float, side: float) -> NDArray[np.uint8]:
        """Crops and resizes in one go, in source coordinates: an odd margin is halved without rounding."""
        size = (self.image_size, self.image_size)
        if image.size != size or side != self.image_size:
            box = (left, top, left + side, top + side)
            image = image.resize(size, Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
        return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))
