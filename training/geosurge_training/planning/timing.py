"""How long a run would take on a machine that is only described."""

from __future__ import annotations

from dataclasses import dataclass

from geosurge_training.planning.gpus import Gpu
from geosurge_training.planning.plan import Course


@dataclass(frozen=True)
class Machine:
    """What a run would run on.

    Attributes:
        gpu: Each of its devices.
        utilisation: Share of the devices' peak that is taken to be reached, over 0 and at most 1.
        disk_gb_per_s: What the disk with a tower cache gives, 10^9 bytes a second.
    """

    gpu: Gpu
    utilisation: float
    disk_gb_per_s: float


def run_seconds(course: Course, machine: Machine, devices: int) -> float:
    """Time of a run.

    Args:
        course: What is to be done.
        machine: On what.
        devices: How many of its devices share the work, evenly and without loss.

    Returns:
        Seconds. Arithmetic goes on beside the disk's work, so that the longer of the two counts: while a cache is
        filled, and after that.
    """
    rate = machine.gpu.bfloat16_tflops * 1e12 * machine.utilisation * devices
    disk = machine.disk_gb_per_s * 1e9
    filling = max(course.filling_flops / rate, course.disk_bytes / disk)
    return filling + max((course.flops - course.filling_flops) / rate, course.read_bytes / disk)
