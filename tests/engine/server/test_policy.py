from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geosurge.description import VersionState
from geosurge.server.policy import Load, Refuse, Resident, Unload, WaitForDrain, next_step

READY, ACTIVE, DRAINING = VersionState.READY, VersionState.ACTIVE, VersionState.DRAINING


@pytest.mark.parametrize(
    ("residents", "needed", "unload_first", "expected"),
    [
        ([], 5, False, Load),
        ([Resident("a", ACTIVE, 1)], 5, False, Load),
        ([Resident("a", ACTIVE, 2), Resident("b", READY, 1)], 5, False, Unload),
        ([Resident("a", ACTIVE, 2), Resident("b", DRAINING, 1)], 5, False, WaitForDrain),
        ([Resident("a", ACTIVE, 2), Resident("b", READY, 1, has_traffic=True)], 5, False, Refuse),
        ([Resident("a", ACTIVE, 1)], 50, False, Refuse),
        ([Resident("a", ACTIVE, 1)], 50, True, Unload),
        ([], 50, True, Refuse),
    ],
)
def test_what_is_done_to_make_room(
    residents: list[Resident], needed: int, unload_first: bool, expected: type[object]
) -> None:
    assert type(next_step(needed, 10, residents, max_versions=2, unload_first=unload_first)) is expected


def test_what_was_wanted_longest_ago_goes_first() -> None:
    residents = [Resident("a", ACTIVE, 1), Resident("b", READY, 3), Resident("c", READY, 2)]
    assert next_step(1, 10, residents, max_versions=3) == Unload("c")


@given(
    kinds=st.lists(st.sampled_from([READY, DRAINING]), max_size=6),
    has_active=st.booleans(),
    has_canary=st.booleans(),
    needed=st.integers(0, 20),
    free=st.integers(0, 20),
    max_versions=st.integers(1, 6),
    unload_first=st.booleans(),
)
def test_making_room_ends_and_spares_what_has_traffic(
    kinds: Sequence[VersionState],
    has_active: bool,
    has_canary: bool,
    needed: int,
    free: int,
    max_versions: int,
    unload_first: bool,
) -> None:
    residents = [Resident(str(age), kind, age) for age, kind in enumerate(kinds)]
    residents += [Resident("active", ACTIVE, 99)] * has_active + [Resident("canary", READY, 98, True)] * has_canary
    for _ in range(2 * len(residents) + 1):
        step = next_step(needed, free, residents, max_versions=max_versions, unload_first=unload_first)
        if isinstance(step, Load):
            assert needed <= free
            assert len(residents) < max_versions
            return
        if isinstance(step, Refuse):
            assert not any(v.state is READY and not v.has_traffic for v in residents)
            return
        if isinstance(step, Unload):
            assert step.name != "canary"
            assert step.name != "active" or unload_first
            residents = [v for v in residents if v.name != step.name]
        else:
            residents = [v for v in residents if v.state is not DRAINING]
        free += 1
    pytest.fail("it did not end")
