"""One run over an archive, from its sources to its rows; whatever was interrupted goes on where it was."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
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
from geosurge.archive.outputs.files import replacing
from geosurge.archive.paths import shown
from geosurge.archive.report import RunSummary, write_report
from geosurge.archive.rows import Status
from geosurge.archive.sources import Found, ScanCounts, ScanOptions, scan
from geosurge.archive.tagging import finish_writes, write_positions
from geosurge.archive.writes import WriteKind
from geosurge.cores import usable_cores
from geosurge.errors import LedgerError, OutputNotWritableError, RunConflictError

REPORT_FILE: Final = "report.html"
AUDIT_FILE: Final = "audit.json"


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
    workers: int = field(default_factory=usable_cores)
    cluster: Cluster | None = None

    def asked_for(self) -> dict[str, str]:
        """What is not as it is by default, by the name of its flag."""
        usual = Job(self.sources, self.directory).identity()
        return {
            f"--{name.replace('_', '-')}": json.dumps(value)
            for name, value in self.identity().items()
            if value != usual[name]
        }

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
        located: Pictures that it located, or whose content it knew.
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
    counts = ScanCounts()
    found = _not_own(scan(job.sources, ScanOptions(job.globs), counts), job.directory)
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(_ledger_directory(job.directory, dry_run=dry_run))
        ledger = stack.enter_context(Ledger.open(directory, job.identity(), keeps=not dry_run))
        pool = stack.enter_context(DecodePool(job.workers))
        if not dry_run:
            finish_writes(ledger, job.write, job.directory)
        note_pictures(ledger, found, observer.phase("finding pictures", None))
        progress = observer.phase("looking for positions", ledger.counts().get(None, 0))
        look_for_positions(ledger, pool, progress, audit=job.audit)
        engine: Engine | None = None
        if job.relocate:
            _check_relocation(ledger, job.write)
            engine = stack.enter_context(open_engine())
            ledger.ask_again(answer_key(engine, job.asked.options))
        before = ledger.counts()
        to_locate = before.get(None, 0)
        observer.plan(Plan(sum(before.values()), counts, to_locate, _known(before)))
        if dry_run:
            return None
        if to_locate:
            progress = observer.phase("locating", to_locate)
            if job.cluster is not None:
                locate_on_cluster(ledger, job.cluster, job.directory, job.asked, progress)
            else:
                locate_pictures(ledger, pool, engine or stack.enter_context(open_engine()), job.asked, progress)
        located = _answered(ledger.counts()) - _answered(before)
        if job.write is not None:
            write_positions(ledger, job.write, job.directory, observer.phase("writing positions", None))
        return _put_out(ledger, job, located, started, lambda: time.perf_counter() - begun)


def _put_out(ledger: Ledger, job: Job, located: int, started: datetime, seconds_so_far: Callable[[], float]) -> Result:
    """Writes the rows in every form that is asked for."""
    counts = ledger.counts()
    if missing := counts.get(None, 0):
        raise LedgerError(f"{missing} pictures were left without a row; give the same command again")
    files = write_outputs(ledger.rows(), job.directory, job.formats)
    if job.report:
        seconds = seconds_so_far()
        summary = RunSummary(
            started=started,
            seconds=seconds,
            pictures_per_s=located / seconds,
            sources=job.sources,
            index_version=", ".join(ledger.index_versions()),
            options=job.asked_for(),
        )
        files.append(write_report(ledger.rows(), job.directory / REPORT_FILE, summary=summary))
    comparison = audit(ledger.rows()) if job.audit else None
    if comparison is not None:
        with replacing(job.directory / AUDIT_FILE) as file:
            file.write(f"{json.dumps(asdict(comparison), indent=2)}\n".encode())
        files.append(job.directory / AUDIT_FILE)
    return Result(_known(counts), ledger.reasons(Status.FAILED), seconds_so_far(), located, files, comparison)


def _answered(counts: Mapping[Status | None, int]) -> int:
    return counts.get(Status.DONE, 0) + counts.get(Status.WITHHELD, 0)


def _check_relocation(ledger: Ledger, write: WriteKind | None) -> None:
    """Refuses to give pictures other rows than the positions that were written for them say."""
    older = ledger.written_kinds() - {write}
    if older:
        raise RunConflictError(
            f"this run has written positions ({', '.join(sorted(older))}), which would no longer agree with its rows; "
            "take them back first (geosurge geotag --undo), or give --relocate with the same --write"
        )


def _known(counts: Mapping[Status | None, int]) -> dict[Status, int]:
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


def _not_own(found: Iterator[Found], directory: Path) -> Iterator[Found]:
    """What is not the run's own, where its directory lies in a source and a glob or a link leads there."""
    home = os.fsencode(directory.resolve()) + b"/"
    names = tuple(
        home + name for name in (b"ledger.sqlite", b"results.", b"report.html", b"audit.json", b"backup/", b"ray/")
    )
    return (item for item in found if not item.path.startswith(names))
