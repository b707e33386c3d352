"""A run's parameters, memory, arithmetic and time, worked out before anything starts.

Parameters, operations and activations of the encoder are counted on the very encoder that the recipe builds, run with
a micro-batch of images but without memory behind its tensors (`footprint`). What the optimiser and the loss hold
follows from the numbers of parameters, cells and images. PyTorch's allocator rounds up and CUDA keeps workspaces: leave
a tenth of the memory for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from geosurge.encoder import EncoderConfig, ImageEncoder
from geosurge.encoder.model import TowerOutputs
from geosurge_training.encoders import encoder_config
from geosurge_training.fitting.schedule import Schedule
from geosurge_training.planning.extent import Extent, find_extent
from geosurge_training.planning.footprint import Footprint, footprint, hollow, weightless
from geosurge_training.recipe import Recipe

_FLOAT = 4
"""Bytes of a float32, in which weights, gradients and moments are kept whatever the precision of the arithmetic."""


@dataclass(frozen=True)
class PartMemory:
    """Bytes that a part needs on each device.

    Attributes:
        weights: Its parameters.
        gradients: Of those that are trained.
        moments: AdamW's two, likewise.
        activations: The most that its own pass holds at one time, for a micro-batch. Passes follow one another, so that
            those of all parts together are in `Memory`. Of the geocell tables, what `Memory.loss` says.
    """

    weights: int
    gradients: int
    moments: int
    activations: int


@dataclass(frozen=True)
class Part:
    """A part of what is trained.

    Attributes:
        name: What it is.
        parameters: Its parameters.
        trained_parameters: Those that are trained.
        forward_flops: Operations to run it on one image; see `Footprint.flops`.
        training_flops: Operations that a training step spends in it on one image.
        memory: What each device needs for it, with the towers run at every step.
    """

    name: str
    parameters: int
    trained_parameters: int
    forward_flops: int
    training_flops: int
    memory: PartMemory


@dataclass(frozen=True)
class Parts:
    """All parts, in the order in which an image passes them."""

    vision: Part
    segmenter: Part
    fusion: Part
    geocells: Part

    def __iter__(self) -> Iterator[Part]:
        return iter((self.vision, self.segmenter, self.fusion, self.geocells))


@dataclass(frozen=True)
class Memory:
    """Bytes that each device needs.

    Attributes:
        weights: Parameters of all parts, frozen ones included.
        gradients: Of what is trained.
        moments: AdamW's two, of what is trained.
        activations: The most that the encoder's passes hold at one time, for a micro-batch.
        loss: Candidate cells, their gradients and a micro-batch's logits.
        inputs: A micro-batch of pixels, or of tower outputs where they are cached.
    """

    weights: int
    gradients: int
    moments: int
    activations: int
    loss: int
    inputs: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.moments + self.activations + self.loss + self.inputs


@dataclass(frozen=True)
class Course:
    """One way to go through the run: with the towers run at every step, or with their outputs kept on disk.

    Attributes:
        memory: What each device needs.
        flops: Operations of the whole run, on all devices together.
        filling_flops: Those of them that the towers spend on images which the cache does not have yet.
        disk_bytes: What the outputs of the towers take on disk; 0 without a cache.
        read_bytes: What is read of them after the first epoch.
    """

    memory: Memory
    flops: int
    filling_flops: int = 0
    disk_bytes: int = 0
    read_bytes: int = 0


@dataclass(frozen=True)
class Plan:
    """What a recipe takes.

    Attributes:
        name: The recipe's.
        parts: What it consists of.
        extent: Images and cells.
        steps: Steps of the run, at most.
        epochs: Epochs of the run, at most; None where images never repeat.
        batch_size: Images a step.
        micro_batch_size: Images that a device encodes at once.
        devices: Devices that share each batch.
        precision: In which the arithmetic is done.
        direct: The run with the towers run at every step.
        cached: The run with a tower cache; None where there can be none.
        uses_cache: Whether the recipe asks for it.
    """

    name: str
    parts: Parts
    extent: Extent
    steps: int
    epochs: float | None
    batch_size: int
    micro_batch_size: int
    devices: int
    precision: str
    direct: Course
    cached: Course | None
    uses_cache: bool

    @property
    def course(self) -> Course:
        """The one that the recipe asks for."""
        return self.cached if self.uses_cache and self.cached is not None else self.direct


@dataclass(frozen=True)
class _Costs:
    """Of a micro-batch of `count` images, whose towers give `output_values` numbers."""

    count: int
    vision: Footprint
    vision_training: Footprint
    segmenter: Footprint
    towers: Footprint
    fusion: Footprint
    fusion_training: Footprint
    step: Footprint
    output_values: int


@dataclass(frozen=True)
class _Basis:
    """What all the figures follow from; the encoder has no weights."""

    recipe: Recipe
    encoder: ImageEncoder
    extent: Extent
    schedule: Schedule
    costs: _Costs

    @property
    def columns(self) -> list[int]:
        """Cells of each level that an image is compared with in a training step, at most."""
        section = self.recipe.training
        if section.negatives == "all_cells":
            return list(self.extent.cell_counts)
        return [min(section.batch_size, cells) for cells in self.extent.cell_counts]

    @property
    def shown(self) -> int:
        """Images of all steps."""
        return self.schedule.steps * self.recipe.training.batch_size


def make_plan(recipe: Recipe, run: Path, *, images: int | None = None, cells: Sequence[int] | None = None) -> Plan:
    """Plans a run.

    Args:
        recipe: The recipe.
        run: Directory of the run, which need not exist.
        images: Training images, where they are not to be counted.
        cells: Cells of each level, likewise.

    Returns:
        The plan.

    Raises:
        ConfigurationError: The recipe cannot be trained, or sizes are neither stated nor at hand.
        EncoderError: The encoder's configuration is wrong.
    """
    section, config = recipe.training, encoder_config(recipe)
    with weightless():
        encoder = hollow(lambda: ImageEncoder(config))
    extent = find_extent(recipe, encoder, run, images=images, cells=cells)
    schedule = Schedule.of(section, extent.train_count)
    costs = _costs(config, section.images_at_once, section.precision)
    basis = _Basis(recipe, encoder, extent, schedule, costs)
    parts = _parts(basis)
    return Plan(
        recipe.name,
        parts,
        extent,
        schedule.steps,
        None if extent.train_count is None else basis.shown / extent.train_count,
        section.batch_size,
        section.images_at_once,
        section.devices,
        section.precision,
        _direct(basis, parts),
        _cached(basis, parts),
        section.tower_cache is not None,
    )


def _costs(config: EncoderConfig, count: int, precision: str) -> _Costs:
    with weightless(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        encoder = hollow(lambda: ImageEncoder(config)).train()
        pixels = torch.empty(count, 3, encoder.image_size, encoder.image_size, dtype=torch.uint8)
        outputs = _tower_outputs(encoder, count)
        # From the second micro-batch on, gradients are there and are added to.
        _back(encoder.vision(pixels).tokens)
        _back(encoder.fuse(outputs))
        with torch.no_grad():
            vision = footprint(lambda: encoder.vision(pixels))
            segmenter = Footprint(0, 0)
            if encoder.config.fusion.blocks:
                segmenter = footprint(lambda: encoder.segmenter(pixels, encoder.vision.grid))
            towers = footprint(lambda: encoder.towers(pixels))
            fusion = footprint(lambda: encoder.fuse(outputs))
        return _Costs(
            count,
            vision,
            footprint(lambda: _back(encoder.vision(pixels).tokens)),
            segmenter,
            towers,
            fusion,
            footprint(lambda: _back(encoder.fuse(outputs))),
            footprint(lambda: _back(encoder(pixels))),
            sum(part.numel() for part in outputs if part is not None),
        )


def _tower_outputs(encoder: ImageEncoder, count: int) -> TowerOutputs:
    """Of the shape that the towers give, which must not be run for it."""
    vision, (rows, columns) = encoder.vision, encoder.vision.grid
    tokens = torch.empty(count, vision.token_count, vision.width, requires_grad=not vision.config.frozen)
    if encoder.config.fusion.blocks == 0:
        return TowerOutputs(tokens, None)
    return TowerOutputs(tokens, torch.empty(count, rows * columns, encoder.config.segmentation.class_count))


def _back(outputs: Tensor) -> None:
    if outputs.requires_grad:
        outputs.backward(torch.empty_like(outputs))  # type: ignore[no-untyped-call]


def _parts(basis: _Basis) -> Parts:
    costs, encoder = basis.costs, basis.encoder
    counts, dimension = encoder.parameter_counts(), encoder.dimension

    def part(name: str, parameters: int, forward: Footprint, training: Footprint, *, is_trained: bool = True) -> Part:
        size, trained = _FLOAT * parameters, parameters if is_trained else 0
        memory = PartMemory(size, _FLOAT * trained, 2 * _FLOAT * trained, training.peak_bytes)
        return Part(name, parameters, trained, forward.flops // costs.count, training.flops // costs.count, memory)

    # Each level has a temperature, too.
    geocells = sum(basis.extent.cell_counts) * dimension + len(basis.extent.cell_counts)
    # One product forward, one each for the gradients of images and of cells.
    loss = Footprint(3 * 2 * dimension * sum(basis.columns) * costs.count, _loss_bytes(basis))
    is_vision_trained = not encoder.config.vision.frozen
    return Parts(
        part("vision tower", counts["vision"], costs.vision, costs.vision_training, is_trained=is_vision_trained),
        part("segmenter", counts["segmentation"], costs.segmenter, costs.segmenter, is_trained=False),
        part("fusion", counts["fusion"], costs.fusion, costs.fusion_training),
        part("geocell tables", geocells, Footprint(0, 0), loss),
    )


def _loss_bytes(basis: _Basis) -> int:
    section, columns = basis.recipe.training, sum(basis.columns)
    # Unit rows and the gradient that is collected on them; a batch's cells are gathered from the table and back, too.
    rows = (2 if section.negatives == "all_cells" else 4) * basis.encoder.dimension * columns
    # Logits before and after the temperature, log-probabilities, and the gradient of the logits.
    logits = 4 * section.images_at_once * columns
    return _FLOAT * (rows + logits)


def _memory(basis: _Basis, parts: Parts, *, activations: int, inputs: int) -> Memory:
    return Memory(
        weights=sum(part.memory.weights for part in parts),
        gradients=sum(part.memory.gradients for part in parts),
        moments=sum(part.memory.moments for part in parts),
        activations=activations,
        loss=_loss_bytes(basis),
        inputs=inputs,
    )


def _direct(basis: _Basis, parts: Parts) -> Course:
    segmentation = basis.recipe.encoder.segmentation
    pixels = basis.costs.count * 3 * basis.encoder.image_size**2
    memory = _memory(basis, parts, activations=basis.costs.step.peak_bytes, inputs=pixels)
    training = basis.shown * sum(part.training_flops for part in parts)
    # A segmenter that is trained first costs its backward pass, twice the forward one, too.
    segmenter = 3 * segmentation.training_steps * segmentation.training_batch_size * parts.segmenter.forward_flops
    return Course(memory, training + segmenter + _watch_flops(basis, parts))


def _cached(basis: _Basis, parts: Parts) -> Course | None:
    costs, count = basis.costs, basis.extent.train_count
    if count is None or not basis.encoder.config.vision.frozen:
        return None
    # The towers' pass and the fusion module's are never there together.
    activations = max(costs.towers.peak_bytes, costs.fusion_training.peak_bytes)
    memory = _memory(basis, parts, activations=activations, inputs=_FLOAT * costs.output_values)
    seen = min(count, basis.shown)
    filling = seen * (parts.vision.forward_flops + parts.segmenter.forward_flops)
    training = basis.shown * (parts.fusion.training_flops + parts.geocells.training_flops)
    value_bytes = 2 if basis.recipe.training.tower_cache_dtype == "float16" else 4
    image_bytes = value_bytes * costs.output_values // costs.count
    return Course(
        memory,
        filling + training + _watch_flops(basis, parts),
        filling,
        count * image_bytes,
        (basis.shown - seen) * image_bytes,
    )


def _watch_flops(basis: _Basis, parts: Parts) -> int:
    """Operations of the held-out losses that early stopping watches, over all cells."""
    section = basis.recipe.training
    if section.patience is None:
        return 0
    images = basis.schedule.epochs_before(basis.schedule.steps) * section.patience_images
    loss = 2 * basis.encoder.dimension * sum(basis.extent.cell_counts)
    return images * (loss + sum(part.forward_flops for part in parts))
