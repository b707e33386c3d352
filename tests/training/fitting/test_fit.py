from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.recipes import write_recipe
from support.trainings import train_until_killed

from geosurge.encoder import ImageEncoder
from geosurge.errors import ConfigurationError
from geosurge_training.data.blue_marble import BlueMarble
from geosurge_training.data.open_source import open_source
from geosurge_training.data.source import ImageSource
from geosurge_training.encoders import build_encoder
from geosurge_training.fitting import fit as fit_module
from geosurge_training.fitting.checkpoint import latest_checkpoint, load_checkpoint
from geosurge_training.fitting.fit import fit
from geosurge_training.fitting.geocells import GeocellEmbeddings
from geosurge_training.fitting.schedule import Schedule
from geosurge_training.fitting.trainable import Trainable
from geosurge_training.partitions import make as make_module
from geosurge_training.partitions.load import load_partition
from geosurge_training.partitions.make import make_partition
from geosurge_training.recipe import Recipe, load_recipe


@pytest.fixture(autouse=True)
def shared_world(world: BlueMarble, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads the maps once for all runs of this module."""

    def opened(recipe: Recipe, encoder: ImageEncoder, run: Path) -> ImageSource:
        if recipe.data.source != "blue_marble":
            return open_source(recipe, encoder, run)
        assert (recipe.seed, recipe.data.partition_samples) == (world.seed, world.partition_samples)
        assert encoder.image_size == world.image_size
        return world

    monkeypatch.setattr(fit_module, "open_source", opened)
    monkeypatch.setattr(make_module, "open_source", opened)


def recipe_in(folder: Path, *replacements: tuple[str, str], steps: int = 12, negatives: str = "all_cells") -> Recipe:
    path = write_recipe(folder / "recipe.toml", steps=steps, negatives=negatives)
    text = path.read_text()
    for old, new in replacements:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path.write_text(text)
    return load_recipe(path)


def log_rows(run: Path) -> list[dict[str, float]]:
    with (run / "log.csv").open(newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def assert_same_run(one: Path, other: Path) -> None:
    checkpoints = [latest_checkpoint(run) for run in (one, other)]
    assert checkpoints[0] is not None
    assert checkpoints[1] is not None
    assert checkpoints[0].name == checkpoints[1].name
    for file in ("model.safetensors", "optimiser.safetensors"):
        tensors, others = (load_file(checkpoint / file) for checkpoint in checkpoints if checkpoint is not None)
        assert tensors.keys() == others.keys()
        different = [name for name, values in tensors.items() if not torch.equal(values, others[name])]
        assert different == [], file
    assert (one / "log.csv").read_bytes() == (other / "log.csv").read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, world: BlueMarble) -> Path:
    """A run of twelve steps."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit_module, "open_source", lambda recipe, encoder, run: world)
        fit(recipe_in(folder), folder / "run")
    return folder / "run"


def test_a_run_leaves_its_files_and_nothing_half_written(uninterrupted: Path) -> None:
    assert sorted(path.name for path in uninterrupted.iterdir()) == [
        "checkpoint-000000012",
        "log.csv",
        "partition.npz",
        "recipe.sha256",
        "segmenter.safetensors",
        "tensorboard",
    ]
    assert any((uninterrupted / "tensorboard").iterdir())


def test_the_log_has_a_row_for_every_second_step_and_losses_that_add_up(uninterrupted: Path) -> None:
    rows = log_rows(uninterrupted)
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10, 12]
    schedule = Schedule.of(load_recipe(uninterrupted.parent / "recipe.toml").training, None)
    for row in rows:
        assert row["loss"] == pytest.approx(row["loss_level_1"] + row["loss_level_2"], rel=1e-4)
        assert row["learning_rate"] == pytest.approx(schedule.rate(int(row["step"]) - 1), rel=1e-4)
        assert 0.01 < row["temperature_level_1"] < 0.5
    assert list(rows[0]) == [
        "step",
        "learning_rate",
        "loss",
        "loss_level_1",
        "loss_level_2",
        "temperature_level_1",
        "temperature_level_2",
    ]


def test_a_checkpoint_fits_an_encoder_and_tables_built_from_the_recipe(uninterrupted: Path) -> None:
    recipe = load_recipe(uninterrupted.parent / "recipe.toml")
    partition = load_partition(uninterrupted / "partition.npz")
    model = Trainable(build_encoder(recipe), GeocellEmbeddings(partition.cell_counts, 16))
    checkpoint = latest_checkpoint(uninterrupted)
    assert checkpoint is not None
    assert load_checkpoint(checkpoint, model) == 12
    assert np.isfinite(model.encoder.encode(np.zeros((1, 3, 32, 32), np.uint8))).all()


