"""Where encoders and indexes live: the names of devices."""

from __future__ import annotations

import re
from typing import Final

from geosurge.errors import UsageError

_GPU: Final = re.compile(r"cuda(?::([0-9]{1,3}))?")


def device_to_gpu(device: str) -> int | None:
    """The number of a GPU, or ``None`` for the CPU.

    Args:
        device: ``"cpu"``, ``"cuda"`` (the first GPU) or ``"cuda:N"``.

    Raises:
        UsageError: It is none of these.
    """
    if device == "cpu":
        return None
    match = _GPU.fullmatch(device)
    if match is None:
        raise UsageError(f"the device {device!r} is unknown; use cpu, cuda or cuda:N")
    return int(match[1] or 0)


def check_torch_device(device: str) -> None:
    """Refuses a device that torch cannot compute on.

    Args:
        device: As for `device_to_gpu`.

    Raises:
        UsageError: It is unknown, or there is no such GPU.
    """
    gpu = device_to_gpu(device)
    if gpu is None:
        return
    import torch  # noqa: PLC0415 - slow to import, and not needed for the CPU

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpu >= count:
        raise UsageError(f"the device {device!r} does not exist: PyTorch sees {count} GPUs; use cpu or another GPU")
