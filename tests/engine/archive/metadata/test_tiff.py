from __future__ import annotations

import io
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.metadata import ASCII, BYTE, DOUBLE, LONG, RATIONAL, SHORT, SRATIONAL, exif_block

from geosurge.archive.metadata.tiff import Directory, Entry, Tiff, TiffError, open_tiff


@pytest.mark.parametrize("order", ["<", ">"])
def test_values_of_every_kind_are_read_in_both_byte_orders(order: str) -> None:
    block = exif_block(
        {
            1: (BYTE, [7, 8]),
            2: (ASCII, b"a long text\0"),
            3: (SHORT, [65535]),
            4: (LONG, [2**32 - 1]),
            5: (RATIONAL, [(1, 4), (7, 2)]),
            10: (SRATIONAL, [(-1, 4)]),
            12: (DOUBLE, [0.125]),
        },
        {1: (BYTE, [9])},
        order=order,
    )
    tiff = open_tiff(block)
    first = tiff.read_directory(tiff.first_offset)

    numbers = {entry.tag: tiff.read_numbers(entry, 100) for entry in first.entries if entry.kind != ASCII}

    assert numbers == {1: (7, 8), 3: (65535,), 4: (2**32 - 1,), 5: (0.25, 3.5), 10: (-0.25,), 12: (0.125,)}
    text = first.find(2)
    assert text is not None
    assert tiff.read_value(text, 100) == b"a long text\0"
    assert tiff.read_directory(first.next_offset).entries[0].tag == 1


@given(
    big=st.booleans(),
    order=st.sampled_from("<>"),
    tags=st.lists(st.tuples(st.integers(0, 65535), st.integers(0, 65535), st.integers(0, 2**32 - 1)), max_size=5),
    next_offset=st.integers(0, 2**32 - 1),
)
def test_a_packed_directory_reads_as_it_was(
    big: bool, order: str, tags: list[tuple[int, int, int]], next_offset: int
) -> None:
    tiff = Tiff(io.BytesIO(), order, big, 0)
    entries = tuple(Entry(*tag, bytes(range(tiff.field_size))) for tag in tags)
    packed = tiff.pack_directory(entries, next_offset)

    read = Tiff(io.BytesIO(bytes(16) + packed), order, big, 16).read_directory(16)

    assert read.entries == entries
    assert read.next_offset == next_offset


def test_a_block_cut_anywhere_raises_only_its_own_error() -> None:
    block = exif_block({1: (ASCII, b"a long text\0"), 5: (RATIONAL, [(1, 4)])})
    for length in range(len(block)):
        with pytest.raises(TiffError):
            first_directory(block[:length])


def first_directory(block: bytes) -> Directory:
    tiff = open_tiff(block)
    return tiff.read_directory(tiff.first_offset)


@pytest.mark.parametrize("offset", [0, 4, 5000, 2**32 - 1])
def test_a_directory_must_be_in_the_file_and_after_its_header(offset: int) -> None:
    tiff = open_tiff(exif_block({1: (BYTE, [1])}))
    with pytest.raises(TiffError):
        tiff.read_directory(offset)


def test_an_offset_that_no_stream_takes_is_outside_the_file() -> None:
    tiff = open_tiff(b"II+\0\x08\0\0\0" + struct.pack("<Q", 2**64 - 1))
    with pytest.raises(TiffError, match="outside the file"):
        tiff.read_directory(tiff.first_offset)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (Entry(1, 99, 1, b"abcd"), "type 99"),
        (Entry(1, LONG, 2**32 - 1, b"\0\0\0\0"), "4294967295 values"),
        (Entry(1, LONG, 0, b"\0\0\0\0"), "0 values"),
        (Entry(1, LONG, 2, b"\xff\xff\xff\xff"), "outside the file"),
        (Entry(1, ASCII, 2, b"N\0\0\0"), "no numbers"),
    ],
)
def test_values_that_cannot_be_read_are_refused(entry: Entry, message: str) -> None:
    with pytest.raises(TiffError, match=message):
        open_tiff(exif_block()).read_numbers(entry, 4096)


@pytest.mark.parametrize(
    "header", [b"", b"II*\0", b"XX*\0\x08\0\0\0", b"II\x55\0\x08\0\0\0", b"II+\0\x04\0\0\0" + bytes(8)]
)
def test_what_has_no_header_is_no_tiff(header: bytes) -> None:
    with pytest.raises(TiffError):
        open_tiff(header)
