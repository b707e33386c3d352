from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from geosurge.archive.sidecar_states import SidecarStates, state_after_write
from geosurge.archive.sources import Found


def state(picture: Path, member: bytes = b"") -> str:
    return SidecarStates().of(Found(os.fsencode(picture), member))


@pytest.mark.parametrize("name", ["photo.jpg.xmp", "photo.xmp", "photo.XMP"])
def test_a_state_tells_sidecars_apart_by_size_and_time(name: str, tmp_path: Path) -> None:
    picture, sidecar = tmp_path / "photo.jpg", tmp_path / name
    assert state(picture) == ""
    sidecar.write_text("old")
    os.utime(sidecar, ns=(1, 7))
    assert json.loads(state(picture)) == {name: [3, 7]}
    os.utime(sidecar, ns=(1, 8))
    assert json.loads(state(picture)) == {name: [3, 8]}
    assert state(tmp_path / "photo2.jpg") == state(picture, member=b"1.jpg") == ""
    sidecar.unlink()
    assert state(picture) == ""


def test_a_link_that_leads_nowhere_and_a_name_that_is_no_text_have_states(tmp_path: Path) -> None:
    picture = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe9.jpg"))
    picture.with_name(f"{picture.name}.xmp").symlink_to("nowhere")
    assert json.loads(state(picture)) == {f"{picture.name}.xmp": [0, 0]}
    assert state(tmp_path / "away" / "photo.jpg") == ""


def test_folders_are_told_apart(tmp_path: Path) -> None:
    states = SidecarStates()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "a" / "1.xmp").touch()
    found = [Found(os.fsencode(tmp_path / name / "1.jpg")) for name in ("a", "b", "a")]
    assert [bool(states.of(each)) for each in found] == [True, False, True]


def test_only_what_the_run_wrote_is_known_after_a_write(tmp_path: Path) -> None:
    picture, own, other = (tmp_path / name for name in ("photo.jpg", "photo.jpg.xmp", "photo.xmp"))
    own.write_text("own")
    written = state_after_write("", picture, own)
    assert written == state(picture)
    other.write_text("other")
    own.write_text("own again")
    again = state_after_write(written, picture, own)
    assert json.loads(again).keys() == {"photo.jpg.xmp"}
    assert again not in (written, state(picture))
    own.unlink()
    assert state_after_write(again, picture, own) == ""