def test_towers_fusion_tables_and_temperatures_learn_and_the_segmenter_does_not(uninterrupted: Path) -> None:
    checkpoint = latest_checkpoint(uninterrupted)
    assert checkpoint is not None
    optimised = load_file(checkpoint / "optimiser.safetensors")
    assert {int(values) for name, values in optimised.items() if name.endswith(".step")} == {12}
    trained = load_file(checkpoint / "model.safetensors")
    start = build_encoder(load_recipe(uninterrupted.parent / "recipe.toml")).state_dict()
    names = [name for name in start if name.startswith(("vision", "fusion")) and name.endswith("weight")]
    assert [name for name in names if torch.equal(start[name], trained[f"encoder.{name}"])] == []
    segmenter = load_file(uninterrupted / "segmenter.safetensors")
    assert all(torch.equal(values, trained[f"encoder.segmenter.backbone.{name}"]) for name, values in segmenter.items())
    assert (trained["geocells.log_temperatures"] != math.log(0.07)).all()


@pytest.mark.parametrize("negatives", ["all_cells", "batch"])
def test_the_loss_goes_down(tmp_path: Path, negatives: str) -> None:
    fit(recipe_in(tmp_path, steps=60, negatives=negatives), tmp_path / "run")
    losses = [row["loss"] for row in log_rows(tmp_path / "run")]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.3


@pytest.mark.parametrize("cuts", [(5,), (7,), (1, 2, 11)], ids=str)
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tmp_path: Path, uninterrupted: Path, cuts: tuple[int]) -> None:
    recipe, run = recipe_in(tmp_path), tmp_path / "run"
    for cut in cuts:
        assert fit(recipe, run, stop_after=cut).name == f"checkpoint-{cut:09d}"
        torch.rand(7)
    fit(recipe, run)
    assert_same_run(run, uninterrupted)


def test_dropout_and_reduced_precision_resume_to_the_same_bits_too(tmp_path: Path) -> None:
    changes = (
        ("\nblocks = 2", "\nblocks = 2\ndropout = 0.2"),
        ("warmup_steps", 'precision = "bfloat16"\nwarmup_steps'),
    )
    recipe = recipe_in(tmp_path, *changes, steps=8)
    fit(recipe, tmp_path / "whole")
    fit(recipe, tmp_path / "cut", stop_after=3)
    fit(recipe, tmp_path / "cut")
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_rows_past_the_checkpoint_are_written_again_and_not_twice(tmp_path: Path, uninterrupted: Path) -> None:
    recipe, run = recipe_in(tmp_path), tmp_path / "run"
    fit(recipe, run, stop_after=5)
    # What a run leaves that was cut off after logging and before its next checkpoint.
    with (run / "log.csv").open("a") as file:
        file.write("6,9,9,9,9,9,9\n8,9,9,9")
    fit(recipe, run)
    assert_same_run(run, uninterrupted)


def test_a_finished_run_that_is_started_again_changes_nothing(tmp_path: Path, uninterrupted: Path) -> None:
    recipe = load_recipe(uninterrupted.parent / "recipe.toml")
    before = {
        path: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in uninterrupted.rglob("*")
        if path.is_file() and path.name != "log.csv" and "tensorboard" not in path.parts
    }
    log = (uninterrupted / "log.csv").read_bytes()
    assert fit(recipe, uninterrupted).name == "checkpoint-000000012"
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before} == before
    assert (uninterrupted / "log.csv").read_bytes() == log


def test_the_partition_is_made_once(tmp_path: Path, uninterrupted: Path) -> None:
    recipe, run = recipe_in(tmp_path), tmp_path / "run"
    path = make_partition(recipe, run)
    assert path.read_bytes() == (uninterrupted / "partition.npz").read_bytes()
    modified = path.stat().st_mtime_ns
    assert make_partition(recipe, run) == path
    assert path.stat().st_mtime_ns == modified
    assert sorted(file.name for file in run.iterdir()) == ["partition.npz", "recipe.sha256"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("seed = 3", "seed = 4"),
        ("steps = 12", "steps = 13"),
        ("tau_min = 8", "tau_min = 9"),
        ("heads = 2", "heads = 4"),
    ],
)
def test_a_run_of_another_recipe_is_refused_and_left_alone(
    tmp_path: Path, uninterrupted: Path, old: str, new: str
) -> None:
    checkpoint = latest_checkpoint(uninterrupted)
    with pytest.raises(ConfigurationError, match=r"holds a run of another recipe.*--run"):
        fit(recipe_in(tmp_path, (f"\n{old}\n", f"\n{new}\n")), uninterrupted)
    assert latest_checkpoint(uninterrupted) == checkpoint


