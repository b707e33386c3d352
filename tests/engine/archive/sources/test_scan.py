from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest
from support.bad_archive import CONTENTS, bound_by_permissions, can_bind_permissions, make_bad_archive
from support.metadata import first_position

from geosurge.archive.metadata.positions import sidecar_paths
from geosurge.archive.rows import Status
from geosurge.archive.sources import Found, ScanCounts, is_picture, scan
from geosurge.errors import GeoSurgeError, InputNotReadableError, ShardInvalidError, UsageError
from geosurge.images import OWN_LIMITS, decode_image


def make(root: Path, *names: str) -> Path:
    """A folder of files that hold their own names."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return root


def pack(path: Path, *names: str) -> Path:
    with tarfile.open(path, "w") as archive:
        for name in names:
            header = tarfile.TarInfo(name)
            header.size = len(name)
            archive.addfile(header, io.BytesIO(name.encode()))
    return path


def names_below(root: Path, found: Iterable[Found]) -> list[str]:
    return [item.name.removeprefix(f"{root}/") for item in found]


def readable(root: Path, sources: Sequence[Path | str], *globs: str, counts: ScanCounts | None = None) -> list[str]:
    """Names of what is found, all of which can be read and holds what it should."""
    found = list(scan(sources, globs, counts))
    assert [item.error for item in found] == [None] * len(found)
    return names_below(root, found)


def test_folders_are_searched_in_the_order_of_names(tmp_path: Path) -> None:
    make(tmp_path, "b/2.jpg", "b/10.JPEG", "a.png", "c/d/e/f.TIF", "B.webp", "b.gif", "c.bmp/x.jpg")
    counts = ScanCounts()
    assert readable(tmp_path, [tmp_path], counts=counts) == [
        *("B.webp", "a.png", "b/10.JPEG", "b/2.jpg", "b.gif", "c/d/e/f.TIF", "c.bmp/x.jpg")
    ]
    assert counts == ScanCounts()


def test_what_is_no_picture_by_its_name_is_counted(tmp_path: Path) -> None:
    make(tmp_path, "a.jpg", "a.jpg.xmp", "a.xmp", "a.mov", "jpg", "notes", ".hidden.jpg", ".trash/b.jpg", "shard.tar")
    counts = ScanCounts()
    assert readable(tmp_path, [tmp_path], counts=counts) == ["a.jpg"]
    kinds = Counter({".xmp": 2, ".mov": 1, "without an extension": 2, ".tar": 1})
    assert counts == ScanCounts(other_files=6, kinds=kinds, ignored=2)


def test_formats_that_cannot_be_read_are_found_nevertheless() -> None:
    assert all(is_picture(name) for name in (b"a.HEIC", b"a.avif", b"x/a.CR3", b"a.nef", b"a.dng", b"a.jxl", b"a.jp2"))
    assert not any(is_picture(name) for name in (b"a.xmp", b"a.mp4", b".jpg", b"jpg", b"a.jpg/b", b"a.jpg~", b""))


def test_sources_may_overlap_be_repeated_and_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "a/1.jpg", "a/b/2.jpg", "a/b/c/3.jpg", "a/.d/4.jpg")
    monkeypatch.chdir(tmp_path / "a")
    (tmp_path / "link").symlink_to("a/b")
    sources = [tmp_path, "..", "b", tmp_path / "a/b/../b/", Path(), tmp_path / "link", ".d"]
    found = readable(tmp_path, sources)
    assert sorted(found) == ["a/.d/4.jpg", "a/1.jpg", "a/b/2.jpg", "a/b/c/3.jpg"]


def test_links_lead_to_what_is_found_once(tmp_path: Path) -> None:
    archive, outside = tmp_path / "archive", tmp_path / "outside"
    make(archive, "2024/1.jpg", "2024/.raw/2.jpg", "2024/plain")
    make(outside, "all/3.jpg", "4.jpg", "5.jpg", "notes.txt")
    for name, target in {
        "latest": "2024",
        "best.jpg": "2024/1.jpg",
        "more": "../outside/all",
        "again": "more",
        "4.jpg": "../outside/4.jpg",
        "four.jpg": "../outside/4.jpg",
        "notes.txt": "../outside/notes.txt",
        "notes": "../outside/notes.txt",
    }.items():
        (archive / name).symlink_to(target)
    counts = ScanCounts()
    found = readable(tmp_path, [archive], counts=counts)
    assert found == ["archive/2024/1.jpg", "outside/4.jpg", "outside/all/3.jpg", "outside/4.jpg"]
    # "latest" and "best.jpg" lead into the archive, "more" to where "again" has led.
    assert counts == ScanCounts(3, Counter({".txt": 1, "without an extension": 2}), ignored=1, links=3)


def test_a_link_into_an_object_store_is_the_picture(tmp_path: Path) -> None:
    make(tmp_path, "photos/.git/annex/aa.jpg", "cache/d41d8cd9")
    (tmp_path / "photos/a.jpg").symlink_to(".git/annex/aa.jpg")
    (tmp_path / "photos/b.jpg").symlink_to(".git/annex/aa.jpg")
    (tmp_path / "photos/c.jpg").symlink_to("../cache/d41d8cd9")
    (tmp_path / "photos/folder").symlink_to(".git/annex")
    found = list(scan([tmp_path / "photos"]))
    assert names_below(tmp_path / "photos", found) == ["a.jpg", "b.jpg", "c.jpg", ".git/annex/aa.jpg"]
    # Size and time are those of the file, so that a change of it shows.
    assert [item.size for item in found] == [len(".git/annex/aa.jpg") + 7] * 2 + [14] + [24]


def test_links_without_end_end(tmp_path: Path) -> None:
    make(tmp_path, "a/b/1.jpg", "other/2.jpg")
    (tmp_path / "a/b/up").symlink_to("..")
    (tmp_path / "a/b/top").symlink_to(tmp_path / "a")
    (tmp_path / "a/self.jpg").symlink_to("self.jpg")
    (tmp_path / "a/here").symlink_to(".")
    (tmp_path / "a/ping").symlink_to("pong")
    (tmp_path / "a/pong").symlink_to("ping")
    (tmp_path / "a/other").symlink_to("../other")
    (tmp_path / "other/back").symlink_to("../a")
    found = list(scan([tmp_path / "a"]))
    assert names_below(tmp_path, (item for item in found if item.error is None)) == ["a/b/1.jpg", "other/2.jpg"]
    failed = {Path(item.name).name: str(item.error) for item in found if item.error is not None}
    assert set(failed) == {"up", "top", "self.jpg", "here", "ping", "pong"}
    assert all("folder that it lies in" in failed[name] for name in ("up", "top", "here"))
    assert all("links" in failed[name] for name in ("self.jpg", "ping", "pong"))


def test_links_that_multiply_are_followed_once(tmp_path: Path) -> None:
    """Thirty folders, each with two links to the next: a billion ways to the last one."""
    for number in range(30):
        make(tmp_path, f"outside/{number:02d}/{number}.jpg")
        (tmp_path / f"outside/{number:02d}/left").symlink_to(f"../{number + 1:02d}")
        (tmp_path / f"outside/{number:02d}/right").symlink_to(f"../{number + 1:02d}")
    (tmp_path / "archive").mkdir()
    (tmp_path / "archive/first").symlink_to("../outside/00")
    found = [item for item in scan([tmp_path / "archive"]) if item.error is None]
    assert sorted(item.path for item in found) == sorted(
        os.fsencode(tmp_path / f"outside/{number:02d}/{number}.jpg") for number in range(30)
    )


def test_what_an_ignore_file_names_is_ignored_behind_links_too(tmp_path: Path) -> None:
    make(tmp_path, "archive/.geosurgeignore", "outside/1.jpg", "outside/private/2.jpg", "archive/a/3.jpg")
    (tmp_path / "archive/.geosurgeignore").write_text("private/\n/a\n")
    (tmp_path / "archive/more").symlink_to("../outside")
    # What lies in the archive is left alone even where a link leads to it.
    (tmp_path / "archive/to-a").symlink_to("a")
    (tmp_path / "archive/3.jpg").symlink_to("a/3.jpg")
    counts = ScanCounts()
    assert readable(tmp_path, [tmp_path / "archive"], counts=counts) == ["outside/1.jpg"]
    assert counts == ScanCounts(ignored=3, links=2)


def test_what_vanishes_during_the_search_is_a_row(tmp_path: Path) -> None:
    make(tmp_path, "1.jpg", "2.jpg", "3/a.jpg", "4.jpg")
    found = scan([tmp_path])
    first = next(found)
    (tmp_path / "2.jpg").unlink()
    (tmp_path / "3/a.jpg").unlink()
    (tmp_path / "3").rmdir()
    rest = list(found)
    assert names_below(tmp_path, [first, *rest]) == ["1.jpg", "2.jpg", "3", "4.jpg"]
    assert [isinstance(item.error, InputNotReadableError) for item in rest] == [True, True, False]
    assert "No such file" in str(rest[0].error)


def test_a_folder_that_vanishes_after_it_was_seen_is_a_row(tmp_path: Path) -> None:
    make(tmp_path, "1/a.jpg", "1/b/c.jpg", "2.jpg")
    found = scan([tmp_path])
    assert next(found).path.endswith(b"a.jpg")
    (tmp_path / "1/b/c.jpg").unlink()
    (tmp_path / "1/b").rmdir()
    (tmp_path / "1/b").write_text("a file by now")
    assert names_below(tmp_path, found) == ["1/b", "2.jpg"]


def test_deep_folders(tmp_path: Path) -> None:
    """Deeper than Python calls, and then deeper than the system takes paths."""
    place = os.open(tmp_path, os.O_RDONLY)
    for name in [*["d"] * 1100, *["long" * 50] * 12]:
        os.mkdir(name, dir_fd=place)
        os.close(os.open("x.jpg", os.O_CREAT | os.O_WRONLY, dir_fd=place))
        inner = os.open(name, os.O_RDONLY, dir_fd=place)
        os.close(place)
        place = inner
    os.close(place)
    found = list(scan([tmp_path]))
    assert sum(item.error is None for item in found) > 1100
    too_deep = [item for item in found if item.error is not None]
    assert too_deep
    assert all("File name too long" in str(item.error) for item in too_deep)
    subprocess.run(["rm", "-r", tmp_path / "d"], check=True)


def test_what_is_no_file_is_a_row_and_never_waited_for(tmp_path: Path) -> None:
    make(tmp_path, "a.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    (_, pipe) = scan([tmp_path])
    assert "a pipe, a socket or a device" in str(pipe.error)


def test_globs_take_what_they_match(tmp_path: Path) -> None:
    make(tmp_path, "a.jpg", "2024/b.jpg", "2024/c.dat", "2024/c.dat.xmp", "2025/d.JPG", ".e.jpg")
    pack(tmp_path / "2024/s.tar", "in.jpg", "in.txt")
    for globs, expected in {
        ("*.jpg",): ["2024/b.jpg", "a.jpg"],
        ("/*.jpg",): ["a.jpg"],
        ("2024/**",): ["2024/b.jpg", "2024/c.dat", "2024/s.tar/in.jpg"],
        ("*.dat", "*.JPG"): ["2024/c.dat", "2025/d.JPG"],
        ("*.[jJ][pP][gG]", "!2025/**"): ["2024/b.jpg", "a.jpg"],
        ("*.tar",): ["2024/s.tar/in.jpg"],
        ("*.xmp",): [],
    }.items():
        assert readable(tmp_path, [tmp_path], *globs) == expected


def test_shards_hold_pictures_and_their_companions(tmp_path: Path) -> None:
    shard = pack(tmp_path / "s.tar", "0.jpg", "0.json", "a/1.seg.PNG", "./2.webp", "._0.jpg", "a/.b/3.jpg", "../4.jpg")
    counts = ScanCounts()
    found = list(scan([shard], counts=counts))
    assert names_below(tmp_path, found) == ["s.tar/0.jpg", "s.tar/a/1.seg.PNG", "s.tar/./2.webp", "s.tar/../4.jpg"]
    assert counts == ScanCounts(1, Counter({".json": 1}), ignored=2)
    for item in found:
        assert item.is_member
        assert item.path == os.fsencode(shard)
        assert item.mtime_ns == shard.stat().st_mtime_ns
        with pickle.loads(pickle.dumps(item)).open() as file:
            assert file.read() == item.member
    assert readable(tmp_path, [shard], "*.json") == ["s.tar/0.json"]
    assert readable(tmp_path, [shard], "a/*") == ["s.tar/a/1.seg.PNG"]


def test_members_that_are_no_files(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for name, kind in {
            "folder.jpg": tarfile.DIRTYPE,
            "hard.jpg": tarfile.LNKTYPE,
            "soft.jpg": tarfile.SYMTYPE,
            "pipe.jpg": tarfile.FIFOTYPE,
            "soft.txt": tarfile.SYMTYPE,
        }.items():
            header = tarfile.TarInfo(name)
            header.type, header.linkname = kind, "0.jpg"
            archive.addfile(header)
    counts = ScanCounts()
    found = list(scan([tmp_path / "s.tar"], None, counts))
    assert names_below(tmp_path, found) == ["s.tar/soft.jpg", "s.tar/pipe.jpg"]
    assert all(isinstance(item.error, ShardInvalidError) for item in found)
    assert counts == ScanCounts(1, Counter({".txt": 1}), links=1)


def test_a_damaged_shard_is_one_row_after_its_members(tmp_path: Path) -> None:
    shard = pack(tmp_path / "s.tar", "0.jpg", "1.jpg", "2.jpg")
    os.truncate(shard, 2 * 1024 + 512 + 3)
    pack(tmp_path / "t.tar", "3.jpg")
    found = list(scan([shard, tmp_path / "t.tar"]))
    assert names_below(tmp_path, found) == ["s.tar/0.jpg", "s.tar/1.jpg", "s.tar", "t.tar/3.jpg"]
    assert [item.error is None for item in found] == [True, True, False, True]
    assert isinstance(found[2].error, ShardInvalidError)
    assert not found[2].is_member


def test_lists_name_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "photos/a.jpg", "photos/b", "elsewhere/c.jpg", "photos/.hidden.jpg")
    pack(tmp_path / "photos/s.tar", "in.jpg")
    (tmp_path / "linked").symlink_to("elsewhere")
    (tmp_path / "photos/link.jpg").symlink_to("../linked/c.jpg")
    lines = ["a.jpg", "../linked/c.jpg", f"{tmp_path}/photos/../photos/a.jpg", "b", "link.jpg", ".hidden.jpg", "s.tar"]
    (tmp_path / "photos/list.txt").write_text("\n".join(lines))
    # Not the folder of the run, but that of the list is where relative paths start.
    monkeypatch.chdir("/")
    assert readable(tmp_path, [tmp_path / "photos/list.txt"], "*.png") == [
        *("photos/a.jpg", "elsewhere/c.jpg", "photos/a.jpg", "photos/b", "elsewhere/c.jpg", "photos/.hidden.jpg"),
        "photos/s.tar/in.jpg",
    ]


def test_what_a_list_names_in_vain_is_a_row(tmp_path: Path) -> None:
    make(tmp_path, "folder.tar/a.jpg", "a.jpg")
    (tmp_path / "gone.jpg").symlink_to("nowhere")
    rows = [
        "missing.jpg",
        "missing/x.jpg",
        "folder.tar",
        "folder.tar/",
        "a.jpg/x.jpg",
        "gone.jpg",
        "..",
        "a\0b.jpg",
        "n" * 300,
    ]
    (tmp_path / "list.csv").write_text("path\n" + "\n".join(rows) + "\na.jpg\n")
    *failed, good = scan([tmp_path / "list.csv"])
    assert good.error is None
    assert [type(item.error) for item in failed] == [InputNotReadableError] * len(rows)
    for item, why in zip(
        failed,
        (
            "No such file",
            "No such file",
            "is a folder",
            "is a folder",
            "Not a directory",
            "No such file",
            "is a folder",
        ),
        strict=False,
    ):
        assert why in str(item.error)
    # The reason can be stored wherever text can.
    assert all(str(item.error).encode() and item.name.encode() for item in failed)


def test_a_list_that_turns_out_to_be_damaged_is_one_row_after_its_entries(tmp_path: Path) -> None:
    make(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "list.csv").write_text('path\na.jpg\n"b.jpg\n')
    found = list(scan([tmp_path / "list.csv", tmp_path / "b.jpg"]))
    assert names_below(tmp_path, found) == ["a.jpg", "list.csv", "b.jpg"]
    assert "unexpected end of data" in str(found[1].error)


def test_a_list_that_vanishes_is_a_row(tmp_path: Path) -> None:
    make(tmp_path, "a.jpg", "list.txt")
    found = scan([tmp_path / "a.jpg", tmp_path / "list.txt"])
    (tmp_path / "list.txt").unlink()
    assert [item.error is None for item in found] == [True, False]


def test_pictures_may_be_sources(tmp_path: Path) -> None:
    make(tmp_path, "a.jpg", "b.CR2")
    (tmp_path / "link.png").symlink_to("a.jpg")
    assert readable(tmp_path, [tmp_path / "b.CR2", str(tmp_path / "link.png")]) == ["b.CR2", "a.jpg"]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("missing", "there is no source"),
        ("dangling.jpg", "there is no source"),
        ("ring", "there is no source"),
        ("nul\0", "there is no source"),
        ("a.jpg/x", "there is no source"),
        ("s.tar.gz", "compressed shard; unpack it"),
        ("s.TGZ", "compressed shard; unpack it"),
        ("clip.mov", "is no folder, no list"),
        ("table.csv", "has no column named path"),
        ("table.parquet", "no Parquet file"),
        ("utf-16.txt", "save it as UTF-8"),
    ],
)
def test_a_source_that_is_none_stops_before_anything_is_searched(tmp_path: Path, name: str, why: str) -> None:
    make(tmp_path, "a.jpg", "s.tar.gz", "s.TGZ", "clip.mov", "table.csv", "table.parquet")
    (tmp_path / "utf-16.txt").write_text("a.jpg", encoding="utf-16")
    (tmp_path / "dangling.jpg").symlink_to("nowhere")
    (tmp_path / "ring").symlink_to("ring")
    with pytest.raises(UsageError, match=why):
        scan([tmp_path, f"{tmp_path}/{name}"])


def test_a_glob_that_is_none_stops_before_anything_is_searched(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="bracket that is not closed"):
        scan([tmp_path], ("*.jpg", "[a"))


def test_an_empty_folder_holds_nothing(tmp_path: Path) -> None:
    assert list(scan([tmp_path])) == []
    assert list(scan([])) == []


def test_memory_does_not_grow_with_the_number_of_folders(tmp_path: Path) -> None:
    peaks = []
    for count in (5, 50):
        for number in range(count):
            make(tmp_path, *(f"{count}/{number}/{picture}.jpg" for picture in range(50)))
        tracemalloc.start()
        assert sum(1 for _ in scan([tmp_path / str(count)])) == 50 * count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 20_000


def outcome(item: Found) -> tuple[Status, str]:
    """What becomes of something that was found, up to its pixels."""
    try:
        if item.error is not None:
            raise item.error
        with item.open() as file:
            assert first_position(file, sidecar_paths(Path(os.fsdecode(item.path)))) is None
            file.seek(0)
            decode_image(file.read(), OWN_LIMITS)
    except GeoSurgeError as error:
        return Status.FAILED, error.reason
    return Status.DONE, ""


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_every_kind_of_bad_file_has_its_reason(tmp_path: Path) -> None:
    expected = make_bad_archive(tmp_path / "bad")
    assert {item.name: outcome(item) for item in scan([tmp_path / "bad"])} == expected
    assert {reason for _, reason in expected.values()} == {
        *("", "INPUT_NOT_READABLE", "SIDECAR_INVALID", "IMAGE_EMPTY", "IMAGE_NOT_DECODABLE", "IMAGE_TRUNCATED"),
        *("IMAGE_TOO_SMALL", "IMAGE_TOO_LARGE", "IMAGE_TOO_MANY_PIXELS", "IMAGE_FORMAT_UNSUPPORTED"),
    }


def test_bad_files_repeat_with_other_content(tmp_path: Path) -> None:
    expected = make_bad_archive(tmp_path / "bad", 120)
    found = list(scan([tmp_path / "bad"]))
    assert sorted(item.name for item in found) == sorted(expected)
    contents = [item.open().read() for item in found if item.error is None and 0 < item.size < 1_000_000]
    assert len(contents) > 90
    assert len(set(contents)) == len(contents)
    assert len(CONTENTS) > 30


_SCAN = """
import json, sys
from geosurge.archive.sources import scan
outcomes = {}
for item in scan(sys.argv[1:]):
    try:
        if item.error is None:
            item.open().close()
        outcomes[item.name] = str(item.error or "")
    except OSError as error:
        outcomes[item.name] = f"cannot read {item.name}: {error.strerror}"
