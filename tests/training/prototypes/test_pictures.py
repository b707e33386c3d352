from __future__ import annotations

import csv
import logging
from pathlib import Path

import numpy as np
import pytest
from support.bad_archive import picture, with_gps
from support.metadata import GUESS, exif_block, gps

from geosurge.archive.metadata.sidecars import add_guess
from geosurge.errors import ConfigurationError, UsageError
from geosurge.preprocessing import Preprocessing
from geosurge_training.prototypes.pictures import BATCH_SIZE, PictureBatch, Pictures, ViewPictures, open_pictures

SMALL = Preprocessing(32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pictures with positions, one of them damaged behind its metadata, and others that know none."""
    (tmp_path / "a.jpg").write_bytes(with_gps(1, 47.0, 8.0))
    (tmp_path / "b.jpg").write_bytes(picture(2))
    (tmp_path / "c.jpg").write_bytes(picture(3))
    (tmp_path / "c.xmp").write_bytes(add_guess(None, GUESS))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "d.jpg").write_bytes(with_gps(4, 11.0, 22.0)[:-300])
    return tmp_path


def batch_of(pictures: Pictures, number: int = 0) -> PictureBatch:
    count = min(BATCH_SIZE, pictures.count - number * BATCH_SIZE)
    return pictures.batch(number, np.arange(count))


def write_table(folder: Path, rows: list[tuple[str, float, float]]) -> Path:
    path = folder / "places.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("path", "latitude_deg", "longitude_deg"), *rows])
    return path


def test_a_folder_gives_the_pictures_that_say_where_they_were_taken(folder: Path) -> None:
    pictures = open_pictures([folder], None, SMALL)
    batch = batch_of(pictures)
    assert pictures.count == 2
    assert batch.positions.tolist() == [0]
    assert (batch.latitude_deg.tolist(), batch.longitude_deg.tolist()) == ([47.0], [8.0])
    np.testing.assert_array_equal(batch.pixels, SMALL.decode((folder / "a.jpg").read_bytes())[np.newaxis])


def test_a_phones_heic_is_a_picture(folder: Path) -> None:
    exif = b"Exif\0\0" + exif_block(gps_tags=gps(12.5, -7.25))
    (folder / "b.heic").write_bytes(picture(5, "HEIF", exif=exif))
    pictures = open_pictures([folder], None, SMALL)
    batch = batch_of(pictures)
    assert pictures.count == 3
    assert batch.positions.tolist() == [0, 1]
    np.testing.assert_allclose([batch.latitude_deg[1], batch.longitude_deg[1]], [12.5, -7.25], atol=1e-6)


def test_a_guess_of_the_engine_is_no_position(folder: Path) -> None:
    for name in ("a.jpg", "sub/d.jpg"):
        (folder / name).unlink()
    with pytest.raises(ConfigurationError, match="none of 2 pictures has a position"):
        open_pictures([folder], None, SMALL)


def test_bad_pictures_are_named_and_left_out(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = write_table(
        folder, [("a.jpg", 1.0, 2.0), ("missing.jpg", 3.0, 4.0), ("sub/d.jpg", 5.0, 6.0), ("b.jpg", 7.0, 8.0)]
    )
    with caplog.at_level(logging.WARNING):
        batch = batch_of(open_pictures([table], None, SMALL))
    assert batch.positions.tolist() == [0, 3]
    assert batch.latitude_deg.tolist() == [1.0, 7.0]
    assert "missing.jpg" in caplog.text
    assert "sub/d.jpg" in caplog.text


def test_too_many_bad_pictures_are_an_error(folder: Path) -> None:
    table = write_table(folder, [("a.jpg", 1.0, 2.0), *((f"{number}.jpg", 1.0, 2.0) for number in range(30))])
    with pytest.raises(ConfigurationError, match=r"30 of 31 pictures cannot be used .* 5.0%"):
        batch_of(open_pictures([table], None, SMALL))
    assert len(batch_of(open_pictures([table], None, SMALL, max_bad_share=1.0)).positions) == 1


def test_pictures_whose_metadata_cannot_be_read_count_as_bad(tmp_path: Path) -> None:
    for number in range(28):
        (tmp_path / f"good-{number}.jpg").write_bytes(with_gps(number, 47.0, 8.0))
    for number in range(12):
        (tmp_path / f"bad-{number}.jpg").write_bytes(picture(number))
        (tmp_path / f"bad-{number}.xmp").write_bytes(b"<not XML")
    with pytest.raises(ConfigurationError, match=r"12 of 40 pictures cannot be used .* 5.0%"):
        open_pictures([tmp_path], None, SMALL)
    assert open_pictures([tmp_path], None, SMALL, max_bad_share=0.3).count == 28


def test_a_picture_that_was_replaced_has_another_file_state(folder: Path) -> None:
    table = write_table(folder, [("a.jpg", 1.0, 2.0), ("missing.jpg", 3.0, 4.0)])
    sources = ([table], [folder])
    before = [open_pictures(source, None, SMALL) for source in sources]
    (folder / "a.jpg").write_bytes(with_gps(9, 47.0, 8.0))
    for one, source in zip(before, sources, strict=True):
        now = open_pictures(source, None, SMALL)
        assert (now.file_states != one.file_states).any(axis=1).tolist() == [True, False]
        assert now.digest == one.digest


def test_the_paths_of_a_table_start_from_the_root(folder: Path) -> None:
    table = write_table(folder / "sub", [("a.jpg", 1.0, 2.0)])
    assert len(batch_of(open_pictures([table], folder, SMALL)).positions) == 1


def test_other_pictures_places_and_sizes_have_other_digests(folder: Path) -> None:
    rows = [("a.jpg", 1.0, 2.0), ("b.jpg", 3.0, 4.0)]
    digests = [open_pictures([write_table(folder, rows)], None, SMALL).digest for _ in range(2)]
    others = (rows[:1], rows[::-1], [rows[0], ("b.jpg", 3.0, 4.5)])
    digests += [open_pictures([write_table(folder, other)], None, SMALL).digest for other in others]
    digests.append(open_pictures([write_table(folder, rows)], None, Preprocessing(48)).digest)
    assert digests[0] == digests[1]
    assert len(set(digests)) == 5


def test_a_table_stands_alone_and_sources_have_to_exist(folder: Path) -> None:
    with pytest.raises(ConfigurationError, match="give it alone"):
        open_pictures([write_table(folder, []), folder], None, SMALL)
    with pytest.raises(UsageError):
        open_pictures([folder / "nowhere"], None, SMALL)


def test_views_are_batches_of_the_training_stream_and_end_at_their_count() -> None:
    views = ViewPictures(32, BATCH_SIZE + 10, seed=3)
    first, last = batch_of(views, 0), batch_of(views, 1)
    assert (len(first.positions), len(last.positions)) == (BATCH_SIZE, 10)
    again = batch_of(views, 1)
    np.testing.assert_array_equal(again.pixels, last.pixels)
    np.testing.assert_array_equal(views.batch(1, np.array([2, 7])).pixels, last.pixels[[2, 7]])
    assert not np.isin(last.latitude_deg, first.latitude_deg).any()
