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
from geosurge_training.data.image_table import open_table
from geosurge_training.data.stored_images import StoredImages, held_out_by_spot

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


def open_images(
    path: Path, images: Path | None = None, *, held_out_share: float = 0.25, seed: int = 5, max_bad_share: float = 0.01
) -> StoredImages:
    samples = open_table(path, images)
    held_out = held_out_by_spot(samples.latitude_deg, samples.longitude_deg, held_out_share)
    return StoredImages(samples, held_out, decode=decode, seed=seed, max_bad_share=max_bad_share)


def numbers_of(batch: Any) -> list[int]:
    numbers = [int(pixels[0, 0, 0]) for pixels in batch.pixels]
    assert [place(number) for number in numbers] == list(
        zip(batch.latitude_deg.tolist(), batch.longitude_deg.tolist(), strict=True)
    )
    return numbers


def held_out_numbers(source: StoredImages, batch_size: int = 7, count: int = 1000, seed: int = 1) -> list[int]:
    return [number for batch in source.held_out(count, seed, batch_size) for number in numbers_of(batch)]


def training_count(source: StoredImages) -> int:
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


def test_about_the_stated_share_of_the_spots_is_held_out() -> None:
    rng = np.random.default_rng(0)
    latitude_deg, longitude_deg = rng.uniform(-90, 90, 5000), rng.uniform(-180, 180, 5000)
    for share in (0.05, 0.5):
        held_out = held_out_by_spot(latitude_deg, longitude_deg, share)
        assert abs(held_out.sum() - share * 5000) < 5 * np.sqrt(5000 * share * (1 - share))


def test_the_pictures_of_a_spot_are_never_divided() -> None:
    rng = np.random.default_rng(1)
    rows, columns = rng.integers(-8000, 8000, 200), rng.integers(-18000, 18000, 200)
    # A burst: within 400 m of the middle of the spot.
    latitude_deg = rows[:, None] / 100 + rng.uniform(-0.004, 0.004, (200, 30))
    longitude_deg = columns[:, None] / 100 + rng.uniform(-0.004, 0.004, (200, 30))
    held_out = held_out_by_spot(latitude_deg.reshape(-1), longitude_deg.reshape(-1), 0.3).reshape(200, 30)
    assert (held_out == held_out[:, :1]).all()
    assert 0 < held_out[:, 0].sum() < 200
    northward = np.arange(-80.0, 80.0, 0.01)
    date_line = [held_out_by_spot(northward, np.full_like(northward, side), 0.3) for side in (-179.999, 179.999)]
    assert np.array_equal(*date_line)
    assert 0.2 < date_line[0].mean() < 0.4


def test_held_out_pictures_depend_on_the_seed_and_not_on_the_batches(table: Path) -> None:
    source = open_images(table)
    whole = held_out_numbers(source, batch_size=100)
    assert len(set(whole)) == len(whole) == COUNT - training_count(source)
    assert held_out_numbers(source, batch_size=4) == whole
    assert held_out_numbers(source, count=5) == whole[:5]
    other = held_out_numbers(source, seed=2)
    assert other != whole
    assert sorted(other) == sorted(whole)


def test_held_out_pictures_of_a_spot_follow_each_other(tmp_path: Path) -> None:
    write_images(tmp_path)
    with (tmp_path / "pictures.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "latitude_deg", "longitude_deg"])
        rows.writerows([f"{number}.png", place(number % 20)[0], place(number % 20)[1]] for number in range(COUNT))
    source = open_images(tmp_path / "pictures.csv", held_out_share=0.5)
    batches = list(source.held_out(1000, 1, 7))
    latitude_deg = np.concatenate([batch.latitude_deg for batch in batches]).reshape(-1, 3)
    assert (latitude_deg == latitude_deg[:, :1]).all()
    assert 3 < len(np.unique(latitude_deg)) == len(latitude_deg)
    assert latitude_deg[:, 0].tolist() != sorted(latitude_deg[:, 0])


def test_a_file_without_held_out_pictures_says_so(tmp_path: Path) -> None:
    write_images(tmp_path, range(1))
    source = open_images(write_csv(tmp_path / "one.csv", range(1)), held_out_share=1e-9)
    with pytest.raises(ConfigurationError, match="no image is held out: raise `held_out_share`"):
        list(source.held_out(5, 1, 5))


def test_a_file_without_training_pictures_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"no image is left to train on \(0 images"):
        open_images(write_csv(tmp_path / "none.csv", range(0)))