def test_what_does_not_touch_the_weights_makes_no_other_recipe(tmp_path: Path, uninterrupted: Path) -> None:
    changes = (("A tiny world, for tests.", "Described otherwise."), ("log_every = 2", "log_every = 3"))
    assert fit(recipe_in(tmp_path, *changes), uninterrupted) == latest_checkpoint(uninterrupted)


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    steps = 150
    recipe = recipe_in(tmp_path, steps=steps)
    killed = tmp_path / "killed"
    checkpoint = train_until_killed(tmp_path / "recipe.toml", killed, most_seconds_after=0.15)
    assert checkpoint.name < f"checkpoint-{steps:09d}"
    fit(recipe, killed)
    fit(recipe, tmp_path / "whole")
    assert_same_run(killed, tmp_path / "whole")


def test_a_run_killed_before_its_first_checkpoint_starts_afresh(tmp_path: Path, uninterrupted: Path) -> None:
    recipe, run = recipe_in(tmp_path), tmp_path / "run"
    make_partition(recipe, run)
    (run / ".segmenter.safetensors.1.tmp").write_bytes(b"half a segmenter")
    (run / "log.csv").write_text("step,learning_rate\n2,9")
    half = run / ".checkpoint-000000005.tmp"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half a model")
    fit(recipe, run)
    assert_same_run(run, uninterrupted)


def test_training_that_diverges_stops_with_advice(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, ("learning_rate = 3e-3\nwarmup", "learning_rate = 1e30\nwarmup"))
    with pytest.raises(ConfigurationError, match=r"the loss of step \d+ is .*lower training\.learning_rate"):
        fit(recipe, tmp_path / "run")


def test_a_gradient_that_is_not_finite_stops_training_before_the_weights_are_lost(tmp_path: Path) -> None:
    recipe, run = recipe_in(tmp_path), tmp_path / "run"
    file = fit(recipe, run, stop_after=5) / "model.safetensors"
    weights = load_file(file)
    # The loss of embeddings of no length is finite; their gradient, a 1e42 of a unit, is not.
    weights["encoder.fusion.norm.weight"].fill_(1e30)
    weights["encoder.fusion.projection.weight"].zero_()
    weights["encoder.fusion.projection.bias"].zero_()
    save_file(weights, file)
    with pytest.raises(ConfigurationError, match=r"loss of step 6 is \d.*, its gradient's norm (inf|nan): .*lower"):
        fit(recipe, run, stop_after=6)
    assert latest_checkpoint(run) == file.parent


def test_a_segmenter_with_other_classes_than_the_worlds_is_refused(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, ("class_count = 7", "class_count = 9"))
    with pytest.raises(ConfigurationError, match="class_count is 9, but this data source has 7 classes: deep sea"):
        fit(recipe, tmp_path / "run")


def write_pictures(folder: Path, world: BlueMarble) -> str:
    batch = world.train_batch(0, 80)
    with (folder / "pictures.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "latitude_deg", "longitude_deg"])
        for number, pixels in enumerate(batch.pixels.numpy()):
            Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / f"{number}.png")
            rows.writerow([f"{number}.png", batch.latitude_deg[number], batch.longitude_deg[number]])
    return 'source = "table"\ntable = "pictures.csv"\nheld_out_share = 0.5'


def test_pictures_on_disk_resume_to_the_same_bits(tmp_path: Path, world: BlueMarble) -> None:
    data = write_pictures(tmp_path, world)
    path = write_recipe(tmp_path / "recipe.toml", data=data, steps=9, segmenter_steps=0, negatives="batch")
    path.write_text(path.read_text().replace("tau_min = 8", "tau_min = 1").replace("[400, 120]", "[12, 6]"))
    recipe = load_recipe(path)
    fit(recipe, tmp_path / "whole")
    fit(recipe, tmp_path / "cut", stop_after=4)
    fit(recipe, tmp_path / "cut")
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    assert not (tmp_path / "whole" / "segmenter.safetensors").exists()


def test_too_few_held_out_pictures_are_found_before_training(tmp_path: Path, world: BlueMarble) -> None:
    data = write_pictures(tmp_path, world).replace("0.5", "0.05")
    path = write_recipe(tmp_path / "recipe.toml", data=data, segmenter_steps=0)
    with pytest.raises(ConfigurationError, match=r"\d images are held out, and 30 are the least .*held_out_share"):
        fit(load_recipe(path), tmp_path / "run")
    assert not (tmp_path / "run" / "partition.npz").exists()


def test_pictures_on_disk_cannot_train_a_segmenter(tmp_path: Path, world: BlueMarble) -> None:
    data = write_pictures(tmp_path, world)
    path = write_recipe(tmp_path / "recipe.toml", data=data, segmenter_steps=3)
    path.write_text(path.read_text().replace("tau_min = 8", "tau_min = 1").replace("[400, 120]", "[12, 6]"))
    with pytest.raises(ConfigurationError, match="has no classes to train a segmenter on; give a pretrained one"):
        fit(load_recipe(path), tmp_path / "run")
