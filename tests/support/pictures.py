"""Pictures on disk to train on, and recipes for them that train in seconds."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image
from support.recipes import write_recipe

from geosurge_training.recipe import Recipe, load_recipe

SIDE: Final = 32

CLIP_BACKBONE: Final = """[encoder.vision.backbone]
model_type = "clip_vision_model"
hidden_size = 16
intermediate_size = 32
num_hidden_layers = 2
num_attention_heads = 2
patch_size = 8
image_size = 32
"""


def write_pictures(folder: Path, count: int = 80) -> None:
    """Writes `pictures.csv` and its PNG files: noise in the colour of one of four places."""
    rng = np.random.default_rng(5)
    places = np.array([[47.0, 8.0], [-33.0, 151.0], [40.0, -74.0], [1.0, 36.0]])
    with (folder / "pictures.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "latitude_deg", "longitude_deg"])
        for number in range(count):
            place = number % len(places)
            colour = np.array([40 + 50 * place, 200 - 40 * place, 30 * place])
            pixels = np.clip(colour + rng.normal(0.0, 25.0, (SIDE, SIDE, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
            rows.writerow([f"{number}.png", *(places[place] + rng.normal(0.0, 3.0, 2)).round(6)])


def picture_recipe(
    folder: Path,
    training: str,
    *,
    vision: str | None = None,
    frozen: bool = False,
    dropout: float = 0.0,
    learning_rate: float = 3e-3,
    name: str = "recipe.toml",
) -> Recipe:
    """Writes and loads a recipe for `write_pictures` of the same folder.

    Args:
        folder: Where the recipe goes.
        training: Further lines of the training section.
        vision: The vision backbone's table; by default a ResNet with batch normalisation.
        frozen: Whether the vision tower is frozen.
        dropout: That of the fusion module.
        learning_rate: Highest learning rate.
        name: Name of the recipe's file.
    """
    data = 'source = "table"\ntable = "pictures.csv"\nheld_out_share = 0.5'
    path = write_recipe(folder / name, data=data, segmenter_steps=0)
    text = path.read_text()
    start, end = text.index("[training]"), text.index("[calibration]")
    lines = f"[training]\nbatch_size = 8\nlearning_rate = {learning_rate}\nlog_every = 1\n{training}\n\n"
    text = text[:start] + lines + text[end:]
    if vision is not None:
        start, end = text.index("[encoder.vision.backbone]"), text.index("[encoder.segmentation]")
        text = f"{text[:start]}{vision}\n{text[end:]}"
    changes = [
        ("tau_min = 8", "tau_min = 0"),
        ("[400, 120]", "[12, 6]"),
        ("\nblocks = 2", f"\nblocks = 2\ndropout = {dropout}"),
        ("frozen = false", f"frozen = {str(frozen).lower()}"),
    ]
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path.write_text(text)
    return load_recipe(path)
