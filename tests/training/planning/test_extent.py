"""Where the numbers of images and cells come from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.recipes import write_recipe

from geosurge.encoder import ImageEncoder
from geosurge.errors import ConfigurationError
from geosurge_training.data.open_source import open_source
from geosurge_training.encoders import build_encoder
from geosurge_training.partitions.load import load_partition
from geosurge_training.partitions.make import make_partition
from geosurge_training.planning.extent import PUBLISHED_CELL_COUNTS, Extent, find_extent
from geosurge_training.recipe import load_recipe

TABLE = 'source = "table"\ntable = "pictures.csv"\nheld_out_share = 0.25'
PAPER = ("tau_min = 8\ntau_max = [400, 120]", "tau_min = 50\ntau_max = [25000, 10000, 5000, 2000, 1000, 750, 500]")


def encoder_of(folder: Path) -> ImageEncoder:
    return build_encoder(load_recipe(folder / "recipe.toml"))


def write_table(folder: Path, rows: int = 3000) -> None:
    rng = np.random.default_rng(0)
    places = np.stack([rng.uniform(30, 60, rows), rng.uniform(-10, 40, rows)], axis=1)
    lines = [f"{number}.jpg,{latitude:.5f},{longitude:.5f}" for number, (latitude, longitude) in enumerate(places)]
    (folder / "pictures.csv").write_text("\n".join(["path,latitude_deg,longitude_deg", *lines]))


def extent(folder: Path, *replacements: tuple[str, str], **stated: object) -> Extent:
    path = write_recipe(folder / "recipe.toml", data=TABLE, segmenter_steps=0)
    text = path.read_text()
    for old, new in replacements:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path.write_text(text)
    return find_extent(load_recipe(path), encoder_of(folder), folder / "run", **stated)  # type: ignore[arg-type]


def test_a_table_that_is_at_hand_is_counted_as_training_would(tmp_path: Path) -> None:
    write_table(tmp_path)
    found = extent(tmp_path)
    recipe = load_recipe(tmp_path / "recipe.toml")
    source = open_source(recipe, encoder_of(tmp_path), tmp_path)
    assert found.train_count == source.train_count
    assert 2000 < (found.train_count or 0) < 2500
    partition = load_partition(make_partition(recipe, tmp_path / "real", source))
    assert found.cell_counts == tuple(partition.cell_counts)
    assert all("counted" in origin or "those of" in origin for origin in found.origins)
    assert not (tmp_path / "run").exists()


def test_what_is_stated_goes_before_what_can_be_counted(tmp_path: Path) -> None:
    write_table(tmp_path)
    stated = extent(tmp_path, images=77, cells=[3, 5])
    assert (stated.train_count, stated.cell_counts) == (77, (3, 5))
    assert extent(tmp_path, images=77).cell_counts == extent(tmp_path).cell_counts


def test_the_papers_thresholds_have_published_cells(tmp_path: Path) -> None:
    found = extent(tmp_path, PAPER, images=4_723_695)
    assert found.cell_counts == PUBLISHED_CELL_COUNTS
    assert sum(PUBLISHED_CELL_COUNTS) == 63_644
    assert "published" in found.origins[1]
    with pytest.raises(ConfigurationError, match=r"number of cells is unknown.*--cells"):
        extent(tmp_path, PAPER, ("[encoder.vision]", "start_s2_level = 3\n[encoder.vision]"), images=4_723_695)


def test_what_is_unknown_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"no .*pictures\.csv: state it with --images .*4723695"):
        extent(tmp_path)
    with pytest.raises(ConfigurationError, match=r"number of cells is unknown.*--cells"):
        extent(tmp_path, images=100)
    with pytest.raises(ConfigurationError, match="3 counts of cells are stated, but the partition has 2 levels"):
        extent(tmp_path, images=100, cells=[1, 2, 3])


def test_shards_are_not_opened(tmp_path: Path) -> None:
    shards = ('source = "table"\ntable = "pictures.csv"', 'source = "webdataset"\nshards = "{00..99}.tar"')
    with pytest.raises(ConfigurationError, match=r"index of the shards.*--images"):
        extent(tmp_path, shards)
    assert extent(tmp_path, shards, images=9, cells=[1, 2]).train_count == 9


def test_rendered_images_have_no_number(tmp_path: Path) -> None:
    rendered = load_recipe(write_recipe(tmp_path / "recipe.toml"))
    encoder = encoder_of(tmp_path)
    assert find_extent(rendered, encoder, tmp_path, cells=[4, 9]).train_count is None
    with pytest.raises(ConfigurationError, match="renders"):
        find_extent(rendered, encoder, tmp_path, images=100, cells=[4, 9])
