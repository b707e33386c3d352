from __future__ import annotations

import csv
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from support.recipes import write_recipe
from support.servers import encoded_image
from support.shards import write_shard

from geosurge.errors import ConfigurationError
from geosurge_training.data.open_source import open_source
from geosurge_training.data.source import ImageSource
from geosurge_training.encoders import build_encoder
from geosurge_training.recipe import Recipe, load_recipe

COUNT = 40


def place(number: int) -> tuple[float, float]:
    return number + 0.5, -number - 0.5


def write_table(folder: Path) -> str:
    with (folder / "pictures.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["IMG_ID", "LAT", "LON"])
        for number in range(COUNT):
            path = folder / "images" / f"{number % 3:02x}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded_image(number))
            rows.writerow([path.relative_to(folder / "images"), *place(number)])
    return 'source = "table"\ntable = "pictures.csv"\nimages = "images"'


def write_shards(folder: Path) -> str:
    members = []
    for number in range(COUNT):
        latitude, longitude = place(number)
        told = json.dumps({"lat": latitude, "lng": longitude}).encode()
        members += [
            (f"{number % 3:02x}_{number}.png", encoded_image(number)),
            (f"{number % 3:02x}_{number}.json", told),
        ]
    write_shard(folder / "shard.tar", members)
    return 'source = "webdataset"\nshards = "*.tar"\nlatitude_field = "lat"\nlongitude_field = "lng"'


def opened(folder: Path, data: str) -> tuple[Recipe, ImageSource]:
    recipe = load_recipe(write_recipe(folder / "recipe.toml", data=data))
    return recipe, open_source(recipe, build_encoder(recipe), folder / "run")


@pytest.mark.parametrize("write", [write_table, write_shards])
def test_files_become_training_batches_and_held_out_ones(tmp_path: Path, write: object) -> None:
    recipe, source = opened(tmp_path, write(tmp_path) + "\nheld_out_share = 0.3")  # type: ignore[operator]
    assert source.train_count is not None
    batch = source.train_batch(0, source.train_count)
    held_out = next(source.held_out(COUNT, 1, COUNT))
    assert sorted([*batch.latitude_deg, *held_out.latitude_deg]) == [number + 0.5 for number in range(COUNT)]
    assert np.array_equal(batch.longitude_deg, -batch.latitude_deg)
    decode = build_encoder(recipe).preprocessing.decode
    for pixels, latitude_deg in zip(batch.pixels, batch.latitude_deg, strict=True):
        assert np.array_equal(pixels, decode(encoded_image(int(latitude_deg))))


@pytest.mark.parametrize("write", [write_table, write_shards])
def test_a_table_can_say_which_images_are_held_out(tmp_path: Path, write: object) -> None:
    (tmp_path / "held-out.csv").write_text("IMG_ID,LAT,LON\n01/1.png,0,0\n02/5.png,0,0\n99/99.png,0,0\n")
    _, source = opened(tmp_path, write(tmp_path) + '\nheld_out_table = "held-out.csv"')  # type: ignore[operator]
    assert source.train_count == COUNT - 2
    assert sorted(next(source.held_out(COUNT, 1, COUNT)).latitude_deg) == [1.5, 5.5]


@pytest.mark.parametrize("write", [write_table, write_shards])
def test_a_held_out_table_that_mostly_names_other_images_is_refused(
    tmp_path: Path, write: object, caplog: pytest.LogCaptureFixture
) -> None:
    data = write(tmp_path) + '\nheld_out_table = "held-out.csv"'  # type: ignore[operator]
    named = [f"{number % 3:02x}/{number}.png,0,0" for number in range(5)]
    elsewhere = [f"elsewhere/{number}.png,0,0" for number in range(11)]
    table = tmp_path / "held-out.csv"
    table.write_text("\n".join(["IMG_ID,LAT,LON", *named, *elsewhere]))
    with pytest.raises(ConfigurationError, match=r"11 of 16 names in .*held-out\.csv .*elsewhere/0\.png"):
        opened(tmp_path, data)
    # A name that stands there twice is one name.
    table.write_text("\n".join(["IMG_ID,LAT,LON", *named, *named, *elsewhere[1:]]))
    with caplog.at_level(logging.INFO):
        opened(tmp_path, data)
    assert "held-out.csv names 15 images, and 5 of them are there" in caplog.text


def test_a_table_that_holds_nothing_out_is_refused(tmp_path: Path) -> None:
    (tmp_path / "held-out.csv").write_text("IMG_ID,LAT,LON\nelsewhere.png,0,0\n")
    with pytest.raises(ConfigurationError, match=r"names no image that there is: it has \['elsewhere\.png'\]"):
        opened(tmp_path, write_table(tmp_path) + '\nheld_out_table = "held-out.csv"')


def test_an_index_of_shards_is_kept_in_the_run(tmp_path: Path) -> None:
    opened(tmp_path, write_shards(tmp_path))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["shards.arrow"]
