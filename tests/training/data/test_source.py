from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
import pytest
import torch

from geosurge_training.data.blue_marble import BlueMarble
from geosurge_training.data.source import Batch, prefetch, rebatch


def batch_of(numbers: list[int]) -> Batch:
    values = np.array(numbers, dtype=np.float64)
    return Batch(torch.tensor(numbers, dtype=torch.uint8).view(-1, 1, 1, 1), values, -values)


def numbers_of(batch: Batch) -> list[int]:
    numbers = [int(value) for value in batch.pixels.view(-1)]
    assert batch.latitude_deg.tolist() == numbers
    assert batch.longitude_deg.tolist() == [-number for number in numbers]
    return numbers


class Counted:
    """Batches whose pictures are numbered by step; counts how many were asked for."""

    train_count = None

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.three_asked = threading.Event()

    def coordinate_chunks(self) -> Iterable[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]:
        return []

    def train_batch(self, step: int, batch_size: int, rows: slice | None = None) -> Batch:
        self.asked.append(step)
        if len(self.asked) == 3:
            self.three_asked.set()
        if step == 9:
            raise RuntimeError("the ninth")
        whole = batch_of(list(range(step * batch_size, (step + 1) * batch_size)))
        return whole if rows is None else whole.cut(rows)

    def held_out(self, count: int, seed: int, batch_size: int) -> Iterator[Batch]:
        return iter(())


@pytest.mark.parametrize("sizes", [[5, 5], [10], [1] * 10, [0, 7, 0, 3], [2, 1, 7]], ids=str)
@pytest.mark.parametrize(("count", "batch_size"), [(10, 3), (7, 7), (7, 2), (100, 4), (4, 100)])
def test_batches_of_any_sizes_are_cut_anew(sizes: list[int], count: int, batch_size: int) -> None:
    ends = np.cumsum(sizes).tolist()
    stream = (batch_of(list(range(end - size, end))) for size, end in zip(sizes, ends, strict=True))
    cut = [numbers_of(batch) for batch in rebatch(stream, count, batch_size)]
    assert [number for numbers in cut for number in numbers] == list(range(min(count, 10)))
    assert {len(numbers) for numbers in cut[:-1]} <= {batch_size}
    assert 0 < len(cut[-1]) <= batch_size


def test_prefetched_batches_are_those_of_the_steps() -> None:
    batches = prefetch(Counted(), range(2, 7), 4)
    assert [numbers_of(batch)[0] for batch in batches] == [8, 12, 16, 20, 24]
    parts = prefetch(Counted(), range(2), 4, slice(1, 3))
    assert [numbers_of(batch) for batch in parts] == [[1, 2], [5, 6]]


def test_no_more_is_read_than_what_was_said() -> None:
    source = Counted()
    batches = prefetch(source, range(8), 4, ahead=2)
    next(batches)
    # Two more are read while nobody asks for them, and then no third.
    assert source.three_asked.wait(60)
    assert source.asked == [0, 1, 2]
    next(batches)
    batches.close()
    assert len(source.asked) <= 4


def test_an_error_comes_in_the_place_of_its_batch() -> None:
    batches = prefetch(Counted(), range(7, 12), 4)
    assert [numbers_of(next(batches))[0], numbers_of(next(batches))[0]] == [28, 32]
    with pytest.raises(RuntimeError, match="the ninth"):
        next(batches)


def test_a_rendered_world_has_no_epochs_and_gives_parts_of_a_batch(world: BlueMarble) -> None:
    assert world.train_count is None
    whole, part = world.train_batch(3, 12), world.train_batch(3, 12, slice(4, 8))
    assert torch.equal(part.pixels, whole.pixels[4:8])
    assert np.array_equal(part.latitude_deg, whole.latitude_deg[4:8])
    assert np.array_equal(part.longitude_deg, whole.longitude_deg[4:8])
