"""Whatever a request holds that reflection says it may hold: the server answers, or refuses as its API says."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.answers import Query, expected_answers, questions, same_answer
from support.bad_requests import shows_code
from support.bundles import make_store, tiny_encoder
from support.processes import ServerProcess, geolocation, index_client, server_process
from support.servers import DIMENSION, embedding, encoded_image

from geosurge.v1 import cell_pb2, cell_pb2_grpc

EXAMPLES = 150
VERSIONS = ("a", "b")
QUERIES: list[Query] = [encoded_image(0), embedding(0)]
PROTO = Path(__file__).parents[3] / "proto" / "geosurge" / "v1"

Documented = set[tuple[str, str]]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("fuzz") / "store", dict.fromkeys(VERSIONS, tiny_encoder()))


@pytest.fixture(scope="module")
def server(store: Path) -> Iterator[ServerProcess]:
    with server_process(store) as running:
        yield running


def documented_failures() -> dict[str, Documented]:
    """Status codes and reasons of each service, from the tables in its .proto file; the engine's own fault is none."""
    services: dict[str, Documented] = {}
    for file in PROTO.glob("*.proto"):
        for table, name in re.findall(r"((?:^//.*\n)+)^service (\w+)", file.read_text(), re.MULTILINE):
            codes: list[str] = []
            failures = services.setdefault(f"geosurge.v1.{name}", set())
            for status, reasons in re.findall(r"^// \|(.*?)\|(.*)\|$", table, re.MULTILINE):
                codes = re.findall(r"[A-Z_]{4,}", status) or codes
                failures |= {
                    (code, reason) for code in codes for reason in re.findall(r"\b[A-Z]+(?:_[A-Z]+)*\b", reasons)
                }
            failures.discard(("INTERNAL", "INTERNAL"))
    return services


def reflected_methods(channel: grpc.Channel) -> list[MethodDescriptor]:
    """Every method of the engine's services, as the server describes them."""
    database = ProtoReflectionDescriptorDatabase(channel)
    pool = DescriptorPool(database)
    names = [name for name in database.get_services() if name.startswith("geosurge.")]
    return [method for name in sorted(names) for method in pool.FindServiceByName(name).methods]


def known_words(channel: grpc.Channel) -> list[str]:
    """What the server itself has told: random text would never be the name of anything."""
    answer = geolocation(channel).Locate(questions(QUERIES)[0], timeout=60)
    cells: Any = cell_pb2_grpc.CellServiceStub(channel)  # type: ignore[no-untyped-call]
    page = cells.ListChildren(cell_pb2.ListChildrenRequest(page_size=1), timeout=60)
    return [*VERSIONS, *(cell.token for cell in answer.path), page.next_page_token]


def whole_numbers(low: int, high: int) -> st.SearchStrategy[int]:
    return st.sampled_from([low, high]) | st.integers(max(low, -2), 20) | st.integers(low, high)


def single_values(field: FieldDescriptor, words: list[str]) -> st.SearchStrategy[Any]:
    """Whatever one value of a field may be."""
    kinds = FieldDescriptor
    match field.cpp_type:
        case kinds.CPPTYPE_MESSAGE:
            return messages(field.message_type, words)
        case kinds.CPPTYPE_ENUM:
            known = st.sampled_from([value.number for value in field.enum_type.values])
            return known | whole_numbers(-(2**31), 2**31 - 1)
        case kinds.CPPTYPE_BOOL:
            return st.booleans()
        case kinds.CPPTYPE_FLOAT:
            return st.floats(width=32)
        case kinds.CPPTYPE_DOUBLE:
            return st.floats(0, 1) | st.floats()
        case kinds.CPPTYPE_INT32:
            return whole_numbers(-(2**31), 2**31 - 1)
        case kinds.CPPTYPE_INT64:
            return whole_numbers(-(2**63), 2**63 - 1)
        case kinds.CPPTYPE_UINT32:
            return whole_numbers(0, 2**32 - 1)
        case kinds.CPPTYPE_UINT64:
            return whole_numbers(0, 2**64 - 1)
    if field.type == kinds.TYPE_BYTES:
        return st.binary(max_size=100) | st.sampled_from([encoded_image(0), encoded_image(1)[:-900], bytes(300_000)])
    hostile = ["", "\0", ".", "..", "../a", "a/", "%s%n", "{0}", "\u202e\u2028", "\U0010ffff", "é" * 100_000]
    return st.sampled_from([*words, *hostile]) | st.text(max_size=20)


