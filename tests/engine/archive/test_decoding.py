from __future__ import annotations

import hashlib
import itertools
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from support.bad_archive import bomb, picture, with_gps
from support.metadata import GUESS, xmp_packet
from support.processes import wait_until
from support.tasks import Crashing, Endless, Fine, Raising

from geosurge.archive import decoding
from geosurge.archive.decoding import Decode, Decoded, DecodePool, Failure, Look, Looked, Outcome, Task, Unusable
from geosurge.archive.rows import Position
from geosurge.archive.sources import Found, scan
from geosurge.archive.writes import apply, prepare
from geosurge.errors import InputChangedError, InputNotReadableError, SidecarInvalidError
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


def outcomes(pool: DecodePool, tasks: list[Task]) -> dict[int, Outcome]:
    pairs = list(pool.run(tasks))
    assert len(pairs) == len(tasks), "every task has one outcome"
    return dict(pairs)


def processes_of_pools() -> list[psutil.Process]:
    return [each for each in psutil.Process().children() if "geosurge.archive.decoding" in " ".join(each.cmdline())]


def process_of(outcome: Outcome) -> float:
    """The process that did a task `Fine`."""
    assert isinstance(outcome, Looked)
    assert outcome.position is not None
    return outcome.position.longitude_deg


def test_a_picture_is_looked_at_with_its_sidecar(folder: Path) -> None:
    photo = folder / "photo.jpg"
    photo.write_bytes(picture(1))
    assert Look(1, found(photo)).run() == Looked(None)
    photo.with_suffix(".xmp").write_text(
        xmp_packet("", 'exif:GPSLatitude="12,30.0N" exif:GPSLongitude="45,0.0W"'), encoding="utf-8"
    )
    assert Look(1, found(photo)).run() == Looked(Position(12.5, -45.0, "sidecar"))
    photo.write_bytes(with_gps(1, 20.0, 30.0))
    assert Look(1, found(photo)).run() == Looked(Position(20.0, 30.0, "exif"))


def test_somebody_elses_position_goes_before_a_guess(folder: Path, tmp_path: Path) -> None:
    photo = folder / "photo.png"
    photo.write_bytes(picture(1, "PNG"))
    apply(prepare(photo, "exif", GUESS, tmp_path / "backup"))
    guess = Look(1, found(photo)).run()
    assert guess.run_id == GUESS.run_id
    assert guess.position is not None
    assert GUESS.is_at(guess.position.latitude_deg, guess.position.longitude_deg)
    photo.with_suffix(".xmp").write_text(
        xmp_packet("", 'exif:GPSLatitude="12,30.0N" exif:GPSLongitude="45,0.0W"'), encoding="utf-8"
    )
    assert Look(1, found(photo)).run() == Looked(Position(12.5, -45.0, "sidecar"))


def test_what_cannot_be_looked_at_says_why(folder: Path) -> None:
    photo = folder / "photo.jpg"
    photo.write_bytes(picture(1))
    item = found(photo)
    photo.with_suffix(".xmp").write_bytes(b"rating: 5")
    with pytest.raises(SidecarInvalidError, match=r"photo\.xmp"):
        Look(1, item).run()
    photo.unlink()
    with pytest.raises(InputNotReadableError, match=r"photo\.jpg.*gone"):
        Look(1, item).run()


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
    assert (unusable.failure.reason, unusable.failure.is_final) == ("IMAGE_TOO_MANY_PIXELS", True)


def test_of_a_huge_file_only_the_hash_is_taken(folder: Path) -> None:
    photo = folder / "photo.jpg"
    data = picture(1) + bytes(3_000_000)
    photo.write_bytes(data)
    for here in (True, False):
        unusable = decode(found(photo), limits=ImageLimits(max_bytes=1_000_000), here=here)
        assert isinstance(unusable, Unusable)
        assert unusable.content_hash == hashlib.sha256(data).digest()
        assert unusable.failure.reason == "IMAGE_TOO_LARGE"
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


def test_the_pool_does_every_task_once_and_only_pulls_what_it_can_hold() -> None:
    pulled = 0

    def tasks() -> Iterator[Task]:
        nonlocal pulled
        for key in range(300):
            pulled += 1
            yield Fine(key)

    seen, processes = [], set()
    with DecodePool(2) as pool:
        for key, outcome in pool.run(tasks()):
            seen.append(key)
            processes.add(process_of(outcome))
            assert pulled - len(seen) <= 2 * 8
    assert sorted(seen) == list(range(300))
    assert len(processes) == 2


