"""Checkpoints of a run: safetensors and JSON, written aside and renamed, so that the newest is always whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from geosurge.durable_files import fsync_path
from geosurge.errors import ConfigurationError

_PREFIX = "checkpoint-"
_MODEL_FILE, _OPTIMISER_FILE, _STATE_FILE = "model.safetensors", "optimiser.safetensors", "state.json"


def save_checkpoint(
    run: Path,
    step: int,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    state: Mapping[str, float | None] | None = None,
) -> Path:
    """Writes a checkpoint and removes older ones.

    Args:
        run: Directory of the run.
        step: Steps done.
        model: Everything that is trained.
        optimiser: Its optimiser.
        state: What else a run has to know to go on, for `load_state`.

    Returns:
        The checkpoint's directory.
    """
    final = run / f"{_PREFIX}{step:09d}"
    aside = run / f".{final.name}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, aside / _MODEL_FILE)
    save_file(_optimiser_tensors(optimiser), aside / _OPTIMISER_FILE)
    (aside / _STATE_FILE).write_text(json.dumps({"step": step, **(state or {})}))
    for file in [*aside.iterdir(), aside]:
        fsync_path(file)
    shutil.rmtree(final, ignore_errors=True)
    aside.rename(final)
    # The new name must be on the disk before the old checkpoints are not.
    fsync_path(run)
    for older in run.glob(f"{_PREFIX}*"):
        if older != final:
            shutil.rmtree(older)
    return final


def latest_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint of a run, if there is one."""
    return max(run.glob(f"{_PREFIX}*"), default=None)


def load_checkpoint(checkpoint: Path, model: nn.Module, optimiser: torch.optim.Optimizer | None = None) -> int:
    """Reads a checkpoint.

    Args:
        checkpoint: Its directory.
        model: Receives the weights.
        optimiser: Receives its state; leave out to read the weights alone.

    Returns:
        Steps done.

    Raises:
        ConfigurationError: A file is missing or damaged, or the weights are of another recipe.
    """
    try:
        weights = load_file(checkpoint / _MODEL_FILE)
        moments = {} if optimiser is None else load_file(checkpoint / _OPTIMISER_FILE)
        step = int(json.loads((checkpoint / _STATE_FILE).read_text())["step"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"{checkpoint} is damaged: {error}; remove it, and training starts from the beginning"
        ) from error
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ConfigurationError(f"{checkpoint} does not fit the recipe: {error}") from error
    if optimiser is not None:
        _restore_optimiser(optimiser, moments)
    return step


def load_state(checkpoint: Path) -> dict[str, Any]:
    """What `save_checkpoint` was told that a run has to know to go on.

    Args:
        checkpoint: A checkpoint that `load_checkpoint` could read.

    Returns:
        The state, without the step.
    """
    state: dict[str, Any] = json.loads((checkpoint / _STATE_FILE).read_text())
    del state["step"]
    return state


def _optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    state = optimiser.state_dict()["state"]
    return {f"{index}.{name}": value.contiguous() for index, entry in state.items() for name, value in entry.items()}


def _restore_optimiser(optimiser: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
