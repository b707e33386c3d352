from __future__ import annotations

import resource
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.limits import limited
from support.pictures import CLIP_BACKBONE, picture_recipe, write_pictures

from geosurge.encoder import ImageEncoder
from geosurge.errors import ConfigurationError
from geosurge_training.data.blue_marble import BlueMarble
from geosurge_training.data.open_source import open_source
from geosurge_training.data.source import NumberedSource
from geosurge_training.data.stored_images import StoredImages
from geosurge_training.encoders import build_encoder
from geosurge_training.fitting.tower_cache import CacheDtype, TowerCache


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder, 24)
    return folder


@pytest.fixture(scope="module")
def encoder(folder: Path) -> ImageEncoder:
    return build_encoder(picture_recipe(folder, "steps = 1", vision=CLIP_BACKBONE, frozen=True))


@pytest.fixture(scope="module")
def source(folder: Path, encoder: ImageEncoder) -> StoredImages:
    opened = open_source(picture_recipe(folder, "steps = 1"), encoder, folder)
    assert isinstance(opened, StoredImages)
    return opened


def open_cache(directory: Path, encoder: ImageEncoder, source: Any, dtype: CacheDtype = "float32") -> TowerCache:
    return TowerCache.open(directory, encoder, source, dtype, "float32")


def fill(cache: TowerCache, encoder: ImageEncoder, source: StoredImages, rows: slice) -> np.ndarray[Any, Any]:
    numbers, batch = source.train_numbers(0, source.train_count, rows), source.train_batch(0, source.train_count, rows)
    with torch.no_grad():
        cache.add(numbers, batch, encoder.towers(batch.pixels))
    return numbers


def test_a_stored_image_source_has_numbers_and_the_blue_marble_has_none(
    source: StoredImages, world: BlueMarble
) -> None:
    assert isinstance(source, NumberedSource)
    assert not isinstance(world, NumberedSource)
    numbers = source.train_numbers(0, source.train_count)
    assert sorted(numbers.tolist()) == list(range(source.train_count))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0.0), ("float16", 2e-3)])
def test_what_was_seen_comes_back(
    tmp_path: Path, encoder: ImageEncoder, source: StoredImages, dtype: CacheDtype, tolerance: float
) -> None:
    rows = slice(3, 8)
    numbers = fill(open_cache(tmp_path / "cache", encoder, source, dtype), encoder, source, rows)
    cache = open_cache(tmp_path / "cache", encoder, source, dtype)
    assert cache.has(np.arange(source.train_count)).sum() == 5
    assert cache.has(numbers).all()
    batch = source.train_batch(0, source.train_count, rows)
    with torch.no_grad():
        expected = encoder.towers(batch.pixels)
    found = cache.outputs(numbers[::-1].copy(), torch.device("cpu"))
    assert found.fractions is not None
    assert expected.fractions is not None
    torch.testing.assert_close(found.tokens.flip(0), expected.tokens, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.fractions.flip(0), expected.fractions, rtol=tolerance, atol=tolerance)
    latitude_deg, longitude_deg = cache.coordinates(numbers)
    np.testing.assert_array_equal(latitude_deg, batch.latitude_deg)
    np.testing.assert_array_equal(longitude_deg, batch.longitude_deg)
    # Of one image: the numbers of an epoch are those of every other.
    later = source.train_numbers(1, source.train_count)
    place = int(np.flatnonzero(later == numbers[0])[0])
    again = source.train_batch(1, source.train_count, slice(place, place + 1))
    assert again.latitude_deg[0] == latitude_deg[0]


def test_what_is_there_is_not_written_again(tmp_path: Path, encoder: ImageEncoder, source: StoredImages) -> None:
    cache = open_cache(tmp_path / "cache", encoder, source)
    numbers = fill(cache, encoder, source, slice(0, 4))
    before = cache.outputs(numbers, torch.device("cpu")).tokens
    batch = source.train_batch(0, source.train_count, slice(0, 4))
    with torch.no_grad():
        seen = encoder.towers(batch.pixels)
    cache.add(numbers, batch, seen._replace(tokens=seen.tokens + 1))
    assert torch.equal(cache.outputs(numbers, torch.device("cpu")).tokens, before)


