"""Runs over pictures on disk, which have epochs: early stopping, tower caches, and being killed amid all that."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.pictures import CLIP_BACKBONE, picture_recipe, write_pictures
from support.trainings import train_until_killed

from geosurge.errors import ConfigurationError
from geosurge_training.data.open_source import open_source
from geosurge_training.encoders import build_encoder
from geosurge_training.fitting.checkpoint import latest_checkpoint
from geosurge_training.fitting.fit import fit


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_pictures(tmp_path)
    return tmp_path


def rows_of(path: Path) -> list[dict[str, float]]:
    with path.open(newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def assert_same_run(one: Path, other: Path, *logs: str) -> None:
    checkpoints = [latest_checkpoint(run) for run in (one, other)]
    assert checkpoints[0] is not None
    assert checkpoints[1] is not None
    assert checkpoints[0].name == checkpoints[1].name
    for file in ("model.safetensors", "optimiser.safetensors"):
        tensors, others = (load_file(checkpoint / file) for checkpoint in checkpoints if checkpoint is not None)
        assert [name for name, values in tensors.items() if not torch.equal(values, others[name])] == [], file
    for name in ("log.csv", *logs):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    assert (checkpoints[0] / "state.json").read_text() == (checkpoints[1] / "state.json").read_text()


def test_epochs_halve_the_rate_and_end_the_run(folder: Path) -> None:
    recipe = picture_recipe(folder, 'epochs = 3\nschedule = "halving"\nnegatives = "batch"')
    checkpoint = fit(recipe, folder / "run")
    rows = rows_of(folder / "run" / "log.csv")
    images = open_source(recipe, build_encoder(recipe), folder).train_count
    assert images is not None
    assert checkpoint.name == f"checkpoint-{-(-3 * images // 8):09d}"
    for number, row in enumerate(rows):
        assert row["learning_rate"] == pytest.approx(3e-3 * 0.5 ** (number * 8 // images))
    assert {row["learning_rate"] for row in rows} == {3e-3, 1.5e-3, 7.5e-4}


def test_a_run_that_gains_nothing_ends_early_and_stays_ended(folder: Path) -> None:
    # A rate so small that the weights cannot change what float32 says of the held-out loss.
    training = 'epochs = 50\npatience = 3\nnegatives = "all_cells"'
    recipe = picture_recipe(folder, training, vision=CLIP_BACKBONE, frozen=True, learning_rate=1e-30)
    checkpoint = fit(recipe, folder / "run")
    rows = rows_of(folder / "run" / "held-out.csv")
    assert len(rows) == 4
    assert len({row["held_out_loss"] for row in rows}) == 1
    assert rows[0]["held_out_loss"] == pytest.approx(
        rows[0]["held_out_loss_level_1"] + rows[0]["held_out_loss_level_2"], rel=1e-4
    )
    assert json.loads((checkpoint / "state.json").read_text())["epochs_without_gain"] == 3
    assert checkpoint.name == f"checkpoint-{int(rows[-1]['step']):09d}"
    before = (folder / "run" / "held-out.csv").read_bytes()
    assert fit(recipe, folder / "run") == checkpoint
    assert (folder / "run" / "held-out.csv").read_bytes() == before


def test_early_stopping_resumes_in_mid_epoch_to_the_same_bits(folder: Path) -> None:
    recipe = picture_recipe(folder, 'epochs = 4\npatience = 2\nnegatives = "all_cells"', dropout=0.1)
    fit(recipe, folder / "whole")
    # In mid-epoch, on the last step of an epoch, and right after it.
    for cut in (3, 5, 6, 13):
        fit(recipe, folder / "cut", stop_after=cut)
    fit(recipe, folder / "cut")
    assert_same_run(folder / "cut", folder / "whole", "held-out.csv")
    rows = rows_of(folder / "whole" / "held-out.csv")
    assert len(rows) == 4
    assert rows[-1]["held_out_loss"] < rows[0]["held_out_loss"]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float16", 1e-2)])
def test_a_tower_cache_changes_nothing_but_roundings(folder: Path, dtype: str, tolerance: float) -> None:
    training = 'epochs = 4\nmicro_batch_size = 3\nnegatives = "batch"'
    plain = picture_recipe(folder, training, vision=CLIP_BACKBONE, frozen=True, dropout=0.1)
    cached = picture_recipe(
        folder,
        f'{training}\ntower_cache = "cache"\ntower_cache_dtype = "{dtype}"',
        vision=CLIP_BACKBONE,
        frozen=True,
        dropout=0.1,
        name="cached.toml",
    )
    fit(plain, folder / "plain")
    fit(cached, folder / "cached")
    losses = [[row["loss"] for row in rows_of(folder / run / "log.csv")] for run in ("plain", "cached")]
    np.testing.assert_allclose(losses[1], losses[0], rtol=tolerance)
    # The pictures are not looked at again: a second run over the same cache needs none of them.
    for picture in folder.glob("*.png"):
        picture.unlink()
    fit(cached, folder / "again")
    assert_same_run(folder / "again", folder / "cached")


def test_images_that_cannot_be_used_are_skipped_with_a_tower_cache_as_without(folder: Path) -> None:
    training = 'epochs = 3\nmicro_batch_size = 3\nnegatives = "batch"'
    plain, cached = (
        picture_recipe(folder, training + more, vision=CLIP_BACKBONE, frozen=True, name=f"{len(more)}.toml")
        for more in ("", '\ntower_cache = "cache"\ntower_cache_dtype = "float32"')
    )
    for number in range(2):
        (folder / f"{number}.png").unlink()
    fit(plain, folder / "plain")
    fit(cached, folder / "cached")
    losses = [[row["loss"] for row in rows_of(folder / run / "log.csv")] for run in ("plain", "cached")]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    # None of them counts as seen, and what stands in for them is known without a look at any picture.
    done = np.fromfile(folder / "cache" / "done.bin", np.uint8)
    assert (done != 1).sum() == 2
    for picture in folder.glob("*.png"):
        picture.unlink()
    fit(cached, folder / "again")
    assert_same_run(folder / "again", folder / "cached")


def test_a_run_killed_in_mid_epoch_resumes_to_the_same_bits_with_all_that_it_keeps(folder: Path) -> None:
    training = 'epochs = 30\npatience = 1000\ncheckpoint_every = 3\nmicro_batch_size = 3\nnegatives = "all_cells"\n'
    killed = picture_recipe(
        folder, training + 'tower_cache = "cache"', vision=CLIP_BACKBONE, frozen=True, dropout=0.2, name="killed.toml"
    )
    whole = picture_recipe(
        folder, training + 'tower_cache = "other"', vision=CLIP_BACKBONE, frozen=True, dropout=0.2, name="whole.toml"
    )
    run = folder / "killed"
    # The first checkpoint is in mid-epoch, while the cache is still being filled; the kill comes then or soon after.
    checkpoint = train_until_killed(folder / "killed.toml", run, most_seconds_after=0.3)
    fit(whole, folder / "whole")
    finished = latest_checkpoint(folder / "whole")
    assert finished is not None
    assert checkpoint.name < finished.name
    fit(killed, run)
    assert_same_run(run, folder / "whole", "held-out.csv")


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ("", "give exactly one of `steps` and `epochs`"),
        ("steps = 3\nepochs = 3", "give exactly one of `steps` and `epochs`"),
        ("steps = 3\ndevices = 3", "batch_size 8 cannot be shared by 3 devices evenly"),
        ('steps = 3\nhead = "classifier"', 'it needs negatives = "all_cells"'),
    ],
)
def test_training_sections_that_contradict_themselves_are_refused(folder: Path, lines: str, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        picture_recipe(folder, lines)