def test_a_bad_picture_is_skipped_and_another_takes_its_place(table: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = open_images(table, max_bad_share=0.2)
    before = numbers_of(source.train_batch(0, 20))
    missing, damaged = before[3], before[11]
    (table.parent / f"{missing}.png").unlink()
    (table.parent / f"{damaged}.png").write_bytes(b"no picture at all")
    with caplog.at_level(logging.WARNING):
        after = numbers_of(open_images(table, max_bad_share=0.2).train_batch(0, 20))
    assert [place for place in range(20) if after[place] != before[place]] == [3, 11]
    assert not {missing, damaged} & set(after)
    assert not {after[3], after[11]} & set(held_out_numbers(source))
    assert f"{missing}.png is skipped: file missing" in caplog.text
    assert f"{damaged}.png is skipped: image not decodable" in caplog.text


def test_what_takes_a_bad_pictures_place_depends_on_the_place_alone(table: Path) -> None:
    source = open_images(table, max_bad_share=0.5)
    for number in numbers_of(source.train_batch(0, 20))[::3]:
        (table.parent / f"{number}.png").write_bytes(b"")
    whole = numbers_of(open_images(table, max_bad_share=0.5).train_batch(1, 10))
    resumed = open_images(table, max_bad_share=0.5)
    parts = [numbers_of(resumed.train_batch(1, 10, slice(start, start + 5))) for start in (5, 0)]
    assert parts == [whole[5:], whole[:5]]
    assert numbers_of(open_images(table, max_bad_share=0.5).train_batch(0, 20))[10:] == whole


def test_bad_held_out_pictures_give_way_to_the_next_ones(table: Path) -> None:
    before = held_out_numbers(open_images(table))
    for number in before[1:3]:
        (table.parent / f"{number}.png").write_bytes(b"")
    good = [before[0], *before[3:]]
    assert held_out_numbers(open_images(table), count=4) == good[:4]
    assert held_out_numbers(open_images(table), batch_size=1) == good


def test_the_log_says_at_the_end_of_an_epoch_what_was_skipped(table: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = open_images(table, max_bad_share=0.5)
    count = source.train_count
    damaged, missing = (numbers_of(source.train_batch(0, count))[place] for place in (0, -1))
    (table.parent / f"{damaged}.png").write_bytes(b"")
    (table.parent / f"{missing}.png").unlink()
    source = open_images(table, max_bad_share=0.5)
    with caplog.at_level(logging.WARNING):
        for step in range(2 * count // 8 + 1):
            source.train_batch(step, 8)
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("epoch")]
    assert [line.split(":")[0] for line in lines] == [f"epoch {epoch} of the training images" for epoch in (1, 2)]
    assert all("image empty" in line and "file missing" in line for line in lines)


def test_too_many_bad_pictures_stop_the_training(table: Path) -> None:
    for number in range(20, COUNT):
        (table.parent / f"{number}.png").unlink()
    reason = (
        r"of \d+ training images cannot be used \(\d+ file missing\), and .* allows 10\.0%\. .*file missing: \d+\.png"
    )
    with pytest.raises(ConfigurationError, match=reason):
        open_images(table, max_bad_share=0.1).train_batch(0, 30)


def test_a_few_bad_pictures_never_stop_it_but_none_that_is_good_does(table: Path) -> None:
    source = open_images(table, max_bad_share=0.0)
    bad, good = numbers_of(source.train_batch(0, 2))
    (table.parent / f"{bad}.png").write_bytes(b"")
    assert numbers_of(source.train_batch(0, 2))[1] == good
    for number in range(COUNT):
        (table.parent / f"{number}.png").unlink()
    nothing = r"training images: .* 100 others .* used either \(\d+ file missing\).*file missing: \d+\.png"
    with pytest.raises(ConfigurationError, match=nothing):
        open_images(table, max_bad_share=1.0).train_batch(0, 1)
    with pytest.raises(ConfigurationError, match=r"none of the \d+ held-out images can be used \(\d+ file missing\)"):
        list(open_images(table, max_bad_share=1.0).held_out(5, 1, 5))


def test_a_table_of_nothing_but_bad_rows_says_what_is_wrong_with_them(tmp_path: Path) -> None:
    (tmp_path / "pictures.csv").write_text("path,latitude_deg,longitude_deg\na.png,0,0\nb.png,0,0\n")
    with pytest.raises(ConfigurationError, match=r"no row of .*pictures\.csv can be used \(2 coordinates 0, 0"):
        open_images(tmp_path / "pictures.csv")


def test_an_epoch_is_as_long_as_the_training_part(table: Path) -> None:
    source = open_images(table)
    assert source.train_count == training_count(source) == COUNT - len(held_out_numbers(source))


def test_pictures_may_lie_in_another_folder_or_under_a_whole_path(tmp_path: Path) -> None:
    write_images(tmp_path / "elsewhere", range(8))
    path = write_csv(tmp_path / "pictures.csv", range(7))
    with path.open("a", newline="") as file:
        csv.writer(file).writerow([tmp_path / "elsewhere" / "7.png", *place(7)])
    source = open_images(path, images=tmp_path / "elsewhere", held_out_share=1e-9)
    assert sorted(numbers_of(source.train_batch(0, 8))) == list(range(8))


def open_a_little_too_bad(folder: Path) -> StoredImages:
    """400 images of which more cannot be used than are allowed, but not more than chance explains."""
    count = 400
    write_images(folder, range(120))
    with (folder / "pictures.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "latitude_deg", "longitude_deg"])
        rows.writerows([f"{number % 120}.png", *place(number % 120)] for number in range(count))
    for number in range(40, 48):
        (folder / f"{number}.png").unlink()
    return open_images(folder / "pictures.csv", held_out_share=1e-9, max_bad_share=0.05)


@pytest.mark.parametrize("batch_size", [8, 64])  # batches that end with the epoch, and some that do not
def test_what_processes_find_unusable_in_an_epoch_adds_up_to_all_that_is(tmp_path: Path, batch_size: int) -> None:
    half = batch_size // 2
    processes = [open_a_little_too_bad(tmp_path), open_a_little_too_bad(tmp_path)]
    for step in range(-(-800 // batch_size)):
        for source, start in zip(processes, (0, half), strict=True):
            source.train_batch(step, batch_size, slice(start, start + half))
    for epoch in range(2):
        counts = [source.unusable_count(epoch) for source in processes]
        assert 0 < counts[0] < 24
        assert sum(counts) == 24
    with pytest.raises(ConfigurationError, match=r"24 of 400 .* \(\d+ file missing\), .* allows 5\.0%"):
        processes[0].check_unusable_count(24)
    processes[0].check_unusable_count(20)


def test_an_epoch_that_is_not_seen_whole_leaves_room_for_chance(tmp_path: Path) -> None:
    source = open_a_little_too_bad(tmp_path)
    for step in range(25, 50):
        source.train_batch(step, 8)
    assert 0 < source.unusable_count(0) < 24
    source.check_unusable_count(source.unusable_count(0))