def test_without_fusion_there_are_no_fractions(tmp_path: Path, encoder: ImageEncoder, source: StoredImages) -> None:
    config = replace(encoder.config, fusion=replace(encoder.config.fusion, blocks=0))
    plain = ImageEncoder(config, encoder.vision, encoder.segmenter)
    cache = open_cache(tmp_path / "cache", plain, source)
    numbers = fill(cache, plain, source, slice(0, 4))
    assert cache.outputs(numbers, torch.device("cpu")).fractions is None
    assert (tmp_path / "cache" / "fractions.bin").stat().st_size == 0


def test_a_record_that_was_cut_off_is_not_there(tmp_path: Path, encoder: ImageEncoder, source: StoredImages) -> None:
    cache = open_cache(tmp_path / "cache", encoder, source)
    numbers = source.train_numbers(0, source.train_count, slice(0, 3))
    batch = source.train_batch(0, source.train_count, slice(0, 3))
    with torch.no_grad():
        seen = encoder.towers(batch.pixels)
    cache._write("tokens.bin", int(numbers[0]), seen.tokens[0].numpy())
    cache.close()
    reopened = open_cache(tmp_path / "cache", encoder, source)
    assert not reopened.has(numbers).any()
    reopened.add(numbers, batch, seen)
    assert torch.equal(reopened.outputs(numbers, torch.device("cpu")).tokens, seen.tokens)


def test_a_disk_that_is_full_is_an_error_and_what_is_in_the_cache_stays_good(
    tmp_path: Path, encoder: ImageEncoder, source: StoredImages
) -> None:
    cache = open_cache(tmp_path / "cache", encoder, source)
    good = fill(cache, encoder, source, slice(0, 2))
    before = cache.outputs(good, torch.device("cpu")).tokens
    with (
        limited(resource.RLIMIT_FSIZE, 100),
        pytest.raises(ConfigurationError, match=r"cannot be written: .*too large; make room, or leave the cache out"),
    ):
        fill(cache, encoder, source, slice(2, source.train_count))
    cache.close()
    reopened = open_cache(tmp_path / "cache", encoder, source)
    assert reopened.has(np.arange(source.train_count)).sum() == 2
    assert torch.equal(reopened.outputs(good, torch.device("cpu")).tokens, before)


class LargeSource:
    """A source that says that it has more images than it has."""

    def __init__(self, source: StoredImages, train_count: int) -> None:
        self._source, self.train_count = source, train_count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)


