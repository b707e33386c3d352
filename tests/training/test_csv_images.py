from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from geosurge.errors import ConfigurationError
from geosurge.images import decode_image
from geosurge_training.csv_images import CsvImages

COUNT = 60


def decode(data: bytes) -> NDArray[np.uint8]:
    return np.asarray(decode_image(data).resize((16, 16)), dtype=np.uint8).transpose(2, 0, 1)


def place(number: int) -> tuple[float, float]:
    return number / 2.0 - 15.0, number * 2.0 - 120.0


def write_images(folder: Path, numbers: range = range(COUNT)) -> None:
    folder.mkdir(exist_ok=True)
    for number in numbers:
        # The grey level names the picture.
        Image.new("RGB", (20, 24), (number, number, number)).save(folder / f"{number}.png")


def write_csv(path: Path, numbers: range = range(COUNT)) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "latitude_deg", "longitude_deg"])
        rows.writerows([f"{number}.png", *place(number)] for number in numbers)
    return path


@pytest.fixture
def table(tmp_path: Path) -> Path:
    write_images(tmp_path)
    return write_csv(tmp_path / "pictures.csv")


def open_images(path: Path, **settings: Any) -> CsvImages:
    return CsvImages(path, decode=decode, **{"held_out_share": 0.25, "seed": 5, **settings})


def numbers_of(batch: Any) -> list[int]:
    numbers = [int(pixels[0, 0, 0]) for pixels in batch.pixels]
    assert [place(number) for number in numbers] == list(
        zip(batch.latitude_deg.tolist(), batch.longitude_deg.tolist(), strict=True)
    )
    return numbers


def held_out_numbers(source: CsvImages, batch_size: int = 7, count: int = 1000, seed: int = 1) -> list[int]:
    return [number for batch in source.held_out(count, seed, batch_size) for number in numbers_of(batch)]


def training_count(source: CsvImages) -> int:
    return sum(len(latitude_deg) for latitude_deg, _ in source.coordinate_chunks())


def test_pictures_come_with_their_own_coordinates(table: Path) -> None:
    batch = open_images(table).train_batch(0, 10)
    assert batch.pixels.shape == (10, 3, 16, 16)
    assert batch.latitude_deg.dtype == np.float64
    assert len(set(numbers_of(batch))) == 10


