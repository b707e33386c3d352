"""The `geosurge-train evaluate` command."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal, cast, get_args

import typer
from rich.console import Console

from geosurge.errors import UsageError
from geosurge.preprocessing import CropCount


def evaluate(
    bundle: Annotated[Path, typer.Argument(help="Bundle, or store whose active bundle is meant.")],
    *,
    dataset: Annotated[
        Path | None,
        typer.Option(
            metavar="CSV",
            help="Pictures with path, latitude_deg and longitude_deg, instead of views. None of them should be among "
            "those that the bundle was trained or calibrated on: its figures on these are too good.",
        ),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder that the dataset's paths start from; default the CSV's.")
    ] = None,
    benchmark: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The dataset is the published metadata of im2gps, im2gps3k, yfcc4k, yfcc26k, gws15k or osv5m.",
        ),
    ] = None,
    views: Annotated[int, typer.Option(min=1, help="Held-out views of the Blue Marble world.")] = 2000,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the views, not the one calibrated on, and of the resamples.")
    ] = 7,
    exact: Annotated[bool, typer.Option("--exact", help="Search every leaf instead of the default beam.")] = False,
    point_estimator: Annotated[
        Literal["leaf", "posterior_mean", "kernel_density"] | None,
        typer.Option(help="What makes the points, if not what the bundle was calibrated with."),
    ] = None,
    crops: Annotated[
        int, typer.Option(help="Average the predictions of 5 crops of each image, or of 10 with mirror images.")
    ] = 1,
    device: Annotated[str, typer.Option(help="Where encoder and index live: cpu, cuda or cuda:N.")] = "cpu",
    resamples: Annotated[int, typer.Option(min=1, help="Bootstrap resamples that the intervals come from.")] = 1000,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also write evaluation.json, evaluation.md and plots here.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else.")] = False,
) -> None:
    """Measure a bundle on held-out views of the Blue Marble world, on pictures of your own, or on a benchmark."""
    from geosurge_training.evaluation.bootstrap import Bootstrap  # noqa: PLC0415 - torch is slow to import
    from geosurge_training.evaluation.datasets import open_dataset  # noqa: PLC0415
    from geosurge_training.evaluation.evaluate import (  # noqa: PLC0415
        EvaluationOptions,
        evaluate_images,
        evaluate_views,
    )
    from geosurge_training.evaluation.report import print_tables, write_report  # noqa: PLC0415

    if dataset is None and (benchmark is not None or images is not None):
        raise UsageError("--benchmark and --images say what --dataset is; give the CSV file, too")
    if crops not in get_args(CropCount):
        raise UsageError(f"--crops is {crops}; it must be 1, 5 or 10")
    options = EvaluationOptions(
        exact=exact,
        point_estimator=point_estimator,
        crops=cast("CropCount", crops),
        device=device,
        bootstrap=Bootstrap(resamples, seed=seed),
    )
    if dataset is not None:
        result = evaluate_images(bundle, open_dataset(dataset, images, benchmark), options)
    else:
        result = evaluate_views(bundle, views=views, seed=seed, options=options)
    if output is not None:
        write_report(result, output)
    if as_json:
        sys.stdout.write(json.dumps(result.to_dict()) + "\n")
    else:
        print_tables(result, Console())
