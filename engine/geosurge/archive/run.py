"""One run over an archive, from its sources to its rows; whatever was interrupted goes on where it was."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Protocol

from geosurge.archive.audit import Audit, audit
from geosurge.archive.cluster import Cluster, locate_on_cluster
from geosurge.archive.decoding import DecodePool
from geosurge.archive.engines import Engine
from geosurge.archive.ledger import LEDGER_FILE, Ledger
from geosurge.archive.locating import Asked, answer_key, locate_pictures, look_for_positions, note_pictures
from geosurge.archive.outputs import Format, write_outputs
from geosurge.archive.paths import shown
from geosurge.archive.report import RunSummary, write_report
from geosurge.archive.rows import Status
from geosurge.archive.sources import ScanCounts, ScanOptions, scan
from geosurge.archive.tagging import finish_writes, write_positions
from geosurge.archive.writes import WriteKind
from geosurge.errors import OutputNotWritableError

REPORT_FILE: Final = "report.html"


@dataclass(frozen=True)
class Job:
    """What a run is asked for.

    Attributes:
        sources: Folders, lists, shards and single pictures.
        directory: Where the ledger, the outputs and the backups go.
        globs: What of the sources is wanted, in gitignore's syntax; by default what looks like a picture.
        asked: How pictures are located, and which guesses are held back.
        write: Where positions are written to as well: into sidecars, or into the pictures.
        formats: What the rows are put out as.
        report: Whether to write the page for people.
        audit: Locate the pictures that have a position, instead of those that have none, and compare.
        relocate: Locate again what another index version has located.
        workers: Processes that decode.
        cluster: Where pictures are located, if not here.
    """

    sources: tuple[str, ...]
    directory: Path
    globs: tuple[str, ...] = ()
    asked: Asked = field(default_factory=Asked)
    write: WriteKind | None = None
    formats: tuple[Format, ...] = (Format.PARQUET,)
    report: bool = False
    audit: bool = False
    relocate: bool = False
    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    cluster: Cluster | None = None

    def identity(self) -> dict[str, object]:
        """What two runs in one directory must have in common: everything that changes which rows there are."""
        return {
            "sources": sorted({shown(os.fsencode(Path(source).resolve())) for source in self.sources}),
            "glob": sorted(self.globs),
            "audit": self.audit,
            "min_probability": self.asked.min_probability,
            "max_radius_km": self.asked.max_radius_km,
            **asdict(self.asked.options),
        }


@dataclass(frozen=True)
class Plan:
    """What a run is about to do.

    Attributes:
        found: Pictures found, and places that cannot be looked into.
        passed_over: Files that are no pictures.
        to_locate: Pictures that will be located.
        counts: The others, by what became of them.
    """

    found: int
    passed_over: ScanCounts
    to_locate: int
    counts: dict[Status, int]


@dataclass(frozen=True)
class Result:
    """What a run has done.

    Attributes:
        counts: Pictures by what became of them; together all that were found.
        failures: Failed pictures by reason, most frequent first.
        seconds: Time that the run took.
        located: Pictures that it located or found a known answer for.
        files: What it has written.
        audit: The comparison, if it was asked for and something could be compared.
    """

    counts: dict[Status, int]
    failures: dict[str, int]
    seconds: float
    located: int
    files: list[Path]
    audit: Audit | None = None


class Observer(Protocol):
    """Is told how a run goes on."""

    def phase(self, name: str, total: int | None) -> Callable[[], None]:
        """A phase begins.

        Args:
            name: What is done in it.
            total: To how many pictures, where that is known.

        Returns:
            What to call after every picture.
        """

    def plan(self, plan: Plan) -> None:
        """It is known what will be done."""


def run(
    job: Job, open_engine: Callable[[], AbstractContextManager[Engine]], observer: Observer, *, dry_run: bool = False
) -> Result | None:
    """Does a run, or the rest of one that was interrupted.

    Args:
        job: What is asked for.
        open_engine: Opens what locates; not called when there is nothing to locate.
        observer: Is told how it goes on.
        dry_run: Stop after the plan; the directory stays as it is.

    Returns:
        What was done; ``None`` of a dry run.

    Raises:
        UsageError: A source does not exist, or the directory holds another run.
        LedgerError: The ledger cannot be used.
        OutputNotWritableError: The disk is full, or the directory cannot be written.
        GeoSurgeError: The engine cannot be opened, or cannot go on; the next run does the rest.
    """
    started, begun = datetime.now(UTC), time.perf_counter()
    found = scan(job.sources, ScanOptions(job.globs), counts := ScanCounts())
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(_ledger_directory(job.directory, dry_run=dry_run))
        ledger = stack.enter_context(Ledger.open(directory, job.identity()))
        pool = stack.enter_context(DecodePool(job.workers))
        finish_writes(ledger)
        note_pictures(ledger, found, observer.phase("finding pictures", None))
        observer_look = observer.phase("looking for positions", ledger.counts().get(None, 0))
        look_for_positions(ledger, pool, observer_look, audit=job.audit)
        engine: Engine | None = None
        if job.relocate:
            engine = stack.enter_context(open_engine())
            ledger.ask_again(answer_key(engine, job.asked.options))
        before = ledger.counts()
        to_locate = before.pop(None, 0)
        observer.plan(Plan(sum(before.values()) + to_locate, counts, to_locate, _known(before)))
        if dry_run:
            return None
        if to_locate and job.cluster is not None:
            progress = observer.phase("locating", to_locate)
            locate_on_cluster(ledger, job.cluster, job.directory, job.asked, progress)
        elif to_locate:
            engine = engine or stack.enter_context(open_engine())
            locate_pictures(ledger, pool, engine, job.asked, observer.phase("locating", to_locate))
        if job.write is not None:
            write_positions(ledger, job.write, job.directory, observer.phase("writing positions", None))
        after = _known(ledger.counts())
        files = write_outputs(ledger.rows(), job.directory, job.formats)
        seconds = time.perf_counter() - begun
        if job.report:
            summary = RunSummary(
                started=started,
                seconds=seconds,
                pictures_per_s=to_locate / seconds,
                sources=job.sources,
                index_version=", ".join(ledger.index_versions()),
                options={name: str(value) for name, value in job.identity().items() if name != "sources"},
            )
            files.append(write_report(ledger.rows(), job.directory / REPORT_FILE, summary=summary))
        comparison = audit(ledger.rows()) if job.audit else None
        return Result(after, ledger.reasons(Status.FAILED), seconds, to_locate, files, comparison)


def _known(counts: dict[Status | None, int]) -> dict[Status, int]:
    return {status: counts.get(status, 0) for status in Status}


@contextlib.contextmanager
def _ledger_directory(directory: Path, *, dry_run: bool) -> Iterator[Path]:
    """The run's directory; of a dry run that would begin one, a temporary one."""
    if dry_run and not (directory / LEDGER_FILE).exists():
        with tempfile.TemporaryDirectory(prefix="geosurge-geotag-") as temporary:
            yield Path(temporary)
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputNotWritableError(f"{directory} cannot be made: {error.strerror}; name another directory") from error
    yield directory
