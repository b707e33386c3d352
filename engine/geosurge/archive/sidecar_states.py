"""What the sidecars of a picture are, by size and time: whether one came, changed or went since an earlier run.

A state is JSON, ``{"photo.jpg.xmp": [size, mtime_ns]}``, and empty where there is no sidecar.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from geosurge.archive.metadata.positions import sidecar_paths
from geosurge.archive.sources import Found
from geosurge.archive.sources.paths import extension


class SidecarStates:
    """Tells the states of many pictures; remembers the sidecars of the last folder.

    Without that, each picture would cost six calls to a file system that may be far away.
    """

    def __init__(self) -> None:
        """Begins with no folder."""
        self._folder = b""
        self._stems: frozenset[bytes] = frozenset()

    def of(self, found: Found) -> str:
        """The state of a picture's sidecars; one in a shard has none."""
        if found.is_member or found.error is not None:
            return ""
        folder, _, name = found.path.rpartition(b"/")
        if folder != self._folder:
            self._folder, self._stems = folder, _sidecar_stems(folder or b"/")
        if self._stems.isdisjoint((name, name.rpartition(b".")[0])):
            return ""
        return _to_text(_read_states(Path(os.fsdecode(found.path))))


def state_after_write(before: str, picture: Path, sidecar: Path) -> str:
    """The state after the run itself has changed a sidecar; what others changed meanwhile still counts as changed.

    Args:
        before: The state as it was noted.
        picture: The picture.
        sidecar: What was changed, made or removed; links followed.
    """
    states = json.loads(before or "{}")
    now = _read_states(picture)
    for name in states.keys() | now.keys():
        if os.path.realpath(picture.with_name(name)) == os.fspath(sidecar):
            states.pop(name, None)
            if name in now:
                states[name] = now[name]
    return _to_text(states)


def _sidecar_stems(folder: bytes) -> frozenset[bytes]:
    try:
        with os.scandir(folder) as entries:
            return frozenset(entry.name[: -len(b".xmp")] for entry in entries if extension(entry.name) == b"xmp")
    except OSError:
        return frozenset()


def _read_states(picture: Path) -> dict[str, list[int]]:
    states = {}
    for path in sidecar_paths(picture):
        try:
            status = path.stat()
        except OSError:
            # A link that leads nowhere is a sidecar that cannot be read.
            states[path.name] = [0, 0]
        else:
            states[path.name] = [status.st_size, status.st_mtime_ns]
    return states


def _to_text(states: dict[str, list[int]]) -> str:
    return json.dumps(states, sort_keys=True) if states else ""
