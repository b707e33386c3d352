from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from geosurge.archive.sources.lists import check_list, read_list
from geosurge.errors import InputNotReadableError

HARD_NAMES = [b"plain.jpg", b" spaces .jpg", b'"quoted", with comma.jpg', b"two\nlines.jpg", b"caf\xe9.jpg", b"#.jpg"]


def entries(path: Path, content: bytes | None = None) -> list[bytes]:
    if content is not None:
        path.write_bytes(content)
    return list(read_list(os.fsencode(path)))


def entries_and_error(path: Path, content: bytes) -> tuple[list[bytes], str]:
    """What is read before a list turns out to be damaged, and the error."""
    path.write_bytes(content)
    read: list[bytes] = []
    with pytest.raises(InputNotReadableError) as caught:
        read.extend(read_list(os.fsencode(path)))
    assert path.name in str(caught.value)
    return read, str(caught.value)


def write_csv(path: Path, names: Sequence[bytes]) -> None:
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "path", "note"])
        writer.writerows([number, os.fsdecode(name), "a, b"] for number, name in enumerate(names))


def test_text_is_a_path_a_line(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    assert entries(path, b"a.jpg\n\n b c.jpg \ncaf\xe9.jpg\n# no comment.jpg") == [
        *(b"a.jpg", b" b c.jpg ", b"caf\xe9.jpg", b"# no comment.jpg")
    ]
    assert entries(path, b"\xef\xbb\xbfa.jpg\r\nb.jpg\r\n\r\n") == [b"a.jpg", b"b.jpg"]
    assert entries(path, b"") == []


def test_text_with_nul_bytes_holds_names_with_line_breaks(tmp_path: Path) -> None:
    assert entries(tmp_path / "list.txt", b"\0".join([*HARD_NAMES, b""])) == HARD_NAMES
    assert entries(tmp_path / "list.txt", b"a\r\0b\0") == [b"a\r", b"b"]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 5000), min_size=20, max_size=60), separator=st.sampled_from([b"\n", b"\r\n", b"\0"])
)
def test_a_long_list_is_read_across_its_chunks(tmp_path: Path, lengths: list[int], separator: bytes) -> None:
    names = [bytes([97 + number % 26]) * length for number, length in enumerate(lengths)]
    assert entries(tmp_path / "list.TXT", separator.join(names)) == names
    assert entries(tmp_path / "list.TXT", separator.join([*names, b""])) == names


def test_csv_has_a_column_of_paths(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    write_csv(path, HARD_NAMES)
    assert entries(path) == HARD_NAMES
    assert entries(path, b"\xef\xbb\xbf" + path.read_bytes()) == HARD_NAMES
    assert entries(path, b"path\r\na.jpg\r\n\r\nb.jpg") == [b"a.jpg", b"b.jpg"]
    assert entries(path, b"path\n") == []


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_has_a_column_of_paths(tmp_path: Path, kind: pa.DataType) -> None:
    names = [name for name in HARD_NAMES if kind == pa.binary() or b"\xe9" not in name]
    values = names if kind == pa.binary() else [name.decode() for name in names]
    columns = {"id": pa.array(range(len(names))), "path": pa.array(values, kind)}
    parquet.write_table(pa.table(columns), tmp_path / "list.parquet")
    assert entries(tmp_path / "list.parquet") == names


def test_parquet_of_many_rows_and_groups(tmp_path: Path) -> None:
    names = [f"{number}.jpg" for number in range(10_000)]
    parquet.write_table(pa.table({"path": names}), tmp_path / "list.parquet", row_group_size=3000)
    assert entries(tmp_path / "list.parquet") == [name.encode() for name in names]


@pytest.mark.parametrize(
    ("name", "content", "before", "why"),
    [
        ("a.txt", "a\nb\n".encode("utf-16"), [], "save it as UTF-8"),
        ("a.txt", b"a\n" + 200_000 * b"x", [b"a"], "longer than any path"),
        ("a.csv", b"file,note\nx,y\n", [], "no column named path, but file, note"),
        ("a.csv", b"path;note\nx;y\n", [], "no column named path, but path;note; give"),
        ("a.csv", b"", [], "none at all"),
        ("a.csv", b"id,path\n1,a\n2\n3,b\n", [b"a"], "line 3, has no path"),
        ("a.csv", b'path\na\n"b\nc\n', [b"a"], "after line 2: unexpected end of data"),
        ("a.csv", b"path\na\n" + 70_000 * b"x" + b"\n", [b"a"], "is it a CSV file"),
        ("a.csv", b'path\na\n"' + 9_000 * b"many short lines\n", [b"a"], "field larger than field limit"),
        ("a.parquet", b"", [], "no Parquet file"),
        ("a.parquet", b"PAR1" + bytes(100) + b"PAR1", [], "a.parquet"),
    ],
)
def test_a_list_that_is_none_or_damaged(
    tmp_path: Path, name: str, content: bytes, before: list[bytes], why: str
) -> None:
    read, message = entries_and_error(tmp_path / name, content)
    assert read == before
    assert why in message


def test_parquet_that_is_cut_off_or_has_no_paths(tmp_path: Path) -> None:
    path = tmp_path / "list.parquet"
    parquet.write_table(pa.table({"path": ["a.jpg", "b.jpg"]}), path)
    whole = path.read_bytes()
    assert entries_and_error(path, whole[:-10])[0] == []
    for column, why in (
        (pa.array([1, 2]), "holds 1 in the column path"),
        (pa.array(["a", None]), "holds None"),
        (pa.array(["a", ""]), "holds ''"),
        (pa.array([{"x": "a"}]), "holds {'x': 'a'}"),
    ):
        parquet.write_table(pa.table({"path": column}), path)
        assert why in entries_and_error(path, path.read_bytes())[1]


def test_a_list_that_cannot_be_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    for name in ("missing.txt", "pipe.txt", "missing.csv", "missing.parquet"):
        with pytest.raises(InputNotReadableError, match="cannot read"):
            check_list(os.fsencode(tmp_path / name))


def test_a_check_reads_no_further_than_the_first_entry(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_bytes(b"path\na\n\n" + 70_000 * b"x" + b"\n")
    check_list(os.fsencode(path))
    path.write_bytes(b"name\na\n")
    with pytest.raises(InputNotReadableError, match="no column named path"):
        check_list(os.fsencode(path))
