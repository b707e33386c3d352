"""The files of a bundle against the list in its manifest."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from geosurge.bundle.manifest import MANIFEST_FILE, Manifest
from geosurge.errors import BundleCorruptError, BundleError, BundleInconsistentError, BundlePartialError

_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Problem:
    """Something that is wrong with one file of a bundle.

    Attributes:
        file: Path inside the bundle.
        error: What using the file would raise.
    """

    file: str
    error: BundleError


def walk(directory: Path) -> list[str]:
    """Relative paths of everything in a bundle's directory that is no directory, less the manifest's own."""
    found = []
    for folder, folders, files in os.walk(directory):
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        found += [(Path(folder) / name).relative_to(directory).as_posix() for name in files + links]
    return sorted(set(found) - {MANIFEST_FILE, f".{MANIFEST_FILE}.partial"})


def is_plain(directory: Path, relative: str) -> bool:
    """Whether a path is a regular file reached without following a link below the directory."""
    path = directory / relative
    return path.is_file() and path.resolve() == directory.resolve() / relative


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def file_problems(path: Path, manifest: Manifest) -> Iterator[Problem]:
    """What opening finds: files that are not listed, missing, no plain files, or of another size."""
    for relative in manifest.needed_files:
        if relative not in manifest.files:
            yield Problem(
                relative, BundlePartialError(f"{path / MANIFEST_FILE} does not list {relative}, which it speaks of")
            )
    for relative, info in manifest.files.items():
        file = path / relative
        if not os.path.lexists(file):
            yield Problem(relative, BundlePartialError(f"{file} is missing; publish the bundle again"))
        elif not is_plain(path, relative):
            yield Problem(
                relative, BundleCorruptError(f"{file} is a link or no regular file; a bundle holds its own data")
            )
        elif (size := file.stat().st_size) != info.size:
            yield Problem(
                relative,
                BundleCorruptError(f"{file} has {size} bytes instead of {info.size}; publish the bundle again"),
            )


def hash_problems(path: Path, manifest: Manifest, *, skip: Collection[str] = ()) -> Iterator[Problem]:
    """Files whose content is not what the manifest records."""
    for relative, info in manifest.files.items():
        if relative in skip:
            continue
        file = path / relative
        try:
            digest = sha256(file)
        except OSError as error:
            yield Problem(relative, BundleCorruptError(f"{file} cannot be read: {error}"))
            continue
        if digest != info.sha256:
            yield Problem(
                relative, BundleCorruptError(f"{file} has another SHA-256 than recorded; publish the bundle again")
            )


def unlisted_problems(path: Path, manifest: Manifest) -> Iterator[Problem]:
    """Files that nobody vouches for."""
    for relative in sorted(set(walk(path)) - set(manifest.files)):
        yield Problem(relative, BundleInconsistentError(f"{path / relative} is not in the manifest; remove it"))
