"""`geosurge-train plan` from its command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.recipes import write_recipe
from typer.testing import CliRunner

from geosurge.errors import ConfigurationError, GeoSurgeError, UsageError
from geosurge_training.cli import app
from geosurge_training.encoders import build_encoder
from geosurge_training.recipe import load_recipe

CELLS = ("--cells", "40,90")


def plan(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, ["plan", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def write(folder: Path, *, precision: str = "float32") -> Path:
    path = write_recipe(folder / "recipe.toml")
    path.write_text(path.read_text().replace("[calibration]", f'precision = "{precision}"\n\n[calibration]'))
    return path


def test_json_holds_the_whole_plan_and_nothing_is_written(tmp_path: Path) -> None:
    recipe = write(tmp_path)
    before = sorted(tmp_path.iterdir())
    told = json.loads(plan(recipe, *CELLS, "--run", tmp_path / "run", "--tflops", 2, "--memory-gib", 4, "--json"))
    assert sorted(tmp_path.iterdir()) == before
    counts = build_encoder(load_recipe(recipe)).parameter_counts()
    assert [part["name"] for part in told["parts"]] == ["vision tower", "segmenter", "fusion", "geocell tables"]
    assert [part["parameters"] for part in told["parts"]] == [*counts.values(), 16 * 130 + 2]
    memory = told["direct"]["memory"]
    for kind in ("weights", "gradients", "moments"):
        assert sum(part["memory"][kind] for part in told["parts"]) == memory[kind]
    assert all(part["memory"]["activations"] > 0 for part in told["parts"])
    assert memory["total"] == sum(size for name, size in memory.items() if name != "total")
    assert told["direct"]["seconds"] == pytest.approx(told["direct"]["flops"] / (2e12 * 0.35))
    assert told["direct"]["fits"]
    assert (told["steps"], told["epochs"], told["cached"]) == (12, None, None)
    assert told["machine"]["gpu"]["memory_gb"] == pytest.approx(4 * 1.073741824)


def test_without_a_gpu_there_is_no_time_and_a_small_one_does_not_fit(tmp_path: Path) -> None:
    recipe = write(tmp_path)
    bare = json.loads(plan(recipe, *CELLS, "--json"))
    assert "seconds" not in bare["direct"]
    assert bare["machine"] is None
    tiny = json.loads(plan(recipe, *CELLS, "--tflops", 1, "--memory-gib", 0.001, "--json"))
    assert not tiny["direct"]["fits"]


def test_people_get_parts_memory_time_and_what_was_assumed(tmp_path: Path) -> None:
    text = plan(write(tmp_path, precision="bfloat16"), *CELLS, "--gpu", "h200", "--utilisation", 0.4)
    for words in (
        "geocell tables",
        "memory of each device by part",
        "moments of AdamW",
        "activations of 16 images",
        "time, at most",
        "fits",
    ):
        assert words in text
    for assumption in ("130 cells, as stated", "h200-sxm", "40%", "bfloat16"):
        assert assumption in text


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        (("--gpu", "h100"), UsageError, "bfloat16, and this recipe computes in float32"),
        (("--gpu", "h100", "--tflops", "5"), UsageError, "leave out"),
        (("--tflops", "5"), UsageError, "give both"),
        (("--cells", "40,x"), UsageError, "--cells 40,x"),
        (("--cells", "40,0"), UsageError, "whole number a level"),
        (("--cells", "40"), ConfigurationError, "the partition has 2 levels"),
        (("--images", "7"), ConfigurationError, "renders"),
    ],
)
def test_a_wrong_question_says_what_is_wrong(
    tmp_path: Path, options: tuple[str, ...], error: type[GeoSurgeError], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        plan(write(tmp_path), *options)


def test_a_wrong_recipe_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"recipe\.toml cannot be read"):
        plan(tmp_path / "recipe.toml")
    recipe = write(tmp_path)
    recipe.write_text(recipe.read_text().replace("heads = 2", "heads = 3"))
    with pytest.raises(GeoSurgeError, match="latent_width 8 is not divisible by 3 heads"):
        plan(recipe, *CELLS)
