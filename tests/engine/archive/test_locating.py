from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from support.bad_archive import picture, with_gps
from support.bundles import make_bundle, tiny_encoder
from support.runs import WatchedBackend

from geosurge.archive import locating
from geosurge.archive.backends import Query
from geosurge.archive.ledger import LEDGER_FILE, Ledger
from geosurge.archive.locating import Thresholds, answer_key, locate_pictures, look_for_positions, note_pictures
from geosurge.archive.pool import TaskPool
from geosurge.archive.rows import Row, Status
from geosurge.archive.sources import scan
from geosurge.errors import (
    EmbeddingInvalidError,
    GeoSurgeError,
    OverloadedError,
    RegionEmptyError,
    ServiceError,
    UsageError,
)
from geosurge.location import LocateOptions, Location
from geosurge.locator import Locator


@pytest.fixture(scope="module")
def locator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Locator]:
    with Locator.open(make_bundle(tmp_path_factory.mktemp("index") / "tiny", encoder=tiny_encoder())) as opened:
        yield opened


@pytest.fixture(scope="module")
def pool() -> Iterator[TaskPool]:
    with TaskPool(1) as pool:
        yield pool


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "photos"
    path.mkdir()
    return path


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    (tmp_path / "out").mkdir()
    with Ledger.open(tmp_path / "out", {}) as ledger:
        yield ledger


def add(folder: Path, contents: Sequence[int]) -> None:
    """Adds pictures, with the same content where the number is the same."""
    for number, seed in enumerate(contents):
        (folder / f"{number:03}.jpg").write_bytes(picture(seed))


def ignore(*, failed: bool = False) -> None:
    """Shows no progress."""


def prepare(ledger: Ledger, pool: TaskPool, folder: Path, *, audit: bool = False) -> int:
    """Everything before locating; returns how many calls there were."""
    steps: list[bool] = []
    note_pictures(ledger, scan([folder]), ignore)
    look_for_positions(ledger, pool, lambda *, failed=False: steps.append(failed), audit=audit)
    return len(steps)


def locate(
    ledger: Ledger,
    pool: TaskPool,
    backend: WatchedBackend,
    options: LocateOptions | None = None,
    thresholds: Thresholds | None = None,
) -> int:
    """Locates; returns how many calls there were."""
    steps: list[bool] = []
    locate_pictures(
        ledger,
        pool,
        backend,
        lambda *, failed=False: steps.append(failed),
        options=options or LocateOptions(),
        thresholds=thresholds or Thresholds(),
    )
    return len(steps)


def rows(ledger: Ledger) -> dict[str, Row]:
    return {Path(row.path).name: row for row in ledger.rows()}


def committed(folder: Path) -> int:
    """Pictures that somebody else sees to be located."""
    with sqlite3.connect(folder.parent / "out" / LEDGER_FILE) as database:
        (count,) = database.execute("SELECT count(*) FROM picture WHERE status = 'done'").fetchone()
    database.close()
    return int(count)


def test_answers_are_those_of_the_index_itself(folder: Path, ledger: Ledger, pool: TaskPool, locator: Locator) -> None:
    add(folder, range(7))
    assert prepare(ledger, pool, folder) == 7
    options = LocateOptions(top_k=3, confidence_level=0.5)
    backend = WatchedBackend(locator, 3)
    assert locate(ledger, pool, backend, options) == 7
    assert backend.batches == [3, 3, 1]
    expected = locator.locate([picture(seed) for seed in range(7)], options)
    for row, location in zip(ledger.rows(), expected, strict=True):
        assert isinstance(location, Location)
        assert row.status is Status.DONE
        assert (row.latitude_deg, row.longitude_deg) == pytest.approx(
            (location.latitude_deg, location.longitude_deg), abs=1e-6
        )
        assert row.radius_km == pytest.approx(location.radius_km, rel=1e-3)
        assert row.probability == pytest.approx(location.probability, abs=1e-4)
        assert row.confidence_level == 0.5
        assert [cell.token for cell in row.cells] == [cell.token for cell in location.path]
        assert len(row.alternatives) == 3
        assert row.place == location.place
        assert row.index_version == "tiny"
        assert locator.manifest.encoder is not None
        assert row.encoder_hash == locator.manifest.encoder.sha256
        assert row.timings is not None
        assert row.timings.decode_ms > 0
        assert row.timings.encode_ms > 0


