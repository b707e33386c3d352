from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from support.bad_archive import bomb, picture, with_gps
from support.metadata import GUESS, xmp_packet

from geosurge.archive.rows import Position
from geosurge.archive.sources import Found, scan
from geosurge.archive.tasks import Decode, Decoded, Failure, Looked, Unusable, look
from geosurge.archive.writes.file_write import apply, prepare
from geosurge.errors import ImageTruncatedError, InputChangedError, InputNotReadableError, SidecarInvalidError
from geosurge.images import ImageLimits
from geosurge.preprocessing import Preprocessing

PREPROCESSING = Preprocessing(32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "photos"
    path.mkdir()
    return path


def found(path: Path) -> Found:
    (item,) = scan([path])
    return item


def decode(item: Found, *, limits: ImageLimits | None = None, here: bool = True) -> Decoded | Unusable:
    return Decode(1, item, PREPROCESSING if here else None, limits or ImageLimits()).run()


def test_a_picture_is_looked_at_with_its_sidecar(folder: Path) -> None:
    photo = folder / "photo.jpg"
    photo.write_bytes(picture(1))
    assert look(found(photo)) == Looked(None)
    photo.with_suffix(".xmp").write_text(
        xmp_packet("", 'exif:GPSLatitude="12,30.0N" exif:GPSLongitude="45,0.0W"'), encoding="utf-8"
    )
    assert look(found(photo)) == Looked(Position(12.5, -45.0, "sidecar"))
    photo.write_bytes(with_gps(1, 20.0, 30.0))
    assert look(found(photo)) == Looked(Position(20.0, 30.0, "exif"))


def test_somebody_elses_position_goes_before_a_guess(folder: Path, tmp_path: Path) -> None:
    photo = folder / "photo.png"
    photo.write_bytes(picture(1, "PNG"))
    apply(prepare(photo, "exif", GUESS, tmp_path / "backup"))
    guess = look(found(photo))
    assert guess.run_id == GUESS.run_id
    assert guess.position is not None
    assert GUESS.is_at(guess.position.latitude_deg, guess.position.longitude_deg)
    photo.with_suffix(".xmp").write_text(
        xmp_packet("", 'exif:GPSLatitude="12,30.0N" exif:GPSLongitude="45,0.0W"'), encoding="utf-8"
    )
    assert look(found(photo)) == Looked(Position(12.5, -45.0, "sidecar"))


def test_what_cannot_be_looked_at_says_why(folder: Path) -> None:
    photo = folder / "photo.jpg"
    photo.write_bytes(picture(1))
    item = found(photo)
    photo.with_suffix(".xmp").write_bytes(b"rating: 5")
    with pytest.raises(SidecarInvalidError, match=r"photo\.xmp"):
        look(item)
    photo.unlink()
    with pytest.raises(InputNotReadableError, match=r"photo\.jpg.*gone"):
        look(item)


def test_a_picture_is_hashed_and_decoded_as_everywhere_else(folder: Path) -> None:
    photo = folder / "photo.jpg"
    data = picture(3)
    photo.write_bytes(data)
    decoded = decode(found(photo))
    assert isinstance(decoded, Decoded)
    assert decoded.content_hash == hashlib.sha256(data).digest()
    assert np.array_equal(np.asarray(decoded.query), PREPROCESSING.decode(data))
    assert decoded.decode_ms > 0
    assert decode(found(photo), here=False) == Decoded(hashlib.sha256(data).digest(), data)


def test_a_bad_picture_keeps_its_hash_and_is_not_tried_again(folder: Path) -> None:
    photo = folder / "photo.png"
    photo.write_bytes(bomb(1))
    unusable = decode(found(photo))
    assert isinstance(unusable, Unusable)
    assert unusable.content_hash == hashlib.sha256(bomb(1)).digest()
    assert (unusable.failure.name, unusable.failure.is_final) == ("IMAGE_TOO_MANY_PIXELS", True)


@pytest.mark.parametrize("here", [True, False])
def test_what_the_limits_of_a_server_refuse_is_asked_again(here: bool, folder: Path) -> None:
    photo = folder / "photo.jpg"
    photo.write_bytes(picture(1))
    unusable = decode(found(photo), limits=ImageLimits(max_bytes=100), here=here)
    assert isinstance(unusable, Unusable)
    assert (unusable.failure.name, unusable.failure.is_final) == ("IMAGE_TOO_LARGE", here)
    assert ("by the limits of the server" in unusable.failure.detail) == (not here)
    assert Failure.of(ImageTruncatedError("cut off"), by_server=not here) == Failure("IMAGE_TRUNCATED", "cut off", True)


def test_of_a_huge_file_only_the_hash_is_taken(folder: Path) -> None:
    photo = folder / "photo.jpg"
    data = picture(1) + bytes(3_000_000)
    photo.write_bytes(data)
    for here in (True, False):
        unusable = decode(found(photo), limits=ImageLimits(max_bytes=1_000_000), here=here)
        assert isinstance(unusable, Unusable)
        assert unusable.content_hash == hashlib.sha256(data).digest()
        assert unusable.failure.name == "IMAGE_TOO_LARGE"
        assert f"{len(data)} bytes" in unusable.failure.detail


@pytest.mark.parametrize("change", ["longer", "touched", "replaced"])
def test_a_picture_that_changed_since_it_was_found_is_not_taken_for_it(change: str, folder: Path) -> None:
    photo = folder / "photo.jpg"
    photo.write_bytes(picture(1))
    item = found(photo)
    if change == "longer":
        photo.write_bytes(picture(1) + b"\0")
        os.utime(photo, ns=(item.mtime_ns, item.mtime_ns))
    elif change == "touched":
        os.utime(photo, ns=(item.mtime_ns, item.mtime_ns + 1))
    else:
        photo.with_name("new").write_bytes(picture(2))
        photo.with_name("new").replace(photo)
    with pytest.raises(InputChangedError, match=r"photo\.jpg changed.*again"):
        decode(item)
