"""Ignore files: what an archive's owner wants to be left alone, in the syntax of gitignore.

One may lie in any folder and holds for everything below. Of the patterns that match, the last one of the innermost file
decides. What lies in an ignored folder cannot be taken back in.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Final

from geosurge.archive.sources.paths import join, not_readable, open_regular, shown
from geosurge.archive.sources.patterns import Patterns
from geosurge.errors import InputNotReadableError

IGNORE_FILE: Final = ".geosurgeignore"

_MAX_BYTES: Final = 1_000_000


@dataclass(frozen=True)
class IgnoreRules:
    """The ignore files that hold in one folder, outermost first, each with the length of its own folder's path."""

    files: tuple[tuple[int, Patterns], ...] = ()

    def within(self, folder: bytes, relative: bytes) -> IgnoreRules:
        """The rules that hold in a folder: these, and those of the ignore file that lies in it.

        Args:
            folder: Path of the folder.
            relative: The same from the source on, with a slash at its end; empty for the source itself.

        Raises:
            InputNotReadableError: There is an ignore file that cannot be read.
        """
        path = join(folder, os.fsencode(IGNORE_FILE))
        try:
            with open_regular(path) as file:
                content = file.read(_MAX_BYTES + 1)
        except FileNotFoundError:
            return self
        except OSError as error:
            raise not_readable(path, error) from error
        if len(content) > _MAX_BYTES:
            raise InputNotReadableError(f"{shown(path)} has more than {_MAX_BYTES} bytes; is it an ignore file?")
        lines = os.fsdecode(content.removeprefix(b"\xef\xbb\xbf")).replace("\r\n", "\n").split("\n")
        try:
            patterns = Patterns.parse(lines)
        except ValueError as error:
            raise InputNotReadableError(f"{shown(path)} cannot be used: {error}; correct it") from error
        return IgnoreRules((*self.files, (len(relative), patterns)))

    def ignores(self, relative: bytes, *, is_folder: bool) -> bool:
        """Whether a file or folder is to be left alone; its path starts from the source."""
        for start, patterns in reversed(self.files):
            if (decision := patterns.match(relative[start:], is_folder=is_folder)) is not None:
                return decision
        return False
