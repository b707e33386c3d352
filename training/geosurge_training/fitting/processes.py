"""The processes and devices that train one model together, by Lightning Fabric."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy
from torch.multiprocessing.spawn import ProcessRaisedException

from geosurge import errors
from geosurge.devices import device_to_gpu
from geosurge.errors import ConfigurationError, GeoSurgeError, UsageError
from geosurge_training.recipe import TrainingSection

T = TypeVar("T")
# Fabric tells at this level which precision it was asked for.
logging.getLogger("lightning_fabric").setLevel(logging.WARNING)


def launch(section: TrainingSection, function: Callable[..., T], *args: object) -> T:
    """Runs a function on each device: in this process where there is one, else in a process for each.

    Args:
        section: Says on which devices, and in which precision forward passes are.
        function: Gets the Fabric first; importable by name, and its arguments picklable, where there are several.
        args: Its further arguments.

    Returns:
        What the function returned in the first process.

    Raises:
        ConfigurationError: There are no such devices.
        GeoSurgeError: What the function raised on purpose, whichever process it was in.
    """
    kind, number = _parse(section.device, section.devices)
    fabric = Fabric(
        accelerator=kind,
        devices=section.devices if number is None else [number],
        # Processes that Fabric starts by running the command again would run whatever else the caller does, too.
        strategy="auto" if section.devices == 1 else DDPStrategy(start_method="spawn"),
        precision="bf16-mixed" if section.precision == "bfloat16" else "32-true",
    )
    result: T
    if section.devices == 1:
        result = fabric.launch(function, *args)
        return result
    with tempfile.TemporaryDirectory(prefix="geosurge-train-") as folder:
        report, level = Path(folder) / "error.json", logging.getLogger().getEffectiveLevel()
        try:
            result = fabric.launch(partial(_reporting, report=report, level=level, function=function), *args)
        except ProcessRaisedException as error:
            if not report.exists():
                raise
            told = json.loads(report.read_text(encoding="utf-8"))
            raise getattr(errors, told["class"])(told["message"]) from error
    return result


def _reporting(fabric: Fabric, *args: object, report: Path, level: int, function: Callable[..., T]) -> T:
    """Calls a function; leaves the error that it raises on purpose where the process that waits can read it."""
    if fabric.is_global_zero:
        logging.basicConfig(level=level, format="%(message)s")
    try:
        return function(fabric, *args)
    except GeoSurgeError as error:
        aside = report.with_suffix(f".{fabric.global_rank}")
        aside.write_text(json.dumps({"class": type(error).__name__, "message": str(error)}), encoding="utf-8")
        aside.replace(report)
        raise


def _parse(device: str, devices: int) -> tuple[str, int | None]:
    """Kind and number of a device that is there."""
    try:
        gpu = device_to_gpu(device)
    except UsageError as error:
        raise ConfigurationError(f"training.device: {error}") from error
    if gpu is None:
        return "cpu", None
    number = gpu if ":" in device else None
    if number is not None and devices > 1:
        raise ConfigurationError(
            f"training.device is {device!r} and training.devices {devices}: give the number of one device or none"
        )
    there = torch.cuda.device_count()
    if there < max(devices, gpu + 1):
        raise ConfigurationError(
            f"training.device is {device!r} and training.devices {devices}, but torch sees {there} such devices here"
        )
    return "cuda", number