def test_an_epoch_shows_every_training_picture_once_and_in_a_new_order(table: Path) -> None:
    source = open_images(table)
    count = training_count(source)
    assert 0 < count < COUNT
    epochs = [numbers_of(source.train_batch(step, count)) for step in range(3)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len(set(epochs[0])) == count
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != sorted(epochs[0])
    assert not set(epochs[0]) & set(held_out_numbers(source))


def test_batches_walk_through_the_epochs_without_gap_or_overlap(table: Path) -> None:
    source = open_images(table)
    count = training_count(source)
    whole = [number for step in range(2) for number in numbers_of(source.train_batch(step, count))]
    in_batches = [number for step in range(2 * count // 8) for number in numbers_of(source.train_batch(step, 8))]
    assert in_batches == whole[: len(in_batches)]


def test_a_batch_is_a_function_of_its_step(table: Path) -> None:
    one, other = open_images(table), open_images(table)
    forward = [numbers_of(one.train_batch(step, 9)) for step in range(12)]
    backward = [numbers_of(other.train_batch(step, 9)) for step in reversed(range(12))][::-1]
    assert forward == backward
    assert numbers_of(open_images(table, seed=6).train_batch(0, 9)) != forward[0]


def test_a_batch_may_be_larger_than_the_training_part(table: Path) -> None:
    source = open_images(table)
    count = training_count(source)
    numbers = numbers_of(source.train_batch(0, 2 * count + 3))
    assert sorted(numbers[:count]) == sorted(numbers[count : 2 * count])


def test_more_rows_in_another_order_never_move_a_picture_to_the_other_part(table: Path) -> None:
    before = set(held_out_numbers(open_images(table)))
    write_images(table.parent, range(COUNT, 120))
    write_csv(table, range(119, -1, -1))
    after = set(held_out_numbers(open_images(table, seed=77)))
    assert {number for number in after if number < COUNT} == before
    assert len(after) > len(before)


def test_about_the_stated_share_is_held_out(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "many.csv", range(60))
    with path.open("a", newline="") as file:
        csv.writer(file).writerows([f"folder/{number}.jpg", 1.0, 2.0] for number in range(4000))
    for share in (0.05, 0.5):
        held_out = 4060 - training_count(open_images(path, held_out_share=share))
        assert abs(held_out - share * 4060) < 5 * np.sqrt(4060 * share * (1 - share))


def test_held_out_pictures_depend_on_the_seed_and_not_on_the_batches(table: Path) -> None:
    source = open_images(table)
    whole = held_out_numbers(source, batch_size=100)
    assert len(set(whole)) == len(whole) == COUNT - training_count(source)
    assert held_out_numbers(source, batch_size=4) == whole
    assert held_out_numbers(source, count=5) == whole[:5]
    other = held_out_numbers(source, seed=2)
    assert other != whole
    assert sorted(other) == sorted(whole)


def test_a_file_without_held_out_pictures_says_so(tmp_path: Path) -> None:
    write_images(tmp_path, range(1))
    source = open_images(write_csv(tmp_path / "one.csv", range(1)), held_out_share=1e-9)
    with pytest.raises(ConfigurationError, match="no image is held out: raise `held_out_share`"):
        list(source.held_out(5, 1, 5))


def test_a_file_without_training_pictures_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"no image is left to train on \(0 rows\)"):
        open_images(write_csv(tmp_path / "none.csv", range(0)))


def test_a_bad_picture_is_named_in_the_log_and_left_out(table: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = open_images(table, max_bad_share=0.2)
    before = numbers_of(source.train_batch(0, 20))
    missing, damaged = before[3], before[11]
    (table.parent / f"{missing}.png").unlink()
    (table.parent / f"{damaged}.png").write_bytes(b"no picture at all")
    with caplog.at_level(logging.WARNING):
        after = numbers_of(source.train_batch(0, 20))
    assert after == [number for number in before if number not in (missing, damaged)]
    assert {f"{missing}.png", f"{damaged}.png"} == {
        name for name in (f"{number}.png" for number in range(COUNT)) if f"/{name} is left out" in caplog.text
    }


def test_too_many_bad_pictures_stop_the_training(table: Path) -> None:
    source = open_images(table, max_bad_share=0.1)
    for number in numbers_of(source.train_batch(0, 20))[:3]:
        (table.parent / f"{number}.png").write_bytes(b"")
    with pytest.raises(ConfigurationError, match=r"3 of 20 images of a batch cannot be used.* allows 10\.0%"):
        source.train_batch(0, 20)


def test_one_bad_picture_never_stops_it_but_a_batch_of_none_does(table: Path) -> None:
    source = open_images(table, max_bad_share=0.0)
    bad, good = numbers_of(source.train_batch(0, 2))
    (table.parent / f"{bad}.png").write_bytes(b"")
    assert numbers_of(source.train_batch(0, 2)) == [good]
    with pytest.raises(ConfigurationError, match="1 of 1 images"):
        source.train_batch(0, 1)


def test_pictures_may_lie_in_another_folder_or_under_a_whole_path(tmp_path: Path) -> None:
    write_images(tmp_path / "elsewhere", range(8))
    path = write_csv(tmp_path / "pictures.csv", range(7))
    with path.open("a", newline="") as file:
        csv.writer(file).writerow([tmp_path / "elsewhere" / "7.png", *place(7)])
    source = open_images(path, images=tmp_path / "elsewhere", held_out_share=1e-9)
    assert sorted(numbers_of(source.train_batch(0, 8))) == list(range(8))


def test_texts_are_taken_as_they_stand(tmp_path: Path) -> None:
    # A reader that guesses would make a missing value of Namibia's code, and numbers of these names.
    names = ["NA", "null", "007", "1e5", "Zürich, 8001", " leading space"]
    for number, name in enumerate(names):
        Image.new("RGB", (20, 20), (number, number, number)).save(tmp_path / name, "PNG")
    path = tmp_path / "pictures.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["country", "path", "longitude_deg", "latitude_deg"])
        rows.writerows(["NA", name, place(number)[1], place(number)[0]] for number, name in enumerate(names))
    source = open_images(path, held_out_share=1e-9, max_bad_share=0.0)
    assert sorted(numbers_of(source.train_batch(0, len(names)))) == list(range(len(names)))


def test_a_spreadsheets_byte_order_mark_is_no_part_of_a_name(table: Path) -> None:
    table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes())
    assert training_count(open_images(table)) > 0


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"nowhere\.csv cannot be read: No such file"):
        open_images(tmp_path / "nowhere.csv")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "has no column path, latitude_deg, longitude_deg; .* has nothing"),
        (b"path,lat,lon\na.png,1,2\n", "has no column latitude_deg, longitude_deg; .* has path, lat, lon"),
        (b"path,latitude_deg,longitude_deg\na.png,1,2\nb.png,north,2\n", "line 3: a coordinate is not a number.*north"),
        (b"path,latitude_deg,longitude_deg\na.png,1\n", "line 2: a coordinate is not a number"),
        (b"path,latitude_deg,longitude_deg\na.png,,2\n", "line 2: a coordinate is not a number"),
        (b"path,latitude_deg,longitude_deg\na.png,1,2\nb.png,90.5,2\n", r"line 3: latitude_deg 90\.5.* off the globe"),
        (b"path,latitude_deg,longitude_deg\na.png,1,180.01\n", r"line 2: .*longitude_deg 180\.01 is off the globe"),
        (b"path,latitude_deg,longitude_deg\na.png,nan,2\n", "line 2: latitude_deg nan.* off the globe"),
        (b"path,latitude_deg,longitude_deg\na.png,1,inf\n", "line 2: .*inf is off the globe"),
        (b"path,latitude_deg,longitude_deg\n,1,2\n", "line 2: the path is empty"),
        (b"path,latitude_deg,longitude_deg\n\xff\xfe.png,1,2\n", "is not a CSV file in UTF-8"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_file_line_and_reason(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    path = tmp_path / "pictures.csv"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=rf"pictures\.csv.*{reason}"):
        open_images(path)


def test_the_edges_of_the_globe_are_on_it(tmp_path: Path) -> None:
    path = tmp_path / "pictures.csv"
    path.write_text("path,latitude_deg,longitude_deg\na.png,90,-180\nb.png,-90,180\n")
    assert training_count(open_images(path, held_out_share=1e-9)) == 2