def values(field: FieldDescriptor, words: list[str]) -> st.SearchStrategy[Any]:
    """Whatever a field may hold: one value, a few, as many as an embedding has, or very many."""
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        key, value = (field.message_type.fields_by_name[name] for name in ("key", "value"))
        return st.dictionaries(single_values(key, words), single_values(value, words), max_size=3)
    one = single_values(field, words)
    if not field.is_repeated:
        return one
    fitting = st.lists(one, min_size=DIMENSION, max_size=DIMENSION)
    return st.lists(one, max_size=3) | fitting | st.builds(very_many, one)


def very_many(value: Any) -> list[Any]:
    """A value again and again, as far as the message stays a few megabytes."""
    size = value.ByteSize() if isinstance(value, Message) else len(value) if isinstance(value, str | bytes) else 1
    return [value] * min(70_000, 1 + 4_000_000 // max(size, 1))


@st.composite
def messages(draw: st.DrawFn, kind: Descriptor, words: list[str]) -> Message:
    """A message with any of its fields; of a oneof, the last one stays."""
    fields = draw(st.permutations(list(kind.fields)))
    chosen = fields[: draw(st.integers(0, len(fields)))]
    return message_factory.GetMessageClass(kind)(**{field.name: draw(values(field, words)) for field in chosen})


def failures_of(channel: grpc.Channel, method: MethodDescriptor, asked: Sequence[Message]) -> tuple[Documented, str]:
    """Calls a method; returns how the call failed, or items of it, and everything that the server told as text."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    parse = message_factory.GetMessageClass(method.output_type).FromString
    requests = [message.SerializeToString() for message in asked]
    try:
        if not method.client_streaming:
            answer = channel.unary_unary(path, response_deserializer=parse)(requests[0], timeout=60)
            return set(), str(answer)
        answers = list(channel.stream_stream(path, response_deserializer=parse)(iter(requests), timeout=60))
    except grpc.RpcError as error:
        return {code_and_reason(rpc_status.from_call(error))}, f"{error!r} {error.trailing_metadata()!r}"
    if method.name != "LocateStream":
        assert len(answers) == len(asked)
        return {code_and_reason(answer.status) for answer in answers if answer.HasField("status")}, str(answers)
    results = [result for answer in answers for result in answer.results]
    assert len(results) == sum(len(message.requests) for message in asked)
    return {code_and_reason(result.status) for result in results if result.HasField("status")}, str(answers)


def code_and_reason(status: Any) -> tuple[str, str]:
    info = error_details_pb2.ErrorInfo()
    # The class of an item's status is the one that reflection made.
    assert status_pb2.Status.FromString(status.SerializeToString()).details[0].Unpack(info)
    (code,) = (code.name for code in grpc.StatusCode if code.value[0] == status.code)
    return code, info.reason


def fuzz(
    channel: grpc.Channel, method: MethodDescriptor, words: list[str], documented: Documented, may_tell: str
) -> Documented:
    """Calls a method with `EXAMPLES` requests; returns how calls failed, each as it may."""
    seen: Documented = set()
    one = messages(method.input_type, words)
    requests = st.lists(one, max_size=3) if method.client_streaming else st.tuples(one)

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(requests)
    def call(asked: Sequence[Message]) -> None:
        failures, told = failures_of(channel, method, asked)
        assert failures <= documented, failures - documented
        assert not shows_code(told.replace(may_tell, "")), told
        seen.update(failures)

    call()
    return seen


def test_every_field_of_every_request_may_hold_anything(server: ServerProcess, store: Path) -> None:
    documented = documented_failures()
    seen: Documented = set()
    with grpc.insecure_channel(server.address) as channel:
        words = known_words(channel)
        methods = reflected_methods(channel)
        assert {method.containing_service.full_name for method in methods} == documented.keys()
        for method in methods:
            service = method.containing_service
            # Administrators are told where a bundle is missing.
            may_tell = str(store) if service.name == "IndexService" else ""
            seen |= fuzz(channel, method, words, documented[service.full_name], may_tell)
        with index_client(server) as index:
            index.activate("b")
            index.activate("a")
        answers = [geolocation(channel).Locate(asked, timeout=60) for asked in questions(QUERIES)]
    assert all(map(same_answer, answers, expected_answers(store / "a", QUERIES)))
    assert server.health() == "SERVING"
    assert server.metric("geosurge_permits_in_use") == 0
    assert "Traceback" not in server.log
    # What is refused by the first check in its way alone would have been no test of the others.
    assert len(seen) > 12, seen