def test_a_picture_has_the_same_row_whatever_its_batch_is(
    folder: Path, ledger: Ledger, pool: TaskPool, locator: Locator
) -> None:
    add(folder, range(9))
    prepare(ledger, pool, folder)
    locate(ledger, pool, WatchedBackend(locator, 4))
    together = {name: replace(row, timings=None) for name, row in rows(ledger).items()}
    for number in range(9):
        out = folder.parent / f"alone{number}"
        out.mkdir()
        with Ledger.open(out, {}) as alone:
            note_pictures(alone, scan([folder / f"{number:03}.jpg"]), ignore)
            look_for_positions(alone, pool, ignore, audit=False)
            locate(alone, pool, WatchedBackend(locator, 4))
            for name, row in rows(alone).items():
                assert replace(row, timings=None) == together[name]


def test_equal_contents_are_located_once(folder: Path, ledger: Ledger, pool: TaskPool, locator: Locator) -> None:
    contents = [0, 1, 0, 2, 0, 1, 3, 3, 3, 4, 0]
    add(folder, contents)
    prepare(ledger, pool, folder)
    backend = WatchedBackend(locator, 2)
    assert locate(ledger, pool, backend) == len(contents)
    assert backend.count == 5
    by_content: dict[int, set[Row]] = {}
    for seed, row in zip(contents, ledger.rows(), strict=True):
        assert row.status is Status.DONE
        by_content.setdefault(seed, set()).add(replace(row, path=""))
    assert all(len(same) == 1 for same in by_content.values())

    (folder / "late.jpg").write_bytes(picture(1))
    prepare(ledger, pool, folder)
    assert locate(ledger, pool, backend) == 1
    assert backend.count == 5, "nor in another run"
    assert replace(rows(ledger)["late.jpg"], path="") in by_content[1]


def test_a_long_run_of_copies_does_not_wait_for_a_batch_to_fill(
    folder: Path, ledger: Ledger, pool: TaskPool, locator: Locator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locating, "_MAX_WAITING", 10)
    add(folder, [0] * 20 + [1] * 20 + [2] * 20)
    prepare(ledger, pool, folder)
    backend = WatchedBackend(locator, 8)
    assert locate(ledger, pool, backend) == 60
    assert backend.batches == [1, 1, 1]
    assert ledger.counts() == {Status.DONE: 60}


@dataclass(frozen=True)
class Encoded(WatchedBackend):
    """Wants encoded pictures, as a server does."""

    @property
    def preprocessing(self) -> None:  # type: ignore[override]
        """Decodes by itself."""

    def locate(self, queries: Sequence[Query], options: LocateOptions) -> list[Location | GeoSurgeError]:
        return super().locate([self.locator.preprocess(bytes(query)) for query in queries], options)


def test_encoded_pictures_are_sent_in_batches_of_so_many_bytes_and_pixels_are_not(
    folder: Path, ledger: Ledger, pool: TaskPool, locator: Locator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locating, "_MAX_BATCH_BYTES", 1)
    add(folder, range(8))
    prepare(ledger, pool, folder)
    backend = WatchedBackend(locator, 4)
    assert locate(ledger, pool, backend) == 8
    assert backend.batches == [4, 4]
    add(folder, range(100, 103))
    prepare(ledger, pool, folder)
    server = Encoded(locator, 4)
    assert locate(ledger, pool, server) == 3
    assert server.batches == [1, 1, 1]


