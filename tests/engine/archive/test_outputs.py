from __future__ import annotations

import csv
import json
import math
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import geosurge.archive.outputs as package
from geosurge.archive.outputs import SCHEMA, Format, columns_table, read_rows, write_outputs
from geosurge.archive.rows import HAS_POSITION, PROBABILITY_TOO_LOW, Position, Row, Status
from geosurge.errors import OutputNotWritableError, UsageError
from geosurge.location import Alternative, PathCell, Place, Timings

LYON = Place("Lyon", "Auvergne-Rhône-Alpes", "France", "FR", 3.25)
DONE = Row(
    path='archive/été, <b>&amp;"quoted".jpg',
    status=Status.DONE,
    content_hash="ab" * 32,
    latitude_deg=45.7640435,
    longitude_deg=-4.8356589,
    radius_km=12.5,
    confidence_level=0.9,
    probability=0.75,
    cells=(PathCell(1, "47", 0.875), PathCell(2, "47f5", 0.75)),
    place=LYON,
    alternatives=(
        Alternative("47f5", 0.75, 45.76, 4.83, LYON),
        Alternative('city/"Villeurbanne"', 0.125, -0.0, 180.0, None),
    ),
    index_version="blue-marble-v1",
    encoder_hash="cd" * 32,
    timings=Timings(1.0, 2.0, 3.0, 4.0, 5.0),
)
SKIPPED = Row("b.jpg", Status.SKIPPED, HAS_POSITION, "it has one", position=Position(-89.5, 180.0, "sidecar"))
WITHHELD = Row("c.jpg", Status.WITHHELD, PROBABILITY_TOO_LOW, "0.1 is below 0.5", radius_km=900.0, probability=0.1)
FAILED = Row("line\r\nbreak\rand\ttab\x01\ufffe.jpg", Status.FAILED, "IMAGE_EMPTY", "the image has no bytes")
ROWS = [DONE, SKIPPED, WITHHELD, FAILED]

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
numbers = st.floats(allow_nan=False, allow_infinity=False)
latitudes, longitudes = st.floats(-90.0, 90.0), st.floats(-180.0, 180.0)
places = st.builds(Place, texts, texts, texts, texts, numbers)
rows = st.builds(
    Row,
    path=texts,
    status=st.sampled_from(Status),
    reason=texts,
    detail=texts,
    content_hash=texts,
    position=st.none() | st.builds(Position, latitudes, longitudes, texts),
    latitude_deg=st.none() | latitudes,
    longitude_deg=st.none() | longitudes,
    radius_km=st.none() | numbers,
    confidence_level=st.none() | numbers,
    probability=st.none() | numbers,
    cells=st.lists(st.builds(PathCell, st.integers(1, 30), texts, numbers), max_size=3).map(tuple),
    place=st.none() | places,
    alternatives=st.lists(
        st.builds(Alternative, texts, numbers, latitudes, longitudes, st.none() | places), max_size=2
    ).map(tuple),
    index_version=texts,
    encoder_hash=texts,
    timings=st.none() | st.builds(Timings, numbers, numbers, numbers, numbers, numbers),
)


def many(count: int) -> Iterator[Row]:
    return (Row(f"{number:06d}.jpg", Status.DONE, latitude_deg=1.0, longitude_deg=2.0) for number in range(count))


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file may grow beyond a size, in bytes, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(rows, max_size=4))
def test_rows_come_back_from_parquet_as_they_went(tmp_path: Path, some: list[Row]) -> None:
    (path,) = write_outputs(some, tmp_path, [Format.PARQUET])
    assert list(read_rows(path)) == some


def test_many_rows_keep_their_order_in_row_groups_of_bounded_size(tmp_path: Path) -> None:
    (path,) = write_outputs(many(9000), tmp_path, [Format.PARQUET])
    assert list(read_rows(path)) == list(many(9000))
    metadata = pq.read_metadata(path)
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [4096, 4096, 808]
    assert metadata.row_group(0).column(0).compression == "ZSTD"


