"""Trains an encoder and its geographic embeddings: partition, segmenter, then InfoNCE summed over the levels."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from geosurge.encoder import ImageEncoder
from geosurge.errors import ConfigurationError
from geosurge_training.blue_marble import CLASSES, BlueMarble
from geosurge_training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from geosurge_training.data import Batch, ImageSource
from geosurge_training.geocells import GeocellEmbeddings
from geosurge_training.memory import keep_freed_memory
from geosurge_training.partition import Partition, adaptive_partition
from geosurge_training.progress import track
from geosurge_training.recipe import Recipe
from geosurge_training.segmenter import train_segmenter
from geosurge_training.sources import build_encoder, open_source

_LOGGER = logging.getLogger(__name__)
PARTITION_FILE = "partition.npz"
SEGMENTER_FILE = "segmenter.safetensors"
RECIPE_DIGEST_FILE = "recipe.sha256"
LOG_FILE = "log.csv"


class Trainable(nn.Module):
    """The encoder and the geographic embeddings, trained together."""

    def __init__(self, encoder: ImageEncoder, geocells: GeocellEmbeddings) -> None:
        super().__init__()
        self.encoder = encoder
        self.geocells = geocells


def make_partition(recipe: Recipe, run: Path, source: ImageSource | None = None) -> Path:
    """Partitions the training coordinates; skips what is already there.

    Args:
        recipe: The recipe.
        run: Directory of the run.
        source: The recipe's source, where it is open already.

    Returns:
        The partition's file.
    """
    path = run / PARTITION_FILE
    claim_run(recipe, run)
    if not path.exists():
        source = source or open_source(recipe, build_encoder(recipe))
        section = recipe.partition
        partition = adaptive_partition(
            source.coordinate_chunks(),
            section.tau_min_per_level,
            section.tau_max,
            start_s2_level=section.start_s2_level,
            max_s2_level=section.max_s2_level,
        )
        aside = path.with_suffix(".tmp")
        partition.save(aside)
        aside.rename(path)
    return path


def fit(recipe: Recipe, run: Path, *, stop_after: int | None = None) -> Path:
    """Trains, or goes on with a run that was cut off.

    A run that is cut at any moment and started again ends with the same bits as one that was not, on the CPU with the
    same number of threads.

    Args:
        recipe: The recipe.
        run: Directory of the run; holds partition, segmenter, checkpoints and log.
        stop_after: Stop with a checkpoint after this many steps of the whole run, at least one.

    Returns:
        The newest checkpoint.

    Raises:
        ConfigurationError: The directory holds a run of another recipe, the data cannot be used, or training diverged.
        EncoderError: A backbone is not at hand.
    """
    claim_run(recipe, run)
    keep_freed_memory()
    encoder = build_encoder(recipe)
    source = open_source(recipe, encoder)
    partition = Partition.load(make_partition(recipe, run, source))
    _LOGGER.info("partition: %s cells", ", ".join(str(len(level.cell_ids)) for level in partition.levels))
    _prepare_segmenter(recipe, run, encoder, source)
    section = recipe.training
    torch.manual_seed(recipe.seed)
    counts = [len(level.cell_ids) for level in partition.levels]
    geocells = GeocellEmbeddings(counts, encoder.dimension, section.initial_temperature)
    model = Trainable(encoder, geocells).to(section.device)
    optimiser = _optimiser(model, section.learning_rate, section.weight_decay)
    checkpoint = latest_checkpoint(run)
    done = 0 if checkpoint is None else load_checkpoint(checkpoint, model, optimiser)
    last = section.steps if stop_after is None else min(section.steps, stop_after)
    model.train()
    with track("fit", last, done) as progress, _Log(run, len(counts), done) as log:
        for step in range(done, last):
            rate = learning_rate(step, section.learning_rate, section.warmup_steps, section.steps)
            for group in optimiser.param_groups:
                group["lr"] = rate
            torch.manual_seed(recipe.seed * 1_000_003 + step)
            losses = _step(recipe, model, optimiser, source.train_batch(step, section.batch_size), partition)
            if not losses.isfinite().all():
                raise ConfigurationError(
                    f"the loss of step {step + 1} is {float(losses.sum())}: training diverged; lower "
                    "training.learning_rate or raise training.warmup_steps"
                )
            progress.advance(loss=float(losses.sum()), leaf=float(losses[-1]))
            if (step + 1) % section.log_every == 0:
                log.write(step + 1, rate, losses, model.geocells.temperatures().detach())
            if (step + 1) % section.checkpoint_every == 0 or step + 1 == last:
                checkpoint = save_checkpoint(run, step + 1, model, optimiser)
    if checkpoint is None:
        raise ConfigurationError(f"nothing to do: the recipe asks for {last} steps")
    return checkpoint


def learning_rate(step: int, peak: float, warmup_steps: int, steps: int) -> float:
    """Linear warm-up to `peak`, then a half cosine to zero at `steps`."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * 0.5 * (1.0 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


