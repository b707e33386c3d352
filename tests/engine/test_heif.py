from __future__ import annotations

import io
import struct
import time
import tracemalloc
from collections.abc import Sequence

import pytest
from support.heif import (
    FILE_TYPE,
    box,
    grid,
    information,
    items_of,
    locations,
    meta,
    primary,
    references,
)

from geosurge.heif import MAX_META_BYTES, HeifError, Items, read_items

CODED = b"\0\0\0\x05\x28\x01\xaf\x13\x80" * 9
FIRST = len(FILE_TYPE) + 8
"""Where the content of a box starts that follows the file's type."""


def test_items_are_told_with_their_parts_wherever_they_lie() -> None:
    stored = box(b"mdat", b"heads of tails") + box(b"free", bytes(5), wide=True)
    for version in (0, 1, 2):
        for base in (0, 7):
            places = {7: [(FIRST - base, 5), (FIRST + 9 - base, 5)], 8: [(FIRST - base, 14)]}
            about = meta(information({7: b"Exif", 8: b"mimea/b\0"}), locations(places, version, base=base))
            items = items_of(stored, about)
            assert {number: (item.kind, item.content_type) for number, item in items.items.items()} == {
                7: (b"Exif", b""),
                8: (b"mime", b"a/b"),
            }
            assert items.content(7, 100) == b"headstails"
            assert items.content(8, 100) == b"heads of tails"


@pytest.mark.parametrize("version", [2, 3])
def test_items_may_lie_in_the_box_itself(version: int) -> None:
    about = [information({1: b"Exif"}, version), locations({1: [(6, 3)]}, 1, method=1), box(b"idat", b"headertailer")]
    assert items_of(meta(*about)).content(1, 3) == b"tai"
    with pytest.raises(HeifError, match="more than 2 bytes"):
        items_of(meta(*about)).content(1, 2)
    with pytest.raises(HeifError, match="ends before item 1"):
        items_of(meta(*about[:2])).content(1, 3)


def test_a_length_of_zero_means_up_to_the_end() -> None:
    items = items_of(meta(information({1: b"Exif"}), locations({1: [(2, 0)]}, 1, method=1), box(b"idat", b"abcdef")))
    assert items.content(1, 100) == b"cdef"


def test_items_that_are_made_of_others_have_no_content() -> None:
    items = items_of(meta(information({1: b"Exif"}), locations({1: [(0, 4)]}, 1, method=2)))
    with pytest.raises(HeifError, match="made of others"):
        items.content(1, 100)


def test_packed_text_has_no_content_type() -> None:
    items = items_of(meta(information({1: b"mimeapplication/rdf+xml\0deflate\0"})))
    assert items.items[1].content_type == b""


def test_a_video_has_no_picture() -> None:
    items = items_of(box(b"moov", bytes(100)), box(b"mdat", bytes(100)))
    assert items.items == {}
    for ask in (items.canvas, items.is_whole):
        with pytest.raises(HeifError, match="no picture"):
            ask()


@pytest.mark.parametrize("version", [0, 1])
def test_a_picture_of_one_part_is_there_if_its_bytes_are(version: int) -> None:
    about = [
        primary(3, version),
        information({3: b"hvc1"}, 2 + version),
        locations({3: [(FIRST, len(CODED))]}, version),
    ]
    items = items_of(box(b"mdat", CODED), meta(*about))
    assert items.is_whole()
    assert items.canvas() is None


def tiled(
    canvas: tuple[int, int] = (120, 90),
    *,
    tiles: Sequence[int] = (2, 3),
    second: tuple[int, int] = (FIRST, len(CODED)),
    after: bytes = b"",
    version: int = 0,
) -> Items:
    """A grid (1) of tiles (2, 3) with a thumbnail (4), of which nothing is there."""
    kinds = {1: b"grid", 2: b"hvc1", 3: b"hvc1", 4: b"hvc1"}
    content = grid(len(tiles), 1, *canvas) + after
    stored = CODED + content
    places = {2: [(FIRST, len(CODED))], 3: [second], 4: [(10_000, 5)], 1: [(FIRST + len(CODED), len(content))]}
    links = references({b"thmb": {4: [1]}, b"dimg": {1: tiles}}, version)
    return items_of(box(b"mdat", stored), meta(primary(1), information(kinds), locations(places, 1), links))


@pytest.mark.parametrize("version", [0, 1])
def test_a_grid_tells_its_canvas_and_is_there_if_all_its_tiles_are(version: int) -> None:
    assert tiled(version=version).canvas() == (120, 90)
    assert tiled((100_000, 90)).canvas() == (100_000, 90)
    assert tiled(after=b"padding").canvas() == (120, 90)
    assert tiled(version=version).is_whole()
    assert not tiled(second=(FIRST, 10_000)).is_whole()


