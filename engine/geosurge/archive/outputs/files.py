"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from geosurge.durable_files import fsync_path
from geosurge.errors import OutputNotWritableError


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that takes its name only when everything is on the disk.

    Until then it has a name of its own beside it, always the same, so that what a killed run left is written over. When
    anything fails, what was written is removed and what had the name before stays.

    Args:
        path: The file to write; its folder is made when it is missing.

    Yields:
        The file.

    Raises:
        OutputNotWritableError: The disk is full, or the folder or file cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        fsync_path(path.parent)
    except OSError as error:
        raise OutputNotWritableError(
            f"cannot write {path}: {error.strerror or error}; make room or mend its folder, then run the same command "
            "again: nothing that was located is lost"
        ) from error