print(json.dumps(outcomes))
"""


@pytest.fixture
def scan_bound() -> Callable[[Path], dict[str, str]]:
    """Searches in a process that permissions bind; returns what is wrong by name."""
    if not can_bind_permissions() and not os.environ.get("CI"):
        pytest.skip("this is root, whom no permission binds, and setpriv is not installed")

    def run(source: Path) -> dict[str, str]:
        command = bound_by_permissions([sys.executable, "-c", _SCAN, str(source)])
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        outcomes: dict[str, str] = json.loads(output)
        return outcomes

    return run


def test_what_permissions_forbid_is_a_row(tmp_path: Path, scan_bound: Callable[[Path], dict[str, str]]) -> None:
    expected = make_bad_archive(tmp_path / "bad", permissions=True)
    make(tmp_path, "bad/ignored/secret.jpg", "bad/ignored/.geosurgeignore", "bad/unlisted/x.jpg")
    (tmp_path / "bad/ignored/.geosurgeignore").chmod(0)
    (tmp_path / "bad/unlisted").chmod(0o111)
    outcomes = scan_bound(tmp_path / "bad")
    assert set(outcomes) == {*expected, *(f"{tmp_path}/bad/{name}" for name in ("ignored", "unlisted"))}
    forbidden = {name for name in outcomes if Path(name).name.startswith(("locked", "ignored", "unlisted"))}
    assert len(forbidden) == 4
    # Where a folder may not be entered, it is the folder's permissions that have to be given.
    at_fault = {name: f"{name}/.geosurgeignore" if name.endswith("/ignored") else name for name in forbidden}
    for name in forbidden:
        assert outcomes[name].startswith(f"cannot read {at_fault[name]}: Permission denied")