def test_too_little_room_is_said_before_anything_is_seen(
    tmp_path: Path, encoder: ImageEncoder, source: StoredImages
) -> None:
    bytes_of_an_image = 4 * (17 * 16 + 16 * 7) + 8 * 2 + 1
    count = shutil.disk_usage(tmp_path).free // bytes_of_an_image
    with pytest.raises(ConfigurationError, match=r"needs .* GiB more for \d+ images, and the disk has .*store float16"):
        open_cache(tmp_path / "cache", encoder, LargeSource(source, 2 * count))
    open_cache(tmp_path / "smaller", encoder, LargeSource(source, count // 2)).close()


def test_a_cache_of_something_else_is_refused(
    tmp_path: Path, folder: Path, encoder: ImageEncoder, source: StoredImages
) -> None:
    cache = tmp_path / "cache"
    open_cache(cache, encoder, source).close()
    before = (cache / "manifest.json").read_bytes()
    other = build_encoder(picture_recipe(folder, "steps = 1", vision=CLIP_BACKBONE, frozen=True))
    # Another fusion module makes no other towers.
    torch.nn.init.zeros_(other.fusion.projection.weight)
    open_cache(cache, other, source).close()
    weight = next(other.vision.parameters())
    weight.data += 1.0
    more = tmp_path / "more"
    more.mkdir()
    write_pictures(more, 25)
    larger = open_source(picture_recipe(more, "steps = 1"), encoder, more)
    refusals: list[tuple[ImageEncoder, Any, CacheDtype]] = [
        (other, source, "float32"),
        (encoder, larger, "float32"),
        (encoder, source, "float16"),
    ]
    for towers, images, dtype in refusals:
        with pytest.raises(
            ConfigurationError, match="outputs of other towers, images, precision or type; give another"
        ):
            open_cache(cache, towers, images, dtype)
    assert (cache / "manifest.json").read_bytes() == before


def test_a_folder_with_something_else_in_it_is_refused(
    tmp_path: Path, encoder: ImageEncoder, source: StoredImages
) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"")
    with pytest.raises(ConfigurationError, match="is no cache and not empty"):
        open_cache(tmp_path, encoder, source)


def test_processes_that_open_a_new_cache_at_once_all_get_it(tmp_path: Path, encoder: ImageEncoder, source: Any) -> None:
    together = threading.Barrier(8)

    def opened(directory: Path) -> TowerCache:
        together.wait(60)
        return open_cache(directory, encoder, source)

    with ThreadPoolExecutor(8) as pool:
        for attempt in range(20):
            caches = list(pool.map(opened, [tmp_path / str(attempt)] * 8))
            numbers = fill(caches[0], encoder, source, slice(0, 1))
            assert all(cache.has(numbers).all() for cache in caches)
            for cache in caches:
                cache.close()


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"short")], ids=["gone", "short"])
def test_a_damaged_cache_is_refused(tmp_path: Path, encoder: ImageEncoder, source: StoredImages, damage: Any) -> None:
    open_cache(tmp_path / "cache", encoder, source).close()
    damage(tmp_path / "cache" / "tokens.bin")
    with pytest.raises(ConfigurationError, match=r"tokens\.bin is missing or damaged; remove"):
        open_cache(tmp_path / "cache", encoder, source)
    shutil.rmtree(tmp_path / "cache")
    open_cache(tmp_path / "cache", encoder, source).close()


def test_a_cache_that_was_cut_off_while_it_was_made_is_made_again(
    tmp_path: Path, encoder: ImageEncoder, source: StoredImages
) -> None:
    cache = tmp_path / "cache"
    open_cache(cache, encoder, source).close()
    # The last file was made and had no size yet.
    (cache / "done.bin").write_bytes(b"")
    reopened = open_cache(cache, encoder, source)
    assert not reopened.has(np.arange(source.train_count)).any()
    assert reopened.has(fill(reopened, encoder, source, slice(0, 2))).all()


def test_outputs_too_large_for_half_precision_are_refused(
    tmp_path: Path, encoder: ImageEncoder, source: StoredImages
) -> None:
    cache = open_cache(tmp_path / "cache", encoder, source, "float16")
    numbers, batch = source.train_numbers(0, 2), source.train_batch(0, 2)
    with torch.no_grad():
        seen = encoder.towers(batch.pixels)
    with pytest.raises(ConfigurationError, match=r'set training\.tower_cache_dtype = "float32"'):
        cache.add(numbers, batch, seen._replace(tokens=seen.tokens * 1e6))
    assert not cache.has(numbers).any()


def test_towers_that_are_trained_and_images_that_never_repeat_cannot_be_cached(
    tmp_path: Path, folder: Path, encoder: ImageEncoder, source: StoredImages, world: BlueMarble
) -> None:
    trained = build_encoder(picture_recipe(folder, "steps = 1", vision=CLIP_BACKBONE))
    with pytest.raises(ConfigurationError, match="the vision tower is trained"):
        open_cache(tmp_path / "cache", trained, source)
    with pytest.raises(ConfigurationError, match="the images of this data source never repeat"):
        open_cache(tmp_path / "cache", encoder, world)
    assert not (tmp_path / "cache").exists()
