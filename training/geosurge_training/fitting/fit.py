"""Trains an encoder and its geographic embeddings: partition, segmenter, then InfoNCE summed over the levels."""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning_fabric import Fabric
from torch import Tensor

from geosurge.errors import ConfigurationError
from geosurge.geodesy import latlng_to_unit_vector
from geosurge_training.data.open_source import open_source
from geosurge_training.data.source import ImageSource, NumberedSource
from geosurge_training.encoders import build_encoder
from geosurge_training.fitting.batch_norm import share_batch_norms
from geosurge_training.fitting.checkpoint import latest_checkpoint, load_checkpoint, load_state, save_checkpoint
from geosurge_training.fitting.geocells import GeocellEmbeddings, Labels
from geosurge_training.fitting.held_out import held_out_loss
from geosurge_training.fitting.label_smoothing import LabelSmoothing
from geosurge_training.fitting.memory import keep_freed_memory
from geosurge_training.fitting.processes import launch
from geosurge_training.fitting.schedule import EarlyStopping, Schedule
from geosurge_training.fitting.segmenter import prepare_segmenter
from geosurge_training.fitting.step_images import StepImages, cached_images, decoded_images
from geosurge_training.fitting.steps import compute_gradients, part_seed, sum_over_processes
from geosurge_training.fitting.tower_cache import TowerCache
from geosurge_training.fitting.trainable import Trainable, make_optimiser
from geosurge_training.fitting.training_log import TrainingLog
from geosurge_training.partitions.interface import Partition
from geosurge_training.partitions.load import load_partition
from geosurge_training.partitions.make import make_partition
from geosurge_training.progress import Tracker, track
from geosurge_training.recipe import MIN_CALIBRATION_IMAGES, Recipe
from geosurge_training.run_directory import claim_images, claim_run

_LOGGER = logging.getLogger(__name__)


def fit(recipe: Recipe, run: Path, *, stop_after: int | None = None) -> Path:
    """Trains, or goes on with a run that was cut off.

    A run that is cut at any moment and started again ends with the same bits as one that was not, on the CPU with the
    same number of threads and processes. With another number of processes, or of images encoded at once, it ends with
    the same weights to rounding, as long as there is no dropout. Batch normalisation in a vision tower that is trained
    takes the statistics of the images that all processes encode at once: there, that number has to stay the same.

    Args:
        recipe: The recipe.
        run: Directory of the run; holds partition, segmenter, checkpoints and log.
        stop_after: Stop with a checkpoint after this many steps of the whole run, at least one.

    Returns:
        The newest checkpoint.

    Raises:
        ConfigurationError: The directory holds a run of another recipe or on other images, too few images are held out
            to calibrate on, the data or the devices cannot be used, or training diverged.
        EncoderError: A backbone is not at hand.
    """
    return launch(recipe.training, _fit, recipe, run, stop_after)


@dataclass(frozen=True)
class _Record:
    """What the first process tells of a run."""

    progress: Tracker
    log: TrainingLog


@dataclass(frozen=True)
class _Run:
    """Everything that a process trains with."""

    fabric: Fabric
    recipe: Recipe
    folder: Path
    source: ImageSource
    partition: Partition
    schedule: Schedule
    smoothing: LabelSmoothing | None
    model: Trainable
    optimiser: torch.optim.Optimizer


def _fit(fabric: Fabric, recipe: Recipe, folder: Path, stop_after: int | None) -> Path:
    """What each process does."""
    run = _prepare(fabric, recipe, folder)
    patience = recipe.training.patience
    checkpoint, done, stopping = latest_checkpoint(folder), 0, EarlyStopping(patience)
    if checkpoint is not None:
        done = load_checkpoint(checkpoint, run.model, run.optimiser)
        stopping = EarlyStopping(patience, **load_state(checkpoint))
    last = run.schedule.steps if stop_after is None else min(run.schedule.steps, stop_after)
    with ExitStack() as stack:
        record = None
        if fabric.is_global_zero:
            level_count = len(run.partition.cell_counts)
            log = stack.enter_context(TrainingLog(folder, level_count, done, held_out=patience is not None))
            record = _Record(stack.enter_context(track("fit", last, done)), log)
        if not stopping.ends:
            _train(run, range(done, last), stopping, record)
    fabric.barrier()
    checkpoint = latest_checkpoint(folder)
    if checkpoint is None:
        raise ConfigurationError(f"nothing to do: the recipe asks for {last} steps")
    return checkpoint


def _prepare(fabric: Fabric, recipe: Recipe, folder: Path) -> _Run:
    section = recipe.training
    keep_freed_memory()
    # The first process makes what all of them read.
    with fabric.rank_zero_first():
        claim_run(recipe, folder)
        encoder = build_encoder(recipe)
        source = open_source(recipe, encoder, folder)
        claim_images(source, folder)
        _check_held_out(source)
        partition = load_partition(make_partition(recipe, folder, source))
        prepare_segmenter(recipe, folder, encoder, source)
    if fabric.is_global_zero:
        _LOGGER.info("partition: %s cells", ", ".join(map(str, partition.cell_counts)))
    torch.manual_seed(recipe.seed)
    geocells = GeocellEmbeddings(partition.cell_counts, encoder.dimension, section.initial_temperature, section.head)
    if fabric.world_size > 1 and not encoder.vision.config.frozen:
        share_batch_norms(encoder.vision)
    model = Trainable(encoder, geocells).to(fabric.device).train()
    smoothing = None
    if section.label_smoothing_km > 0:
        locations = [(level.mean_latitude_deg, level.mean_longitude_deg) for level in partition.levels]
        smoothing = LabelSmoothing.of_cells(section.label_smoothing_km, locations, fabric.device)
    return _Run(
        fabric,
        recipe,
        folder,
        source,
        partition,
        Schedule.of(section, source.train_count),
        smoothing,
        model,
        make_optimiser(model, section.learning_rate, section.weight_decay),
    )


