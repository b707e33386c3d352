"""Plans against encoders that are really built and steps that are really done."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from lightning_fabric import Fabric
from support.recipes import write_recipe

from geosurge.errors import ConfigurationError, EncoderError
from geosurge_training.encoders import build_encoder
from geosurge_training.fitting.geocells import GeocellEmbeddings, Labels
from geosurge_training.fitting.steps import compute_gradients
from geosurge_training.fitting.trainable import Trainable, make_optimiser
from geosurge_training.planning.footprint import Footprint, footprint
from geosurge_training.planning.plan import Plan, make_plan
from geosurge_training.recipe import Recipe, load_recipe

CELLS = (40, 90)
TABLE = 'source = "table"\ntable = "pictures.csv"'


def recipe_of(folder: Path, *replacements: tuple[str, str], data: str | None = None) -> Recipe:
    path = folder / "recipe.toml"
    text = (write_recipe(path) if data is None else write_recipe(path, data=data, segmenter_steps=0)).read_text()
    for old, new in replacements:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path.write_text(text)
    return load_recipe(path)


@dataclass(frozen=True)
class Step:
    cost: Footprint
    weight_bytes: int
    gradient_bytes: int
    moment_bytes: int


def real_step(recipe: Recipe) -> Step:
    """One training step of a recipe, on noise and with cells drawn at random."""
    section, encoder = recipe.training, build_encoder(recipe)
    model = Trainable(encoder, GeocellEmbeddings(CELLS, encoder.dimension)).train()
    optimiser = make_optimiser(model, section.learning_rate, section.weight_decay)
    count, side = section.batch_size, encoder.image_size
    pixels = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)
    # With as few cells as images are compared with at most, the number of distinct ones is known.
    ordinals = torch.stack([torch.arange(count) % cells for cells in CELLS], dim=1)
    cost = footprint(
        lambda: compute_gradients(
            Fabric(accelerator="cpu", devices=1),
            model,
            lambda rows: encoder(pixels[rows]),
            Labels(ordinals),
            negatives=section.negatives,
            micro_batch_size=section.images_at_once,
            seed=lambda place: place,
        )
    )
    optimiser.step()
    moments = [value for state in optimiser.state.values() for name, value in state.items() if name != "step"]
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return Step(cost, *(sum(t.nbytes for t in tensors) for tensors in (model.parameters(), gradients, moments)))


@pytest.mark.parametrize(
    "changes",
    [
        (),
        (('"all_cells"', '"batch"'), ("batch_size = 16\nl", "batch_size = 16\nmicro_batch_size = 4\nl")),
        (("frozen = false", "frozen = true"),),
        (("\nblocks = 2", "\nblocks = 0"),),
    ],
    ids=["all cells", "batch in parts", "frozen", "no fusion"],
)
def test_a_plan_is_what_a_real_step_takes(tmp_path: Path, changes: tuple[tuple[str, str], ...]) -> None:
    recipe = recipe_of(tmp_path, *changes)
    plan, step = make_plan(recipe, tmp_path / "run", cells=CELLS), real_step(recipe)
    counts = build_encoder(recipe).parameter_counts()
    assert [part.parameters for part in plan.parts][:3] == [counts[k] for k in ("vision", "segmentation", "fusion")]
    assert plan.parts.vision.trained_parameters == (0 if recipe.encoder.vision.frozen else counts["vision"])
    memory = plan.direct.memory
    assert (memory.weights, memory.gradients, memory.moments) == (
        step.weight_bytes,
        step.gradient_bytes,
        step.moment_bytes,
    )
    planned = recipe.training.batch_size * sum(part.training_flops for part in plan.parts)
    assert planned == pytest.approx(step.cost.flops, rel=1e-3)
    assert memory.gradients + memory.activations + memory.loss == pytest.approx(step.cost.peak_bytes, rel=0.15)


@pytest.mark.parametrize("vision", ["frozen = false", "frozen = true"])
def test_each_part_takes_what_it_takes_by_itself(tmp_path: Path, vision: str) -> None:
    recipe = recipe_of(tmp_path, ("frozen = false", vision))
    plan, encoder = make_plan(recipe, tmp_path, cells=CELLS), build_encoder(recipe).train()
    side = encoder.image_size
    pixels = torch.randint(0, 256, (recipe.training.images_at_once, 3, side, side), dtype=torch.uint8)
    with torch.no_grad():
        seen = encoder.towers(pixels)
        segmenter = footprint(lambda: encoder.segmenter(pixels, encoder.vision.grid))

    def backward(outputs: torch.Tensor) -> None:
        if outputs.requires_grad:
            outputs.sum().backward()  # type: ignore[no-untyped-call]

    for _ in range(2):
        # The second time, gradients are there and are added to.
        tower = footprint(lambda: backward(encoder.vision(pixels).tokens))
        fusion = footprint(lambda: backward(encoder.fuse(seen)))
    parts = plan.parts
    for part, cost in ((parts.vision, tower), (parts.segmenter, segmenter), (parts.fusion, fusion)):
        assert part.memory.activations == pytest.approx(cost.peak_bytes, rel=0.05), part.name
        assert part.memory.activations <= plan.direct.memory.activations
        assert part.memory.gradients == 4 * part.trained_parameters
        assert part.memory.moments == 2 * part.memory.gradients
        assert part.memory.weights == 4 * part.parameters
    assert parts.geocells.memory.activations == plan.direct.memory.loss
    assert parts.segmenter.memory.gradients == 0
    assert (parts.vision.memory.gradients == 0) == recipe.encoder.vision.frozen


def test_without_fusion_the_segmenter_only_takes_its_weights(tmp_path: Path) -> None:
    memory = make_plan(
        recipe_of(tmp_path, ("\nblocks = 2", "\nblocks = 0")), tmp_path, cells=CELLS
    ).parts.segmenter.memory
    assert memory.weights > 0
    assert (memory.gradients, memory.moments, memory.activations) == (0, 0, 0)


def test_the_loss_compares_with_the_batch_or_with_all_cells(tmp_path: Path) -> None:
    everything = make_plan(recipe_of(tmp_path), tmp_path, cells=CELLS).parts.geocells
    batch = make_plan(recipe_of(tmp_path, ('"all_cells"', '"batch"')), tmp_path, cells=CELLS).parts.geocells
    assert everything.training_flops == 3 * 2 * 16 * sum(CELLS)
    assert batch.training_flops == 3 * 2 * 16 * (16 + 16)
    assert everything.parameters == batch.parameters == 16 * sum(CELLS) + len(CELLS)


def test_memory_follows_the_micro_batch_and_arithmetic_does_not(tmp_path: Path) -> None:
    def plan_with(line: str) -> Plan:
        recipe = recipe_of(tmp_path, ("batch_size = 16\nl", f"batch_size = 16\n{line}\nl"))
        return make_plan(recipe, tmp_path, cells=CELLS)

    whole, parts = plan_with("devices = 1"), plan_with("micro_batch_size = 4")
    shared = plan_with("devices = 4")
    assert whole.direct.flops == pytest.approx(parts.direct.flops, rel=0.01)
    assert whole.direct.memory.activations > 3 * parts.direct.memory.activations
    assert (parts.micro_batch_size, shared.micro_batch_size, shared.devices) == (4, 4, 4)
    assert shared.direct.memory == parts.direct.memory


def test_the_segmenters_own_training_is_counted(tmp_path: Path) -> None:
    plan = make_plan(recipe_of(tmp_path), tmp_path, cells=CELLS)
    steps, images = 12 * 16, 3 * 8
    training = steps * sum(part.training_flops for part in plan.parts)
    assert plan.direct.flops == training + 3 * images * plan.parts.segmenter.forward_flops


def test_a_cache_runs_the_towers_once_an_image(tmp_path: Path) -> None:
    frozen = ("frozen = false", "frozen = true")
    epochs = ("steps = 12", "epochs = 5\npatience = 2\npatience_images = 10")
    plan = make_plan(recipe_of(tmp_path, frozen, epochs, data=TABLE), tmp_path, images=100, cells=CELLS)
    parts = plan.parts
    # 5 * 100 images in batches of 16.
    assert (plan.steps, plan.extent.train_count) == (32, 100)
    assert plan.epochs == pytest.approx(32 * 16 / 100)
    towers = parts.vision.forward_flops + parts.segmenter.forward_flops
    assert parts.vision.training_flops == parts.vision.forward_flops
    rest = parts.fusion.training_flops + parts.geocells.training_flops
    watched = 5 * 10 * (towers + parts.fusion.forward_flops + 2 * 16 * sum(CELLS))
    assert plan.direct.flops == 512 * (towers + rest) + watched
    assert plan.cached is not None
    assert plan.cached.filling_flops == 100 * towers
    assert plan.cached.flops == 100 * towers + 512 * rest + watched
    # Tokens of 16 numbers and fractions of 7 classes, in float16.
    rows, columns = build_encoder(load_recipe(tmp_path / "recipe.toml")).vision.grid
    image_bytes = 2 * rows * columns * (16 + 7)
    assert plan.cached.disk_bytes == 100 * image_bytes
    assert plan.cached.read_bytes == 412 * image_bytes
    assert not plan.uses_cache
    assert plan.course == plan.direct


@pytest.mark.parametrize("data", [None, TABLE], ids=["rendered", "trained tower"])
def test_there_is_no_cache_of_what_changes(tmp_path: Path, data: str | None) -> None:
    recipe = recipe_of(tmp_path, data=data)
    plan = make_plan(recipe, tmp_path, images=None if data is None else 100, cells=CELLS)
    assert plan.cached is None


def test_reduced_precision_keeps_weights_and_halves_activations(tmp_path: Path) -> None:
    single = make_plan(recipe_of(tmp_path), tmp_path, cells=CELLS)
    reduced = recipe_of(tmp_path, ("batch_size = 16\nl", 'batch_size = 16\nprecision = "bfloat16"\nl'))
    half = make_plan(reduced, tmp_path, cells=CELLS)
    assert half.direct.memory.weights == single.direct.memory.weights
    assert half.direct.memory.activations < 0.8 * single.direct.memory.activations


def test_an_encoder_that_cannot_be_built_is_refused_as_training_would(tmp_path: Path) -> None:
    old = write_recipe(tmp_path / "recipe.toml").read_text()
    backbone = old[old.index("model_type") : old.index("[encoder.segmentation]")]
    clip = 'model_type = "clip_vision_model"\nimage_size = 64\npatch_size = 8\n\n'
    recipe = recipe_of(tmp_path, (backbone, clip))
    with pytest.raises(EncoderError) as planned:
        make_plan(recipe, tmp_path, cells=CELLS)
    with pytest.raises(EncoderError, match="cannot see a square of 32 pixels") as built:
        build_encoder(recipe)
    assert str(planned.value) == str(built.value)


def test_what_cannot_be_trained_cannot_be_planned(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="epochs"):
        make_plan(recipe_of(tmp_path, ("steps = 12", "epochs = 3")), tmp_path, cells=CELLS)
