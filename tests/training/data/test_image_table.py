from __future__ import annotations

import csv
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from geosurge.errors import ConfigurationError
from geosurge_training.data.bad_samples import ALWAYS_ALLOWED
from geosurge_training.data.image_table import FLAWS, KNOWN_COLUMNS, ImageTable, read_image_list, read_image_table


def write_csv(path: Path, rows: Sequence[Sequence[object]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


def rows_of(table: ImageTable) -> list[tuple[str, float, float]]:
    return list(zip(table.names.to_pylist(), table.latitude_deg.tolist(), table.longitude_deg.tolist(), strict=True))


@pytest.mark.parametrize("columns", KNOWN_COLUMNS, ids="-".join)
def test_published_headings_are_known_in_csv_and_parquet(tmp_path: Path, columns: tuple[str, str, str]) -> None:
    headings = ["AUTHOR", columns[2], columns[0], "S3_Label", columns[1]]
    path = write_csv(tmp_path / "t.csv", [headings, ["x", 20.5, "ab/cd/1.jpg", 3, -10.25], ["y", 1, "2.jpg", 4, 2]])
    expected = [("ab/cd/1.jpg", -10.25, 20.5), ("2.jpg", 2.0, 1.0)]
    assert rows_of(read_image_table(path)) == expected
    names, latitudes, longitudes = (list(column) for column in zip(*expected, strict=True))
    pq.write_table(pa.table({columns[1]: latitudes, columns[2]: longitudes, columns[0]: names}), tmp_path / "t.parquet")
    assert rows_of(read_image_table(tmp_path / "t.parquet")) == expected


def test_ones_own_headings_come_before_published_ones_and_can_be_named(tmp_path: Path) -> None:
    headings = ["id", "path", "latitude", "longitude", "latitude_deg", "longitude_deg", "y", "x"]
    path = write_csv(tmp_path / "t.csv", [headings, ["7", "a.jpg", 1, 2, 3, 4, 5, 6]])
    assert rows_of(read_image_table(path)) == [("a.jpg", 3.0, 4.0)]
    assert rows_of(read_image_table(path, ["id", "y", "x"])) == [("7", 5.0, 6.0)]
    with pytest.raises(ConfigurationError, match="has no column IMG_ID; it needs IMG_ID, y, x and has id, path, lat"):
        read_image_table(path, ["IMG_ID", "y", "x"])


def test_texts_are_taken_as_they_stand(tmp_path: Path) -> None:
    # A reader that guesses would make a missing value of Namibia's code, and numbers of these names.
    names = ["NA", "null", "007", "1e5", "Zürich, 8001", " leading space", "two\nlines"]
    path = write_csv(tmp_path / "t.csv", [KNOWN_COLUMNS[0], *([name, 1, 2] for name in names)])
    assert read_image_table(path).names.to_pylist() == names


def test_whole_numbers_short_floats_and_nulls_of_parquet_are_read(tmp_path: Path) -> None:
    columns = {
        "id": pa.array([7, 8, None], pa.int64()),
        "latitude": pa.array([1.5, None, 3.0], pa.float32()),
        "longitude": pa.array(["2.5", "3", "4"]),
    }
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    table = read_image_table(tmp_path / "t.parquet")
    assert rows_of(table)[0] == ("7", 1.5, 2.5)
    assert [FLAWS[flaw] for flaw in table.flaws()] == ["", "a coordinate that is not a number", "no name of an image"]


def test_a_spreadsheets_byte_order_mark_and_blank_lines_are_no_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(
        b"\xef\xbb\xbfpath,latitude_deg,longitude_deg\r\na.jpg,1,2\r\n\r\nb.jpg,3,4\r\n\r\n"
    )
    assert rows_of(read_image_table(tmp_path / "t.csv")) == [("a.jpg", 1.0, 2.0), ("b.jpg", 3.0, 4.0)]


def test_what_is_wrong_with_a_row_is_told(tmp_path: Path) -> None:
    rows = [
        ["a", 90, -180],
        ["b", -90, 180],
        ["", 1, 2],
        ["d", "north", 2],
        ["e", 1],
        ["f"],
        ["g", 90.5, 2],
        ["h", 1, "inf"],
        ["i", "nan", 2],
    ]
    flaws = read_image_table(write_csv(tmp_path / "t.csv", [KNOWN_COLUMNS[0], *rows])).flaws()
    assert flaws.tolist() == [0, 0, 1, 2, 2, 2, 3, 3, 2]


def test_bad_rows_are_skipped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [["a", 1, 2], ["b", 91, 2], ["c", 0, 0], ["d", 0, 3]]
    table = read_image_table(write_csv(tmp_path / "t.csv", [KNOWN_COLUMNS[0], *rows]))
    with caplog.at_level(logging.WARNING):
        assert table.good_rows(0.0).tolist() == [0, 3]
    assert "row 2 ('b' at 91.0, 2.0) is skipped: coordinates off the globe" in caplog.text
    assert "row 3 ('c' at 0.0, 0.0) is skipped: coordinates 0, 0, which stand for none" in caplog.text
    assert "2 of 4 rows of" in caplog.text


@pytest.mark.parametrize(
    ("share", "bad", "is_error"), [(0.1, 20, False), (0.1, 21, True), (0.0, ALWAYS_ALLOWED, False)]
)
def test_more_bad_rows_than_the_share_are_an_error(tmp_path: Path, share: float, bad: int, is_error: bool) -> None:
    rows = [[f"{number}.jpg", 99 if number < bad else 1, 2] for number in range(200)]
    table = read_image_table(write_csv(tmp_path / "t.csv", [KNOWN_COLUMNS[0], *rows]))
    if not is_error:
        assert len(table.good_rows(share)) == 200 - bad
        return
    reason = r"21 of 200 rows of .*t\.csv cannot be used \(21 coordinates off .* allows 10\.0%.*row 1 \('0\.jpg'"
    with pytest.raises(ConfigurationError, match=reason):
        table.good_rows(share)


def test_more_rows_than_are_read_at_once_stay_in_order(tmp_path: Path) -> None:
    count = 150_000
    path = write_csv(tmp_path / "t.csv", [KNOWN_COLUMNS[0], *([f"{row}", row % 90, row % 180] for row in range(count))])
    table = read_image_table(path)
    assert len(table.names) == count
    assert table.names[count - 1].as_py() == f"{count - 1}"
    assert np.array_equal(table.latitude_deg, np.arange(count) % 90)
    assert np.array_equal(table.longitude_deg, np.arange(count) % 180)


def test_a_list_without_headings_is_read(tmp_path: Path) -> None:
    (tmp_path / "l.txt").write_text("a.jpg 1.5 -2\n\nb.jpg\t3\n")
    table = read_image_list(tmp_path / "l.txt")
    assert rows_of(table)[0] == ("a.jpg", 1.5, -2.0)
    assert table.flaws().tolist() == [0, 2]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("t.csv", None, "cannot be read: No such file"),
        ("t.csv", b"", "has no column path, latitude_deg, longitude_deg; .* has nothing"),
        ("t.csv", b"path,lat\na,1\n", "has no column latitude_deg, longitude_deg; .* has path, lat"),
        ("t.csv", b"path,latitude_deg,longitude_deg\n\xff\xfe.png,1,2\n", "is not a CSV file in UTF-8"),
        ("t.parquet", None, "cannot be read"),
        ("t.parquet", b"path,latitude_deg,longitude_deg\n", "is not a Parquet file"),
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, name: str, content: bytes | None, reason: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigurationError, match=rf"{name} .*{reason}|{name} {reason}"):
        read_image_table(tmp_path / name)
