"""What a scan passes over, counted for whoever wonders where pictures are."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from geosurge.archive.sources.paths import extension, shown
from geosurge.archive.sources.shards import SHARD_EXTENSION

_MAX_KINDS: Final = 1000
_SHOWN_KINDS: Final = 5
_REST: Final = "others"
_SHARD_KIND: Final = f".{SHARD_EXTENSION.decode()}"
_SHARD_HINT: Final = f"; name {_SHARD_KIND} files as sources to have them read"


@dataclass
class ScanCounts:
    """What was passed over, counted while a scan goes on.

    Attributes:
        other_files: Files that are no pictures by their names, or that no glob takes.
        kinds: The same by extension, such as ``".txt"``; the rarer ones of very many together.
        ignored: Files and folders that are hidden or that an ignore file names; a folder counts as one.
        links: Links to what is found anyway.
    """

    other_files: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    ignored: int = 0
    links: int = 0

    def add_other_file(self, path: bytes) -> None:
        """Counts a file that is no picture by its name."""
        kind = extension(path)
        name = f".{shown(kind)}" if kind else "without an extension"
        self.other_files += 1
        self.kinds[name if name in self.kinds or len(self.kinds) < _MAX_KINDS else _REST] += 1

    def __str__(self) -> str:
        """In words; empty if nothing was passed over that anybody might miss."""
        parts = []
        if self.other_files:
            frequent = [item for item in self.kinds.most_common(_SHOWN_KINDS + 1) if item[0] != _REST][:_SHOWN_KINDS]
            kinds = [f"{count:,} {kind}" for kind, count in frequent]
            if rest := self.other_files - sum(count for _, count in frequent):
                kinds.append(f"{rest:,} {_REST}")
            parts.append(f"{self.other_files:,} other file{'s' * (self.other_files > 1)} ({', '.join(kinds)})")
        if self.ignored:
            parts.append(f"{self.ignored:,} hidden or ignored")
        hint = _SHARD_HINT if _SHARD_KIND in self.kinds else ""
        return ", ".join(parts) + hint
