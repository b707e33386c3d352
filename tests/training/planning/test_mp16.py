"""The paper's recipe at its real size, planned without data and without weights."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import pytest

from geosurge_training.planning.extent import MP16_IMAGES, PUBLISHED_CELL_COUNTS
from geosurge_training.planning.gpus import find_gpu
from geosurge_training.planning.plan import Plan, make_plan
from geosurge_training.planning.timing import Machine, run_seconds
from geosurge_training.recipe import Recipe, TableData, load_recipe

GIB = 2**30


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe(Path(str(files("geosurge_training") / "recipes" / "mp16.toml")))


@pytest.fixture(scope="module")
def plan(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return make_plan(recipe, tmp_path_factory.mktemp("run"), images=MP16_IMAGES)


def test_the_recipe_is_the_papers(recipe: Recipe) -> None:
    vision, segmentation, fusion = recipe.encoder.vision, recipe.encoder.segmentation, recipe.encoder.fusion
    assert (vision.pretrained, vision.image_size, vision.frozen) == ("openai/clip-vit-large-patch14-336", 336, True)
    assert (segmentation.pretrained, segmentation.class_count) == ("shi-labs/oneformer_ade20k_swin_large", 150)
    for tower in (vision, segmentation):
        assert tower.revision is not None
        assert len(bytes.fromhex(tower.revision)) == 20
    assert (fusion.blocks, fusion.width, fusion.latent_width, fusion.dimension) == (3, 128, 64, 768)
    assert recipe.partition.level_count == 7
    training = recipe.training
    assert (training.batch_size, training.negatives, training.precision) == (1024, "batch", "bfloat16")
    assert (training.learning_rate, training.weight_decay, training.schedule) == (1e-4, 1e-4, "halving")
    assert (training.patience, training.initial_temperature) == (4, 0.07)
    assert isinstance(recipe.data, TableData)
    assert recipe.data.table.name == "mp16_places365.csv"


def test_the_parts_have_their_published_sizes(plan: Plan) -> None:
    parts = plan.parts
    # ViT-L/14 is published as 304 million parameters, OneFormer Swin-L as 219; both to three digits.
    assert parts.vision.parameters == pytest.approx(304e6, rel=0.005)
    assert parts.segmenter.parameters == pytest.approx(219e6, rel=0.005)
    assert plan.extent.cell_counts == PUBLISHED_CELL_COUNTS
    assert parts.geocells.parameters == 63_644 * 768 + 7
    assert (parts.vision.trained_parameters, parts.segmenter.trained_parameters) == (0, 0)


def test_arithmetic_is_that_of_the_towers(plan: Plan) -> None:
    parts = plan.parts
    layers, width, tokens = 24, 1024, 577
    products = layers * (12 * width * width * tokens + 2 * tokens * tokens * width) + 576 * 588 * width
    assert parts.vision.training_flops == parts.vision.forward_flops == 2 * products
    assert parts.segmenter.training_flops == parts.segmenter.forward_flops
    whole = sum(part.forward_flops for part in parts)
    # What issue of time the fusion module may be, it is of arithmetic at most.
    assert parts.fusion.forward_flops < 0.05 * whole
    assert plan.direct.flops > plan.steps * 1024 * whole
    assert plan.cached is not None
    assert plan.cached.flops < 0.11 * plan.direct.flops
    assert plan.cached.disk_bytes == MP16_IMAGES * 2 * (577 * 1024 + 576 * 150)


def test_it_fits_the_papers_gpus_and_takes_about_the_papers_time(plan: Plan) -> None:
    assert 2.1 * GIB < plan.direct.memory.weights < 2.2 * GIB
    a6000 = find_gpu("a6000")
    assert plan.direct.memory.total < a6000.memory_gb * 1e9
    # 21 hours on eight A6000 are between 4 and 10 epochs, with a quarter to a half of the peak reached.
    epochs = plan.epochs or 0.0
    slow, fast = (run_seconds(plan.direct, Machine(a6000, share, 3.0), 8) / epochs / 3600 for share in (0.25, 0.5))
    assert fast * 4 < 21 < slow * 10
