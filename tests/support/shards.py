"""Tar shards as WebDataset writes them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path


def write_shard(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """Writes a shard of named members, in their order."""
    with tarfile.open(path, "w") as shard:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    return path
