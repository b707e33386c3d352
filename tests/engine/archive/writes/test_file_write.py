from __future__ import annotations

import io
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from support import exiftool, power_cuts
from support.metadata import FORMATS, GUESS, exif_block, first_position, gps, picture, xmp_packet

from geosurge.archive.metadata import exif, sidecars
from geosurge.archive.metadata.guess import Guess
from geosurge.archive.metadata.positions import sidecar_paths
from geosurge.archive.writes.file_write import Write, WriteKind, apply, is_missing, prepare, undo
from geosurge.errors import (
    ExifInvalidError,
    FileChangedError,
    FileNotWritableError,
    HasPositionError,
    InputNotReadableError,
    SidecarInvalidError,
    WriteUnsupportedError,
)

KINDS: tuple[WriteKind, ...] = ("xmp", "exif")
kinds = pytest.mark.parametrize("kind", KINDS)
RATED = xmp_packet("", 'xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmp:Rating="4"').encode()


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "archive" / "photo.jpg"
    path.parent.mkdir()
    path.write_bytes(picture("JPEG"))
    return path


@pytest.fixture
def backups(tmp_path: Path) -> Path:
    return tmp_path / "out" / "backup"


def snapshot(folder: Path) -> dict[str, tuple[bytes, int, int]]:
    """Every file below a folder: content, mode and time of change."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mode, path.stat().st_mtime_ns)
        for path in files
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {name: file[0] for name, file in snapshot(folder).items()}


def is_at_guess(photo: Path) -> bool:
    with photo.open("rb") as image:
        found = first_position(image, sidecar_paths(photo))
    return found is not None and GUESS.is_at(found.latitude_deg, found.longitude_deg)


def test_exiftool_reads_every_written_position_back(tmp_path: Path, backups: Path) -> None:
    chance = random.Random(11)
    exact = [(latitude, longitude) for latitude in (90.0, -90.0, 0.0) for longitude in (180.0, -180.0, 1e-6, -1e-6)]
    exact += [(1e-6, 0.0), (-1e-6, 0.0), (1e-9, -1e-9), (59.999999999, -179.999999999), (-0.0, 45.0), (45.0, -0.0)]
    anywhere = [(chance.uniform(-90, 90), chance.uniform(-180, 180)) for _ in range(80)]
    places = [(place, kind) for place in exact + anywhere for kind in KINDS]
    expected: dict[Path, tuple[float, float]] = {}
    for number, (place, kind) in enumerate(places):
        file_format = FORMATS[chance.randrange(4)]
        path = tmp_path / f"{number}.{file_format.lower()}"
        path.write_bytes(picture(file_format))
        guess = replace(GUESS, latitude_deg=place[0], longitude_deg=place[1], radius_km=chance.uniform(0, 20015))
        write = prepare(path, kind, guess, backups)
        apply(write)
        expected[Path(os.fsdecode(write.target))] = place

    read = exiftool.read_tags(expected)

    assert len(read) == len(places)
    for path, place in expected.items():
        assert exiftool.position(read[path]) == pytest.approx(place, abs=1e-8)


@kinds
@pytest.mark.parametrize("beside", [None, "photo.jpg.xmp", "photo.xmp"])
def test_a_write_and_its_undo(kind: WriteKind, beside: str | None, photo: Path, backups: Path) -> None:
    if beside is not None:
        photo.with_name(beside).write_bytes(RATED)
    before = snapshot(photo.parent)
    write = prepare(photo, kind, GUESS, backups)
    assert snapshot(photo.parent) == before, "preparing changes nothing"

    apply(write)
    written = snapshot(photo.parent)
    target = {"exif": "photo.jpg", "xmp": beside or "photo.jpg.xmp"}[kind]
    assert {name for name in written if written[name] != before.get(name)} == {target}
    assert Path(os.fsdecode(write.target)) == photo.with_name(target)
    assert is_at_guess(photo)
    apply(write)
    assert snapshot(photo.parent) == written, "applying again changes nothing"

    undo(write, backups)
    assert snapshot(photo.parent) == before
    undo(write, backups)
    assert snapshot(photo.parent) == before, "undoing again changes nothing"


def test_both_kinds_can_be_written_by_one_run(photo: Path, backups: Path) -> None:
    before = snapshot(photo.parent)
    writes = []
    for kind in KINDS:
        writes.append(prepare(photo, kind, GUESS, backups))
        apply(writes[-1])
    for write in writes:
        undo(write, backups)
    assert snapshot(photo.parent) == before


@kinds
def test_a_write_can_be_kept_as_json(kind: WriteKind, photo: Path, backups: Path) -> None:
    write = prepare(photo, kind, GUESS, backups)
    fields = asdict(write) | {"target": os.fsdecode(write.target)}
    read = json.loads(json.dumps(fields))
    assert Write(**{**read, "target": os.fsencode(read["target"]), "guess": Guess(**read["guess"])}) == write


@kinds
def test_the_backup_is_the_file_as_it_was(kind: WriteKind, photo: Path, backups: Path) -> None:
    photo.chmod(0o640)
    photo.with_name("photo.xmp").write_bytes(RATED)
    write = prepare(photo, kind, GUESS, backups)
    backup = backups / write.backup
    assert backup.read_bytes() == (photo.read_bytes() if kind == "exif" else RATED)
    assert backup.name.endswith("-photo.jpg" if kind == "exif" else "-photo.xmp")
    assert backup.stat().st_mode & 0o777 == (0o640 if kind == "exif" else backup.stat().st_mode & 0o777)
    apply(write)
    assert photo.stat().st_mode & 0o777 == 0o640


def test_a_new_sidecar_has_no_backup(photo: Path, backups: Path) -> None:
    write = prepare(photo, "xmp", GUESS, backups)
    assert (write.existed, write.backup, write.sha256_before) == (False, "", "")
    assert not backups.exists()


@pytest.mark.parametrize("other", [replace(GUESS, run_id="run-0"), GUESS])
@kinds
def test_a_position_that_is_there_is_not_overwritten(kind: WriteKind, other: Guess, photo: Path, backups: Path) -> None:
    apply(prepare(photo, kind, other, backups))
    before = snapshot(photo.parent)
    with pytest.raises(HasPositionError, match="undo that run first"):
        prepare(photo, kind, GUESS, backups)
    assert snapshot(photo.parent) == before


@kinds
@pytest.mark.parametrize("where", ["exif", "xmp", "photo.jpg.xmp", "photo.xmp"])
def test_a_position_of_somebody_else_stays(kind: WriteKind, where: str, photo: Path, backups: Path) -> None:
    packet = xmp_packet("", 'exif:GPSLatitude="1,0.0N" exif:GPSLongitude="2,0.0E"').encode()
    if where == "exif":
        photo.write_bytes(picture("JPEG", exif=b"Exif\0\0" + exif_block(gps_tags=gps(1, 2))))
    elif where == "xmp":
        photo.write_bytes(picture("JPEG", xmp=packet))
    else:
        photo.with_name(where).write_bytes(packet)
    before = snapshot(photo.parent)
    with pytest.raises(HasPositionError, match="has a position already"):
        prepare(photo, kind, GUESS, backups)
    assert snapshot(photo.parent) == before
    assert not backups.exists()


def test_two_pictures_that_share_a_sidecar_do_not_overwrite_each_other(photo: Path, backups: Path) -> None:
    raw = photo.with_suffix(".png")
    raw.write_bytes(picture("PNG"))
    photo.with_suffix(".xmp").write_bytes(RATED)
    first, second = prepare(photo, "xmp", GUESS, backups), prepare(raw, "xmp", replace(GUESS, latitude_deg=1), backups)
    apply(first)
    with pytest.raises(FileChangedError, match="changed by another program"):
        apply(second)
    with pytest.raises(HasPositionError):
        prepare(raw, "xmp", GUESS, backups)


@kinds
def test_what_is_no_position_is_replaced_and_comes_back(kind: WriteKind, photo: Path, backups: Path) -> None:
    photo.write_bytes(picture("JPEG", exif=b"Exif\0\0" + exif_block(gps_tags=gps(0, 0))))
    photo.with_suffix(".xmp").write_bytes(
        xmp_packet("", 'exif:GPSLatitude="0,0.0N" exif:GPSLongitude="0,0.0E"').encode()
    )
    before = snapshot(photo.parent)
    write = prepare(photo, kind, GUESS, backups)
    apply(write)
    assert is_at_guess(photo)
    undo(write, backups)
    assert snapshot(photo.parent) == before


@pytest.mark.parametrize(
    ("kind", "name", "content", "error"),
    [
        ("xmp", "photo.jpg.xmp", b"no xml", SidecarInvalidError),
        ("xmp", "photo.xmp", b"", SidecarInvalidError),
        ("exif", "photo.jpg.xmp", b"<a/>", SidecarInvalidError),
        ("exif", "photo.jpg", b"GIF89a", WriteUnsupportedError),
        ("exif", "photo.jpg", b"", WriteUnsupportedError),
        ("exif", "photo.jpg", picture("JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), ExifInvalidError),
    ],
)
def test_what_cannot_be_merged_is_left_alone(
    kind: WriteKind, name: str, content: bytes, error: type[Exception], photo: Path, backups: Path
) -> None:
    photo.with_name(name).write_bytes(content)
    before = snapshot(photo.parent)
    with pytest.raises(error):
        prepare(photo, kind, GUESS, backups)
    assert snapshot(photo.parent) == before


@kinds
def test_null_island_is_not_written(kind: WriteKind, photo: Path, backups: Path) -> None:
    with pytest.raises(WriteUnsupportedError, match="read back"):
        prepare(photo, kind, replace(GUESS, latitude_deg=0.0, longitude_deg=-0.0), backups)


@kinds
def test_a_file_that_changed_before_the_write_is_not_touched(kind: WriteKind, photo: Path, backups: Path) -> None:
    photo.with_suffix(".xmp").write_bytes(RATED)
    write = prepare(photo, kind, GUESS, backups)
    target = Path(os.fsdecode(write.target))
    target.write_bytes(target.read_bytes() + b"\n")
    before = snapshot(photo.parent)
    with pytest.raises(FileChangedError, match="run the command again"):
        apply(write)
    assert snapshot(photo.parent) == before
    target.unlink()
    with pytest.raises(FileChangedError):
        apply(write)
    assert not target.exists()


def test_a_sidecar_that_appeared_before_the_write_is_not_touched(photo: Path, backups: Path) -> None:
    write = prepare(photo, "xmp", GUESS, backups)
    photo.with_name("photo.jpg.xmp").write_bytes(RATED)
    with pytest.raises(FileChangedError):
        apply(write)
    assert photo.with_name("photo.jpg.xmp").read_bytes() == RATED


def test_a_write_whose_bytes_are_not_the_announced_ones_is_not_done(photo: Path, backups: Path) -> None:
    write = replace(prepare(photo, "exif", GUESS, backups), sha256_after="00" * 32)
    before = snapshot(photo.parent)
    with pytest.raises(FileChangedError, match="announces"):
        apply(write)
    assert snapshot(photo.parent) == before


@kinds
@pytest.mark.parametrize("beside", [None, RATED])
def test_undo_after_another_program_changed_the_file_takes_only_the_guess(
    kind: WriteKind, beside: bytes | None, photo: Path, backups: Path
) -> None:
    if beside is not None:
        photo.with_suffix(".xmp").write_bytes(beside)
    write = prepare(photo, kind, GUESS, backups)
    apply(write)
    target = Path(os.fsdecode(write.target))
    exiftool.change_tags([target], "-XMP-dc:Creator=Somebody", "-EXIF:Artist=Somebody")

    undo(write, backups)

    assert not is_at_guess(photo)
    tags = exiftool.read_tags([target])[target]
    assert tags["XMP:Creator"] == "Somebody"
    assert not [name for name in tags if name.endswith(("GPSLatitude", "RunId", "GPSProcessingMethod"))]
    after = snapshot(photo.parent)
    undo(write, backups)
    assert snapshot(photo.parent) == after


@kinds
@pytest.mark.parametrize("backup", [None, b"damaged"])
def test_undo_without_its_backup_takes_only_the_guess(
    kind: WriteKind, backup: bytes | None, photo: Path, backups: Path
) -> None:
    photo.with_suffix(".xmp").write_bytes(RATED)
    write = prepare(photo, kind, GUESS, backups)
    apply(write)
    shutil.rmtree(backups)
    if backup is not None:
        (backups / write.backup).parent.mkdir(parents=True)
        (backups / write.backup).write_bytes(backup)
    undo(write, backups)
    assert not is_at_guess(photo)
    assert b"Rating" in photo.with_suffix(".xmp").read_bytes()


def test_undo_removes_a_sidecar_in_which_only_the_guess_was(photo: Path, backups: Path) -> None:
    write = prepare(photo, "xmp", GUESS, backups)
    apply(write)
    target = Path(os.fsdecode(write.target))
    target.write_bytes(b"\n" + target.read_bytes().replace(b"GeoSURGE engine", b"another"))
    undo(write, backups)
    assert contents(photo.parent).keys() == {"photo.jpg"}


@kinds
def test_undo_leaves_a_corrected_position(kind: WriteKind, photo: Path, backups: Path) -> None:
    write = prepare(photo, kind, GUESS, backups)
    apply(write)
    target = Path(os.fsdecode(write.target))
    exiftool.change_tags([target], "-n", "-XMP-exif:GPSLatitude=-33.9" if kind == "xmp" else "-GPS:GPSLatitude=33.9")
    before = snapshot(photo.parent)
    with pytest.raises(FileChangedError, match="stays as it is"):
        undo(write, backups)
    assert snapshot(photo.parent) == before


def test_undo_of_a_file_that_is_gone(photo: Path, backups: Path) -> None:
    created, changed = (prepare(photo, kind, GUESS, backups) for kind in KINDS)
    photo.unlink()
    undo(created, backups)
    with pytest.raises(FileChangedError, match=r"not there any more.* undo again: its backup is '../.*-photo\.jpg'"):
        undo(changed, backups)


def test_undo_of_a_write_that_was_never_done_changes_nothing(photo: Path, backups: Path) -> None:
    before = snapshot(photo.parent)
    for kind in KINDS:
        undo(prepare(photo, kind, GUESS, backups), backups)
    assert snapshot(photo.parent) == before


@pytest.mark.parametrize(("kind", "beside"), [("xmp", None), ("xmp", RATED), ("exif", None)])
def test_a_power_cut_at_any_step_leaves_the_old_file_or_the_new(
    kind: WriteKind, beside: bytes | None, photo: Path, backups: Path
) -> None:
    if beside is not None:
        photo.with_suffix(".xmp").write_bytes(beside)
    old = contents(photo.parent)
    write = prepare(photo, kind, GUESS, backups)
    apply(write)
    new = contents(photo.parent)
    _cut_everywhere(lambda: apply(write), photo.parent, old, new)
    _cut_everywhere(lambda: undo(write, backups), photo.parent, new, old)
    _cut_everywhere(lambda: apply(write), photo.parent, old, new, lambda: undo(write, backups), old)


def _cut_everywhere(
    operation: Callable[[], object],
    folder: Path,
    start: dict[str, bytes],
    goal: dict[str, bytes],
    then: Callable[[], object] | None = None,
    end: dict[str, bytes] | None = None,
) -> None:
    for kill_before in range(100):
        for path in folder.iterdir():
            path.unlink()
        for name, content in start.items():
            (folder / name).write_bytes(content)
        killed, trace = power_cuts.in_child(operation, folder, kill_before)
        whole = {name: content for name, content in contents(folder).items() if not name.startswith(".")}
        assert whole in (start, goal)
        (then or operation)()
        assert contents(folder) == (goal if end is None else end), "the work ends, and nothing is left behind"
        if not killed:
            assert trace
            return
    raise AssertionError("the operation never ended")


@kinds
def test_a_power_cut_while_a_backup_is_made_changes_no_picture(kind: WriteKind, photo: Path, backups: Path) -> None:
    photo.with_suffix(".xmp").write_bytes(RATED)
    before = snapshot(photo.parent)
    kill_before, killed = 0, True
    while killed:
        shutil.rmtree(backups, ignore_errors=True)
        killed, _ = power_cuts.in_child(lambda: prepare(photo, kind, GUESS, backups), backups.parent, kill_before)
        assert snapshot(photo.parent) == before
        write = prepare(photo, kind, GUESS, backups)
        assert list(contents(backups)) == [write.backup]
        kill_before += 1
    assert kill_before > 4


@pytest.mark.parametrize(
    "name", ["Rom & Jülich é海.jpg", os.fsdecode(b"\xff\xfe\\.jpg"), "a" * 240 + ".jpg", "no ending"]
)
@kinds
def test_names_of_every_kind(kind: WriteKind, name: str, tmp_path: Path, backups: Path) -> None:
    photo = tmp_path / "archive" / name
    photo.parent.mkdir()
    photo.write_bytes(picture("PNG"))
    before = snapshot(photo.parent)
    write = prepare(photo, kind, GUESS, backups)
    apply(write)
    assert is_at_guess(photo)
    undo(write, backups)
    assert snapshot(photo.parent) == before


def test_a_name_that_leaves_no_room_for_the_ending_is_an_error_of_its_own(tmp_path: Path, backups: Path) -> None:
    photo = tmp_path / ("a" * 251 + ".jpg")
    photo.write_bytes(picture("JPEG"))
    with pytest.raises(InputNotReadableError, match="name too long"):
        prepare(photo, "xmp", GUESS, backups)


@kinds
def test_the_file_behind_a_link_is_changed_and_the_link_stays(kind: WriteKind, photo: Path, backups: Path) -> None:
    link = photo.parent / "links" / "photo.jpg"
    link.parent.mkdir()
    link.symlink_to(photo)
    link.with_name("photo.jpg.xmp").symlink_to(photo.with_name("elsewhere.xmp"))
    photo.with_name("elsewhere.xmp").write_bytes(RATED)
    write = prepare(link, kind, GUESS, backups)
    apply(write)
    assert link.is_symlink()
    assert link.with_name("photo.jpg.xmp").is_symlink()
    assert is_at_guess(link)
    undo(write, backups)
    assert photo.with_name("elsewhere.xmp").read_bytes() == RATED


def test_what_was_written_is_missing_only_where_nothing_else_is(photo: Path, backups: Path) -> None:
    write = prepare(photo, "xmp", GUESS, backups)
    apply(write)
    sidecar = photo.with_name("photo.jpg.xmp")
    assert not is_missing(photo, write)
    written = sidecar.read_bytes()
    sidecar.write_bytes(written + b"\n")
    assert not is_missing(photo, write), "it was changed, and still says where"
    sidecar.write_bytes(RATED)
    assert is_missing(photo, write)
    sidecar.unlink()
    assert is_missing(photo, write)
    photo.with_suffix(".xmp").write_bytes(written)
    assert not is_missing(photo, write), "it was given another name"
    photo.with_suffix(".xmp").write_text("rating: 4")
    assert not is_missing(photo, write), "nobody knows"


def test_no_file_is_made_where_a_link_leads_nowhere(photo: Path, backups: Path) -> None:
    photo.with_suffix(".xmp").symlink_to(photo.with_name("elsewhere.xmp"))
    before = snapshot(photo.parent)
    with pytest.raises(InputNotReadableError, match=r"photo\.xmp.*mend it or remove it"):
        prepare(photo, "xmp", GUESS, backups)
    assert snapshot(photo.parent) == before


def test_what_is_no_file_is_never_opened(photo: Path, backups: Path) -> None:
    os.mkfifo(photo.with_name("photo.jpg.xmp"))
    with pytest.raises(InputNotReadableError, match="no file"):
        prepare(photo, "xmp", GUESS, backups)


def test_a_picture_that_vanished(photo: Path, backups: Path) -> None:
    photo.unlink()
    with pytest.raises(InputNotReadableError, match=r"photo\.jpg"):
        prepare(photo, "exif", GUESS, backups)


@kinds
def test_extended_attributes_stay(kind: WriteKind, photo: Path, backups: Path) -> None:
    photo.with_suffix(".xmp").write_bytes(RATED)
    for path in (photo, photo.with_suffix(".xmp")):
        try:
            os.setxattr(path, "user.geosurge.test", b"kept")
        except OSError:
            pytest.skip("the file system of the tests has no extended attributes")
    write = prepare(photo, kind, GUESS, backups)
    apply(write)
    assert os.getxattr(os.fsdecode(write.target), "user.geosurge.test") == b"kept"


@kinds
def test_a_read_only_file_is_left_alone(kind: WriteKind, photo: Path, backups: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("nothing is read-only to root")
    photo.with_suffix(".xmp").write_bytes(RATED)
    for path in (photo, photo.with_suffix(".xmp")):
        path.chmod(0o444)
    with pytest.raises(FileNotWritableError, match="read-only"):
        prepare(photo, kind, GUESS, backups)


def test_a_full_disk_is_an_error_that_leaves_the_file_as_it_was(photo: Path, backups: Path) -> None:
    write = prepare(photo, "exif", GUESS, backups)
    before = snapshot(photo.parent)
    child = os.fork()
    if child == 0:
        _exit_after(lambda: apply(write))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert snapshot(photo.parent) == before


def _exit_after(operation: Callable[[], object]) -> None:
    """Ends a forked process with 7 if a file cannot grow and the operation says so as it should."""
    import resource
    import signal

    code = 1
    try:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        operation()
    except FileNotWritableError as error:
        code = 7 if "make room" in str(error) else 2
    finally:
        os._exit(code)


def test_pixels_and_other_metadata_are_as_before(photo: Path, backups: Path) -> None:
    data = picture("JPEG", exif=b"Exif\0\0" + exif_block({0x10F: (2, b"Camera\0\0")}), xmp=RATED, comment=b"hello")
    photo.write_bytes(data)
    apply(prepare(photo, "exif", GUESS, backups))
    written = photo.read_bytes()
    assert written[written.index(b"\xff\xda") :] == data[data.index(b"\xff\xda") :]
    assert RATED in written
    tags = exiftool.read_tags([photo])[photo]
    assert (tags["EXIF:Make"], tags["XMP:Rating"], tags["File:Comment"]) == ("Camera", 4, "hello")


def test_the_content_is_what_the_parts_make(photo: Path, backups: Path) -> None:
    data = photo.read_bytes()
    apply(prepare(photo, "xmp", GUESS, backups))
    apply(prepare(photo, "exif", GUESS, backups))
    assert photo.with_name("photo.jpg.xmp").read_bytes() == sidecars.add_guess(None, GUESS)
    assert photo.read_bytes() == exif.add_guess(data, GUESS)
    with io.BytesIO(photo.read_bytes()) as image:
        assert first_position(image) is not None
