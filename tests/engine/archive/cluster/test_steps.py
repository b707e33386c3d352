from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from support.bad_archive import picture
from support.bundles import make_bundle, tiny_encoder

from geosurge.archive.backends import open_index
from geosurge.archive.cluster import steps
from geosurge.archive.cluster.parts import ID
from geosurge.archive.cluster.session import Cluster
from geosurge.archive.cluster.steps import DecodeStep, LocateStep
from geosurge.archive.locating import essential
from geosurge.archive.sources import scan
from geosurge.images import ImageLimits
from geosurge.location import LocateOptions, Location, Timings
from geosurge.preprocessing import Preprocessing
from geosurge.wire import bytes_to_location

pytest.importorskip("ray", reason="needs the extra bulk: pip install 'geosurge[bulk]'")

OPTIONS = LocateOptions(top_k=2)
NAMES = ["0.jpg", "1.jpg", "2 text.jpg", "3 gone.jpg"]


@pytest.fixture(autouse=True)
def process() -> Iterator[None]:
    """A step has a process of its own on Ray: it takes all cores, and the process that decodes ends with it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    steps._decoder().stop()


@pytest.fixture
def pictures(tmp_path: Path) -> pa.Table:
    """Two pictures, what is none, and one that has gone since it was found."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, name in enumerate(NAMES):
        (folder / name).write_bytes(b"Dear diary" if "text" in name else picture(number))
    found = list(scan([folder]))
    (folder / "3 gone.jpg").unlink()
    rows = [
        {
            ID: 70 + key,
            "key": key,
            "path": item.path,
            "member": item.member,
            "size": item.size,
            "mtime_ns": item.mtime_ns,
            "offset": item.offset,
        }
        for key, item in enumerate(found)
    ]
    return pa.Table.from_pylist(rows)


def test_what_is_decoded_has_pixels_and_the_rest_a_reason(pictures: pa.Table) -> None:
    preprocessing = Preprocessing(32)
    first, second, text, gone = DecodeStep(preprocessing, ImageLimits())(pictures).to_pylist()
    for number, row in enumerate((first, second)):
        assert (row[ID], row["key"], row["reason"]) == (70 + number, number, None)
        assert row["content_hash"] == hashlib.sha256(picture(number)).digest()
        pixels = np.frombuffer(row["pixels"], np.uint8).reshape(3, 32, 32)
        assert np.array_equal(pixels, preprocessing.decode(picture(number)))
    assert (text["key"], text["pixels"], text["reason"], text["is_final"]) == (2, None, "IMAGE_NOT_DECODABLE", True)
    assert text["content_hash"] == hashlib.sha256(b"Dear diary").digest()
    assert (gone["key"], gone["content_hash"], gone["is_final"]) == (3, None, False)
    assert (gone["reason"], "3 gone.jpg" in gone["detail"]) == ("INPUT_NOT_READABLE", True)


def test_what_has_pixels_is_located_as_everywhere_else(pictures: pa.Table, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "tiny", encoder=tiny_encoder())
    locate = LocateStep(Cluster("", bundle, "cpu", 4), OPTIONS)
    with open_index(bundle, "cpu", 4) as backend:
        assert backend.preprocessing is not None
        decoded = DecodeStep(backend.preprocessing, backend.limits)(pictures)
        expected = backend.locate([backend.preprocessing.decode(picture(number)) for number in range(2)], OPTIONS)
    rows = locate(decoded).to_pylist()
    assert [row[ID] for row in rows] == [70, 71, 72, 73]
    for row, outcome in zip(rows, expected, strict=False):
        assert isinstance(outcome, Location)
        assert without_timings(bytes_to_location(row["response"])) == without_timings(essential(outcome, 0.0))
    assert [(row["response"], row["reason"]) for row in rows[2:]] == [
        (None, "IMAGE_NOT_DECODABLE"),
        (None, "INPUT_NOT_READABLE"),
    ]
    nothing = locate(decoded.slice(2)).to_pylist()
    assert [row["reason"] for row in nothing] == ["IMAGE_NOT_DECODABLE", "INPUT_NOT_READABLE"]


def without_timings(location: Location) -> Location:
    return replace(location, timings=Timings())
