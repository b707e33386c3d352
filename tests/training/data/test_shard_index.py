from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from support.shards import write_shard

from geosurge.errors import ConfigurationError
from geosurge_training.data.shard_index import ShardIndex, open_index

FIELDS = ("latitude", "longitude")


def told(latitude: object, longitude: object) -> bytes:
    return f'{{"latitude": {latitude}, "longitude": {longitude}, "caption": "NA"}}'.encode()


def rows_of(index: ShardIndex) -> list[tuple[str, bytes, float, float]]:
    keys, images = index.keys.to_pylist(), [index.read(row) for row in range(len(index.keys))]
    return list(zip(keys, images, index.latitude_deg.tolist(), index.longitude_deg.tolist(), strict=True))


def test_a_sample_is_a_run_of_members_with_a_key(tmp_path: Path) -> None:
    shard = write_shard(
        tmp_path / "a.tar",
        [
            ("a.jpg", b"first"),
            ("a.json", told(1.5, -2)),
            ("a.seg.png", b"not the picture"),
            ("folder.v1/b.c.json", b"not this either"),
            ("folder.v1/b.json", told('"3.5"', 4)),
            ("folder.v1/b.PNG", b"second"),
            ("./c.txt", b"no picture"),
            ("d" * 300 + ".jpeg", b"third"),
        ],
    )
    rows = rows_of(open_index(tmp_path / "index", [shard], FIELDS))
    assert [row[:2] for row in rows] == [("a", b"first"), ("folder.v1/b", b"second"), ("d" * 300, b"third")]
    assert rows[0][2:] == (1.5, -2.0)
    assert rows[1][2:] == (3.5, 4.0)
    assert np.isnan(rows[2][2:]).all()


def test_a_sample_with_json_and_no_picture_has_a_row_without_one(tmp_path: Path) -> None:
    members = [("a.json", told(1, 2)), ("b.jpg", b"x"), ("b.json", told(3, 4)), ("c.heic", b"y"), ("c.json", b"{}")]
    for fields in (FIELDS, None):
        index = open_index(tmp_path / "index", [write_shard(tmp_path / "a.tar", members)], fields)
        assert index.keys.to_pylist() == ["a", "b", "c"]
        assert index.has_image.tolist() == [False, True, False]
    assert index.read(1) == b"x"


@pytest.mark.parametrize("content", [b"", b"{}", b"[1, 2]", told("null", 1), told('"north"', 1), b'{"latitude": 1'])
def test_json_that_says_no_place_says_none(tmp_path: Path, content: bytes) -> None:
    shard = write_shard(tmp_path / "a.tar", [("a.jpg", b"x"), ("a.json", content)])
    assert np.isnan(open_index(tmp_path / "index", [shard], FIELDS).latitude_deg).all()


def test_names_in_the_json_can_be_others_and_the_json_left_alone(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", [("a.jpg", b"x"), ("a.json", b'{"LAT": 5, "LON": 6}')])
    assert rows_of(open_index(tmp_path / "index", [shard], ("LAT", "LON"))) == [("a", b"x", 5.0, 6.0)]
    assert np.isnan(open_index(tmp_path / "index", [shard], None).latitude_deg).all()


def test_rows_come_in_the_order_of_the_shards(tmp_path: Path) -> None:
    shards = [
        write_shard(tmp_path / f"{letter}.tar", [(f"{letter}{number}.jpg", b"x") for number in range(3)])
        for letter in "ba"
    ]
    index = open_index(tmp_path / "index", shards, None)
    assert index.keys.to_pylist() == ["b0", "b1", "b2", "a0", "a1", "a2"]
    assert index.shard.tolist() == [0, 0, 0, 1, 1, 1]
    assert index.take(np.array([4, 0])).keys.to_pylist() == ["a1", "b0"]


def test_an_index_is_made_once_and_again_when_a_shard_is_another(tmp_path: Path) -> None:
    shard, file = write_shard(tmp_path / "a.tar", [("a.jpg", b"x")]), tmp_path / "run" / "index"
    open_index(file, [shard], FIELDS)
    made = file.stat().st_mtime_ns, file.stat().st_ino
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shard.rename(elsewhere / "a.tar")
    assert open_index(file, [elsewhere / "a.tar"], FIELDS).read(0) == b"x"
    assert (file.stat().st_mtime_ns, file.stat().st_ino) == made

    shard = write_shard(elsewhere / "a.tar", [("b.jpg", b"y")])
    os.utime(shard, ns=(1, 1))
    assert rows_of(open_index(file, [shard], None))[0][:2] == ("b", b"y")
    file.write_bytes(file.read_bytes()[:-20])
    assert rows_of(open_index(file, [shard], None))[0][:2] == ("b", b"y")
    assert [path.name for path in file.parent.iterdir()] == ["index"]


def test_a_shard_that_has_been_cut_off_since_is_not_read_as_if_it_were_whole(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", [("a.jpg", b"x" * 1000)])
    index = open_index(tmp_path / "index", [shard], None)
    os.truncate(shard, 900)
    with pytest.raises(OSError, match=r"a\.tar has been cut off"):
        index.read(0)


def test_shards_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    damaged = write_shard(tmp_path / "damaged.tar", [("a.jpg", b"x" * 1000)])
    os.truncate(damaged, 900)
    with pytest.raises(ConfigurationError, match=r"damaged\.tar is damaged: it ends within a\.jpg"):
        open_index(tmp_path / "index", [damaged], None)
    with pytest.raises(ConfigurationError, match="none of the members ends in bmp, gif, jpeg, jpg"):
        open_index(tmp_path / "index", [write_shard(tmp_path / "b.tar", [("a.txt", b"x")])], None)
    with pytest.raises(ConfigurationError, match=r"a shard cannot be read: .*nowhere\.tar"):
        open_index(tmp_path / "index", [tmp_path / "nowhere.tar"], None)