def test_what_is_located_already_or_cannot_be_is_left_out(
    folder: Path, ledger: Ledger, pool: TaskPool, locator: Locator
) -> None:
    add(folder, range(3))
    (folder / "placed.jpg").write_bytes(with_gps(5, 20.0, 30.0))
    (folder / "text.jpg").write_bytes(b"no picture")
    assert prepare(ledger, pool, folder) == 5
    backend = WatchedBackend(locator, 8)
    assert locate(ledger, pool, backend) == 4
    assert backend.batches == [3]
    assert rows(ledger)["placed.jpg"].reason == "HAS_POSITION"
    assert "20.000000, 30.000000 (exif)" in rows(ledger)["placed.jpg"].detail
    text = rows(ledger)["text.jpg"]
    assert (text.status, text.reason, len(text.content_hash)) == (Status.FAILED, "IMAGE_NOT_DECODABLE", 64)
    assert prepare(ledger, pool, folder) == 1, "only a position may have changed without its picture"
    assert locate(ledger, pool, backend) == 0


def test_in_an_audit_only_pictures_with_a_position_count(
    folder: Path, ledger: Ledger, pool: TaskPool, locator: Locator
) -> None:
    add(folder, range(2))
    (folder / "placed.jpg").write_bytes(with_gps(5, 20.0, 30.0))
    prepare(ledger, pool, folder, audit=True)
    assert locate(ledger, pool, WatchedBackend(locator, 8)) == 1
    placed = rows(ledger)["placed.jpg"]
    assert placed.status is Status.DONE
    assert placed.position is not None
    assert (placed.position.latitude_deg, placed.position.longitude_deg) == (20.0, 30.0)
    assert placed.latitude_deg not in (None, 20.0)
    assert rows(ledger)["000.jpg"].reason == "NO_POSITION"


def test_weak_guesses_are_held_back_without_their_place(
    folder: Path, ledger: Ledger, pool: TaskPool, locator: Locator
) -> None:
    add(folder, range(12))
    answers = locator.locate([picture(seed) for seed in range(12)])
    locations = [location for location in answers if isinstance(location, Location)]
    least = sorted(location.probability for location in locations)[6] - 1e-5
    largest = sorted(location.radius_km for location in locations)[6] + 1e-2
    prepare(ledger, pool, folder)
    locate(ledger, pool, WatchedBackend(locator, 8), thresholds=Thresholds(least, largest))
    reasons = set()
    for row, location in zip(ledger.rows(), locations, strict=True):
        reasons.add(row.reason)
        if location.probability < least:
            assert (row.status, row.reason) == (Status.WITHHELD, "PROBABILITY_TOO_LOW")
            assert f"is below {least:g}" in row.detail
        elif location.radius_km > largest:
            assert (row.status, row.reason) == (Status.WITHHELD, "RADIUS_TOO_LARGE")
            assert f"is over {largest:g} km" in row.detail
        else:
            assert (row.status, row.reason) == (Status.DONE, "")
        is_done = row.status is Status.DONE
        assert (row.latitude_deg is not None) == is_done
        assert (row.longitude_deg is not None) == is_done
        assert bool(row.cells) == bool(row.alternatives) == is_done
        assert row.probability == pytest.approx(location.probability, abs=1e-4)
    assert reasons == {"", "PROBABILITY_TOO_LOW", "RADIUS_TOO_LARGE"}


@dataclass(frozen=True)
class Refusing(WatchedBackend):
    """Has no answer to the first picture of each batch."""

    error: GeoSurgeError = field(default_factory=lambda: EmbeddingInvalidError("the embedding is not finite"))

    def locate(self, queries: Sequence[Query], options: LocateOptions) -> list[Location | GeoSurgeError]:
        return [self.error, *super().locate(queries, options)[1:]]


def test_a_picture_without_an_answer_fails_alone_and_is_asked_for_again(
    folder: Path, ledger: Ledger, pool: TaskPool, locator: Locator
) -> None:
    add(folder, [0, 1, 0, 2])
    prepare(ledger, pool, folder)
    assert locate(ledger, pool, Refusing(locator, 4)) == 4
    failed = [row for row in ledger.rows() if row.status is Status.FAILED]
    assert [(Path(row.path).name, row.reason) for row in failed] == [
        ("000.jpg", "EMBEDDING_INVALID"),
        ("002.jpg", "EMBEDDING_INVALID"),
    ]
    assert all(len(row.content_hash) == 64 for row in failed)
    prepare(ledger, pool, folder)
    backend = WatchedBackend(locator, 4)
    assert locate(ledger, pool, backend) == 2
    assert backend.count == 1
    assert ledger.counts() == {Status.DONE: 4}


