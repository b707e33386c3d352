"""Trainings in processes of their own, which lose their power."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from geosurge_training.fitting.checkpoint import latest_checkpoint

# Processes that a training starts import its main script.
_SCRIPT = "from geosurge_training.cli import main\nif __name__ == '__main__': main()"


def train_until_killed(recipe: Path, run: Path, *, most_seconds_after: float) -> Path:
    """Trains until the first checkpoint is there, kills all its processes soon after, and gives its latest checkpoint.

    Any moment will do: in the middle of a step, a checkpoint or a row of the log.
    """
    script = run.with_name("train.py")
    script.write_text(_SCRIPT)
    process = subprocess.Popen(
        [sys.executable, str(script), "fit", str(recipe), "--run", str(run)],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 200
    while latest_checkpoint(run) is None and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(random.uniform(0.0, most_seconds_after))
    os.killpg(process.pid, signal.SIGKILL)
    output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, output
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None
    return checkpoint
