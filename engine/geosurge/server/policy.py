"""What has to be done before one more version can be loaded: pure functions of states and memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from geosurge.description import VersionState

LOADED_STATES = frozenset({VersionState.READY, VersionState.ACTIVE})
"""States in which requests may name a version."""


@dataclass(frozen=True)
class Resident:
    """A version that takes memory, as the policy sees it.

    Attributes:
        name: Its name.
        state: READY, ACTIVE or DRAINING.
        last_requested: Number of the last request to load or activate it; a lower one is older.
        has_traffic: Whether, though not active, it gets requests: as the canary, or about to be activated.
    """

    name: str
    state: VersionState
    last_requested: int
    has_traffic: bool = False


@dataclass(frozen=True)
class Load:
    """There is room: load the version."""


@dataclass(frozen=True)
class Unload:
    """Unload a version first."""

    name: str


@dataclass(frozen=True)
class WaitForDrain:
    """A version is draining; what it frees may suffice."""


@dataclass(frozen=True)
class Refuse:
    """There is no room, and none can be made."""

    reason: str


Step: TypeAlias = Load | Unload | WaitForDrain | Refuse


def next_step(
    needed_bytes: int,
    available_bytes: int,
    residents: Sequence[Resident],
    *,
    max_versions: int,
    unload_first: bool = False,
) -> Step:
    """Decides what to do next so that one more version can be loaded; ask again after each step.

    Versions without traffic make room first, least recently requested first. The active version and others with traffic
    stay, except that ``unload_first`` gives up the active one as a last resort.

    Args:
        needed_bytes: Estimate of the memory that the version takes.
        available_bytes: Memory that is free.
        residents: The versions in memory.
        max_versions: Versions that may be in memory at once.
        unload_first: Whether the active version may be unloaded first, so that requests are refused meanwhile.
    """
    fits_count = len(residents) < max_versions
    if fits_count and needed_bytes <= available_bytes:
        return Load()
    if any(version.state is VersionState.DRAINING for version in residents):
        return WaitForDrain()
    spare = [version for version in residents if version.state is VersionState.READY and not version.has_traffic]
    if spare:
        return Unload(min(spare, key=lambda version: version.last_requested).name)
    active = [version for version in residents if version.state is VersionState.ACTIVE]
    if unload_first and active:
        return Unload(active[0].name)
    if not fits_count:
        names = ", ".join(version.name for version in residents)
        return Refuse(
            f"{len(residents)} versions are loaded ({names}), as many as max_loaded_versions allows, and all have "
            "traffic; end the canary, or ask to unload first"
        )
    return Refuse(
        f"it takes about {needed_bytes / 1e6:,.0f} MB and {available_bytes / 1e6:,.0f} MB are free; free memory, or "
        "ask to unload first"
    )
