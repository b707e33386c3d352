"""All writes of a run: its positions go into sidecars or pictures, and are taken back.

What will be written is in the journal, on the disk, before a file is touched, so that nothing is ever written that
could not be taken back.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from geosurge.archive.ledger import Ledger
from geosurge.archive.locating import Progress, reason_to_skip
from geosurge.archive.metadata.guess import Guess
from geosurge.archive.rows import Reason, Status
from geosurge.archive.sources import Found
from geosurge.archive.sources.ignores import IGNORE_FILE
from geosurge.archive.tasks import Failure, check_unchanged, look
from geosurge.archive.writes.file_write import Write, WriteKind, apply, is_missing, prepare, undo
from geosurge.archive.writes.journal import APPLIED, PREPARED, UNDONE, PendingWrite
from geosurge.errors import (
    FileChangedError,
    GeoSurgeError,
    HasPositionError,
    OutputNotWritableError,
    WriteUnsupportedError,
)

BACKUP_DIRECTORY: Final = "geosurge-backup"
_OLDER_BACKUP_DIRECTORY: Final = "backup"
"""Where backups that a ledger names may be as well; nothing is written there."""

_WRITTEN_AT_ONCE: Final = 64


def write_positions(ledger: Ledger, kind: WriteKind, directory: Path, progress: Progress) -> int:
    """Writes the position of every picture that is done; one that cannot be written fails.

    What was written for a picture that was located again is replaced, or taken back where the new guess is withheld;
    it is taken back as well where the picture has got a position of its own. What was written and is gone, as from a
    picture that was restored from a backup, is written again.

    Args:
        ledger: The run's ledger.
        kind: Into sidecars or into the pictures.
        directory: Where the run's files are; backups go to a folder in it.
        progress: Called after every picture.

    Returns:
        How many it wrote.
    """
    _keep_out_of_scans(directory / BACKUP_DIRECTORY)
    for key, found, older in ledger.journal.writes(PREPARED, APPLIED, status=Status.WITHHELD):
        if older.kind == kind:
            _take_back(ledger, key, found, older, directory)
    for key, found, older in ledger.journal.writes(PREPARED, APPLIED, status=Status.SKIPPED):
        if older.kind == kind:
            # Where its owner has corrected the guess itself, that is the picture's position.
            _take_back(ledger, key, found, older, directory, unless_changed=True)
    for key, found, older in ledger.journal.writes(APPLIED, status=Status.DONE):
        if older.kind == kind and is_missing(_path(found), older):
            ledger.journal.note_ended(key, kind, UNDONE)
    written = 0
    prepared: dict[bytes, tuple[PendingWrite, Write]] = {}
    for picture in ledger.journal.pending(kind):
        try:
            write = _prepare(ledger, picture, kind, directory)
            if write is not None and write.target in prepared:
                # Two pictures share a sidecar: the second one has to be prepared for what the first one made of it.
                written += _apply_all(ledger, prepared, progress)
                write = _prepare(ledger, picture, kind, directory)
        except GeoSurgeError as error:
            ledger.failed(picture.key, Failure.of(error))
            progress(failed=True)
            continue
        if write is None:
            progress()
            continue
        ledger.journal.note_prepared(picture.key, picture.answer, write)
        prepared[write.target] = picture, write
        if len(prepared) == _WRITTEN_AT_ONCE:
            written += _apply_all(ledger, prepared, progress)
    return written + _apply_all(ledger, prepared, progress)


def _keep_out_of_scans(backup: Path) -> None:
    """Backups are pictures too, which a run over the folder around them must not find."""
    try:
        backup.mkdir(exist_ok=True)
        (backup / IGNORE_FILE).write_text("*\n", encoding="utf-8")
    except OSError as error:
        raise OutputNotWritableError(f"{backup} cannot be written: {error.strerror}; make room there") from error


def finish_writes(ledger: Ledger, kind: WriteKind | None, directory: Path) -> None:
    """Ends what a killed run was writing, before its pictures are looked at again.

    What was begun for a picture that is gone, or another one by now, or that got a position meanwhile, is taken back.

    Args:
        ledger: The run's ledger.
        kind: What is to be written now; of another kind, what was begun is taken back.
        directory: Where the run's files are.
    """
    for key, found, write in ledger.journal.writes(PREPARED):
        if write.kind == kind and _is_still_wanted(ledger, key, found, write):
            _apply(ledger, key, found, write)
        else:
            _take_back(ledger, key, found, write, directory)
    ledger.commit()


def _is_still_wanted(ledger: Ledger, key: int, found: Found, write: Write) -> bool:
    """Whether a picture is still the one that a write was prepared for, and nobody else says where it was taken."""
    try:
        # A picture that is written to itself may have been by the killed run; `apply` knows both states.
        if write.kind != "exif":
            check_unchanged(found)
        looked = look(found)
    except GeoSurgeError:
        return False
    position = looked.position
    return position is None or ledger.journal.is_own_guess(key, position, looked.run_id)


def undo_writes(ledger: Ledger, directory: Path) -> Iterator[tuple[str, GeoSurgeError | None]]:
    """Takes back everything that was written.

    Args:
        ledger: The run's ledger.
        directory: Where the run's files are.

    Yields:
        The name of each file that was written to, and why it was left as it is, if it was.
    """
    for key, found, write in ledger.journal.writes(PREPARED, APPLIED):
        name = Found(write.target).name
        try:
            _undo(ledger, key, found, write, directory)
        except GeoSurgeError as error:
            yield name, error
        else:
            yield name, None


def _apply_all(ledger: Ledger, prepared: dict[bytes, tuple[PendingWrite, Write]], progress: Progress) -> int:
    """Applies what was prepared, after it is in the ledger and on the disk; tells how many could be."""
    ledger.commit()
    applied = 0
    for picture, write in prepared.values():
        is_applied = _apply(ledger, picture.key, picture.found, write)
        applied += is_applied
        progress(failed=not is_applied)
    ledger.commit()
    prepared.clear()
    return applied


def _prepare(ledger: Ledger, picture: PendingWrite, kind: WriteKind, directory: Path) -> Write | None:
    """What is to be written for a picture; ``None`` for one that turns out to have a position.

    Raises:
        GeoSurgeError: Nothing can be written.
    """
    if picture.found.is_member:
        raise WriteUnsupportedError(
            f"{picture.found.name} is in a shard, which is not changed; unpack the shard, or leave out --write"
        )
    check_unchanged(picture.found)
    # Of another index version or of other pixels; or one that another program came in between.
    if (written := ledger.journal.write_of(picture.key, kind)) is not None:
        _undo(ledger, picture.key, picture.found, written, directory)
    try:
        return prepare(_path(picture.found), kind, _guess(ledger, picture), directory / BACKUP_DIRECTORY)
    except HasPositionError as error:
        _skip(ledger, picture, error)
        return None


def _skip(ledger: Ledger, picture: PendingWrite, error: HasPositionError) -> None:
    """Gives a picture that has a position the row that it would have had, and will have, if that is found at once.

    Raises:
        GeoSurgeError: It cannot be looked at any more.
    """
    looked = look(picture.found)
    ledger.looked_at(picture.key, looked.position, reason_to_skip(looked, audit=False) or Reason.of(error))


def _guess(ledger: Ledger, picture: PendingWrite) -> Guess:
    return Guess(
        latitude_deg=picture.location.latitude_deg,
        longitude_deg=picture.location.longitude_deg,
        radius_km=picture.location.radius_km,
        probability=picture.location.probability,
        index_version=picture.location.index_version,
        encoder_hash=picture.encoder_hash,
        run_id=ledger.run_id,
    )


def _take_back(
    ledger: Ledger, key: int, found: Found, write: Write, directory: Path, *, unless_changed: bool = False
) -> None:
    """Undoes what is not wanted any more; where it cannot, the picture fails.

    Args:
        ledger: The run's ledger.
        key: Of the picture.
        found: The picture.
        write: What was written, or about to be.
        directory: Where the run's files are.
        unless_changed: Whether the picture keeps its row where somebody else's changes forbid an undo.
    """
    try:
        _undo(ledger, key, found, write, directory)
    except GeoSurgeError as error:
        if not (unless_changed and isinstance(error, FileChangedError)):
            ledger.failed(key, Failure.of(error))
            ledger.commit()


def _undo(ledger: Ledger, key: int, found: Found, write: Write, directory: Path) -> None:
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
    target = Path(os.fsdecode(write.target))
    is_gone = not (write.existed or os.path.lexists(target) or os.path.lexists(_path(found)))
    if is_gone and _is_away(target.parent):
        raise FileChangedError(
            f"{target.name!r} is not there, nor is the picture {_path(found).name!r} beside it: mount their disk, or "
            "move their folder back, and undo again"
        )
    backup = directory / BACKUP_DIRECTORY
    undo(write, backup if (backup / write.backup).exists() else directory / _OLDER_BACKUP_DIRECTORY)
    ledger.journal.note_ended(key, write.kind, UNDONE)
    if is_ours:
        _picture_is_now(ledger, key, found, write, is_written=False)
    ledger.commit()


def _is_away(folder: Path) -> bool:
    """Whether a folder may be on a disk that is not mounted, or was moved: it is missing, or has nothing in it."""
    try:
        return next(folder.iterdir(), None) is None
    except OSError:
        return True


def _apply(ledger: Ledger, key: int, found: Found, write: Write) -> bool:
    """Applies a write and notes it, or notes why it cannot be; tells which."""
    try:
        apply(write)
    except GeoSurgeError as error:
        ledger.failed(key, Failure.of(error))
        return False
    ledger.journal.note_ended(key, write.kind, APPLIED)
    _picture_is_now(ledger, key, found, write, is_written=True)
    return True


def _picture_is_now(ledger: Ledger, key: int, found: Found, write: Write, *, is_written: bool) -> None:
    """Notes what a picture, or its sidecar, is with the write in it, or without.

    The hash stays that of the picture without.
    """
    if write.kind != "exif":
        ledger.sidecar_is_now(key, _path(found), Path(os.fsdecode(write.target)))
        return
    # Of a picture that is gone meanwhile, the next scan will tell.
    with contextlib.suppress(OSError):
        path = _path(found)
        sha256 = bytes.fromhex(write.sha256_before) if is_written else hashlib.sha256(path.read_bytes()).digest()
        status = path.stat()
        ledger.picture_is_now(key, status.st_size, status.st_mtime_ns, sha256)


def _path(found: Found) -> Path:
    return Path(os.fsdecode(found.path))
