"""One write of a position into one file, which survives a crash and can be taken back.

A write has three steps, so that whoever keeps a journal can note it between them: `prepare` makes the backup and says
what the file is now and what it will be; `apply` changes the file; `undo` takes back what was written. After a crash,
`apply` and `undo` can be called again: what was done is left as it is.

A file is changed by renaming a finished one over it, on the disk before its name is, so that it is the old or the new
one at any moment. It keeps its mode, extended attributes and (where the system allows) owner; its time of change
is the time of the write, and after an undo the old one. A symbolic link stays one: the file behind it is changed.
Of a file with several names (hard links), only the one that is written changes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import shutil
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias

from geosurge.archive.metadata import exif, sidecars
from geosurge.archive.metadata.guess import Guess
from geosurge.archive.metadata.positions import Claim, exif_claims, read_claims, sidecar_paths, xmp_claims
from geosurge.durable_files import fsync_path
from geosurge.errors import (
    FileChangedError,
    FileNotWritableError,
    HasPositionError,
    InputError,
    InputNotReadableError,
    WriteUnsupportedError,
)

WriteKind: TypeAlias = Literal["xmp", "exif"]

_READ_ONLY_HELP: Final = "make it and its folder writable, or leave it out"
_NAME_LENGTH: Final = 100
_NEW_FILE_MODE: Final = 0o666
_SOURCE_BY_KIND: Final = {"exif": "exif", "xmp": "sidecar"}


@dataclass(frozen=True)
class Write:
    """One change of one file: all that has to be remembered to do it, to do it again, and to take it back.

    Attributes:
        target: The file: the picture, or the sidecar.
        kind: ``"exif"`` (in the picture) or ``"xmp"`` (in a sidecar).
        existed: Whether the file was there before.
        backup: The file as it was, relative to the backup folder; empty if it was not there.
        sha256_before: SHA-256 of the file as it was, in hexadecimal; empty if it was not there.
        sha256_after: SHA-256 of the file as it will be.
        size_after: Its bytes then.
        mtime_ns_before: Time of the file's last change; 0 if it was not there.
        guess: What is written.
    """

    target: bytes
    kind: WriteKind
    existed: bool
    backup: str
    sha256_before: str
    sha256_after: str
    size_after: int
    mtime_ns_before: int
    guess: Guess


@dataclass(frozen=True)
class _Content:
    """A file as it was read: without a status, and empty, if it was not there."""

    status: os.stat_result | None
    content: bytes
    sha256: str


def prepare(picture: Path, kind: WriteKind, guess: Guess, backup_dir: Path) -> Write:
    """Backs a file up and says what will be written; the file itself is not touched.

    Args:
        picture: The picture that was located.
        kind: Into its EXIF, or into a sidecar: the one that is there (``photo.jpg.xmp`` before ``photo.xmp``), or else
            a new ``photo.jpg.xmp``.
        guess: What to write.
        backup_dir: Folder of the backups; made if it does not exist.

    Returns:
        The write, to be noted before `apply`.

    Raises:
        HasPositionError: The picture has a position that this run did not write: in its EXIF, XMP or sidecars.
        SidecarInvalidError: A sidecar is not XMP.
        ExifInvalidError: The picture's EXIF is damaged.
        WriteUnsupportedError: The file is of a kind that holds no EXIF, or has no room for it.
        InputNotReadableError: The system cannot read the picture or its sidecar.
        FileNotWritableError: The system does not let the file or its backup be written.
    """
    if (claim := _other_claim(picture, kind, guess.run_id)) is not None:
        raise HasPositionError(_position_message(picture, claim))
    beside = sidecar_paths(picture)
    sidecar = beside[0] if beside else picture.with_name(f"{picture.name}.xmp")
    target = Path(os.path.realpath(picture if kind == "exif" else sidecar))
    before = _read_file(target)
    _check_writable(target)
    after = _render(kind, before.content, guess)
    claims = exif_claims(io.BytesIO(after)) if kind == "exif" else xmp_claims(after, "sidecar")
    if not any(guess.is_at(claim.position.latitude_deg, claim.position.longitude_deg) for claim in claims):
        raise WriteUnsupportedError(
            f"what would be written to {target.name!r} could not be read back as the position"
            f" {guess.latitude_deg}, {guess.longitude_deg}; it stays as it is"
        )
    return Write(
        target=os.fsencode(target),
        kind=kind,
        existed=before.status is not None,
        backup=_back_up(target, before, backup_dir) if before.status else "",
        sha256_before=before.sha256,
        sha256_after=_sha256(after),
        size_after=len(after),
        mtime_ns_before=before.status.st_mtime_ns if before.status else 0,
        guess=guess,
    )


def apply(write: Write) -> None:
    """Does a prepared write; a second time, after a crash or not, it changes nothing.

    Raises:
        FileChangedError: The file is neither as it was when the write was prepared nor as the write leaves it; or this
            version of the engine would write other bytes than were announced. It is not touched.
        InputNotReadableError: The system cannot read the file.
        FileNotWritableError: The system cannot write it.
    """
    target = Path(os.fsdecode(write.target))
    _discard_partial(target)
    before = _read_file(target)
    if before.sha256 == write.sha256_after:
        return
    if before.sha256 != write.sha256_before:
        raise FileChangedError(
            f"{target.name!r} was changed by another program since its position was to be written; it stays as it is:"
            " run the command again"
        )
    after = _render(write.kind, before.content, write.guess)
    if _sha256(after) != write.sha256_after:
        raise FileChangedError(
            f"what would be written to {target.name!r} is not what the ledger announces, as after a change of version;"
            " it stays as it is: undo the run and run the command again"
        )
    _replace(target, after, before.status)


def undo(write: Write, backup_dir: Path) -> None:
    """Takes back exactly what a write did; a second time, after a crash or not, it changes nothing.

    A file that nobody changed since is as before, byte by byte, and one that the write created is gone. From a file
    that was changed since, or whose backup is missing or damaged, only the properties of the guess are taken out.

    Raises:
        FileChangedError: The position in the file is another one by now, or the file cannot be read any more, or is
            gone although it was there before the write. It is not touched.
        InputNotReadableError: The system cannot read the file.
        FileNotWritableError: The system cannot write it.
    """
    target = Path(os.fsdecode(write.target))
    _discard_partial(target)
    now = _read_file(target)
    if now.status is None:
        if write.existed:
            raise FileChangedError(
                f"{target.name!r} is not there any more; mount its disk, or move its folder back, and undo again: its "
                f"backup is {write.backup!r}"
            )
        return
    if write.existed and now.sha256 == write.sha256_before:
        return
    if now.sha256 == write.sha256_after:
        if not write.existed:
            _remove(target)
            return
        backup = _read_file(backup_dir / write.backup)
        if backup.sha256 == write.sha256_before:
            _replace(target, backup.content, now.status, write.mtime_ns_before)
            return
    remove_guess = exif.remove_guess if write.kind == "exif" else sidecars.remove_guess
    rest = remove_guess(now.content, write.guess)
    if rest == now.content:
        return
    if write.kind == "xmp" and not write.existed and sidecars.is_empty(rest):
        _remove(target)
    else:
        _replace(target, rest, now.status)


def is_missing(picture: Path, write: Write) -> bool:
    """Whether nothing says any more where a picture was taken: what was written is gone, and nobody wrote another.

    Files are looked into only where the one that was written has not the size any more that the write gave it.
    """
    status = _read_status(Path(os.fsdecode(write.target)))
    if status is not None and status.st_size == write.size_after:
        return False
    try:
        return _other_claim(picture, write.kind, write.guess.run_id) is None
    except InputError:
        return False


def _other_claim(picture: Path, kind: WriteKind, run_id: str) -> Claim | None:
    """A position for which a run may not write its own.

    Raises:
        SidecarInvalidError: As `prepare`.
        InputNotReadableError: As `prepare`.
    """
    try:
        with picture.open("rb") as image:
            for claim in read_claims(image, sidecar_paths(picture)):
                # A run that writes both kinds meets the one when it prepares the other.
                if claim.run_id != run_id or claim.position.source == _SOURCE_BY_KIND[kind]:
                    return claim
    except OSError as error:
        raise InputNotReadableError(f"{picture.name!r} cannot be read: {error.strerror}") from error
    return None


def _render(kind: WriteKind, before: bytes, guess: Guess) -> bytes:
    return sidecars.add_guess(before or None, guess) if kind == "xmp" else exif.add_guess(before, guess)


def _position_message(picture: Path, claim: Claim) -> str:
    where = {"exif": "in its EXIF", "xmp": "in its XMP", "sidecar": "in a sidecar"}[claim.position.source]
    whose = f": run {claim.run_id} guessed it; undo that run first" if claim.run_id else ", which stays as it is"
    return f"{picture.name!r} has a position already, {where}{whose}"


def _read_file(path: Path) -> _Content:
    """A file with its content; one without a status if there is none."""
    try:
        # Opening what is no file, such as a named pipe, may wait for ever.
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputNotReadableError(f"{path.name!r} is no file; move it away")
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            content = file.read()
    except FileNotFoundError:
        return _Content(None, b"", "")
    except OSError as error:
        raise InputNotReadableError(f"{path.name!r} cannot be read: {error.strerror}") from error
    return _Content(status, content, _sha256(content))


def _read_status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _check_writable(target: Path) -> None:
    # A file that can be renamed over but not written was made read-only on purpose.
    if target.exists() and not os.access(target, os.W_OK):
        raise FileNotWritableError(f"{target.name!r} is read-only; {_READ_ONLY_HELP}")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise FileNotWritableError(f"the folder of {target.name!r} is read-only; {_READ_ONLY_HELP}")


def _back_up(target: Path, before: _Content, backup_dir: Path) -> str:
    """Copies a file into the backup folder, under a name that says what it is; the name, relative to the folder.

    The name starts with the hash of the content, so that no backup ever takes another one's place.
    """
    name = re.sub(r"[^A-Za-z0-9._-]", "_", target.name)[-_NAME_LENGTH:]
    relative = f"{before.sha256[:2]}/{before.sha256}-{name}"
    path = backup_dir / relative
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileNotWritableError(
            f"the backup of {target.name!r} cannot be written: {error.strerror}; make room, or the folder writable"
        ) from error
    there = _read_file(path)
    if there.sha256 != before.sha256:
        mode = stat.S_IMODE(before.status.st_mode) if before.status else _NEW_FILE_MODE
        _replace(path, before.content, there.status, mode=mode)
    return relative


def _replace(
    target: Path,
    content: bytes,
    status: os.stat_result | None,
    mtime_ns: int | None = None,
    mode: int = _NEW_FILE_MODE,
) -> None:
    """Gives a file new content, unless it was changed since its status was taken (`None`: it was not there).

    Args:
        target: The file.
        content: What it will hold.
        status: What it is now.
        mtime_ns: Time of change that it will have; `None` is now.
        mode: Permissions of a new file, of which the system's mask takes some away.
    """
    partial = _partial(target)
    try:
        partial.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        with os.fdopen(os.open(partial, flags, mode if status is None else 0o600), "wb") as file:
            file.write(content)
            # What is still in the buffer would change the time again when it is written.
            file.flush()
            if status is not None:
                _copy_owner(partial, status)
                shutil.copystat(target, partial)
                os.utime(partial, ns=(status.st_atime_ns, time.time_ns() if mtime_ns is None else mtime_ns))
            os.fsync(file.fileno())
        now = _read_status(target)
        if _identity(now) != _identity(status):
            raise FileChangedError(f"{target.name!r} was changed by another program just now; run the command again")
        partial.replace(target)
        fsync_path(target.parent)
    except OSError as error:
        raise FileNotWritableError(
            f"{target.name!r} cannot be written: {error.strerror}; make room, or make it and its folder writable"
        ) from error
    finally:
        _discard_partial(target)


def _partial(target: Path) -> Path:
    """Where the new content of a file is written: one name for each, so that what a crash leaves can be found."""
    return target.with_name(f".{_sha256(os.fsencode(target.name))[:16]}.geosurge")


def _discard_partial(target: Path) -> None:
    with contextlib.suppress(OSError):
        _partial(target).unlink(missing_ok=True)


def _copy_owner(path: Path, status: os.stat_result) -> None:
    # Only root can give files away; for everybody else the file, whose folder is theirs, becomes theirs.
    with contextlib.suppress(OSError, AttributeError):
        own = path.stat()
        if (own.st_uid, own.st_gid) != (status.st_uid, status.st_gid):
            os.chown(path, status.st_uid, status.st_gid)


def _identity(status: os.stat_result | None) -> tuple[int, ...]:
    if status is None:
        return ()
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, stat.S_IFMT(status.st_mode))


def _remove(target: Path) -> None:
    try:
        target.unlink(missing_ok=True)
        fsync_path(target.parent)
    except OSError as error:
        raise FileNotWritableError(f"{target.name!r} cannot be removed: {error.strerror}; {_READ_ONLY_HELP}") from error
