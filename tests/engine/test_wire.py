from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from google.protobuf import json_format
from google.rpc import code_pb2, error_details_pb2, status_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from geosurge import errors
from geosurge.description import IndexVersion, VersionState
from geosurge.errors import (
    BundleCorruptError,
    GeoSurgeError,
    ImageEmptyError,
    OptionOutOfRangeError,
    OverloadedError,
    ServiceError,
)
from geosurge.location import (
    Alternative,
    CredibleRegion,
    LocateOptions,
    Location,
    PathCell,
    Place,
    Timings,
)
from geosurge.v1 import geolocation_pb2, index_pb2
from geosurge.wire import (
    bytes_to_location,
    error_to_json,
    error_to_status,
    location_to_bytes,
    location_to_response,
    message_to_version,
    options_to_message,
    response_to_json,
    response_to_location,
    status_to_error,
    version_to_message,
)

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
numbers = st.floats(allow_nan=False, allow_infinity=False)
places = st.builds(Place, texts, texts, texts, texts, numbers)
locations = st.builds(
    Location,
    latitude_deg=numbers,
    longitude_deg=numbers,
    radius_km=numbers,
    confidence_level=numbers,
    probability=numbers,
    path=st.lists(st.builds(PathCell, st.integers(1, 7), texts, numbers), max_size=3).map(tuple),
    alternatives=st.lists(st.builds(Alternative, texts, numbers, numbers, numbers, st.none() | places), max_size=3).map(
        tuple
    ),
    credible_region=st.builds(CredibleRegion, st.lists(texts, max_size=3).map(tuple), numbers, numbers),
    index_version=texts,
    place=st.none() | places,
    h3_cell=st.none() | texts.filter(bool),
    timings=st.builds(Timings, numbers, numbers, numbers, numbers, numbers),
)

NULL_ISLAND = Location(
    latitude_deg=0.0,
    longitude_deg=0.0,
    radius_km=0.0,
    confidence_level=0.9,
    probability=1.0,
    path=(PathCell(1, "1", 1.0),),
    alternatives=(),
    credible_region=CredibleRegion((), 0.0, 0.0),
    index_version="tiny",
)


def all_error_classes(base: type[GeoSurgeError] = GeoSurgeError) -> list[type[GeoSurgeError]]:
    return [base, *(error for child in base.__subclasses__() for error in all_error_classes(child))]


@settings(deadline=None)
@given(locations, texts)
def test_a_location_survives_the_wire(location: Location, request_id: str) -> None:
    data = location_to_response(location, request_id).SerializeToString()
    response = geolocation_pb2.LocateResponse.FromString(data)
    assert response.request_id == request_id
    assert response_to_location(response) == location
    assert bytes_to_location(location_to_bytes(location)) == location


@settings(deadline=None)
@given(locations, texts)
def test_json_is_one_line_that_says_the_same(location: Location, request_id: str) -> None:
    response = location_to_response(location, request_id)
    text = response_to_json(response)
    assert len(text.splitlines()) == 1
    assert json_format.Parse(text, geolocation_pb2.LocateResponse()) == response


def test_json_has_every_key_even_where_the_value_is_zero_or_empty() -> None:
    printed = json.loads(response_to_json(location_to_response(NULL_ISLAND, "a")))
    assert set(printed) == {
        "request_id",
        "location",
        "path",
        "alternatives",
        "credible_region",
        "index_version",
        "timings",
    }
    assert printed["location"] == {
        "latitude_deg": 0.0,
        "longitude_deg": 0.0,
        "radius_km": 0.0,
        "confidence_level": 0.9,
        "probability": 1.0,
        "h3_cell": "",
    }
    assert printed["alternatives"] == []
    assert printed["path"] == [{"level": 1, "token": "1", "probability": 1.0}]


def test_an_error_line_stands_where_the_answer_would() -> None:
    line = error_to_json(ImageEmptyError("the image\nhas 0 bytes"), "a.jpg")
    assert "\n" not in line
    assert json.loads(line) == {
        "request_id": "a.jpg",
        "error": {"reason": "IMAGE_EMPTY", "message": "the image\nhas 0 bytes"},
    }


