"""The log of a run: CSV files and TensorBoard scalars."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from geosurge_training.aside import written_aside
from geosurge_training.run_directory import HELD_OUT_LOG_FILE, LOG_FILE


class TrainingLog:
    """Rows of steps, and of epochs where a held-out loss is taken; those past the resumed step are dropped."""

    def __init__(self, run: Path, level_count: int, done: int, *, held_out: bool) -> None:
        """Opens the files of a run.

        Args:
            run: Directory of the run.
            level_count: Number of levels.
            done: Steps that the run goes on after.
            held_out: Whether there will be a held-out loss.
        """
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - part of the `train` extra only

        losses = [f"loss_level_{level}" for level in range(1, level_count + 1)]
        temperatures = [f"temperature_level_{level}" for level in range(1, level_count + 1)]
        self._steps = _Rows(run / LOG_FILE, ["step", "learning_rate", "loss", *losses, *temperatures], done)
        self._held_out = (
            _Rows(run / HELD_OUT_LOG_FILE, ["step", "held_out_loss", *(f"held_out_{name}" for name in losses)], done)
            if held_out
            else None
        )
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=done + 1)

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._steps.close()
        if self._held_out is not None:
            self._held_out.close()
        self._board.close()

    def step(self, step: int, rate: float, losses: Tensor, temperatures: Tensor) -> None:
        """Adds a row.

        Args:
            step: Steps done.
            rate: Learning rate of the last step.
            losses: (L,) loss of each level.
            temperatures: (L,) temperature of each level.
        """
        self._add(self._steps, step, [rate, float(losses.sum()), *losses.tolist(), *temperatures.tolist()])

    def held_out(self, step: int, losses: Tensor) -> None:
        """Adds a row of held-out losses.

        Args:
            step: Steps done.
            losses: (L,) loss of each level on held-out images.
        """
        assert self._held_out is not None
        self._add(self._held_out, step, [float(losses.sum()), *losses.tolist()])

    def _add(self, rows: _Rows, step: int, figures: Sequence[float]) -> None:
        rows.add(step, figures)
        for name, value in zip(rows.columns[1:], figures, strict=True):
            self._board.add_scalar(name, value, step)


class _Rows:
    """A CSV file that grows; its first column is the step."""

    def __init__(self, path: Path, columns: Sequence[str], done: int) -> None:
        self.columns = columns
        rows: list[list[str]] = []
        if path.exists():
            with path.open(newline="") as file:
                rows = [row for row in csv.reader(file) if row and row[0].isdigit() and int(row[0]) <= done]
        with written_aside(path) as aside, aside.open("w", newline="") as file:
            csv.writer(file).writerows([columns, *rows])
        self._file = path.open("a", newline="")
        self._csv = csv.writer(self._file)

    def add(self, step: int, figures: Sequence[float]) -> None:
        self._csv.writerow([step, *(f"{value:.6g}" for value in figures)])
        self._file.flush()

    def close(self) -> None:
        self._file.close()
