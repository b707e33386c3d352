"""Turns finished files into a bundle."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from geosurge.bundle.files import is_plain, sha256, walk
from geosurge.bundle.manifest import MANIFEST_FILE, FileInfo, Manifest, render_manifest
from geosurge.durable_files import fsync_path, replace_file
from geosurge.errors import BundleInconsistentError


def finish_bundle(directory: Path, manifest: Manifest) -> Manifest:
    """Turns a directory of finished files into a bundle: records sizes and hashes, and writes the manifest last.

    Everything is on the disk when this returns. A directory that was finished before is finished anew.

    Args:
        directory: Holds all files of the bundle but the manifest.
        manifest: Its `files` and `manifest_sha256` are ignored.

    Returns:
        The manifest as written.

    Raises:
        BundleInconsistentError: The directory holds a link, or misses a file that the manifest speaks of.
    """
    with contextlib.suppress(FileNotFoundError):
        (directory / MANIFEST_FILE).unlink()
    files: dict[str, FileInfo] = {}
    for relative in walk(directory):
        if not is_plain(directory, relative):
            raise BundleInconsistentError(f"{directory / relative} is a link or no regular file; copy the data instead")
        files[relative] = FileInfo(size=(directory / relative).stat().st_size, sha256=sha256(directory / relative))
        fsync_path(directory / relative)
    # Built anew rather than copied, so that every field is validated.
    whole = Manifest.model_validate(dict(manifest) | {"files": files})
    missing = [file for file in whole.needed_files if file not in files]
    if missing:
        raise BundleInconsistentError(f"{directory} has no {missing[0]}, which the manifest speaks of")
    for folder, _, _ in os.walk(directory, topdown=False):
        fsync_path(Path(folder))
    sealed, data = render_manifest(whole)
    replace_file(directory / MANIFEST_FILE, data)
    return sealed
