from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geosurge.errors import OptionOutOfRangeError, QueryMissingError
from geosurge.location import LocateOptions
from geosurge.server.conversions import (
    MAX_REQUEST_ID_LENGTH,
    MAX_VERSION_NAME_LENGTH,
    check_request_id,
    check_version_name,
    message_to_options,
    request_to_id,
    request_to_query,
)
from geosurge.v1 import geolocation_pb2 as pb
from geosurge.wire import options_to_message


def test_fields_that_are_not_set_take_their_defaults() -> None:
    assert message_to_options(pb.LocateOptions()) == LocateOptions()


def test_a_field_that_is_set_to_zero_is_kept_to_be_refused() -> None:
    options = message_to_options(pb.LocateOptions(top_k=0, beam_width=0, confidence_level=0.0, h3_resolution=0))
    assert (options.top_k, options.beam_width, options.confidence_level, options.h3_resolution) == (0, 0, 0.0, 0)


@settings(deadline=None)
@given(
    st.builds(
        LocateOptions,
        top_k=st.integers(0, 2**32 - 1),
        beam_width=st.none() | st.integers(0, 2**32 - 1),
        exact=st.booleans(),
        confidence_level=st.floats(allow_nan=False),
        h3_resolution=st.none() | st.integers(0, 2**32 - 1),
        region_tokens=st.lists(st.text(st.characters(exclude_categories=["Cs"]))).map(tuple),
    )
)
def test_options_survive_the_wire(options: LocateOptions) -> None:
    sent = options_to_message(options, "a-version")
    received = pb.LocateOptions.FromString(sent.SerializeToString())
    assert message_to_options(received) == options
    assert received.index_version == "a-version"


def test_an_unknown_search_mode_is_refused() -> None:
    message = pb.LocateOptions.FromString(b"\x10\x63")
    assert message.search_mode == 99
    with pytest.raises(OptionOutOfRangeError, match="search_mode is 99"):
        message_to_options(message)


def test_a_query_is_the_image_or_the_embedding() -> None:
    assert request_to_query(pb.LocateRequest(image=b"abc")) == b"abc"
    assert request_to_query(pb.LocateRequest(image=b"")) == b""
    query = request_to_query(pb.LocateRequest(embedding=pb.Embedding(values=[1.0, 0.5])))
    assert isinstance(query, np.ndarray)
    assert query.dtype == np.float32
    assert query.tolist() == [1.0, 0.5]


def test_a_request_without_a_query_is_refused() -> None:
    with pytest.raises(QueryMissingError, match="neither an image nor an embedding"):
        request_to_query(pb.LocateRequest(request_id="a"))


def test_ids_are_echoed_or_made_and_bounded() -> None:
    assert request_to_id(pb.LocateRequest(request_id="views/ä.jpg")) == "views/ä.jpg"
    made = {request_to_id(pb.LocateRequest()) for _ in range(10)}
    assert len(made) == 10
    assert all(len(request_id) == 32 for request_id in made)
    check_request_id("x" * MAX_REQUEST_ID_LENGTH)
    with pytest.raises(OptionOutOfRangeError, match="4097 characters"):
        check_request_id("x" * (MAX_REQUEST_ID_LENGTH + 1))


def test_the_name_of_a_version_is_bounded() -> None:
    assert check_version_name("x" * MAX_VERSION_NAME_LENGTH) == "x" * MAX_VERSION_NAME_LENGTH
    with pytest.raises(OptionOutOfRangeError, match="256 characters, at most 255"):
        check_version_name("x" * (MAX_VERSION_NAME_LENGTH + 1))
