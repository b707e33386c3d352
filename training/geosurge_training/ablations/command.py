"""The command `geosurge-train ablate`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

DEFAULT_RECIPE = Path(__file__).parents[1] / "recipes" / "ablations.toml"


def ablate(  # noqa: PLR0917 - a command line has no positions for its options
    output: Annotated[Path, typer.Option("--output", help="The page to write.")] = Path("training/ABLATIONS.md"),
    recipe: Annotated[Path, typer.Option("--recipe", help="What is varied.")] = DEFAULT_RECIPE,
    run: Annotated[
        Path, typer.Option("--run", help="Where runs are kept; a study goes on where it was cut off.")
    ] = Path("runs/ablations"),
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Seeds that every variant is trained with.")] = 3,
    views: Annotated[int, typer.Option("--views", min=100, help="Held-out views to measure on.")] = 4000,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Runs at once, of one thread each.")] = 2,
) -> None:
    """Vary a recipe in one respect at a time, train every variant with several seeds, and write down what comes out."""
    from geosurge_training.ablations.report import to_markdown  # noqa: PLC0415 - torch is slow to import
    from geosurge_training.ablations.run import run_study  # noqa: PLC0415
    from geosurge_training.ablations.study import variants  # noqa: PLC0415
    from geosurge_training.recipe import load_recipe  # noqa: PLC0415

    loaded = load_recipe(recipe)
    varied = variants(loaded)
    results = run_study(loaded, varied, range(1, seeds + 1), run, views=views, jobs=jobs)
    page = to_markdown(loaded, varied, results, views=views, link=link_to(recipe), command=told(recipe, seeds, views))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page, encoding="utf-8")
    typer.echo(str(output))


def told(recipe: Path, seeds: int, views: int) -> str:
    """The command that gives the same page again; where its runs were kept and how many ran at once does not matter."""
    command = f"geosurge-train ablate --seeds {seeds} --views {views}"
    return command if recipe == DEFAULT_RECIPE else f"{command} --recipe {shlex.quote(str(recipe))}"


def link_to(recipe: Path) -> str:
    """What the page says of the recipe's file: a link where it comes with the package."""
    if recipe != DEFAULT_RECIPE:
        return f"`{recipe}`"
    return f"[`recipes/{recipe.name}`](geosurge_training/recipes/{recipe.name})"
