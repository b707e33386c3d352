from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FileDescriptor, MethodDescriptor

from geosurge.v1 import cell_pb2, geolocation_pb2, index_pb2

ROOT = Path(__file__).resolve().parents[1]
FILES: list[FileDescriptor] = [cell_pb2.DESCRIPTOR, geolocation_pb2.DESCRIPTOR, index_pb2.DESCRIPTOR]


def load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "proto" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def messages_of(file: FileDescriptor) -> Iterator[Descriptor]:
    waiting = list(file.message_types_by_name.values())
    while waiting:
        message = waiting.pop()
        waiting.extend(message.nested_types)
        yield message


def all_messages() -> list[Descriptor]:
    return [message for file in FILES for message in messages_of(file)]


def all_enums() -> list[EnumDescriptor]:
    top = [enum for file in FILES for enum in file.enum_types_by_name.values()]
    return top + [enum for message in all_messages() for enum in message.enum_types]


def all_methods() -> list[MethodDescriptor]:
    return [method for file in FILES for service in file.services_by_name.values() for method in service.methods]


def test_every_proto_file_is_checked_here() -> None:
    on_disk = {str(path.relative_to(ROOT / "proto")) for path in (ROOT / "proto").rglob("*.proto")}
    assert on_disk == {file.name for file in FILES}


def test_generating_again_changes_nothing(tmp_path: Path) -> None:
    load_generator().generate(tmp_path)
    generated = {path.name: path.read_bytes() for path in (tmp_path / "geosurge" / "v1").iterdir()}
    committed = {path.name: path.read_bytes() for path in (ROOT / "engine" / "geosurge" / "v1").glob("*_pb2*.py*")}
    assert generated == committed


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_file_lies_where_its_versioned_package_says(file: FileDescriptor) -> None:
    assert file.package.replace(".", "/") == str(Path(file.name).parent)
    assert re.fullmatch(r"[a-z0-9_]+(\.[a-z0-9_]+)*\.v\d+", file.package)
    assert re.fullmatch(r"[a-z0-9_]+\.proto", Path(file.name).name)


@pytest.mark.parametrize("enum", all_enums(), ids=lambda enum: enum.name)
def test_enum_values_carry_the_enums_name_and_zero_is_unspecified(enum: EnumDescriptor) -> None:
    prefix = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", enum.name).upper()
    assert enum.values_by_number[0].name == f"{prefix}_UNSPECIFIED"
    assert all(re.fullmatch(rf"{prefix}_[A-Z0-9_]+", value.name) for value in enum.values)


@pytest.mark.parametrize("message", all_messages(), ids=lambda message: message.name)
def test_messages_are_pascal_case_and_fields_lower_snake_case(message: Descriptor) -> None:
    assert re.fullmatch(r"([A-Z][a-z0-9]*)+", message.name)
    names = [field.name for field in message.fields] + [oneof.name.lstrip("_") for oneof in message.oneofs]
    assert all(re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) for name in names)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_service_names_end_in_service(file: FileDescriptor) -> None:
    assert file.services_by_name
    assert all(re.fullmatch(r"([A-Z][a-z0-9]*)+Service", name) for name in file.services_by_name)


def test_every_method_has_request_and_response_types_of_its_own_name() -> None:
    for method in all_methods():
        assert method.input_type.name == f"{method.name}Request"
        assert method.output_type.name == f"{method.name}Response"
    types = [kind.full_name for method in all_methods() for kind in (method.input_type, method.output_type)]
    assert len(types) == len(set(types))


@pytest.mark.parametrize("message", all_messages(), ids=lambda message: message.name)
def test_quantities_have_their_unit_in_the_name(message: Descriptor) -> None:
    measured = re.compile(
        r"(latitude|longitude|radius|distance|spread|area)(_|$)|_time$|(?<!page_)size$|bytes$|pixels$"
    )
    units = re.compile(r"_(deg|km|km2|ms|px|bytes|pixels)$|_time$|_batch_size$")
    assert all(units.search(field.name) for field in message.fields if measured.search(field.name))