def test_a_run_without_pictures_has_empty_files(tmp_path: Path) -> None:
    parquet, table, points, placemarks = write_outputs([], tmp_path / "new" / "folder", list(Format))
    assert list(read_rows(parquet)) == []
    assert pq.read_schema(parquet).equals(SCHEMA)
    assert table.read_bytes().count(b"\n") == 1
    assert json.loads(points.read_text()) == {"type": "FeatureCollection", "features": []}
    assert len(list(ElementTree.parse(placemarks).iter("{http://www.opengis.net/kml/2.2}Placemark"))) == 0


def test_the_schema_in_the_file_says_what_every_column_means(tmp_path: Path) -> None:
    (path,) = write_outputs(ROWS, tmp_path, [Format.PARQUET])
    schema = pq.read_schema(path)
    assert schema.equals(SCHEMA)
    assert schema.metadata == {b"geosurge.rows": b"1"}
    assert [field.metadata[b"description"] for field in schema] == [field.metadata[b"description"] for field in SCHEMA]
    assert [field.name for field in schema if not field.nullable] == ["path", "status"]


def test_the_published_page_has_every_column() -> None:
    assert columns_table() in (Path(package.__file__).parent / "README.md").read_text(encoding="utf-8")


def test_csv_has_every_column_flattened(tmp_path: Path) -> None:
    (path,) = write_outputs(ROWS, tmp_path, [Format.CSV])
    with path.open(encoding="utf-8", newline="") as file:
        done, skipped, withheld, failed = csv.DictReader(file)
    assert [row["status"] for row in (done, skipped, withheld, failed)] == ["done", "skipped", "withheld", "failed"]
    assert done["path"] == DONE.path
    assert failed["path"] == FAILED.path
    assert (float(done["latitude_deg"]), float(done["longitude_deg"])) == (45.7640435, -4.8356589)
    assert [cell["token"] for cell in json.loads(done["cells"])] == ["47", "47f5"]
    assert json.loads(done["alternatives"])[1]["token"] == 'city/"Villeurbanne"'
    assert (done["place_city"], done["place_distance_km"], done["timings_search_ms"]) == ("Lyon", "3.25", "4.0")
    assert (skipped["position_latitude_deg"], skipped["position_source"]) == ("-89.5", "sidecar")
    assert (withheld["latitude_deg"], withheld["place_city"], withheld["cells"]) == ("", "", "[]")
    flat = {name for field in SCHEMA for name in _flat_names(field)}
    assert set(done) == flat


def _flat_names(field: pa.Field) -> list[str]:
    parts = list(field.type) if pa.types.is_struct(field.type) else []
    return [f"{field.name}_{part.name}" for part in parts] or [field.name]


def test_other_readers_of_csv_see_the_same_rows(tmp_path: Path) -> None:
    (path,) = write_outputs(ROWS, tmp_path, [Format.CSV])
    table = pa_csv.read_csv(path, parse_options=pa_csv.ParseOptions(newlines_in_values=True))
    assert table["path"].to_pylist() == [row.path for row in ROWS]
    assert table["radius_km"].to_pylist() == [12.5, None, 900.0, None]


def test_geojson_has_a_point_for_each_row_that_is_done(tmp_path: Path) -> None:
    (path,) = write_outputs([SKIPPED, DONE, FAILED, DONE], tmp_path, [Format.GEOJSON])
    collection = json.loads(path.read_text(encoding="utf-8"))
    assert collection["type"] == "FeatureCollection"
    first, second = collection["features"]
    assert first == second
    assert first["type"] == "Feature"
    assert first["geometry"] == {"type": "Point", "coordinates": [-4.8356589, 45.7640435]}
    assert first["properties"]["path"] == DONE.path
    assert first["properties"]["radius_km"] == 12.5
    assert first["properties"]["city"] == "Lyon"
    assert first["properties"]["leaf"] == "47f5"