def test_a_grid_of_other_tiles_than_it_says_is_damaged() -> None:
    content = grid(3, 2, 120, 90)
    places = {1: [(FIRST, len(content))]}
    for targets in ([2] * 5, [2] * 7, []):
        about = [
            primary(1),
            information({1: b"grid", 2: b"hvc1"}),
            locations(places),
            references({b"dimg": {1: targets}}),
        ]
        with pytest.raises(HeifError, match="other tiles"):
            items_of(box(b"mdat", content), meta(*about)).canvas()


@pytest.mark.parametrize(
    ("stored", "extents"),
    [
        (CODED, [(FIRST, 10_000)]),
        (CODED, [(FIRST, 4), (10_000, 5)]),
        (CODED, [(2**64 - 1, 5)]),
        (CODED, []),
        (bytes(len(CODED)), [(FIRST, len(CODED))]),
        (CODED + bytes(200), [(FIRST, len(CODED) + 200)]),
    ],
)
def test_what_is_not_there_or_was_never_written_is_told(stored: bytes, extents: list[tuple[int, int]]) -> None:
    about = [primary(3), information({3: b"hvc1"}), locations({3: extents})]
    assert not items_of(box(b"mdat", stored), meta(*about)).is_whole()


def test_padding_after_a_picture_is_no_damage() -> None:
    place = locations({3: [(FIRST, len(CODED) + 31), (0, 0)]})
    about = meta(primary(3), information({3: b"hvc1"}), place)
    assert items_of(box(b"mdat", CODED + bytes(31)), about).is_whole()


def ask_all(boxes: bytes) -> None:
    items = items_of(boxes)
    items.canvas()
    items.is_whole()


@pytest.mark.parametrize(
    "boxes",
    [
        meta(information({1: b"Exif"})[:-2]),
        meta(box(b"iinf", b"\2\0\0")),
        meta(box(b"iinf", bytes(6) + box(b"infe", b"\2"))),
        meta(box(b"iinf", bytes(6) + box(b"infe", b""))),
        meta(box(b"iloc", b"\3\0\0\0\x44\x00\0\0")),
        meta(box(b"iloc", b"\0\0\0\0\xff\x00\0\0")),
        meta(box(b"iloc", b"\0\0\0\0\x44\x00\0\5\0\1")),
        meta(box(b"iloc", b"")),
        meta(box(b"pitm", b"")),
        meta(primary(7)),
        meta(primary(1), primary(2)),
        meta(information({1: b"hvc1"}), information({1: b"grid"})),
        meta(box(b"iinf", bytes(6) + 2 * box(b"infe", struct.pack(">B3xHH4s", 2, 1, 0, b"hvc1"))), primary(1)),
        meta(primary(1), information({1: b"grid"}), box(b"iref", bytes(4) + box(b"dimg", struct.pack(">HH", 1, 500)))),
        meta(primary(1), information({1: b"grid"}), box(b"iref", b"")),
        b"\0\0\0\x05meta",
        b"\xff\xff\xff\xffmeta",
        b"\0\0\0\x01meta\xff\xff\xff\xff\xff\xff\xff\xff",
        box(b"free", b"") * 2000,
    ],
)
def test_what_cannot_be_followed_is_damage(boxes: bytes) -> None:
    with pytest.raises(HeifError):
        ask_all(boxes)


def test_a_huge_box_is_not_read() -> None:
    huge = io.BytesIO(FILE_TYPE + struct.pack(">I4s", 2 * MAX_META_BYTES, b"meta") + bytes(2 * MAX_META_BYTES))
    tracemalloc.start()
    try:
        with pytest.raises(HeifError, match="4 MiB"):
            read_items(huge)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def many_places(count: int, *, each: int) -> bytes:
    """A list of places of no width, as many as fit into few bytes."""
    entry = struct.pack(">HHH", 1, 0, each)
    return box(b"iloc", b"\0\0\0\0\0\0" + struct.pack(">H", count) + entry * count)


def entries(count: int) -> bytes:
    return b"".join(box(b"infe", struct.pack(">B3xIH4s", 3, number, 0, b"hvc1")) for number in range(count))


@pytest.mark.parametrize(
    "boxes",
    [
        [many_places(60_000, each=1000)],
        [many_places(60_000, each=1)],
        [information({1: b"mimeapplication/rdf+xml\0"}), many_places(65_535, each=0)],
        [references({b"dimg": {1: [2] * 60_000}}), information({1: b"grid", 2: b"hvc1"}), primary(1)],
        [references({b"dimg": {number: [2] * 9 for number in range(60_000)}}), information({0: b"grid"}), primary(0)],
        [box(b"iinf", bytes([1, 0, 0, 0]) + bytes(4) + entries(150_000))],
        [box(b"iinf", bytes(6) + box(b"infe", b"\2" + bytes(3)) * 200_000)],
    ],
)
def test_little_work_goes_into_hostile_lists(boxes: list[bytes]) -> None:
    begun = time.process_time()
    with pytest.raises(HeifError):
        ask_all(meta(*boxes))
    # Minutes, if each claim were followed.
    assert time.process_time() - begun < 5
