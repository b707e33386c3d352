"""Renders the sample views of this folder and writes where each one was taken into ``truth.csv``.

    python tests/data/views/make_views.py

NASA's Blue Marble is in the public domain.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from geosurge_training.data.blue_marble import BlueMarble, Views

IMAGE_SIZE = 384
COLUMNS = ("path", "latitude_deg", "longitude_deg", "width_km", "rotation_deg")

# The shape of a coast or a lake gives most of these away; the Sahara's Tassili plateau has only rock and sand.
PLACES = (
    ("florida", 27.9, -81.6, 700.0, -8.0),
    ("iceland", 64.9, -18.6, 650.0, 12.0),
    ("italy", 42.1, 13.3, 850.0, 0.0),
    ("japan", 35.9, 138.4, 750.0, 15.0),
    ("lake_victoria", -0.7, 34.7, 700.0, -5.0),
    ("sahara", 25.2, 7.6, 800.0, 6.0),
    ("tasmania", -42.1, 146.6, 600.0, -14.0),
    ("tierra_del_fuego", -53.9, -69.2, 800.0, 9.0),
)


def make_views(folder: Path) -> None:
    """Writes the pictures and the table into a folder."""
    names = [place[0] for place in PLACES]
    numbers = np.array([place[1:] for place in PLACES], dtype=np.float64)
    pixels = BlueMarble(image_size=IMAGE_SIZE).render(Views(*numbers.T)).permute(0, 2, 3, 1).numpy()
    with (folder / "truth.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for name, row, picture in zip(names, numbers.tolist(), pixels, strict=True):
            Image.fromarray(picture).save(folder / f"{name}.jpg", quality=90)
            writer.writerow([f"{name}.jpg", *row])


if __name__ == "__main__":
    make_views(Path(__file__).parent)