def test_kml_has_a_placemark_for_each_row_that_is_done(tmp_path: Path) -> None:
    odd = Row(f"folder/{FAILED.path}", Status.DONE, latitude_deg=-90.0, longitude_deg=180.0)
    (path,) = write_outputs([DONE, WITHHELD, odd], tmp_path, [Format.KML])
    names = {"k": "http://www.opengis.net/kml/2.2"}
    first, second = ElementTree.parse(path).getroot().findall("k:Document/k:Placemark", names)
    assert first.findtext("k:name", namespaces=names) == DONE.path.removeprefix("archive/")
    assert first.findtext("k:Point/k:coordinates", namespaces=names) == "-4.8356589,45.7640435"
    data = {
        item.get("name"): item.findtext("k:value", namespaces=names) for item in first.iter(f"{{{names['k']}}}Data")
    }
    assert data["path"] == DONE.path
    assert data["radius_km"] == "12.5"
    assert second.findtext("k:Point/k:coordinates", namespaces=names) == "180.0000000,-90.0000000"
    # A control character and a noncharacter, which XML forbids, show their bytes.
    assert second.findtext("k:name", namespaces=names) == "line\r\nbreak\rand\ttab\\x01\\xef\\xbf\\xbe.jpg"


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(rows, max_size=4))
def test_whatever_a_row_holds_the_maps_can_be_parsed(tmp_path: Path, some: list[Row]) -> None:
    points, placemarks = write_outputs(some, tmp_path, [Format.GEOJSON, Format.KML])
    there = [row for row in some if row.status is Status.DONE and None not in (row.latitude_deg, row.longitude_deg)]
    features = json.loads(points.read_text(encoding="utf-8"))["features"]
    assert [feature["properties"]["path"] for feature in features] == [row.path for row in there]
    for feature, row in zip(features, there, strict=True):
        longitude, latitude = feature["geometry"]["coordinates"]
        assert math.isclose(longitude, row.longitude_deg or 0.0, abs_tol=1e-7)
        assert math.isclose(latitude, row.latitude_deg or 0.0, abs_tol=1e-7)
    found = ElementTree.parse(placemarks).getroot().iter("{http://www.opengis.net/kml/2.2}Placemark")
    assert len(list(found)) == len(there)


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    first = write_outputs(ROWS, tmp_path / "a", list(Format))
    second = write_outputs(iter(ROWS), tmp_path / "b", list(Format))
    assert [path.name for path in first] == ["results.parquet", "results.csv", "results.geojson", "results.kml"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


@pytest.mark.parametrize("form", list(Format))
def test_a_full_disk_leaves_what_was_there_before_and_nothing_else(tmp_path: Path, form: Format) -> None:
    (path,) = write_outputs(ROWS, tmp_path, [form])
    before = path.read_bytes()
    with room_for(4096), pytest.raises(OutputNotWritableError, match=rf"results\.{form}: .*make room"):
        write_outputs(many(9000), tmp_path, [form])
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


def test_rows_that_end_with_an_error_leave_no_file(tmp_path: Path) -> None:
    def broken() -> Iterator[Row]:
        yield DONE
        raise RuntimeError("the ledger is gone")

    with pytest.raises(RuntimeError, match="the ledger is gone"):
        write_outputs(broken(), tmp_path, list(Format))
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_written_over(tmp_path: Path) -> None:
    (tmp_path / ".results.csv.partial").write_bytes(b"half a row" * 1000)
    (path,) = write_outputs([], tmp_path, [Format.CSV])
    assert b"half" not in path.read_bytes()
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputNotWritableError, match=r"cannot write .*file/results\.parquet"):
        write_outputs(ROWS, tmp_path / "file", [Format.PARQUET])


def test_a_file_that_holds_no_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read .*missing\.parquet"):
        list(read_rows(tmp_path / "missing.parquet"))
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UsageError, match=r"cannot read .*damaged\.parquet"):
        list(read_rows(tmp_path / "damaged.parquet"))
    pq.write_table(pa.table({"path": ["a.jpg"]}), tmp_path / "other.parquet")
    with pytest.raises(UsageError, match=r"other\.parquet does not have the columns"):
        list(read_rows(tmp_path / "other.parquet"))
