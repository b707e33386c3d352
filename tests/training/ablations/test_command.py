from __future__ import annotations

import shlex
from pathlib import Path

from geosurge_training.ablations.command import DEFAULT_RECIPE, link_to, told


def test_the_command_that_is_recorded_names_a_recipe_of_ones_own() -> None:
    own = Path("my recipes/small.toml")
    assert told(DEFAULT_RECIPE, 3, 4000) == "geosurge-train ablate --seeds 3 --views 4000"
    assert shlex.split(told(own, 2, 100))[-2:] == ["--recipe", "my recipes/small.toml"]


def test_a_recipe_of_the_package_is_linked_and_ones_own_is_named() -> None:
    page = Path(__file__).parents[3] / "training" / "ABLATIONS.md"
    target = link_to(DEFAULT_RECIPE).partition("](")[2].removesuffix(")")
    assert (page.parent / target).is_file()
    assert link_to(Path("small.toml")) == "`small.toml`"
