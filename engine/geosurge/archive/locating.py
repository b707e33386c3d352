"""The steps of a run up to the answers: note what is there, look for positions, locate the rest.

The thread that calls owns the ledger. Pictures are decoded by the processes of a `TaskPool` and located, in batches,
on threads of their own; all queues are short, so that memory does not grow with the archive.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict, deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Final, Protocol

from geosurge.archive.backends import Backend, Query
from geosurge.archive.ledger import AnswerKey, Ledger
from geosurge.archive.pool import TaskPool
from geosurge.archive.rows import HAS_POSITION, NO_POSITION, PROBABILITY_TOO_LOW, RADIUS_TOO_LARGE, Reason
from geosurge.archive.sidecar_states import SidecarStates
from geosurge.archive.sources import Found
from geosurge.archive.tasks import Decode, Decoded, Failure, Look, Looked, Outcome, Unusable
from geosurge.errors import EmbeddingInvalidError, GeoSurgeError, ImageError, InputError, UsageError
from geosurge.location import Alternative, CredibleRegion, LocateOptions, Location, PathCell

_COMMIT_SECONDS: Final = 1.0
_NOTED_AT_ONCE: Final = 1000
_MAX_BATCH_BYTES: Final = 32_000_000
_MAX_WAITING: Final = 1000


class Progress(Protocol):
    """Called after every picture."""

    def __call__(self, *, failed: bool = False) -> None:
        """Counts a picture, and whether it failed."""


@dataclass(frozen=True)
class Thresholds:
    """Which guesses are held back.

    Attributes:
        min_probability: Least probability of the most likely leaf.
        max_radius_km: Largest radius.
    """

    min_probability: float = 0.0
    max_radius_km: float | None = None

    def reason_to_withhold(self, location: Location) -> Reason | None:
        """Why a guess is held back, if it is."""
        if location.probability < self.min_probability:
            detail = f"the probability {location.probability:.3g} is below {self.min_probability:g}"
            return Reason(PROBABILITY_TOO_LOW, detail)
        if self.max_radius_km is not None and location.radius_km > self.max_radius_km:
            detail = f"the radius of {location.radius_km:.1f} km is over {self.max_radius_km:g} km"
            return Reason(RADIUS_TOO_LARGE, detail)
        return None


@dataclass
class _Batch:
    """Pictures that are located together: one query for each content, and the pictures that have it."""

    hashes: list[bytes] = field(default_factory=list)
    queries: list[Query] = field(default_factory=list)
    decode_ms: list[float] = field(default_factory=list)
    byte_count: int = 0
    pictures: int = 0

    def add(self, content_hash: bytes, decoded: Decoded) -> None:
        """Adds a content, by its hash without what this run wrote into it."""
        self.hashes.append(content_hash)
        self.queries.append(decoded.query)
        self.decode_ms.append(decoded.decode_ms)
        # Pixels are bounded by the batch size.
        if isinstance(decoded.query, bytes):
            self.byte_count += len(decoded.query)


def note_pictures(ledger: Ledger, found: Iterable[Found], progress: Progress) -> None:
    """Notes what is there, as it is found."""
    ledger.begin_scan()
    chunk: list[Found] = []
    states = SidecarStates()
    for item in found:
        chunk.append(replace(item, sidecars=states.of(item)))
        progress(failed=item.error is not None)
        if len(chunk) == _NOTED_AT_ONCE:
            ledger.note(chunk)
            ledger.commit()
            chunk.clear()
    ledger.note(chunk)
    ledger.commit()


def look_for_positions(ledger: Ledger, pool: TaskPool, progress: Progress, *, audit: bool) -> None:
    """Finds out which pictures have a position; these are skipped, or in an audit the others."""
    tasks = (Look(noted.key, noted.found) for noted in ledger.to_look_at())
    commits = _Commits(ledger)
    for key, outcome in pool.run(tasks):
        if isinstance(outcome, Looked):
            # What this run wrote for the picture itself says nothing about it.
            position = outcome.position
            is_own = position is not None and ledger.journal.is_own_guess(key, position, outcome.run_id)
            looked = Looked(None) if is_own else outcome
            ledger.looked_at(key, looked.position, reason_to_skip(looked, audit=audit))
        else:
            ledger.failed(key, _failure(outcome))
        progress(failed=not isinstance(outcome, Looked))
        commits.now_and_then()
    ledger.commit()


def reason_to_skip(looked: Looked, *, audit: bool) -> Reason | None:
    """Why a picture is not located, if it is not.

    Args:
        looked: What it says of itself.
        audit: Whether the pictures with a position are the ones that are wanted.
    """
    position = looked.position
    if audit:
        if position is None:
            return Reason(NO_POSITION, "the picture has no position that a guess could be compared with")
        if looked.run_id:
            return Reason(NO_POSITION, f"the picture's position is itself a guess, of run {looked.run_id}")
    elif position is not None:
        place = f"{position.latitude_deg:.6f}, {position.longitude_deg:.6f}"
        by = f", a guess of run {looked.run_id}" if looked.run_id else ""
        return Reason(HAS_POSITION, f"the picture has a position already: {place} ({position.source}{by})")
    return None


def locate_pictures(
    ledger: Ledger,
    pool: TaskPool,
    backend: Backend,
    progress: Progress,
    *,
    options: LocateOptions,
    thresholds: Thresholds,
) -> None:
    """Locates every picture that is still to be located; a content that is known already is not located again.

    Raises:
        GeoSurgeError: The backend cannot go on; what was located until then is in the ledger.
    """
    with ThreadPoolExecutor(backend.concurrency, "geosurge-locate") as threads:
        locating = _Locating(ledger, backend, progress, threads, options=options, thresholds=thresholds)
        tasks = (Decode(noted.key, noted.found, backend.preprocessing, backend.limits) for noted in ledger.to_locate())
        try:
            for key, outcome in pool.run(tasks):
                locating.take(key, outcome)
            locating.finish()
        except (GeoSurgeError, KeyboardInterrupt):
            locating.stop()
            raise
        finally:
            ledger.commit()


class _Locating:
    """The pictures between decoding and the ledger."""

    def __init__(
        self,
        ledger: Ledger,
        backend: Backend,
        progress: Progress,
        threads: ThreadPoolExecutor,
        *,
        options: LocateOptions,
        thresholds: Thresholds,
    ) -> None:
        self._ledger = ledger
        self._backend = backend
        self._options = options
        self._thresholds = thresholds
        self._progress = progress
        self._threads = threads
        self._key = answer_key(backend, options)
        self._commits = _Commits(ledger)
        self._batch = _Batch()
        self._under_way: deque[tuple[_Batch, Future[list[Location | GeoSurgeError]]]] = deque()
        self._waiting: defaultdict[bytes, list[int]] = defaultdict(list)

    def take(self, key: int, outcome: Outcome) -> None:
        """Takes what came of reading a picture."""
        if not isinstance(outcome, Decoded):
            content_hash = outcome.content_hash if isinstance(outcome, Unusable) else None
            self._fail(key, _failure(outcome), content_hash)
            return
        content_hash = self._ledger.journal.hash_before(key, outcome.content_hash)
        known = None if content_hash in self._waiting else self._ledger.answer(content_hash, self._key)
        if known is not None:
            self._settle(key, content_hash, *known)
            return
        self._waiting[content_hash].append(key)
        if len(self._waiting[content_hash]) == 1:
            self._batch.add(content_hash, outcome)
        if content_hash in self._batch.hashes:
            self._batch.pictures += 1
            if self._is_full(self._batch):
                self._submit()
        # One batch more than is being worked on, so that no thread waits for the next.
        at_once = self._backend.concurrency + 1
        while self._under_way and (self._under_way[0][1].done() or len(self._under_way) > at_once):
            self._note_next()

    def finish(self) -> None:
        """Locates the rest, and waits for it."""
        if self._batch.hashes:
            self._submit()
        while self._under_way:
            self._note_next()

    def stop(self) -> None:
        """Gives up what nobody has begun to locate; what is being located is not lost."""
        begun = [(batch, future) for batch, future in self._under_way if not future.cancel()]
        for batch, future in begun:
            if future.exception() is None:
                self._note(batch, future.result())

    def _is_full(self, batch: _Batch) -> bool:
        return (
            len(batch.hashes) >= self._backend.batch_size
            or batch.byte_count >= _MAX_BATCH_BYTES
            # However many copies of a few contents come: what is waiting is lost when the run is killed.
            or batch.pictures >= _MAX_WAITING
        )

    def _submit(self) -> None:
        batch, self._batch = self._batch, _Batch()
        self._under_way.append((batch, self._threads.submit(self._backend.locate, batch.queries, self._options)))

    def _note_next(self) -> None:
        batch, future = self._under_way[0]
        outcomes = future.result()
        self._under_way.popleft()
        self._note(batch, outcomes)

    def _note(self, batch: _Batch, outcomes: list[Location | GeoSurgeError]) -> None:
        for content_hash, decode_ms, outcome in zip(batch.hashes, batch.decode_ms, outcomes, strict=True):
            keys = self._waiting.pop(content_hash)
            if isinstance(outcome, GeoSurgeError):
                _check_goes_on(outcome)
                failure = Failure.of(outcome, by_server=self._backend.preprocessing is None)
                for key in keys:
                    self._fail(key, failure, content_hash)
                continue
            location = essential(outcome, decode_ms)
            answer = self._ledger.add_answer(content_hash, self._key, location)
            for key in keys:
                self._settle(key, content_hash, answer, location)

    def _settle(self, key: int, content_hash: bytes, answer: int, location: Location) -> None:
        self._ledger.located(key, content_hash, answer, self._thresholds.reason_to_withhold(location))
        self._progress()
        self._commits.now_and_then()

    def _fail(self, key: int, failure: Failure, content_hash: bytes | None) -> None:
        self._ledger.failed(key, failure, content_hash)
        self._progress(failed=True)
        self._commits.now_and_then()


class _Commits:
    """Commits at most once in `_COMMIT_SECONDS`: each waits for the disk."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._last = time.monotonic()

    def now_and_then(self) -> None:
        if time.monotonic() - self._last >= _COMMIT_SECONDS:
            self._ledger.commit()
            self._last = time.monotonic()


