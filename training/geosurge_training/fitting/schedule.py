"""How long training goes on and at which learning rate: steps, epochs, rates and early stopping."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Self

from geosurge.errors import ConfigurationError
from geosurge_training.recipe import TrainingSection


@dataclass(frozen=True)
class Schedule:
    """The plan of a run.

    Attributes:
        kind: `cosine`: a half cosine to zero at the end; `halving`: halved every epoch (GeoSURGE, arXiv 2510.01448).
        peak: Highest learning rate.
        warmup_steps: Steps over which the rate rises in a line.
        steps: Steps of the whole run.
        batch_size: Images a step.
        train_count: Images an epoch; None where images never repeat.
    """

    kind: Literal["cosine", "halving"]
    peak: float
    warmup_steps: int
    steps: int
    batch_size: int
    train_count: int | None

    @classmethod
    def of(cls, section: TrainingSection, train_count: int | None) -> Self:
        """The plan that a recipe asks for.

        Args:
            section: The recipe's training section.
            train_count: Images an epoch; None where images never repeat.

        Returns:
            The plan.

        Raises:
            ConfigurationError: Epochs are asked for, and the images never repeat.
        """
        steps = section.steps
        if train_count is None:
            for key, asked in (
                ("epochs", section.epochs is not None),
                ('schedule = "halving"', section.schedule == "halving"),
                ("patience", section.patience is not None),
            ):
                if asked:
                    raise ConfigurationError(
                        f"training.{key} counts epochs, but this data source has none: its images never repeat; "
                        "give training.steps and the cosine schedule"
                    )
        if steps is None:
            assert section.epochs is not None  # the recipe's validator has seen to it
            assert train_count is not None
            steps = -(-section.epochs * train_count // section.batch_size)
        return cls(
            section.schedule, section.learning_rate, section.warmup_steps, steps, section.batch_size, train_count
        )

    def epochs_before(self, step: int) -> int:
        """Whole epochs that have been seen before a step."""
        return 0 if self.train_count is None else step * self.batch_size // self.train_count

    def ends_epoch(self, step: int) -> bool:
        """Whether an epoch's last image is in the batch of a step."""
        return self.epochs_before(step + 1) > self.epochs_before(step)

    def rate(self, step: int) -> float:
        """Learning rate of a step, from 0 on."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.kind == "halving":
            return float(self.peak * 0.5 ** self.epochs_before(step))
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.peak * 0.5 * (1.0 + math.cos(math.pi * done))


@dataclass(frozen=True)
class EarlyStopping:
    """Ends a run after epochs without gain on the held-out loss (GeoSURGE: four).

    OURS: a gain is any loss lower than the lowest so far, and the run ends with the weights it then has.

    Attributes:
        patience: Epochs without gain that end the run; None never ends it.
        lowest: The lowest held-out loss; None before the first.
        epochs_without_gain: Since then.
    """

    patience: int | None
    lowest: float | None = None
    epochs_without_gain: int = 0

    def after(self, loss: float) -> EarlyStopping:
        """The state after an epoch."""
        if self.lowest is None or loss < self.lowest:
            return EarlyStopping(self.patience, loss)
        return EarlyStopping(self.patience, self.lowest, self.epochs_without_gain + 1)

    def state(self) -> dict[str, float | None]:
        """What a checkpoint has to hold of it; nothing where nothing ends the run."""
        if self.patience is None:
            return {}
        return {"lowest": self.lowest, "epochs_without_gain": self.epochs_without_gain}

    @property
    def ends(self) -> bool:
        """Whether the run ends here."""
        return self.patience is not None and self.epochs_without_gain >= self.patience
