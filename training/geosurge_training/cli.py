"""The `geosurge-train` command: each step says what it wrote, and can be repeated."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

from geosurge.errors import GeoSurgeError
from geosurge_training.ablations.command import ablate
from geosurge_training.evaluation.command import evaluate
from geosurge_training.planning.command import plan
from geosurge_training.prototypes.command import prototypes

app = typer.Typer(
    name="geosurge-train",
    help="Train encoders and geocell embeddings, and build index bundles from them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE.toml", help="The recipe.")]
RunPath = Annotated[Path | None, typer.Option("--run", help="Directory of the run. Default: runs/NAME of the recipe.")]


@app.command()
def partition(recipe: RecipePath, run: RunPath = None) -> None:
    """Partition the recipe's training coordinates into nested cells."""
    from geosurge_training.partitions.load import load_partition  # noqa: PLC0415 - torch is slow to import
    from geosurge_training.partitions.make import make_partition  # noqa: PLC0415
    from geosurge_training.recipe import load_recipe  # noqa: PLC0415
    from geosurge_training.run_directory import run_of  # noqa: PLC0415

    loaded = load_recipe(recipe)
    path = make_partition(loaded, run or run_of(loaded))
    _say(f"{path}: {', '.join(str(count) for count in load_partition(path).cell_counts)} cells")


@app.command()
def fit(recipe: RecipePath, run: RunPath = None) -> None:
    """Train encoder and geocell embeddings; goes on where a run was cut off."""
    from geosurge_training.fitting.fit import fit as fit_recipe  # noqa: PLC0415
    from geosurge_training.recipe import load_recipe  # noqa: PLC0415
    from geosurge_training.run_directory import run_of  # noqa: PLC0415

    loaded = load_recipe(recipe)
    _say(str(fit_recipe(loaded, run or run_of(loaded))))


@app.command()
def build(recipe: RecipePath, run: RunPath = None) -> None:
    """Build an index bundle from the newest checkpoint of a run."""
    from geosurge_training.building.build import build as build_bundle  # noqa: PLC0415
    from geosurge_training.recipe import load_recipe  # noqa: PLC0415
    from geosurge_training.run_directory import run_of  # noqa: PLC0415

    loaded = load_recipe(recipe)
    _say(str(build_bundle(loaded, run or run_of(loaded))))


@app.command()
def calibrate(recipe: RecipePath, run: RunPath = None) -> None:
    """Fit probabilities, radii and point estimator of a run's bundle on held-out images."""
    from geosurge_training.building.calibrate import calibrate as calibrate_bundle  # noqa: PLC0415
    from geosurge_training.recipe import load_recipe  # noqa: PLC0415
    from geosurge_training.run_directory import run_of  # noqa: PLC0415

    loaded = load_recipe(recipe)
    result = calibrate_bundle(loaded, run or run_of(loaded))
    _say(
        f"temperature {result.temperature:.4g}, expected calibration error {result.expected_calibration_error:.4f} "
        f"on {result.source}"
    )


@app.command()
def gallery(
    recipe: RecipePath,
    *,
    references: Annotated[int, typer.Option(min=1, help="Training images whose embeddings are stored, at most.")],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Where the new bundle goes; the last part is its name. Must not exist.")
    ],
    bundle: Annotated[
        Path | None,
        typer.Option(metavar="BUNDLE_OR_STORE", help="Bundle that this recipe made. Default: the run's."),
    ] = None,
    run: RunPath = None,
) -> None:
    """Copy a bundle and add training images to it, which place queries inside leaves; then calibrate the copy."""
    from geosurge.bundle import read_manifest  # noqa: PLC0415 - torch is slow to import
    from geosurge_training.building.add_gallery import add_gallery  # noqa: PLC0415
    from geosurge_training.recipe import load_recipe  # noqa: PLC0415
    from geosurge_training.run_directory import bundle_path, run_of  # noqa: PLC0415

    loaded = load_recipe(recipe)
    directory = run or run_of(loaded)
    result = add_gallery(loaded, directory, bundle or bundle_path(loaded, directory), out, references)
    medians = ", ".join(f"{name} {error:.1f} km" for name, error in result.median_error_km.items())
    _say(f"{out}: points by {read_manifest(out).point_estimator}; median errors on {result.source}: {medians}")


app.command()(evaluate)
app.command()(ablate)
app.command()(plan)
app.command()(prototypes)


def main() -> None:
    """Runs the command; an error that the engine raises on purpose is one line on stderr and its exit code."""
    console = Console(stderr=True)
    handler: logging.Handler = RichHandler(console=console, show_path=False)
    if not console.is_terminal:
        handler = logging.StreamHandler()
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler])
    # FAISS tells at this level which instruction sets it looked for.
    logging.getLogger("faiss.loader").setLevel(logging.WARNING)
    try:
        app()
    except GeoSurgeError as error:
        if os.environ.get("GEOSURGE_DEBUG"):
            raise
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
