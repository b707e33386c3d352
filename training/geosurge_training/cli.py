"""The `geosurge-train` command: each step takes a recipe, says what it wrote, and can be repeated."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from geosurge.errors import GeoSurgeError

app = typer.Typer(
    name="geosurge-train",
    help="Train encoders and geocell embeddings, and build index bundles from them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE.toml", help="The recipe.")]
RunPath = Annotated[Path | None, typer.Option("--run", help="Directory of the run. Default: runs/NAME of the recipe.")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else.")]


@app.command()
def partition(recipe: RecipePath, run: RunPath = None) -> None:
    """Partition the recipe's training coordinates into nested adaptive cells."""
    from geosurge_training.fit import make_partition  # noqa: PLC0415 - torch is slow to import
    from geosurge_training.partition import Partition  # noqa: PLC0415
    from geosurge_training.recipe import load_recipe  # noqa: PLC0415

    loaded = load_recipe(recipe)
    path = make_partition(loaded, run or Path("runs") / loaded.name)
    _say(f"{path}: {', '.join(str(count) for count in Partition.load(path).cell_counts)} cells")


@app.command()
def fit(recipe: RecipePath, run: RunPath = None) -> None:
    """Train encoder and geocell embeddings; goes on where a run was cut off."""
    from geosurge_training.fit import fit as fit_recipe  # noqa: PLC0415
    from geosurge_training.recipe import load_recipe  # noqa: PLC0415

    loaded = load_recipe(recipe)
    _say(str(fit_recipe(loaded, run or Path("runs") / loaded.name)))


@app.command()
def build(recipe: RecipePath, run: RunPath = None) -> None:
    """Build an index bundle from the newest checkpoint of a run."""
    from geosurge_training.build import build as build_bundle  # noqa: PLC0415
    from geosurge_training.recipe import load_recipe  # noqa: PLC0415

    loaded = load_recipe(recipe)
    _say(str(build_bundle(loaded, run or Path("runs") / loaded.name)))


@app.command()
def calibrate(recipe: RecipePath, run: RunPath = None) -> None:
    """Fit probabilities, radii and point estimator of a run's bundle on held-out images."""
    from geosurge_training.calibrate import calibrate as calibrate_bundle  # noqa: PLC0415
    from geosurge_training.recipe import load_recipe  # noqa: PLC0415

    loaded = load_recipe(recipe)
    result = calibrate_bundle(loaded, run or Path("runs") / loaded.name)
    _say(
        f"temperature {result.temperature:.4g}, expected calibration error {result.expected_calibration_error:.4f} "
        f"on {result.source}"
    )


@app.command()
def evaluate(
    bundle: Annotated[Path, typer.Argument(help="Bundle, or store whose active bundle is meant.")],
    *,
    dataset: Annotated[
        Path | None,
        typer.Option(metavar="CSV", help="Pictures with path, latitude_deg and longitude_deg, instead of views."),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder that the dataset's paths start from; default the CSV's.")
    ] = None,
    views: Annotated[int, typer.Option(min=1, help="Held-out views of the Blue Marble world.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the views.")] = 7,
    exact: Annotated[bool, typer.Option("--exact", help="Search every leaf instead of the default beam.")] = False,
    device: Annotated[str, typer.Option(help="Where encoder and index live: cpu, cuda or cuda:N.")] = "cpu",
    as_json: JsonFlag = False,
) -> None:
    """Measure a bundle on held-out views of the Blue Marble world, or on pictures of your own."""
    from geosurge_training.evaluate import evaluate_images, evaluate_views  # noqa: PLC0415

    if dataset is not None:
        result = evaluate_images(bundle, dataset, images, exact=exact, device=device)
    else:
        result = evaluate_views(bundle, views=views, seed=seed, exact=exact, device=device)
    if as_json:
        sys.stdout.write(json.dumps(result.to_dict()) + "\n")
        return
    material = f"held-out views, seed {seed}" if dataset is None else f"pictures of {dataset}"
    table = Table(title=f"{result.index_version} on {result.count} {material}")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for threshold, share in result.within_km.items():
        table.add_row(f"within {threshold} km", f"{share:.1%}")
    table.add_row("median error", f"{result.median_km:.1f} km")
    table.add_row("mean error", f"{result.mean_km:.1f} km")
    table.add_row(f"truth inside the {result.confidence_level:.0%} radius", f"{result.radius_coverage:.1%}")
    table.add_row(f"median {result.confidence_level:.0%} radius", f"{result.median_radius_km:.1f} km")
    if result.failed:
        table.add_row("not located", str(result.failed))
    Console().print(table)


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
