from __future__ import annotations

import io
import os
import struct
import subprocess
import tarfile
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from geosurge.archive.sources.shards import Member, MemberKind, open_member, read_latest_members, read_members
from geosurge.errors import ShardInvalidError

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def pack(path: Path, members: Sequence[tuple[bytes, bytes]], file_format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=file_format, encoding="utf-8", errors="surrogateescape") as archive:
        for name, content in members:
            header = tarfile.TarInfo(name.decode("utf-8", "surrogateescape"))
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return path


def members_of(path: Path) -> list[Member]:
    with path.open("rb") as shard:
        return list(read_members(shard, path.name))


def members_and_error(path: Path) -> tuple[list[Member], str]:
    """The members before a damage, and what is said of it; empty if there is none."""
    members: list[Member] = []
    with path.open("rb") as shard:
        try:
            members.extend(read_members(shard, path.name))
        except ShardInvalidError as error:
            return members, str(error)
    return members, ""


def content_of(path: Path, member: Member) -> bytes:
    with open_member(path.open("rb"), member.offset, member.size) as file:
        return file.read()


NAMES = st.binary(min_size=1, max_size=300).filter(lambda name: not set(b"\0/") & set(name))


@pytest.mark.parametrize("file_format", ["gnu", "pax"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(members=st.lists(st.tuples(NAMES, st.binary(max_size=1500)), max_size=5))
def test_members_are_read_back(tmp_path: Path, file_format: str, members: list[tuple[bytes, bytes]]) -> None:
    path = pack(tmp_path / "shard.tar", members, FORMATS[file_format])
    read = members_of(path)
    assert [(member.name, content_of(path, member)) for member in read] == members
    assert all(member.kind is MemberKind.FILE for member in read)


def test_names_in_a_ustar_header_are_split_between_two_fields(tmp_path: Path) -> None:
    name = b"/".join([b"a" * 60, b"b" * 60, b"c.jpg"])
    assert [member.name for member in members_of(pack(tmp_path / "x.tar", [(name, b"x")], tarfile.USTAR_FORMAT))] == [
        name
    ]


def test_a_shard_that_tar_made(tmp_path: Path) -> None:
    """Every kind of member, with names longer than a header's field, packed by GNU tar in its own format."""
    source = tmp_path / "source"
    source.mkdir()
    long_name = "n" * 200 + ".jpg"
    (source / long_name).write_bytes(b"long")
    (source / "a.jpg").write_bytes(b"a" * 1000)
    (source / "folder").mkdir()
    os.link(source / "a.jpg", source / "hard.jpg")
    (source / "soft.jpg").symlink_to("a.jpg")
    os.mkfifo(source / "pipe.jpg")
    with (source / "sparse.jpg").open("wb") as file:
        file.truncate(1 << 20)
        file.write(b"x" * 4096)
    for file_format in ("gnu", "posix"):
        path = tmp_path / f"{file_format}.tar"
        subprocess.run(
            ["tar", "--create", f"--format={file_format}", "--sparse", "--sort=name", f"--file={path}", "."],
            cwd=source,
            check=True,
        )
        members = {member.name: member for member in members_of(path)}
        assert {name.removeprefix(b"./"): member.kind for name, member in members.items()} == {
            b".": MemberKind.FOLDER,
            b"folder": MemberKind.FOLDER,
            b"a.jpg": MemberKind.FILE,
            b"hard.jpg": MemberKind.HARD_LINK,
            b"soft.jpg": MemberKind.SYMBOLIC_LINK,
            b"pipe.jpg": MemberKind.SPECIAL,
            b"sparse.jpg": MemberKind.SPARSE_FILE,
            long_name.encode(): MemberKind.FILE,
        }
        assert content_of(path, members[b"./" + long_name.encode()]) == b"long"
        assert content_of(path, members[b"./a.jpg"]) == b"a" * 1000


def test_a_shard_that_was_appended_to(tmp_path: Path) -> None:
    path = pack(tmp_path / "x.tar", [(b"a.jpg", b"old"), (b"b.jpg", b"b")])
    (tmp_path / "a.jpg").write_bytes(b"newer")
    subprocess.run(["tar", "--append", f"--file={path}", "a.jpg"], cwd=tmp_path, check=True)
    assert [(member.name, content_of(path, member)) for member in members_of(path)] == [
        *((b"a.jpg", b"old"), (b"b.jpg", b"b"), (b"a.jpg", b"newer"))
    ]
    with path.open("rb") as shard:
        latest = [(member.name, content_of(path, member)) for member in read_latest_members(shard, "x.tar")]
    assert latest == [(b"b.jpg", b"b"), (b"a.jpg", b"newer")]


def test_the_last_of_a_name_counts_up_to_where_a_shard_is_damaged(tmp_path: Path) -> None:
    members = [(b"%d.jpg" % (number % 40), b"%d" % number) for number in range(60)]
    path = pack(tmp_path / "x.tar", members)
    path.write_bytes(path.read_bytes()[: 1024 * 50 + 300])
    seen: list[Member] = []
    with path.open("rb") as shard, pytest.raises(ShardInvalidError, match="damaged"):
        seen.extend(read_latest_members(shard, "x.tar"))
    assert len(seen) == 40
    assert {member.name: content_of(path, member) for member in seen} == dict(members[:50])


def test_a_member_is_a_file_of_its_own(tmp_path: Path) -> None:
    path = pack(tmp_path / "x.tar", [(b"a", bytes(range(100))), (b"b", b"")])
    first, second = members_of(path)
    with open_member(path.open("rb"), first.offset, first.size) as file:
        assert (file.read(10), file.tell(), file.seek(-5, os.SEEK_END), file.read()) == (
            *(bytes(range(10)), 10, 95, bytes(range(95, 100))),
        )
        assert (file.seek(200), file.read(), file.seek(50), file.seek(1, os.SEEK_CUR), file.read(1)) == (
            *(200, b"", 50, 51, b"\x33"),
        )
        with pytest.raises(ValueError, match="negative seek"):
            file.seek(-1)
    assert content_of(path, second) == b""
    # Of a shard that has shrunk there is less to read, and nothing of the next member.
    os.truncate(path, first.offset + 40)
    assert content_of(path, first) == bytes(range(40))


def test_a_shard_that_is_cut_off_gives_what_comes_before(tmp_path: Path) -> None:
    sizes = [0, 100, 512, 1000]
    whole = pack(
        tmp_path / "whole.tar", [(b"%d.jpg" % size, bytes([size % 256]) * size) for size in sizes]
    ).read_bytes()
    members = members_of(tmp_path / "whole.tar")
    end = members[-1].offset + 1024
    cut = tmp_path / "cut.tar"
    for length in [*range(0, end + 1, 128), *(member.offset for member in members), end - 1]:
        cut.write_bytes(whole[:length])
        read, message = members_and_error(cut)
        assert read == [member for member in members if member.offset + member.size <= length][: len(read)]
        # A member whose padding is missing may still count as damaged, one whose content is missing must.
        assert len(read) >= sum(member.offset + -(-member.size // 512) * 512 <= length for member in members)
        assert "cut.tar is damaged: " in message
    cut.write_bytes(whole[: end + 512])
    assert members_and_error(cut) == (members, "")


def test_a_damaged_header_ends_a_shard(tmp_path: Path) -> None:
    path = pack(tmp_path / "x.tar", [(b"a.jpg", b"a"), (b"b.jpg", b"b"), (b"c.jpg", b"c")])
    whole, members = path.read_bytes(), members_of(path)
    for number, member in enumerate(members):
        for place in (0, 50, 124, 130, 156, 300):
            data = bytearray(whole)
            data[member.offset - 512 + place] ^= 0x11
            path.write_bytes(data)
            read, message = members_and_error(path)
            assert read == members[:number]
            assert "x.tar is damaged: " in message


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("empty.tar", b"", "damaged: empty file"),
        ("text.tar", b"This is no tar at all.\n" * 100, "damaged: "),
        ("gzip.tar", b"\x1f\x8b\x08" + bytes(600), "compressed with gzip; unpack it"),
        ("bzip2.tar", b"BZh91AY&SY" + bytes(600), "compressed with bzip2; unpack it"),
        ("xz.tar", b"\xfd7zXZ\x00" + bytes(600), "compressed with xz; unpack it"),
        ("zstd.tar", b"\x28\xb5\x2f\xfd" + bytes(600), "compressed with Zstandard; unpack it"),
    ],
)
def test_what_is_no_shard(tmp_path: Path, name: str, content: bytes, why: str) -> None:
    (tmp_path / name).write_bytes(content)
    members, message = members_and_error(tmp_path / name)
    assert members == []
    assert message.startswith(name)
    assert why in message


def test_what_follows_the_end_is_not_passed_over(tmp_path: Path) -> None:
    one = pack(tmp_path / "one.tar", [(b"a.jpg", b"a")]).read_bytes()
    two = pack(tmp_path / "two.tar", [(b"b.jpg", b"b")]).read_bytes()
    (tmp_path / "both.tar").write_bytes(one + two)
    members, message = members_and_error(tmp_path / "both.tar")
    assert [member.name for member in members] == [b"a.jpg"]
    assert "goes on after its end" in message


def test_a_shard_stays_open_for_its_reader(tmp_path: Path) -> None:
    with pack(tmp_path / "x.tar", [(b"a.jpg", b"a")]).open("rb") as shard:
        (member,) = read_members(shard, "x.tar")
        shard.seek(member.offset)
        assert shard.read(1) == b"a"


def test_a_shard_of_nothing_but_its_end(tmp_path: Path) -> None:
    assert members_of(pack(tmp_path / "x.tar", [])) == []


def header(name: bytes, size: bytes, kind: bytes) -> bytes:
    """A header with any size field, and the right checksum."""
    block = bytearray(512)
    block[: len(name)], block[100:108], block[124:136], block[156:157] = name, b"0000644\0", size, kind
    block[257:265] = b"ustar\x0000"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    "content",
    [
        # Sizes that would lead a reader back, or far away.
        header(b"a.jpg", b"\xff" * 12, b"0"),
        header(b"a.jpg", b"\x80" + b"\x7f" * 11, b"0"),
        header(b"a.jpg", b"77777777777\0", b"0"),
        header(b"a.jpg", b"\xff" * 12, b"5"),
        header(b"x", b"00000000017\0", b"x")
        + b"15 size=-99999\n".ljust(512, b"\0")
        + header(b"a.jpg", bytes(12), b"0"),
        header(b"x", b"00000000017\0", b"x") + b"0 size=12345\n".ljust(512, b"\0") + header(b"a.jpg", bytes(12), b"0"),
        # A name, and sparse maps, that never end.
        header(b"L", b"00000001000\0", b"L") * 3000,
        header(b"s", b"00000000000\0", b"S")[:482] + b"\x01" * 30,
    ],
)
def test_a_hostile_shard_is_damaged(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.tar"
    first = pack(path, [(b"first.jpg", b"1")]).read_bytes()[:1024]
    path.write_bytes(first + content + bytes(1024))
    members, message = members_and_error(path)
    assert [member.name for member in members][:1] == [b"first.jpg"]
    assert len(members) <= 2
    assert "x.tar is damaged: " in message


def test_a_header_that_claims_gigabytes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(header(b"x", b"%011o\0" % (3 << 30), b"x"))
    os.truncate(path, 4 << 30)
    tracemalloc.start()
    members, message = members_and_error(path)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert members == []
    assert f"a header of {3 << 30} bytes" in message
    assert peak_bytes < 10_000_000


def test_memory_does_not_grow_with_the_shard(tmp_path: Path) -> None:
    peaks = []
    for count in (200, 4000):
        path = pack(tmp_path / f"{count}.tar", [(b"%d.jpg" % number, b"x") for number in range(count)])
        tracemalloc.start()
        with path.open("rb") as shard:
            assert sum(1 for _ in read_members(shard, path.name)) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 100_000


def test_big_members_are_not_read(tmp_path: Path) -> None:
    """A shard of nine gigabytes that are not there: only headers are looked at."""
    path = tmp_path / "x.tar"
    size = 9 << 30
    with path.open("wb") as shard:
        shard.write(header(b"big.tif", b"\x80" + struct.pack(">3xQ", size), b"0"))
        shard.seek(512 + size)
        shard.write(header(b"small.jpg", b"00000000001\0", b"0") + b"x".ljust(512, b"\0") + bytes(1024))
    assert [(member.name, member.size) for member in members_of(path)] == [(b"big.tif", size), (b"small.jpg", 1)]