@pytest.mark.parametrize("kind", all_error_classes(), ids=lambda kind: kind.__name__)
def test_every_error_comes_back_as_the_class_it_was(kind: type[GeoSurgeError]) -> None:
    status = error_to_status(kind("what is wrong"), {"request_id": "a"})
    received = status_to_error(status_pb2.Status.FromString(status.SerializeToString()))
    assert type(received) is kind
    assert str(received) == "what is wrong"
    assert code_pb2.Code.Name(status.code) == kind.grpc_code
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.domain, info.reason, dict(info.metadata)) == ("geosurge", kind.reason, {"request_id": "a"})


def test_an_overload_says_when_to_come_back() -> None:
    received = status_to_error(error_to_status(OverloadedError("busy", retry_after_seconds=1.25)))
    assert isinstance(received, OverloadedError)
    assert received.retry_after_seconds == 1.25


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (code_pb2.UNAVAILABLE, errors.ServiceError),
        (code_pb2.DEADLINE_EXCEEDED, errors.DeadlineExceededError),
        (code_pb2.RESOURCE_EXHAUSTED, errors.MessageTooLargeError),
        (code_pb2.INVALID_ARGUMENT, errors.InputError),
        (code_pb2.UNKNOWN, GeoSurgeError),
    ],
)
def test_without_details_the_code_decides(code: int, kind: type[GeoSurgeError]) -> None:
    assert type(status_to_error(status_pb2.Status(code=code, message="m"))) is kind


def test_details_of_others_do_not_decide() -> None:
    status = status_pb2.Status(code=code_pb2.UNAVAILABLE, message="m")
    status.details.add().Pack(error_details_pb2.ErrorInfo(domain="example.org", reason="IMAGE_EMPTY"))
    status.details.add().Pack(error_details_pb2.ErrorInfo(domain="geosurge", reason="FROM_THE_FUTURE"))
    assert type(status_to_error(status)) is errors.ServiceError


@settings(deadline=None)
@given(st.text(max_size=3000))
def test_a_message_keeps_its_ends_and_fits_into_trailers(middle: str) -> None:
    message = f"the cell <{middle}> is unknown; use another"
    status = error_to_status(GeoSurgeError(message))
    assert len(status.message.encode()) <= 1000
    assert status.message.startswith("the cell <")
    assert status.message.endswith("> is unknown; use another")


def test_options_that_cannot_be_written_down_are_refused() -> None:
    for options in (LocateOptions(top_k=-1), LocateOptions(beam_width=2**32), LocateOptions(h3_resolution=-1)):
        with pytest.raises(OptionOutOfRangeError):
            options_to_message(options)


@pytest.mark.parametrize("state", VersionState)
def test_all_that_is_known_of_a_version_survives(state: VersionState) -> None:
    now = datetime(2027, 1, 2, 3, 4, 5, tzinfo=UTC)
    version = IndexVersion("a", state, BundleCorruptError("broken"), "reading", 0.5, 3, 4, 0.25, now, now, "5e")
    message = version_to_message(version)
    assert index_pb2.VersionState.Name(message.state) == f"VERSION_STATE_{state.name}"
    assert (message.load_step, message.load_progress, message.request_count) == ("reading", 0.5, 3)
    assert (message.memory_bytes, message.canary_share, message.encoder_sha256) == (4, 0.25, "5e")
    assert message.state_time.ToDatetime(tzinfo=UTC) == message.create_time.ToDatetime(tzinfo=UTC) == now
    again = message_to_version(message)
    assert (type(again.failure), str(again.failure)) == (BundleCorruptError, "broken")
    assert replace(again, failure=version.failure) == version
    bare = version_to_message(IndexVersion("a", state))
    assert not any(bare.HasField(name) for name in ("failure", "state_time", "create_time"))
    assert message_to_version(bare) == IndexVersion("a", state)


@pytest.mark.parametrize("number", [0, 99])
def test_a_state_of_another_version_of_the_engine_is_refused(number: int) -> None:
    with pytest.raises(ServiceError, match=f"reports the state {number} of version 'a'"):
        message_to_version(index_pb2.IndexVersion(name="a", state=number))  # type: ignore[arg-type]
