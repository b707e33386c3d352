"""Archives of pictures for tests: rendered views of the Earth, as an owner would have them on a disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from geosurge_training.data.blue_marble import BlueMarble

_BATCH = 64


def write_views(
    folder: Path, count: int, *, side: int = 160, seed: int = 5, quality: int = 90
) -> dict[str, tuple[float, float]]:
    """Writes views as JPEG, a hundred to a folder; returns where each is, by its name relative to the folder."""
    source = BlueMarble(side, seed=seed, partition_samples=1000)
    truths: dict[str, tuple[float, float]] = {}
    for step in range(-(-count // _BATCH)):
        batch = source.train_batch(step, _BATCH)
        for pixels, latitude, longitude in zip(batch.pixels, batch.latitude_deg, batch.longitude_deg, strict=True):
            number = len(truths)
            if number == count:
                break
            name = f"{number // 100:03}/view{number:05}.jpg"
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.asarray(pixels).transpose(1, 2, 0)).save(path, "JPEG", quality=quality)
            truths[name] = (float(latitude), float(longitude))
    return truths
