from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from support.shards import write_shard

from geosurge.errors import ConfigurationError
from geosurge_training.data.stored_images import StoredSamples
from geosurge_training.data.webdataset import expand_shards, match_keys, open_webdataset


def write_shards(folder: Path, count: int = 3, samples: int = 4) -> list[str]:
    for shard in range(count):
        members = []
        for number in range(shard * samples, (shard + 1) * samples):
            place = {"latitude": number + 0.5, "longitude": -number}
            members += [(f"{number:03d}.jpg", b"%d" % number), (f"{number:03d}.json", json.dumps(place).encode())]
        write_shard(folder / f"shard-{shard:02d}.tar", members)
    return [str(folder / f"shard-{{00..{count - 1:02d}}}.tar")]


def rows_of(samples: StoredSamples) -> list[tuple[str, bytes, float, float]]:
    images = [samples.read(row) for row in range(len(samples.names))]
    places = samples.latitude_deg.tolist(), samples.longitude_deg.tolist()
    return list(zip(samples.names.to_pylist(), images, *places, strict=True))


def test_images_come_with_the_coordinates_of_their_json(tmp_path: Path) -> None:
    samples = open_webdataset(write_shards(tmp_path), tmp_path / "index")
    assert rows_of(samples) == [(f"{number:03d}", b"%d" % number, number + 0.5, -number) for number in range(12)]


def test_a_table_says_where_images_were_taken_and_which_are_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = tmp_path / "places.csv"
    table.write_text("IMG_ID,LAT,LON\n011.jpg,1,2\n500.jpg,3,4\n002.jpg,5,6\n003.jpg,99,6\n")
    with caplog.at_level(logging.INFO):
        samples = open_webdataset(write_shards(tmp_path), tmp_path / "index", coordinates=table)
    assert rows_of(samples) == [("002", b"2", 5.0, 6.0), ("011", b"11", 1.0, 2.0)]
    assert "names 2 of the 12 samples" in caplog.text
    assert "row 4 ('003.jpg' at 99.0, 6.0) is skipped: coordinates off the globe" in caplog.text


def test_a_table_of_other_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "places.csv").write_text("key,latitude_deg,longitude_deg\nmine,1,2\n")
    columns = ["key", "latitude_deg", "longitude_deg"]
    with pytest.raises(ConfigurationError, match=r"names no sample of the shards: it has \['mine'\].*'000', '001'"):
        open_webdataset(
            write_shards(tmp_path), tmp_path / "index", coordinates=tmp_path / "places.csv", columns=columns
        )


def test_samples_without_coordinates_are_skipped_until_they_are_too_many(tmp_path: Path) -> None:
    members = [(f"{number}.jpg", b"x") for number in range(11)]
    patterns = [*write_shards(tmp_path), str(write_shard(tmp_path / "bare.tar", members[:10]))]
    assert len(open_webdataset(patterns, tmp_path / "index").names) == 12
    write_shard(tmp_path / "bare.tar", members)
    with pytest.raises(ConfigurationError, match=r"11 of 23 rows of .*\(11 a coordinate that is not a number\)"):
        open_webdataset(patterns, tmp_path / "index")


@pytest.mark.parametrize("has_table", [False, True])
def test_samples_without_a_picture_are_skipped_until_they_are_too_many(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, has_table: bool
) -> None:
    table = tmp_path / "places.csv"
    table.write_text("IMG_ID,LAT,LON\n" + "\n".join(f"{number:03d}.jpg,1,2" for number in range(12)))
    members = [(f"x{number}.json", b'{"latitude": 1, "longitude": 2}') for number in range(11)]
    patterns = [*write_shards(tmp_path), str(write_shard(tmp_path / "bare.tar", members[:10]))]
    coordinates = table if has_table else None
    # The second time from the index that the first one made.
    for _ in range(2):
        caplog.clear()
        samples = open_webdataset(patterns, tmp_path / "index", coordinates=coordinates)
        assert [row[1] for row in rows_of(samples)] == [b"%d" % number for number in range(12)]
        assert "x0 is skipped: no image" in caplog.text
    write_shard(tmp_path / "bare.tar", members)
    for _ in range(2):
        with pytest.raises(ConfigurationError, match=r"11 of 23 samples of .* cannot be used \(11 no image\)"):
            open_webdataset(patterns, tmp_path / "index", coordinates=coordinates)


@pytest.mark.parametrize(
    ("key", "name", "is_match"),
    [
        ("ab_cd_12", "ab/cd/12.jpg", True),
        ("x/y/ab_cd_12", "ab/cd/12.jpg", True),
        ("ab/cd/12", "ab/cd/12.jpg", True),
        ("12", "12", True),
        ("12", "ab/cd/12.jpg", False),
        ("cd_12", "ab/cd/12.jpg", False),
        ("v1.0/12", "v1.0/12.tar.jpg", True),
    ],
)
def test_names_belong_to_the_keys_that_they_are_packed_under(key: str, name: str, is_match: bool) -> None:
    names = pa.array(["other.jpg", name, name], pa.large_string())
    keys = pa.array(["elsewhere", key], pa.large_string())
    assert match_keys(keys, names).tolist() == [-1, 1 if is_match else -1]


def test_braces_name_files_and_stars_find_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a-08.tar", "a-09.tar", "a-10.tar", "b.tar"):
        (tmp_path / name).touch()
    names = [path.name for path in expand_shards([str(tmp_path / "a-{08..10}.tar"), str(tmp_path / "{b,a-08}.tar")])]
    assert names == ["a-08.tar", "a-09.tar", "a-10.tar", "b.tar", "a-08.tar"]
    assert [path.name for path in expand_shards([str(tmp_path / "a-?[89].t*")])] == ["a-08.tar", "a-09.tar"]
    monkeypatch.chdir(tmp_path.parent)
    assert expand_shards([f"{tmp_path.name}/b.tar"]) == (Path(tmp_path.name) / "b.tar",)
    with pytest.raises(ConfigurationError, match=r"there is no shard .*a-11\.tar"):
        expand_shards([str(tmp_path / "a-{10..11}.tar")])
    with pytest.raises(ConfigurationError, match=r"there is no shard .*c\*\.tar"):
        expand_shards([str(tmp_path / "c*.tar")])


def test_places_have_the_type_that_partitions_expect(tmp_path: Path) -> None:
    samples = open_webdataset(write_shards(tmp_path), tmp_path / "index")
    assert samples.latitude_deg.dtype == samples.longitude_deg.dtype == np.float64