def test_errors_become_failures_and_cost_nothing_else() -> None:
    with DecodePool(1) as pool:
        ended = outcomes(pool, [Fine(0), Raising(1), Raising(2, is_defect=True), Fine(3)])
    assert ended[1] == Failure("INPUT_NOT_READABLE", "the disk has gone", is_final=False)
    assert ended[2] == Failure(
        "INTERNAL", "the engine failed at this picture: ZeroDivisionError: a defect", is_final=False
    )
    assert process_of(ended[0]) == process_of(ended[3]), "it went on"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT])
def test_a_picture_that_ends_its_process_fails_and_the_others_do_not(number: signal.Signals) -> None:
    with DecodePool(1) as pool:
        tasks: list[Task] = [Fine(key) for key in range(12)]
        tasks[1] = Crashing(1, number)
        ended = outcomes(pool, tasks)
    failure = ended.pop(1)
    assert isinstance(failure, Failure)
    assert (failure.reason, failure.is_final) == ("DECODER_CRASHED", False)
    assert f"exit code -{number.value}), 2 times" in failure.detail
    assert all(isinstance(outcome, Looked) for outcome in ended.values())


def test_a_process_that_is_killed_by_chance_costs_no_picture(tmp_path: Path) -> None:
    with DecodePool(1) as pool:
        ended = outcomes(pool, [Fine(0), Crashing(1, once=tmp_path / "crashed"), Fine(2)])
    assert all(isinstance(outcome, Looked) for outcome in ended.values())


def test_processes_that_are_killed_all_the_time_cost_no_picture() -> None:
    with DecodePool(2) as pool:
        keys, killed = [], 0
        for key, outcome in pool.run(Fine(key) for key in range(1500)):
            assert isinstance(outcome, Looked)
            keys.append(key)
            if len(keys) % 600 == 0:
                for process in processes_of_pools():
                    process.kill()
                    killed += 1
    assert sorted(keys) == list(range(1500))
    assert killed == 4


def test_a_process_that_is_killed_while_it_starts_costs_no_picture() -> None:
    def tasks() -> Iterator[Task]:
        yield Fine(0)
        (starting,) = processes_of_pools()
        starting.kill()
        yield from map(Fine, range(1, 20))

    with DecodePool(1) as pool:
        ended = dict(pool.run(tasks()))
    assert sorted(ended) == list(range(20))
    assert all(isinstance(outcome, Looked) for outcome in ended.values())


def test_a_picture_that_takes_for_ever_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    with DecodePool(1) as pool:
        assert isinstance(outcomes(pool, [Fine(0)])[0], Looked)
        # Long enough for a process to start in.
        monkeypatch.setattr(decoding, "MAX_SECONDS", 3.0)
        ended = outcomes(pool, [Fine(0), Endless(1), Fine(2)])
    failure = ended[1]
    assert isinstance(failure, Failure)
    assert failure.reason == "DECODER_CRASHED"
    assert "took more than 3 s, 2 times" in failure.detail
    assert isinstance(ended[0], Looked)
    assert isinstance(ended[2], Looked)


def test_the_time_that_outcomes_wait_for_is_not_the_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a batch is encoded nobody takes what was decoded."""
    with DecodePool(2) as pool:
        before = {process_of(outcome) for outcome in outcomes(pool, [Fine(0, 0.1), Fine(1, 0.1)]).values()}
        monkeypatch.setattr(decoding, "MAX_SECONDS", 1.0)
        after = set()
        for key, outcome in pool.run(Fine(key, 0.3 * (key % 2)) for key in range(8)):
            after.add(process_of(outcome))
            if key == 0:
                time.sleep(1.5)
    assert after == before, "none was ended"


def test_a_pool_that_is_left_leaves_no_process() -> None:
    with DecodePool(2) as pool:
        tasks: itertools.chain[Task] = itertools.chain([Fine(0)], (Endless(key) for key in range(1, 20)))
        key, _ = next(pool.run(tasks))
        assert key == 0
        processes = processes_of_pools()
        assert len(processes) == 2
    wait_until(lambda: not any(map(psutil.Process.is_running, processes)), "the processes end")