def _step(
    recipe: Recipe, model: Trainable, optimiser: torch.optim.Optimizer, batch: Batch, partition: Partition
) -> Tensor:
    """One optimisation step; returns the loss of each level, (L,)."""
    section = recipe.training
    ordinals = torch.from_numpy(partition.assign(batch.latitude_deg, batch.longitude_deg)).to(section.device)
    reduced = section.precision == "bfloat16"
    with torch.autocast(torch.device(section.device).type, torch.bfloat16, enabled=reduced):
        visual = model.encoder(batch.pixels.to(section.device))
    losses = model.geocells.loss(visual, ordinals, section.negatives)
    optimiser.zero_grad(set_to_none=True)
    losses.sum().backward()  # type: ignore[no-untyped-call]
    optimiser.step()
    return losses.detach()


def _optimiser(model: Trainable, rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW; vectors, biases, norms, geographic embeddings and temperatures do not decay."""
    trained = [parameter for parameter in model.encoder.parameters() if parameter.requires_grad]
    decaying = [parameter for parameter in trained if parameter.ndim > 1]
    others = [parameter for parameter in trained if parameter.ndim <= 1] + list(model.geocells.parameters())
    groups = [{"params": decaying, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate)


def _prepare_segmenter(recipe: Recipe, run: Path, encoder: ImageEncoder, source: ImageSource) -> None:
    """Trains the segmenter where the recipe says so, once a run."""
    section = recipe.encoder.segmentation
    if section.training_steps == 0:
        return
    if not isinstance(source, BlueMarble):
        raise ConfigurationError(
            "encoder.segmentation.training_steps: this data source has no classes to train a segmenter on; "
            "give a pretrained one"
        )
    if section.class_count != len(CLASSES):
        raise ConfigurationError(
            f"encoder.segmentation.class_count is {section.class_count}, but this data source has {len(CLASSES)} "
            f"classes: {', '.join(CLASSES)}"
        )
    path = run / SEGMENTER_FILE
    if not path.exists():
        accuracy = train_segmenter(
            encoder.segmenter,
            source,
            steps=section.training_steps,
            batch_size=section.training_batch_size,
            learning_rate=section.training_learning_rate,
            seed=recipe.seed,
        )
        _LOGGER.info("segmenter: pixel accuracy %.3f on unseen views", accuracy)
        aside = path.with_suffix(".tmp")
        save_file(encoder.segmenter.backbone.state_dict(), aside)
        aside.rename(path)
    encoder.segmenter.backbone.load_state_dict(load_file(path))


def claim_run(recipe: Recipe, run: Path) -> None:
    """Marks a directory as this recipe's run, or refuses one that is another's.

    What tells recipes apart is what the weights depend on: the seed, data, partition, encoder and training sections,
    without the data's paths, so that a moved folder or a better description is no other recipe.

    Args:
        recipe: The recipe.
        run: Directory of the run, made when missing.

    Raises:
        ConfigurationError: The directory holds a run of another recipe.
    """
    run.mkdir(parents=True, exist_ok=True)
    sections = {"seed", "data", "partition", "encoder", "training"}
    unlike = {"data": {"csv", "images"}, "training": {"device", "checkpoint_every", "log_every"}}
    told = recipe.model_dump(mode="json", include=sections, exclude=unlike, exclude_defaults=True)
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    marker = run / RECIPE_DIGEST_FILE
    if not marker.exists():
        aside = marker.with_suffix(".tmp")
        aside.write_text(digest + "\n")
        aside.rename(marker)
    elif marker.read_text().strip() != digest:
        raise ConfigurationError(
            f"{run} holds a run of another recipe (its data, partition, encoder or training section differs); "
            "give another --run directory or remove it"
        )


class _Log:
    """A CSV row and TensorBoard scalars every few steps; rows past the resumed step are dropped."""

    def __init__(self, run: Path, level_count: int, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - part of the `train` extra only

        levels = range(1, level_count + 1)
        per_level = (f"{figure}_level_{level}" for figure in ("loss", "temperature") for level in levels)
        self._columns = ("learning_rate", "loss", *per_level)
        path = run / LOG_FILE
        rows: list[list[str]] = []
        if path.exists():
            with path.open(newline="") as file:
                rows = [row for row in csv.reader(file) if row and row[0].isdigit() and int(row[0]) <= done]
        aside = path.with_suffix(".tmp")
        with aside.open("w", newline="") as file:
            csv.writer(file).writerows([["step", *self._columns], *rows])
        aside.rename(path)
        self._file = path.open("a", newline="")
        self._csv = csv.writer(self._file)
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=done + 1)

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._board.close()

    def write(self, step: int, rate: float, losses: Tensor, temperatures: Tensor) -> None:
        """Adds one row.

        Args:
            step: Steps done.
            rate: Learning rate of the last step.
            losses: (L,) loss of each level.
            temperatures: (L,) temperature of each level.
        """
        figures = [rate, float(losses.sum()), *losses.tolist(), *temperatures.tolist()]
        self._csv.writerow([step, *(f"{value:.6g}" for value in figures)])
        self._file.flush()
        for name, value in zip(self._columns, figures, strict=True):
            self._board.add_scalar(name, value, step)