def _check_held_out(source: ImageSource) -> None:
    """Refuses to train where the bundle could not be calibrated afterwards."""
    count = source.held_out_count
    if count is not None and count < MIN_CALIBRATION_IMAGES:
        raise ConfigurationError(
            f"{count} images are held out, and {MIN_CALIBRATION_IMAGES} are the least that a bundle can be calibrated "
            "on: raise data.held_out_share, name more of them in data.held_out_table, or add images"
        )


def _train(run: _Run, steps: range, stopping: EarlyStopping, record: _Record | None) -> None:
    """Goes through steps until they or patience are over; leaves a checkpoint at the end."""
    section = run.recipe.training
    with closing(_images(run, steps)) as images:
        for step, batch in zip(steps, images, strict=True):
            rate = run.schedule.rate(step)
            losses = _step(run, step, rate, batch)
            for epoch in range(run.schedule.epochs_before(step), run.schedule.epochs_before(step + 1)):
                _check_unusable(run, epoch)
            if section.patience is not None and run.schedule.ends_epoch(step):
                held_out = _held_out_loss(run)
                stopping = stopping.after(float(held_out.sum()))
                if record is not None:
                    record.log.held_out(step + 1, held_out)
            if record is not None:
                record.progress.advance(loss=float(losses.sum()), leaf=float(losses[-1]))
                if (step + 1) % section.log_every == 0:
                    record.log.step(step + 1, rate, losses, run.model.geocells.temperatures().detach())
                if (step + 1) % section.checkpoint_every == 0 or step + 1 == steps.stop or stopping.ends:
                    save_checkpoint(run.folder, step + 1, run.model, run.optimiser, stopping.state())
            if stopping.ends:
                _LOGGER.info("no gain on the held-out loss in %d epochs: the run ends", section.patience)
                return


def _check_unusable(run: _Run, epoch: int) -> None:
    """Ends the run where the processes together have met too many images in an epoch that cannot be used."""
    if isinstance(run.source, NumberedSource):
        count = torch.tensor([run.source.unusable_count(epoch)], device=run.fabric.device)
        if run.fabric.world_size > 1:
            sum_over_processes(run.fabric, [count])
        run.source.check_unusable_count(int(count))


def _step(run: _Run, step: int, rate: float, images: StepImages) -> Tensor:
    """One optimisation step; returns the loss of each level, (L,)."""
    section, device = run.recipe.training, run.fabric.device
    ordinals = torch.from_numpy(run.partition.assign(images.latitude_deg, images.longitude_deg)).to(device)
    directions = None
    if run.smoothing is not None:
        directions = torch.from_numpy(latlng_to_unit_vector(images.latitude_deg, images.longitude_deg)).to(device)
    for group in run.optimiser.param_groups:
        group["lr"] = rate
    losses = compute_gradients(
        run.fabric,
        run.model,
        images.encode,
        Labels(ordinals, directions),
        negatives=section.negatives,
        micro_batch_size=section.images_at_once,
        seed=lambda position: part_seed(run.recipe.seed, step, position),
        smoothing=run.smoothing,
    )
    gradients = (parameter.grad for parameter in run.model.parameters())
    norm = torch.nn.utils.get_total_norm(gradient for gradient in gradients if gradient is not None)
    # A finite loss may have a gradient that is not, which would leave weights that no later step can mend.
    if not (losses.isfinite().all() and norm.isfinite()):
        raise ConfigurationError(
            f"the loss of step {step + 1} is {float(losses.sum())}, its gradient's norm {float(norm)}: training "
            "diverged; lower training.learning_rate or raise training.warmup_steps"
        )
    run.optimiser.step()
    return losses


def _images(run: _Run, steps: range) -> Generator[StepImages, None, None]:
    """This process's images of each step, from the tower cache where the recipe has one."""
    section, encoder = run.recipe.training, run.model.encoder
    if section.tower_cache is None:
        yield from decoded_images(run.fabric, encoder, run.source, steps, section.batch_size)
        return
    cache = TowerCache.open(section.tower_cache, encoder, run.source, section.tower_cache_dtype, section.precision)
    assert isinstance(run.source, NumberedSource)  # or it could not be cached
    with closing(cache):
        yield from cached_images(
            run.fabric,
            encoder,
            run.source,
            steps,
            cache,
            batch_size=section.batch_size,
            micro_batch_size=section.images_at_once,
        )


def _held_out_loss(run: _Run) -> Tensor:
    section = run.recipe.training
    return held_out_loss(
        run.fabric,
        run.model,
        run.source,
        run.partition,
        count=section.patience_images,
        seed=run.recipe.seed,
        batch_size=section.images_at_once,
    )
