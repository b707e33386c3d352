from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from support.bundles import tiny_encoder
from support.limits import limited

from geosurge.encoder import ImageEncoder
from geosurge.errors import ConfigurationError, OutputNotWritableError
from geosurge_training.prototypes.encoding import encode_pictures
from geosurge_training.prototypes.pictures import BATCH_SIZE, PictureBatch

COUNT = 3 * BATCH_SIZE + 5
Array = NDArray[np.int64]
EVERY_SEVENTH: Array = np.arange(0, COUNT, 7)
NOTHING: Array = np.empty(0, np.int64)


class Numbered:
    """Pictures of random pixels, some unusable; fails, or notes which pictures it was asked for."""

    count = COUNT
    title = "numbered"

    def __init__(self, digest: str = "a", *, bad: Array = EVERY_SEVENTH, fails_at: int | None = None) -> None:
        self.digest = digest
        self.file_states = np.zeros((COUNT, 2), np.int64)
        self.asked: list[int] = []
        self._bad = bad
        self._fails_at = fails_at

    def batch(self, number: int, positions: Array) -> PictureBatch:
        if number == self._fails_at:
            raise ConfigurationError("unplugged")
        rows = number * BATCH_SIZE + positions
        self.asked += rows.tolist()
        kept = ~np.isin(rows, self._bad)
        pixels = np.random.default_rng(number).integers(0, 256, (BATCH_SIZE, 3, 32, 32), dtype=np.uint8)
        rows, positions = rows[kept], positions[kept]
        return PictureBatch(positions, pixels[positions], rows / 100.0, -rows / 50.0)

    def finish(self) -> None:
        pass


@pytest.fixture(scope="module")
def encoder() -> ImageEncoder:
    return tiny_encoder()


def test_rows_are_those_of_the_pictures_and_unusable_ones_are_empty(encoder: ImageEncoder, tmp_path: Path) -> None:
    encoded = encode_pictures(Numbered(), encoder, tmp_path)
    usable = np.array([row for row in range(COUNT) if row % 7])
    np.testing.assert_array_equal(encoded.usable, usable)
    assert np.isnan(encoded.embeddings[::7]).all()
    np.testing.assert_array_equal(encoded.coordinates[usable], np.stack([usable / 100.0, -usable / 50.0], axis=1))
    last = Numbered().batch(3, np.arange(5))
    expected = encoder.encode(last.pixels)
    np.testing.assert_allclose(encoded.embeddings[3 * BATCH_SIZE + last.positions], expected, atol=1e-6)


def test_batches_are_those_of_the_rows(encoder: ImageEncoder, tmp_path: Path) -> None:
    encoded = encode_pictures(Numbered(), encoder, tmp_path)
    rows = encoded.usable[::3]
    batches = list(encoded.batches(rows, 100))
    assert [len(batch.embeddings) for batch in batches] == [100, 100, len(rows) - 200]
    np.testing.assert_array_equal(np.concatenate([batch.embeddings for batch in batches]), encoded.embeddings[rows])
    np.testing.assert_array_equal(np.concatenate([batch.longitude_deg for batch in batches]), -rows / 50.0)


def test_a_run_that_was_cut_off_goes_on(encoder: ImageEncoder, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="unplugged"):
        encode_pictures(Numbered(fails_at=2), encoder, tmp_path / "cut")
    rest = Numbered()
    resumed = encode_pictures(rest, encoder, tmp_path / "cut")
    first, begun = np.arange(2 * BATCH_SIZE), np.arange(2 * BATCH_SIZE, COUNT)
    assert rest.asked == [*first[::7].tolist(), *begun.tolist()]
    whole = encode_pictures(Numbered(), encoder, tmp_path / "whole")
    np.testing.assert_array_equal(resumed.embeddings, whole.embeddings)
    np.testing.assert_array_equal(resumed.coordinates, whole.coordinates)


def test_what_failed_is_tried_again_and_nothing_else(encoder: ImageEncoder, tmp_path: Path) -> None:
    encode_pictures(Numbered(), encoder, tmp_path)
    mended = Numbered(bad=np.array([14]))
    encoded = encode_pictures(mended, encoder, tmp_path)
    assert mended.asked == list(range(0, COUNT, 7))
    assert encoded.usable.tolist() == [row for row in range(COUNT) if row != 14]
    whole = Numbered().batch(0, np.arange(BATCH_SIZE))
    np.testing.assert_allclose(encoded.embeddings[whole.positions], encoder.encode(whole.pixels), atol=1e-6)
    again = Numbered(bad=np.array([14]))
    encode_pictures(again, encoder, tmp_path)
    assert again.asked == [14]


def test_a_picture_whose_file_changed_is_encoded_anew(encoder: ImageEncoder, tmp_path: Path) -> None:
    encode_pictures(Numbered(bad=NOTHING), encoder, tmp_path)
    for bad, usable in ((np.array([300]), COUNT - 1), (NOTHING, COUNT)):
        changed = Numbered(bad=bad)
        changed.file_states[300] = 5, 6
        assert len(encode_pictures(changed, encoder, tmp_path).usable) == usable
        assert changed.asked == [300]
    assert encode_pictures(changed, encoder, tmp_path).usable.tolist() == list(range(COUNT))
    assert changed.asked == [300]


def test_other_pictures_and_other_encoders_begin_anew(encoder: ImageEncoder, tmp_path: Path) -> None:
    encode_pictures(Numbered(), encoder, tmp_path)
    for pictures, other in ((Numbered("b"), encoder), (Numbered("b"), tiny_encoder(seed=1))):
        encoded = encode_pictures(pictures, other, tmp_path)
        assert pictures.asked == list(range(COUNT))
        first = pictures.batch(0, np.arange(BATCH_SIZE))
        np.testing.assert_allclose(encoded.embeddings[first.positions], other.encode(first.pixels), atol=1e-6)


@pytest.mark.parametrize("name", ["embeddings.npy", "pictures.npy"])
def test_files_that_are_not_whole_are_made_anew(encoder: ImageEncoder, tmp_path: Path, name: str) -> None:
    whole = encode_pictures(Numbered(), encoder, tmp_path / "whole")
    damages: list[Callable[[Path], object]] = [
        Path.unlink,
        lambda path: os.truncate(path, path.stat().st_size - 100),
        lambda path: np.save(path, np.load(path)[:-3]),
    ]
    for number, damage in enumerate(damages):
        directory = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", directory)
        damage(directory / name)
        pictures = Numbered()
        encoded = encode_pictures(pictures, encoder, directory)
        assert pictures.asked == list(range(COUNT))
        np.testing.assert_array_equal(encoded.embeddings, whole.embeddings)


def test_a_full_disk_is_an_error_and_loses_nothing(encoder: ImageEncoder, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="unplugged"):
        encode_pictures(Numbered(bad=NOTHING, fails_at=2), encoder, tmp_path)
    # Room for the third batch, and for a part of the fourth.
    room = (tmp_path / "embeddings.npy").stat().st_size - 4 * encoder.dimension
    with (
        limited(resource.RLIMIT_FSIZE, room),
        pytest.raises(OutputNotWritableError, match="free some space"),
    ):
        encode_pictures(Numbered(bad=NOTHING), encoder, tmp_path)
    rest = Numbered(bad=NOTHING)
    assert len(encode_pictures(rest, encoder, tmp_path).usable) == COUNT
    assert rest.asked == list(range(3 * BATCH_SIZE, COUNT))