def test_an_answer_that_would_be_every_pictures_ends_the_run(folder: Path, ledger: Ledger, locator: Locator) -> None:
    add(folder, range(3))
    with TaskPool(1) as pool:
        prepare(ledger, pool, folder)
        with pytest.raises(UsageError, match="no leaf is left"):
            locate(ledger, pool, Refusing(locator, 4, error=RegionEmptyError("no leaf is left")))
    with TaskPool(1) as pool, pytest.raises(OverloadedError):
        locate(ledger, pool, Refusing(locator, 4, error=OverloadedError("no room")))
    assert ledger.counts() == {None: 3}


@dataclass(frozen=True)
class Failing(WatchedBackend):
    """Cannot go on with its first batch, but takes its time over it: the others are located meanwhile."""

    concurrency: int = 3
    others: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    turns: Iterator[int] = field(default_factory=lambda: iter(range(1000)))

    def locate(self, queries: Sequence[Query], options: LocateOptions) -> list[Location | GeoSurgeError]:
        if next(self.turns) == 0:
            assert self.others.acquire(timeout=60)
            assert self.others.acquire(timeout=60)
            raise ServiceError("the GPU is lost")
        answers = super().locate(queries, options)
        self.others.release()
        return answers


def test_what_was_located_before_a_backend_failed_is_kept(
    folder: Path, ledger: Ledger, pool: TaskPool, locator: Locator
) -> None:
    add(folder, range(30))
    prepare(ledger, pool, folder)
    backend = Failing(locator, 2)
    # What a pool was doing for somebody who gave up comes out of it for the next one.
    with TaskPool(1) as own_pool, pytest.raises(ServiceError, match="GPU is lost"):
        locate(ledger, own_pool, backend)
    assert backend.count >= 4
    assert ledger.counts()[Status.DONE] == backend.count
    assert committed(folder) == backend.count
    prepare(ledger, pool, folder)
    rest = WatchedBackend(locator, 2)
    assert locate(ledger, pool, rest) == 30 - backend.count
    assert rest.count == 30 - backend.count
    assert ledger.counts() == {Status.DONE: 30}


def test_a_backend_that_fails_at_once_leaves_everything_to_be_done(
    folder: Path, ledger: Ledger, pool: TaskPool, locator: Locator
) -> None:
    add(folder, range(5))
    prepare(ledger, pool, folder)
    with TaskPool(1) as own_pool, pytest.raises(ServiceError):
        locate(ledger, own_pool, WatchedBackend(locator, 2, fails_after=0))
    assert ledger.counts() == {None: 5}


def test_known_contents_are_committed_as_others_are(
    folder: Path, ledger: Ledger, pool: TaskPool, locator: Locator, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(folder, [0])
    prepare(ledger, pool, folder)
    locate(ledger, pool, WatchedBackend(locator, 2))
    add(folder, [0] * 40)
    prepare(ledger, pool, folder)
    monkeypatch.setattr(locating, "_COMMIT_SECONDS", 0.0)
    seen: list[int] = []
    locate_pictures(
        ledger,
        pool,
        WatchedBackend(locator, 2),
        lambda *, failed=False: seen.append(committed(folder)),
        options=LocateOptions(),
        thresholds=Thresholds(),
    )
    assert len(seen) == 40
    assert seen[-1] == 39, "all but the one that it is told of"


def test_answers_are_kept_apart_by_what_was_asked(locator: Locator) -> None:
    backend = WatchedBackend(locator, 2)
    keys = [
        answer_key(backend, options)
        for options in (LocateOptions(), LocateOptions(top_k=1), LocateOptions(region_tokens=("47",)))
    ]
    assert len(set(keys)) == 3
    assert keys[0] == answer_key(WatchedBackend(locator, 32), LocateOptions())
    assert keys[0].index_version == "tiny"
