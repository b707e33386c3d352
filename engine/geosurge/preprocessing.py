"""From an image to canonical pixels, which is what encoders read.

Everything here works without torch, so that a process that only decodes need not load it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from geosurge.images import DEFAULT_LIMITS, ImageLimits, decode_image


@dataclass(frozen=True)
class Preprocessing:
    """A way to canonical pixels; an index is only valid with the one that its embeddings were made with.

    Attributes:
        image_size: Side of the canonical square, pixels.
        jpeg_draft: JPEG is decoded at an eighth, a quarter or half of its size where that leaves both sides at least
            twice as long as `image_size`: a photo of 12 megapixels takes a third of the time.
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
        return self.apply(decode_image(data, limits, self.image_size if self.jpeg_draft else None))

    def apply(self, image: Image.Image) -> NDArray[np.uint8]:
        """Brings an image to canonical pixels: shortest side to `image_size` (bicubic, antialiased), centre crop.

        Args:
            image: RGB, upright, any size.

        Returns:
            (3, image_size, image_size) uint8.
        """
        side = self.image_size
        width, height = image.size
        # Crop and resize in one go, in source coordinates: an odd margin is halved without rounding.
        shortest = min(width, height)
        left, top = (width - shortest) / 2, (height - shortest) / 2
        if image.size != (side, side):
            box = (left, top, left + shortest, top + shortest)
            image = image.resize((side, side), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
        return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))
