"""The names of devices."""

from __future__ import annotations

import pytest

from geosurge.devices import check_torch_device, device_to_gpu
from geosurge.errors import UsageError


@pytest.mark.parametrize(("device", "gpu"), [("cpu", None), ("cuda", 0), ("cuda:0", 0), ("cuda:12", 12)])
def test_names_that_there_are(device: str, gpu: int | None) -> None:
    assert device_to_gpu(device) == gpu


@pytest.mark.parametrize("device", ["", "gpu", "CPU", "cpu:0", "cuda:", "cuda:-1", "cuda:x", "cuda:1 ", "mps"])
def test_names_that_there_are_not(device: str) -> None:
    with pytest.raises(UsageError, match=r"is unknown; use cpu, cuda or cuda:N"):
        check_torch_device(device)


def test_a_gpu_that_is_not_there() -> None:
    check_torch_device("cpu")
    with pytest.raises(UsageError, match=r"'cuda:999' does not exist: PyTorch sees \d+ GPUs"):
        check_torch_device("cuda:999")
