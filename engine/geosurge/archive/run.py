"""One run over an archive, from its sources to its rows; whatever was interrupted goes on where it was."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Protocol

from geosurge.archive.audit import Audit, audit
from geosurge.archive.backends import Backend
from geosurge.archive.cluster import CLUSTER_DIRECTORY, Cluster, clear_exchanges, locate_on_cluster
from geosurge.archive.ledger import LEDGER_FILE, LEDGER_FILES, Ledger
from geosurge.archive.locating import (
    Progress,
    Thresholds,
    answer_key,
    locate_pictures,
    look_for_positions,
    note_pictures,
)
from geosurge.archive.outputs import Format, write_outputs
from geosurge.archive.outputs.files import replacing
from geosurge.archive.pool import TaskPool
from geosurge.archive.report import RunSummary, write_report
from geosurge.archive.rows import Status
from geosurge.archive.sources import Found, ScanCounts, scan
from geosurge.archive.sources.paths import shown, within
from geosurge.archive.writes.file_write import WriteKind
from geosurge.archive.writes.run_writes import BACKUP_DIRECTORY, finish_writes, write_positions
from geosurge.cores import usable_cores
from geosurge.errors import LedgerError, NothingFoundError, OutputNotWritableError, RunConflictError, UsageError
from geosurge.location import LocateOptions

REPORT_FILE: Final = "report.html"
AUDIT_FILE: Final = "audit.json"

_OWN_NAMES: Final = frozenset(
    os.fsencode(name)
    for name in (
        *LEDGER_FILES,
        *(form.file_name for form in Format),
        REPORT_FILE,
        AUDIT_FILE,
        BACKUP_DIRECTORY,
        CLUSTER_DIRECTORY,
    )
)
"""What a run makes in its directory."""

_SHOWN_SOURCES: Final = 3


@dataclass(frozen=True)
class Job:
    """What a run is asked for.

    Attributes:
        sources: Folders, lists, shards and single pictures.
        directory: Where the ledger, the outputs and the backups go.
        globs: What of the sources is wanted, in gitignore's syntax; by default what looks like a picture.
        options: How pictures are located.
        thresholds: Which guesses are held back.
        write: Where positions are written to as well: into sidecars, or into the pictures.
        formats: What the rows are put out as; forms that are there of an earlier run are kept up to date as well.
        report: Whether to write the page for people.
        audit: Locate the pictures that have a position, instead of those that have none, and compare.
        relocate: Locate again what another index version has located.
        workers: Processes that decode.
        cluster: Where pictures are located, if not here.
    """

    sources: tuple[str, ...]
    directory: Path
    globs: tuple[str, ...] = ()
    options: LocateOptions = field(default_factory=LocateOptions)
    thresholds: Thresholds = field(default_factory=Thresholds)
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
            f"--{name.removesuffix('_tokens').replace('_', '-')}": json.dumps(value)
            for name, value in self.identity().items()
            if value != usual[name]
        }

    def identity(self) -> dict[str, object]:
        """What two runs in one directory must have in common: everything that changes which rows there are."""
        return {
            "sources": sorted({shown(os.fsencode(Path(source).resolve())) for source in self.sources}),
            "glob": sorted(self.globs),
            "audit": self.audit,
            **asdict(self.thresholds),
            **asdict(self.options),
        }


@dataclass(frozen=True)
class Plan:
    """What a run is about to do.

    Attributes:
        found: Pictures found, and places that cannot be looked into.
        passed_over: Files that are no pictures.
        to_locate: Pictures that will be located.
        counts: The others, by what became of them.
        failures: Those of them that failed, by reason, most frequent first.
        audit: Whether those that are skipped are the ones without a position.
    """

    found: int
    passed_over: ScanCounts
    to_locate: int
    counts: dict[Status, int]
    failures: dict[str, int]
    audit: bool


@dataclass(frozen=True)
class Result:
    """What a run has done.

    Attributes:
        counts: Pictures by what became of them; together all that were found.
        failures: Failed pictures by reason, most frequent first.
        examples: One of them for each reason.
        seconds: Time that the run took.
        located: Pictures that it located, or whose content it knew.
        files: What it has written.
        audit: The comparison, if it was asked for and something could be compared.
        written: Positions that it wrote into sidecars or pictures; ``None`` if it was not to write any.
    """

    counts: dict[Status, int]
    failures: dict[str, int]
    examples: dict[str, str]
    seconds: float
    located: int
    files: list[Path]
    audit: Audit | None = None
    written: int | None = None


class Observer(Protocol):
    """Is told how a run goes on."""

    def phase(self, name: str, total: int | None) -> Progress:
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
    job: Job, open_backend: Callable[[], AbstractContextManager[Backend]], observer: Observer, *, dry_run: bool = False
) -> Result | None:
    """Does a run, or the rest of one that was interrupted.

    Args:
        job: What is asked for.
        open_backend: Opens what locates; not called when there is nothing to locate.
        observer: Is told how it goes on.
        dry_run: Stop after the plan; the directory stays as it is.

    Returns:
        What was done; ``None`` of a dry run.

    Raises:
        UsageError: A source does not exist, or the directory holds another run, or what another program put there
            under the name of a file that is asked for.
        NothingFoundError: There is no picture at all; what an earlier run put out stays as it is.
        LedgerError: The ledger cannot be used.
        OutputNotWritableError: The disk is full, or the directory cannot be written.
        GeoSurgeError: The backend cannot be opened, or cannot go on; the next run does the rest.
    """
    started, begun = datetime.now(UTC), time.perf_counter()
    counts = ScanCounts()
    found = _not_own(scan(job.sources, job.globs, counts), job.directory)
    progress = observer.phase("finding pictures", None)
    if not (job.directory / LEDGER_FILE).exists():
        _check_outputs(job, lambda _: False)
    # Known before anything is made or changed: a wrong path, or a disk that is not mounted, must not look like a run.
    if (first := next(found, None)) is None:
        raise NothingFoundError(_nothing_found(job, counts))
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(_ledger_directory(job.directory, dry_run=dry_run))
        ledger = stack.enter_context(Ledger.open(directory, job.identity(), keeps=not dry_run))
        _check_outputs(job, ledger.is_output)
        pool = stack.enter_context(TaskPool(job.workers))
        if not dry_run:
            finish_writes(ledger, job.write, job.directory)
        note_pictures(ledger, itertools.chain([first], found), progress)
        progress = observer.phase("looking for positions", ledger.counts().get(None, 0))
        look_for_positions(ledger, pool, progress, audit=job.audit)
        backend: Backend | None = None
        if job.relocate:
            _check_relocation(ledger, job.write)
            backend = stack.enter_context(open_backend())
            ledger.ask_again(answer_key(backend, job.options))
        before = ledger.counts()
        to_locate = before.get(None, 0)
        failures = ledger.reasons(Status.FAILED)
        observer.plan(Plan(sum(before.values()), counts, to_locate, _known(before), failures, job.audit))
        if dry_run:
            return None
        if to_locate:
            progress = observer.phase("locating", to_locate)
            if job.cluster is not None:
                locate_on_cluster(
                    ledger, job.cluster, job.directory, progress, options=job.options, thresholds=job.thresholds
                )
            else:
                backend = backend or stack.enter_context(open_backend())
                locate_pictures(ledger, pool, backend, progress, options=job.options, thresholds=job.thresholds)
        clear_exchanges(job.directory)
        located = _answered(ledger.counts()) - _answered(before)
        written = None
        if job.write is not None:
            written = write_positions(ledger, job.write, job.directory, observer.phase("writing positions", None))
        result = _put_out(ledger, job, located, started, lambda: time.perf_counter() - begun)
        return replace(result, written=written)


def _nothing_found(job: Job, counts: ScanCounts) -> str:
    sources = ", ".join(job.sources[:_SHOWN_SOURCES]) + (", ..." if len(job.sources) > _SHOWN_SOURCES else "")
    if passed_over := str(counts):
        wanted = f"what --glob {' '.join(job.globs)} takes" if job.globs else "names such as .jpg, .png, .heic or .dng"
        message = f"no pictures found in {sources}: looked for {wanted}; passed over {passed_over}"
    else:
        message = f"no pictures found in {sources}: nothing is there"
    if (job.directory / LEDGER_FILE).exists():
        message += f"; what the run in {job.directory} has found before stays as it is"
    return message


def _asked_outputs(job: Job) -> list[str]:
    """Names of the files that a run is asked for."""
    names = [form.file_name for form in job.formats]
    return [*names, *([REPORT_FILE] if job.report else []), *([AUDIT_FILE] if job.audit else [])]


def _check_outputs(job: Job, is_own: Callable[[str], bool]) -> None:
    """Refuses to overwrite what is not the run's own."""
    for name in _asked_outputs(job):
        path = job.directory / name
        if os.path.lexists(path) and not is_own(name):
            raise UsageError(
                f"{path} was not written by this run, which would overwrite it; move it away, or name another directory"
            )


