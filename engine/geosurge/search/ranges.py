"""Ranges of leaves: what lies under the cells of a region."""

from __future__ import annotations

from collections.abc import Iterable


def merge_ranges(ranges: Iterable[tuple[int, int]], leaf_count: int) -> list[tuple[int, int]]:
    """Ascending, disjoint, non-empty half-open ranges that cover the same leaves.

    Args:
        ranges: Half-open ranges of leaf ordinals, in any order.
        leaf_count: Number of leaves.

    Raises:
        ValueError: A range is not within the leaves.
    """
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if not 0 <= start <= stop <= leaf_count:
            raise ValueError(f"the leaf range [{start}, {stop}) is not within [0, {leaf_count})")
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        elif start < stop:
            merged.append((start, stop))
    return merged


def cut_ranges(ranges: Iterable[tuple[int, int]], block: int) -> Iterable[list[tuple[int, int]]]:
    """The ranges, cut and packed into blocks of at most ``block`` leaves, in their order."""
    packed: list[tuple[int, int]] = []
    room = block
    for range_start, stop in ranges:
        start = range_start
        while start < stop:
            taken = min(room, stop - start)
            packed.append((start, start + taken))
            start += taken
            room -= taken
            if room == 0:
                yield packed
                packed, room = [], block
    if packed:
        yield packed
