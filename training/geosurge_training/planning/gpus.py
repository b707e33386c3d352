"""Published peak figures of GPUs, to say what a run can cost at best; nothing here was measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from geosurge.errors import ConfigurationError


@dataclass(frozen=True)
class Gpu:
    """A GPU as its maker describes it.

    Attributes:
        name: What it is called.
        bfloat16_tflops: Peak of dense bf16 matrix products that are summed up in float32, 10^12 operations a second.
            Data sheets often print twice as much, for matrices in which half of the numbers are zero.
        memory_gb: Memory, 10^9 bytes. Makers round down: there is a little more.
        source: Where the figures are published.
    """

    name: str
    bfloat16_tflops: float
    memory_gb: float
    source: str


_A100 = "NVIDIA A100 Tensor Core GPU data sheet"
_H100 = "NVIDIA H100 Tensor Core GPU data sheet (half of the figure with sparsity)"

GPUS: Final = (
    Gpu("a100-40gb", 312, 40, _A100),
    Gpu("a100-80gb", 312, 80, _A100),
    Gpu("h100-pcie", 756, 80, _H100),
    Gpu("h100-sxm", 989.5, 80, _H100),
    Gpu("h200-sxm", 989.5, 141, "NVIDIA H200 Tensor Core GPU data sheet (half of the figure with sparsity)"),
    Gpu("rtx-a6000", 154.8, 48, "NVIDIA Ampere GA102 GPU architecture whitepaper (dense, summed in FP32)"),
    Gpu("rtx-4090", 165.2, 24, "NVIDIA Ada GPU architecture whitepaper (dense, summed in FP32)"),
    Gpu("l4", 121, 24, "NVIDIA L4 Tensor Core GPU data sheet (half of the figure with sparsity)"),
    Gpu("l40s", 362, 48, "NVIDIA L40S data sheet (without sparsity)"),
)
"""GPUs that can be asked for by name."""


def find_gpu(name: str) -> Gpu:
    """Looks up a GPU.

    Args:
        name: A name of `GPUS`, or the beginning of one; upper case and spaces do not matter.

    Returns:
        The first GPU whose name begins so, which is the smallest of those.

    Raises:
        ConfigurationError: There is none.
    """
    wanted = name.strip().lower().replace(" ", "-").replace("_", "-")
    for gpu in GPUS:
        if wanted and (gpu.name.startswith(wanted) or gpu.name.removeprefix("rtx-").startswith(wanted)):
            return gpu
    raise ConfigurationError(
        f"GPU {name!r} is not in the table ({', '.join(gpu.name for gpu in GPUS)}); give --tflops and --memory-gib"
    )