def _put_out(ledger: Ledger, job: Job, located: int, started: datetime, seconds_so_far: Callable[[], float]) -> Result:
    """Writes the rows in every form that is asked for."""
    counts = ledger.counts()
    if missing := counts.get(None, 0):
        raise LedgerError(f"{missing} pictures were left without a row; give the same command again")
    ledger.note_outputs(_asked_outputs(job))
    # What an earlier run put out in another form would disagree with these rows.
    there = [
        form
        for form in Format
        if form not in job.formats and ledger.is_output(form.file_name) and (job.directory / form.file_name).exists()
    ]
    files = write_outputs(ledger.rows(), job.directory, [*job.formats, *there])
    if job.report:
        seconds = seconds_so_far()
        summary = RunSummary(
            started=started,
            seconds=seconds,
            pictures_per_s=located / seconds,
            sources=tuple(shown(os.fsencode(source)) for source in job.sources),
            index_version=", ".join(ledger.index_versions()),
            options=job.asked_for(),
        )
        files.append(write_report(ledger.rows(), job.directory / REPORT_FILE, summary=summary))
    comparison = _compare(ledger, job.directory / AUDIT_FILE) if job.audit else None
    if comparison is not None:
        files.append(job.directory / AUDIT_FILE)
    failures = ledger.reasons(Status.FAILED)
    examples = {reason: ledger.example(Status.FAILED, reason) for reason in failures}
    return Result(_known(counts), failures, examples, seconds_so_far(), located, files, comparison)


def _compare(ledger: Ledger, path: Path) -> Audit | None:
    """Compares guesses with the truth, in a file; with nothing to compare there is none, nor that of an earlier run."""
    comparison = audit(ledger.rows())
    if comparison is None:
        path.unlink(missing_ok=True)
    else:
        with replacing(path) as file:
            file.write(f"{json.dumps(asdict(comparison), indent=2)}\n".encode())
    return comparison


def _answered(counts: Mapping[Status | None, int]) -> int:
    return counts.get(Status.DONE, 0) + counts.get(Status.WITHHELD, 0)


def _check_relocation(ledger: Ledger, write: WriteKind | None) -> None:
    """Refuses to give pictures other rows than the positions that were written for them say."""
    older = ledger.journal.written_kinds() - {write}
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
        why = "it is a file" if directory.is_file() else error.strerror
        raise OutputNotWritableError(f"{directory} cannot be made: {why}; name another directory") from error
    yield directory


def _not_own(found: Iterator[Found], directory: Path) -> Iterator[Found]:
    """What is not the run's own, where its directory lies in a source and a glob or a link leads there."""
    home = os.fsencode(directory.resolve())
    return (item for item in found if (within(item.path, home) or b"").partition(b"/")[0] not in _OWN_NAMES)
