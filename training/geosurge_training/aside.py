"""Files that are whole or not there, whenever a run is cut off."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from geosurge.durable_files import fsync_path


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Lets a file be written beside its place, and puts it there once it is whole and on the disk.

    Args:
        path: The file; its folder is made when missing.

    Yields:
        What to write instead.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield aside
        fsync_path(aside)
        aside.replace(path)
        fsync_path(path.parent)
    finally:
        aside.unlink(missing_ok=True)
