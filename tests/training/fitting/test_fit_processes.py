"""Several processes that train one model: real ones, talking through gloo."""

from __future__ import annotations

import csv
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.pictures import CLIP_BACKBONE, picture_recipe, write_pictures
from support.trainings import train_until_killed

from geosurge.errors import ConfigurationError
from geosurge_training.data.open_source import open_source
from geosurge_training.data.source import NumberedSource
from geosurge_training.encoders import build_encoder
from geosurge_training.fitting.checkpoint import latest_checkpoint
from geosurge_training.fitting.fit import fit
from geosurge_training.fitting.tower_cache import TowerCache

_STEPS = 'steps = 30\ncheckpoint_every = 4\nnegatives = "batch"\nmicro_batch_size = 2'


def weights(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None
    return load_file(checkpoint / "model.safetensors")


def losses(run: Path, log: str = "log.csv", column: str = "loss") -> list[float]:
    with (run / log).open(newline="") as file:
        return [float(row[column]) for row in csv.DictReader(file)]


def assert_same_training(one: Path, other: Path) -> None:
    np.testing.assert_allclose(losses(one), losses(other), rtol=1e-3)
    others = weights(other)
    for name, values in weights(one).items():
        # What is added to every key cancels in the softmax: its gradient is nothing but rounding.
        if not name.endswith(("key_value.bias", "k_proj.bias")):
            torch.testing.assert_close(values, others[name], rtol=1e-2, atol=1e-3, msg=name)


def test_two_processes_have_the_loss_curves_of_one_with_batch_normalisation_too(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    training = 'epochs = 3\npatience = 2\nnegatives = "all_cells"\nlabel_smoothing_km = 300.0\n'
    fit(picture_recipe(tmp_path, training), tmp_path / "one")
    fit(picture_recipe(tmp_path, training + "devices = 2", name="two.toml"), tmp_path / "two")
    assert_same_training(tmp_path / "two", tmp_path / "one")
    held_out = [losses(tmp_path / run, "held-out.csv", "held_out_loss") for run in ("two", "one")]
    assert len(held_out[1]) == 3
    np.testing.assert_allclose(held_out[0], held_out[1], rtol=1e-3)
    assert losses(tmp_path / "one")[-1] < losses(tmp_path / "one")[0]


@pytest.mark.timeout(600)
def test_two_processes_agree_with_one_under_dropout_and_resume_to_the_same_bits_after_a_kill(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    one = picture_recipe(tmp_path, _STEPS, vision=CLIP_BACKBONE, dropout=0.2, name="one.toml")
    two = picture_recipe(tmp_path, _STEPS + "\ndevices = 2", vision=CLIP_BACKBONE, dropout=0.2, name="two.toml")
    fit(one, tmp_path / "one")
    fit(two, tmp_path / "two")
    assert_same_training(tmp_path / "two", tmp_path / "one")

    killed = tmp_path / "killed"
    checkpoint = train_until_killed(tmp_path / "two.toml", killed, most_seconds_after=0.05)
    assert checkpoint.name < "checkpoint-000000030"
    fit(two, killed)
    whole = weights(tmp_path / "two")
    assert [name for name, values in weights(killed).items() if not torch.equal(values, whole[name])] == []
    assert (killed / "log.csv").read_bytes() == (tmp_path / "two" / "log.csv").read_bytes()


def test_two_processes_fill_one_tower_cache_that_one_can_train_from(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    training = 'epochs = 2\nnegatives = "batch"\ntower_cache = "cache"\ntower_cache_dtype = "float32"\n'
    two = picture_recipe(tmp_path, training + "devices = 2", vision=CLIP_BACKBONE, frozen=True, name="two.toml")
    fit(two, tmp_path / "two")

    encoder = build_encoder(two)
    source = open_source(two, encoder, tmp_path)
    assert isinstance(source, NumberedSource)
    assert source.train_count is not None
    numbers, batch = source.train_numbers(0, source.train_count), source.train_batch(0, source.train_count)
    with closing(TowerCache.open(tmp_path / "cache", encoder, source, "float32", "float32")) as cache:
        assert cache.has(numbers).all()
        with torch.no_grad():
            seen = encoder.towers(batch.pixels)
        found = cache.outputs(numbers, torch.device("cpu"))
    torch.testing.assert_close(found.tokens, seen.tokens, rtol=1e-4, atol=1e-5)

    for picture in tmp_path.glob("*.png"):
        picture.unlink()
    fit(picture_recipe(tmp_path, training, vision=CLIP_BACKBONE, frozen=True), tmp_path / "one")
    assert len(losses(tmp_path / "one")) == len(losses(tmp_path / "two")) > 2
    assert_same_training(tmp_path / "two", tmp_path / "one")


def test_images_that_cannot_be_used_are_counted_over_all_processes(tmp_path: Path) -> None:
    write_pictures(tmp_path, 320)
    recipe = picture_recipe(tmp_path, "epochs = 1\ndevices = 2", vision=CLIP_BACKBONE)
    # Twelve images of the epoch's first steps: ten are always allowed, and neither process meets so many.
    batch = open_source(recipe, build_encoder(recipe), tmp_path).train_batch(0, 12)
    damaged = set(zip(batch.latitude_deg.tolist(), batch.longitude_deg.tolist(), strict=True))
    with (tmp_path / "pictures.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if (float(row["latitude_deg"]), float(row["longitude_deg"])) in damaged:
                (tmp_path / row["path"]).unlink()
    with pytest.raises(ConfigurationError, match=r"^12 of 1\d\d training images cannot be used"):
        fit(recipe, tmp_path / "run")


def test_an_error_of_a_process_ends_all_and_is_told_as_it_is(tmp_path: Path) -> None:
    recipe = picture_recipe(tmp_path, "steps = 3\ndevices = 2")
    with pytest.raises(ConfigurationError, match=r"pictures\.csv"):
        fit(recipe, tmp_path / "run")


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ('device = "cuda"\ndevices = 8', "devices 8, but torch sees"),
        ('device = "cuda:64"', "but torch sees"),
        ('device = "gpu"', "training.device: the device 'gpu' is unknown"),
        ('device = "cuda:0"\ndevices = 2', "give the number of one device or none"),
        ('device = "mps"', "use cpu, cuda or cuda:N"),
    ],
)
def test_devices_that_are_not_there_are_refused(tmp_path: Path, lines: str, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        fit(picture_recipe(tmp_path, f"steps = 3\n{lines}"), tmp_path / "run")
