"""Writes the positions of a run into sidecars or pictures, and takes them back; the ledger is the journal.

What will be written is in the ledger, on the disk, before a file is touched, so that nothing is ever written that
could not be taken back.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from geosurge.archive.decoding import Failure, check_unchanged
from geosurge.archive.guess import Guess
from geosurge.archive.ignores import IGNORE_FILE
from geosurge.archive.ledger import APPLIED, PREPARED, UNDONE, Ledger, ToWrite
from geosurge.archive.locating import Progress
from geosurge.archive.rows import Status
from geosurge.archive.sources import Found
from geosurge.archive.writes import Write, WriteKind, apply, prepare, undo
from geosurge.errors import GeoSurgeError, HasPositionError, OutputNotWritableError, WriteUnsupportedError

BACKUP_DIRECTORY: Final = "backup"

_WRITTEN_AT_ONCE: Final = 64


def write_positions(ledger: Ledger, kind: WriteKind, directory: Path, progress: Progress) -> None:
    """Writes the position of every picture that is done; one that cannot be written fails.

    What was written for a picture that was located again is replaced, or taken back where the new guess is withheld.

    Args:
        ledger: The run's ledger.
        kind: Into sidecars or into the pictures.
        directory: Where the run's files are; backups go to a folder in it.
        progress: Called after every picture.
    """
    backup = directory / BACKUP_DIRECTORY
    _keep_out_of_scans(backup)
    for key, found, older in ledger.writes(PREPARED, APPLIED, status=Status.WITHHELD):
        if older.kind == kind:
            _take_back(ledger, key, found, older, backup)
    prepared: dict[bytes, tuple[ToWrite, Write]] = {}
    for picture in ledger.to_write(kind):
        write = _prepare(ledger, picture, kind, backup)
        if write is not None and write.target in prepared:
            # Two pictures share a sidecar: the second one has to be prepared for what the first one made of it.
            _apply_all(ledger, prepared)
            write = _prepare(ledger, picture, kind, backup)
        if write is not None:
            ledger.write_prepared(picture.key, picture.answer, write)
            prepared[write.target] = picture, write
        if len(prepared) == _WRITTEN_AT_ONCE:
            _apply_all(ledger, prepared)
        progress()
    _apply_all(ledger, prepared)


def _keep_out_of_scans(backup: Path) -> None:
    """Backups are pictures too, which a run over the folder around them must not find."""
    try:
        backup.mkdir(exist_ok=True)
        (backup / IGNORE_FILE).write_text("*\n", encoding="utf-8")
    except OSError as error:
        raise OutputNotWritableError(f"{backup} cannot be written: {error.strerror}; make room there") from error


def finish_writes(ledger: Ledger, kind: WriteKind | None, directory: Path) -> None:
    """Ends what a killed run was writing, before its pictures are looked at again.

    Args:
        ledger: The run's ledger.
        kind: What is to be written now; of another kind, what was begun is taken back.
        directory: Where the run's files are.
    """
    for key, found, write in ledger.writes(PREPARED):
        if write.kind == kind:
            _apply(ledger, key, found, write)
        else:
            _take_back(ledger, key, found, write, directory / BACKUP_DIRECTORY)
    ledger.commit()


def undo_writes(ledger: Ledger, directory: Path) -> Iterator[tuple[str, GeoSurgeError | None]]:
    """Takes back everything that was written.

    Args:
        ledger: The run's ledger.
        directory: Where the run's files are.

    Yields:
        The name of each file that was written to, and why it was left as it is, if it was.
    """
    for key, found, write in ledger.writes(PREPARED, APPLIED):
        name = Found(write.target).name
        try:
            _undo(ledger, key, found, write, directory / BACKUP_DIRECTORY)
        except GeoSurgeError as error:
            yield name, error
        else:
            yield name, None


def _apply_all(ledger: Ledger, prepared: dict[bytes, tuple[ToWrite, Write]]) -> None:
    """Applies what was prepared, after it is in the ledger and on the disk."""
    ledger.commit()
    for picture, write in prepared.values():
        _apply(ledger, picture.key, picture.found, write)
    ledger.commit()
    prepared.clear()


def _prepare(ledger: Ledger, picture: ToWrite, kind: WriteKind, backup: Path) -> Write | None:
    """What is to be written for a picture; or notes why nothing is."""
    try:
        if picture.found.is_member:
            raise WriteUnsupportedError(
                f"{picture.found.name} is in a shard, which is not changed; unpack the shard, or leave out --write"
            )
        check_unchanged(picture.found)
        # Of another index version or of other pixels; or one that another program came in between.
        if (written := ledger.write_of(picture.key, kind)) is not None:
            _undo(ledger, picture.key, picture.found, written, backup)
        return prepare(Path(os.fsdecode(picture.found.path)), kind, _guess(ledger, picture), backup)
    except HasPositionError as error:
        ledger.skipped(picture.key, error.reason, str(error))
    except GeoSurgeError as error:
        ledger.failed(picture.key, Failure.of(error))
    return None


def _guess(ledger: Ledger, picture: ToWrite) -> Guess:
    return Guess(
        latitude_deg=picture.location.latitude_deg,
        longitude_deg=picture.location.longitude_deg,
        radius_km=picture.location.radius_km,
        probability=picture.location.probability,
        index_version=picture.location.index_version,
        encoder_hash=picture.encoder_hash,
        run_id=ledger.run_id,
    )


def _take_back(ledger: Ledger, key: int, found: Found, write: Write, backup: Path) -> None:
    """Undoes what is not wanted any more; where it cannot, the picture fails."""
    try:
        _undo(ledger, key, found, write, backup)
    except GeoSurgeError as error:
        ledger.failed(key, Failure.of(error))
        ledger.commit()


def _undo(ledger: Ledger, key: int, found: Found, write: Write, backup: Path) -> None:
    """Undoes a write and notes it.

    Raises:
        GeoSurgeError: The file is left as it is.
    """
    try:
        check_unchanged(found)
        is_ours = True
    except GeoSurgeError:
        # Somebody has put another picture there, which the next scan is to find changed.
        is_ours = False
    undo(write, backup)
    ledger.write_ended(key, write.kind, UNDONE)
    if is_ours:
        _picture_is_now(ledger, key, found, write.kind)
    ledger.commit()


def _apply(ledger: Ledger, key: int, found: Found, write: Write) -> None:
    try:
        apply(write)
    except GeoSurgeError as error:
        ledger.failed(key, Failure.of(error))
    else:
        ledger.write_ended(key, write.kind, APPLIED)
        _picture_is_now(ledger, key, found, write.kind)


def _picture_is_now(ledger: Ledger, key: int, found: Found, kind: WriteKind) -> None:
    # Of a picture that is gone meanwhile, the next scan will tell.
    if kind == "exif":
        with contextlib.suppress(OSError):
            status = Path(os.fsdecode(found.path)).stat()
            ledger.picture_is_now(key, status.st_size, status.st_mtime_ns)
