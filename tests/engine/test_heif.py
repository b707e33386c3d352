from __future__ import annotations

import io
import struct
import time
import tracemalloc
from collections.abc import Mapping, Sequence
from types import MappingProxyType

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
    properties,
    references,
)

from geosurge.heif import MAX_META_BYTES, HeifError, StillPicture, read_items

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
    with pytest.raises(HeifError, match="no idat"):
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
    assert (items.primary, items.items) == (None, {})
    with pytest.raises(HeifError, match="no picture"):
        items.still_picture()


@pytest.mark.parametrize("wide", [False, True])
def test_a_picture_of_one_part_takes_what_it_announces(wide: bool) -> None:
    about = [primary(3, version=wide), information({3: b"hvc1"}, 3), properties({3: (40, 30)}, wide=wide)]
    items = items_of(box(b"mdat", CODED), meta(*about, locations({3: [(FIRST, len(CODED))]}, 2 if wide else 0)))
    picture = items.still_picture()
    assert (picture.size, picture.decoded_pixels, picture.is_whole, picture.foreign_kind) == ((40, 30), 1200, True, b"")


def tiled(
    canvas: tuple[int, int] = (120, 90),
    *,
    tiles: Sequence[int] = (2, 3),
    beside: Mapping[int, Sequence[int]] = MappingProxyType({}),
    kind: bytes = b"hvc1",
    sizes: Mapping[int, tuple[int, int]] = MappingProxyType({}),
) -> StillPicture:
    """A grid (1) of tiles (2, 3), with auxiliary items beside it."""
    kinds = {1: b"grid", 2: kind, 3: kind, **dict.fromkeys(beside, b"hvc1")}
    content = grid(2, 1, *canvas)
    places = {number: [(FIRST, len(CODED))] for number in kinds} | {1: [(FIRST + len(CODED), len(content))]}
    about = [
        primary(1),
        information(kinds),
        locations(places, 1),
        references({b"dimg": {1: tiles}, b"auxl": beside}),
        properties({1: (120, 90), 2: (64, 96), 3: (64, 96), **sizes}),
    ]
    return items_of(box(b"mdat", CODED + content), meta(*about)).still_picture()


def test_a_grid_takes_each_tile_as_often_as_it_is_named() -> None:
    picture = tiled()
    assert (picture.size, picture.decoded_pixels, picture.is_whole) == ((120, 90), 2 * 64 * 96, True)
    often = tiled(tiles=[2, 3] * 500)
    assert often.decoded_pixels == 1000 * 64 * 96
    with pytest.raises(HeifError, match="4000 parts"):
        tiled(tiles=[2] * 4001)


def test_a_grid_is_as_large_as_its_canvas_whatever_else_it_announces() -> None:
    assert tiled((30_000, 20_000)).size == (30_000, 20_000)
    assert tiled((100_000, 90)).size == (100_000, 90)
    assert tiled((9, 9)).size == (120, 90)


def test_what_is_auxiliary_to_a_picture_or_its_tiles_counts() -> None:
    sizes = {4: (1000, 1000), 5: (10, 10)}
    picture = tiled(beside={4: [1], 5: [2]}, sizes=sizes)
    assert picture.decoded_pixels == 2 * 64 * 96 + 1_000_000 + 100
    # Its size need not be told, because it need not be decoded.
    assert tiled(beside={4: [1]}).decoded_pixels == 2 * 64 * 96


def test_other_codecs_are_named() -> None:
    assert tiled(kind=b"av01").foreign_kind == b"av01"
    overlay = meta(primary(1), information({1: b"iovl"}), properties({1: (9, 9)}))
    assert items_of(overlay).still_picture().foreign_kind == b"iovl"


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
    about = [primary(3), information({3: b"hvc1"}), properties({3: (40, 30)}), locations({3: extents})]
    assert not items_of(box(b"mdat", stored), meta(*about)).still_picture().is_whole


def test_padding_after_a_picture_is_no_damage() -> None:
    about = [primary(3), information({3: b"hvc1"}), properties({3: (40, 30)})]
    place = locations({3: [(FIRST, len(CODED) + 31)]})
    assert items_of(box(b"mdat", CODED + bytes(31)), meta(*about, place)).still_picture().is_whole


@pytest.mark.parametrize(
    "boxes",
    [
        meta(information({1: b"Exif"})[:-2]),
        meta(box(b"iinf", b"\2\0\0")),
        meta(box(b"infe", b"")) + meta(box(b"iinf", bytes(6) + box(b"infe", b"\2"))),
        meta(box(b"iloc", b"\3\0\0\0\x44\x00\0\0")),
        meta(box(b"iloc", b"\0\0\0\0\xff\x00\0\0")),
        meta(box(b"iloc", b"\0\0\0\0\x44\x00\0\5\0\1")),
        meta(box(b"iref", bytes(4) + box(b"dimg", struct.pack(">HH", 1, 500)))),
        meta(box(b"iprp", box(b"ipco", b"") + box(b"ipma", bytes(4) + struct.pack(">I", 7)))),
        meta(box(b"pitm", b"")),
        b"\0\0\0\x05meta",
        b"\xff\xff\xff\xffmeta",
        b"\0\0\0\x01meta\xff\xff\xff\xff\xff\xff\xff\xff",
        box(b"free", b"") * 2000,
    ],
)
def test_what_cannot_be_followed_is_damage(boxes: bytes) -> None:
    with pytest.raises(HeifError):
        items_of(boxes).still_picture()


def test_a_huge_box_is_not_read() -> None:
    huge = io.BytesIO(FILE_TYPE + struct.pack(">I4s", 2 * MAX_META_BYTES, b"meta") + bytes(2 * MAX_META_BYTES))
    tracemalloc.start()
    try:
        with pytest.raises(HeifError, match="16 MiB"):
            read_items(huge)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def many_places(count: int, *, each: int) -> bytes:
    """A list of places of no width, as many as fit into few bytes."""
    entry = struct.pack(">HHH", 1, 0, each)
    return box(b"iloc", b"\0\0\0\0\0\0" + struct.pack(">H", count) + entry * count)


@pytest.mark.parametrize(
    "boxes",
    [
        [many_places(60_000, each=1000)],
        [many_places(60_000, each=1)],
        [information({1: b"mimeapplication/rdf+xml\0"}), many_places(65_535, each=0)],
        [references({b"dimg": {1: [2] * 60_000}}), information({1: b"grid", 2: b"hvc1"}), primary(1)],
        [box(b"iinf", bytes(6) + box(b"infe", struct.pack(">B3xHH4s", 2, 1, 0, b"Exif")) * 60_000)],
        [box(b"iprp", box(b"ipco", box(b"ispe", bytes(12)) * 60_000) + box(b"ipma", bytes(4) + b"\xff" * 400_000))],
    ],
)
def test_little_time_goes_into_hostile_lists(boxes: list[bytes]) -> None:
    begun = time.process_time()
    with pytest.raises(HeifError):
        items_of(meta(*boxes)).still_picture()
    # Minutes, if each claim were followed.
    assert time.process_time() - begun < 5
