from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from geosurge.errors import ConfigurationError
from geosurge_training.fitting.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint


def make(seed: int = 0, width: int = 4) -> tuple[nn.Module, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2))
    model[2].bias.requires_grad_(requires_grad=False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [{"params": trained[:2], "weight_decay": 0.1}, {"params": trained[2:], "weight_decay": 0.0}]
    return model, torch.optim.AdamW(groups, lr=0.01)


def train(model: nn.Module, optimiser: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        optimiser.zero_grad()
        model(inputs).square().sum().backward()
        optimiser.step()


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    for (name, values), others in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(values, others), name


def test_training_goes_on_from_a_checkpoint_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    whole, whole_optimiser = make()
    train(whole, whole_optimiser, range(10))

    first, first_optimiser = make()
    train(first, first_optimiser, range(6))
    checkpoint = save_checkpoint(tmp_path, 6, first, first_optimiser)
    second, second_optimiser = make(seed=99)
    assert load_checkpoint(checkpoint, second, second_optimiser) == 6
    assert_equal(second, first)
    train(second, second_optimiser, range(6, 10))
    assert_equal(second, whole)
    for (index, state), other in zip(
        second_optimiser.state_dict()["state"].items(), whole_optimiser.state_dict()["state"].values(), strict=True
    ):
        assert all(torch.equal(values, other[name]) for name, values in state.items()), index


def test_weights_can_be_read_without_an_optimiser(tmp_path: Path) -> None:
    model, optimiser = make()
    train(model, optimiser, range(2))
    checkpoint = save_checkpoint(tmp_path, 2, model, optimiser)
    other, _ = make(seed=1)
    assert load_checkpoint(checkpoint, other) == 2
    assert_equal(other, model)


def test_a_checkpoint_is_safetensors_and_json(tmp_path: Path) -> None:
    model, optimiser = make()
    train(model, optimiser, range(1))
    checkpoint = save_checkpoint(tmp_path, 1, model, optimiser)
    files = {file.name for file in checkpoint.iterdir()}
    assert files == {"model.safetensors", "optimiser.safetensors", "state.json"}


def test_saving_does_not_change_what_is_saved(tmp_path: Path) -> None:
    model, optimiser = make()
    train(model, optimiser, range(3))
    before = copy.deepcopy(model)
    save_checkpoint(tmp_path, 3, model, optimiser)
    assert_equal(model, before)


def test_only_the_newest_checkpoint_is_kept(tmp_path: Path) -> None:
    model, optimiser = make()
    assert latest_checkpoint(tmp_path) is None
    for step in (5, 90, 1000):
        train(model, optimiser, range(1))
        assert latest_checkpoint(save_checkpoint(tmp_path, step, model, optimiser).parent) is not None
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000001000"]


def test_a_half_written_checkpoint_is_ignored_and_later_replaced(tmp_path: Path) -> None:
    model, optimiser = make()
    train(model, optimiser, range(1))
    whole = save_checkpoint(tmp_path, 5, model, optimiser)
    half = tmp_path / ".checkpoint-000000009.tmp"
    shutil.copytree(whole, half)
    (half / "model.safetensors").write_bytes(b"cut off")
    (half / "rubbish").write_text("from an earlier attempt")
    assert latest_checkpoint(tmp_path) == whole
    final = save_checkpoint(tmp_path, 9, model, optimiser)
    assert [path.name for path in tmp_path.iterdir()] == [final.name]
    assert load_checkpoint(final, model, optimiser) == 9
    assert not (final / "rubbish").exists()


def test_the_newest_wins_where_the_older_could_not_be_removed(tmp_path: Path) -> None:
    model, optimiser = make()
    train(model, optimiser, range(1))
    older = save_checkpoint(tmp_path, 999, model, optimiser)
    kept = shutil.copytree(older, tmp_path / "kept")
    newer = save_checkpoint(tmp_path, 1000, model, optimiser)
    kept.rename(older)
    assert latest_checkpoint(tmp_path) == newer


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    model, optimiser = make()
    train(model, optimiser, range(1))
    checkpoint = save_checkpoint(tmp_path, 1, model, optimiser)
    wider, wider_optimiser = make(width=5)
    with pytest.raises(ConfigurationError, match=r"checkpoint-000000001 does not fit the recipe[\s\S]*0\.weight"):
        load_checkpoint(checkpoint, wider, wider_optimiser)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("model.safetensors", lambda raw: raw[: len(raw) // 2]),
        ("optimiser.safetensors", lambda raw: raw[: len(raw) // 2]),
        ("optimiser.safetensors", lambda raw: None),
        ("state.json", lambda raw: b"{"),
        ("state.json", lambda raw: b"{}"),
        ("state.json", lambda raw: b"[]"),
        ("state.json", lambda raw: None),
    ],
)
def test_a_damaged_checkpoint_is_refused_before_anything_is_loaded(
    tmp_path: Path, file: str, damage: Callable[[bytes], bytes | None]
) -> None:
    model, optimiser = make()
    train(model, optimiser, range(1))
    checkpoint = save_checkpoint(tmp_path, 1, model, optimiser)
    content = damage((checkpoint / file).read_bytes())
    (checkpoint / file).unlink()
    if content is not None:
        (checkpoint / file).write_bytes(content)
    other, other_optimiser = make(seed=1)
    before = copy.deepcopy(other)
    with pytest.raises(ConfigurationError, match="checkpoint-000000001 is damaged"):
        load_checkpoint(checkpoint, other, other_optimiser)
    assert_equal(other, before)
