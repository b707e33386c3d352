"""Times of runs on described machines, worked out by hand."""

from __future__ import annotations

import pytest

from geosurge.errors import ConfigurationError
from geosurge_training.planning.gpus import GPUS, Gpu, find_gpu
from geosurge_training.planning.plan import Course, Memory
from geosurge_training.planning.timing import Machine, run_seconds

MEMORY = Memory(1, 2, 3, 4, 5, 6)
MACHINE = Machine(Gpu("any", 100.0, 80.0, "stated"), 0.25, 2.0)


def test_time_is_arithmetic_over_what_is_reached_of_the_peak() -> None:
    assert run_seconds(Course(MEMORY, flops=10**15), MACHINE, 1) == pytest.approx(40.0)
    assert run_seconds(Course(MEMORY, flops=10**15), MACHINE, 8) == pytest.approx(5.0)


def test_a_cache_takes_the_longer_of_arithmetic_and_disk_each_time() -> None:
    arithmetic = Course(MEMORY, 10**15, filling_flops=6 * 10**14, disk_bytes=10**9, read_bytes=10**9)
    assert run_seconds(arithmetic, MACHINE, 1) == pytest.approx(24 + 16)
    disk = Course(MEMORY, 10**15, filling_flops=6 * 10**14, disk_bytes=100 * 10**9, read_bytes=200 * 10**9)
    assert run_seconds(disk, MACHINE, 1) == pytest.approx(50 + 100)


def test_all_memory_is_summed_up() -> None:
    assert MEMORY.total == 21


@pytest.mark.parametrize(
    ("asked", "found"),
    [("A100", "a100-40gb"), ("a100 80gb", "a100-80gb"), ("H200", "h200-sxm"), ("a6000", "rtx-a6000"), ("L4", "l4")],
)
def test_a_gpu_is_found_by_the_beginning_of_its_name(asked: str, found: str) -> None:
    assert find_gpu(asked).name == found


def test_of_those_with_one_beginning_the_first_is_the_smallest() -> None:
    for gpu in GPUS:
        alike = [other for other in GPUS if other.name.split("-")[0] == gpu.name.split("-")[0] != "rtx"]
        sizes = [(other.bfloat16_tflops, other.memory_gb) for other in alike]
        assert sizes == sorted(sizes)


@pytest.mark.parametrize("name", ["", "  ", "tpu"])
def test_an_unknown_gpu_lists_the_known_ones_and_the_way_round(name: str) -> None:
    with pytest.raises(ConfigurationError, match=r"a100-40gb, .*--tflops and --memory-gib"):
        find_gpu(name)
