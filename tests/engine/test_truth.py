from __future__ import annotations

from pathlib import Path

import pytest

from geosurge.description import Coordinate
from geosurge.errors import UsageError
from geosurge.location import CredibleRegion, Location
from geosurge.truth import error_km, read_truth


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def test_paths_start_from_the_folder_of_the_file_and_other_columns_are_ignored(tmp_path: Path) -> None:
    table = write(
        tmp_path / "truth.csv",
        "\ufefflongitude_deg,note,path,latitude_deg\r\n-9.1,home,a/lisbon.jpg,38.7\r\n174.8,,/data/x.jpg,-36.8\r\n",
    )
    truths = read_truth(table)
    assert list(truths.items()) == [
        (tmp_path / "a" / "lisbon.jpg", Coordinate(38.7, -9.1)),
        (Path("/data/x.jpg"), Coordinate(-36.8, 174.8)),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("path,lat,lon\na,1,2\n", "no column latitude_deg, longitude_deg"),
        ("", "no column path, latitude_deg, longitude_deg"),
        ("path,latitude_deg,longitude_deg\na,1,2\nb,north,2\n", "line 3: could not convert string to float: 'north'"),
        ("path,latitude_deg,longitude_deg\na,91,2\n", "line 2: .*91"),
        ("path,latitude_deg,longitude_deg\na,nan,2\n", "line 2: .*nan"),
        ("path,latitude_deg,longitude_deg\na,1\n", "line 2: "),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_its_place(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read_truth(write(tmp_path / "truth.csv", text))


def test_a_file_that_cannot_be_read_is_a_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_truth(tmp_path / "missing.csv")
    with pytest.raises(UsageError, match="cannot read the truth"):
        read_truth(write(tmp_path / "binary.csv", "path,latitude_deg,longitude_deg\n").rename(tmp_path / "b") / "c")


def test_an_error_is_a_great_circle() -> None:
    quarter = Location(0.0, 90.0, 1.0, 0.9, 1.0, (), (), CredibleRegion((), 0.0, 1.0), "x")
    assert error_km(quarter, Coordinate(0.0, 0.0)) == pytest.approx(10_007.557, abs=1e-3)
