from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from geosurge.errors import ConfigurationError
from geosurge_training.evaluation.datasets import BENCHMARKS, find_images, open_dataset
from geosurge_training.evaluation.published import PUBLISHED_RESULTS, published_results

PLACES365 = "IMG_ID,AUTHOR,LAT,LON,S3_Label,S16_Label,S365_Label,Prob_indoor,Prob_natural,Prob_urban"
HEADERS = {
    "im2gps": PLACES365,
    "im2gps3k": PLACES365,
    "yfcc4k": "IMG_ID,LAT,LON",
    "yfcc26k": PLACES365,
    "gws15k": "path,lat,lon",
    "osv5m": "id,latitude,longitude,thumb_original_url,country,sequence,captured_at",
}


def write_metadata(path: Path, header: str, count: int) -> Path:
    columns = header.split(",")
    latitude = next(row for row, name in enumerate(columns) if name.lower().startswith("lat"))
    cells = ["NA"] * len(columns)
    lines = [header]
    for row in range(count):
        cells[0] = f"{row}"
        cells[latitude], cells[latitude + 1] = f"{row % 90}.25", f"{row % 180}.5"
        lines.append(",".join(cells))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_published_columns_of_every_benchmark_are_read(name: str, tmp_path: Path) -> None:
    benchmark = BENCHMARKS[name]
    dataset = open_dataset(write_metadata(tmp_path / "m.csv", HEADERS[name], benchmark.count), tmp_path, name)
    assert dataset.title == benchmark.title
    assert dataset.benchmark is benchmark
    assert len(dataset.images) == len(dataset.latitude_deg) == len(dataset.longitude_deg) == benchmark.count
    assert dataset.images[100] == tmp_path / f"100{'.jpg' if name == 'osv5m' else ''}"
    assert (dataset.latitude_deg[100], dataset.longitude_deg[100]) == (10.25, 100.5)


@pytest.mark.parametrize("difference", [-1, 1])
def test_a_file_with_another_number_of_rows_is_not_the_real_one(difference: int, tmp_path: Path) -> None:
    table = write_metadata(tmp_path / "m.csv", PLACES365, 237 + difference)
    with pytest.raises(ConfigurationError, match=f"has {237 + difference} rows, but Im2GPS has 237"):
        open_dataset(table, benchmark="im2gps")


def test_coordinates_under_each_others_headings_are_read_the_right_way_round(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = ["IMG_ID,AUTHOR,LON,LAT"] + [f"{row}.jpg,someone,{row % 90},{-row % 180}" for row in range(237)]
    (tmp_path / "m.csv").write_text("\n".join(rows))
    with caplog.at_level(logging.WARNING):
        dataset = open_dataset(tmp_path / "m.csv", benchmark="im2gps")
    assert (dataset.latitude_deg[5], dataset.longitude_deg[5]) == (5.0, 175.0)
    assert "each other's headings" in caplog.text


def test_the_headerless_list_of_yfcc4k_is_read(tmp_path: Path) -> None:
    lines = [f"images/{row}.jpg {row % 90}.5 {-(row % 180)}" for row in range(4536)]
    (tmp_path / "0aaaa.r.imagedata.txt").write_text("\n".join(lines) + "\n")
    dataset = open_dataset(tmp_path / "0aaaa.r.imagedata.txt", benchmark="yfcc4k")
    assert dataset.images[7] == tmp_path / "images" / "7.jpg"
    assert (dataset.latitude_deg[7], dataset.longitude_deg[7]) == (7.5, -7.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("IMG_ID,LAT\na,1\n", "no column LON"),
        ("IMG_ID,LAT,LON\n,1,1\n", r"row 1 \(''.*no name of an image"),
        ("IMG_ID,LAT,LON\na,1,1\nb,north,1\n", "row 2 .*: a coordinate that is not a number"),
        ("IMG_ID,LAT,LON\na,1\n", "row 1 .*: a coordinate that is not a number"),
        ("IMG_ID,LAT,LON\na,1,1\nb,91,120\n", "row 2 .*'b' at 91.0, 120.0.*: coordinates off the globe"),
        ("IMG_ID,LAT,LON\na,nan,120\n", "row 1 .*'a' at nan, 120.0.*: a coordinate that is not a number"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(ConfigurationError, match=message):
        open_dataset(tmp_path / "m.csv", benchmark="im2gps")


def test_unknown_benchmarks_and_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"no benchmark 'im2gsp'; there are im2gps, im2gps3k"):
        open_dataset(tmp_path / "m.csv", benchmark="im2gsp")
    with pytest.raises(ConfigurationError, match=r"m\.csv cannot be read"):
        open_dataset(tmp_path / "m.csv", benchmark="im2gps")


def test_images_are_found_below_by_a_name_that_only_one_file_has(tmp_path: Path) -> None:
    for name in ("a.jpg", "00/b.jpg", "00/c.jpg", "01/c.jpg", "01/d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_images(tmp_path, ["a.jpg", "b.jpg", "c.jpg", "d", "e.jpg", "01/c.jpg"])
    assert [str(file.relative_to(tmp_path)) for file in found] == [
        "a.jpg",
        "00/b.jpg",
        "c.jpg",
        "01/d.png",
        "e.jpg",
        "01/c.jpg",
    ]


def test_ones_own_table_needs_no_row_count(tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text("path,latitude_deg,longitude_deg\na.jpg,1,2\n")
    dataset = open_dataset(tmp_path / "own.csv", tmp_path / "pictures")
    assert dataset.images == [tmp_path / "pictures" / "a.jpg"]
    assert dataset.benchmark is None
    assert np.array_equal([dataset.latitude_deg, dataset.longitude_deg], [[1.0], [2.0]])


def test_published_results_are_shares_of_known_benchmarks_that_grow_with_the_distance() -> None:
    for result in PUBLISHED_RESULTS:
        assert result.benchmark in BENCHMARKS
        percent = [result.within_percent[threshold] for threshold in sorted(result.within_percent)]
        assert percent == sorted(percent)
        assert all(0 < value < 100 for value in percent)
    assert {result.benchmark for result in PUBLISHED_RESULTS} == set(BENCHMARKS)
    assert len(published_results("im2gps3k")) == 6