def _check_goes_on(error: GeoSurgeError) -> None:
    """After an answer that is an error: raises it where it is not the picture's, and would be every other one's."""
    if isinstance(error, ImageError | EmbeddingInvalidError):
        return
    if isinstance(error, InputError):
        raise UsageError(str(error)) from error
    raise error


def answer_key(backend: Backend, options: LocateOptions) -> AnswerKey:
    """What makes this backend's answers the same as others."""
    return AnswerKey(backend.index_version, backend.encoder_hash, json.dumps(asdict(options), sort_keys=True))


def _failure(outcome: Outcome) -> Failure:
    if isinstance(outcome, Unusable):
        return outcome.failure
    assert isinstance(outcome, Failure)
    return outcome


def essential(location: Location, decode_ms: float) -> Location:
    """What rows hold of an answer, to the digits that mean something.

    The last digits of float64 depend on the other pictures of the batch.
    """
    return replace(
        location,
        latitude_deg=round(location.latitude_deg, 7),
        longitude_deg=round(location.longitude_deg, 7),
        radius_km=round(location.radius_km, 4),
        probability=round(location.probability, 9),
        # Spelled out: `replace` takes ten times as long, and there are a dozen of these in every answer.
        path=tuple(PathCell(cell.level, cell.token, round(cell.probability, 9)) for cell in location.path),
        alternatives=tuple(
            Alternative(leaf.token, round(leaf.probability, 9), leaf.latitude_deg, leaf.longitude_deg, leaf.place)
            for leaf in location.alternatives
        ),
        credible_region=CredibleRegion((), 0.0, 0.0),
        timings=replace(location.timings, decode_ms=decode_ms or location.timings.decode_ms),
    )
