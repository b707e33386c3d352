"""The `geosurge-train plan` command."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from geosurge.errors import UsageError


def plan(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.toml", help="The recipe.")],
    *,
    run: Annotated[
        Path | None, typer.Option("--run", help="Directory of the run. Default: runs/NAME of the recipe.")
    ] = None,
    images: Annotated[
        int | None, typer.Option(min=1, help="Training images, where the recipe's table is not at hand.")
    ] = None,
    cells: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Cells of each level, where they cannot be counted.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(metavar="NAME", help="Say how long it takes on this GPU; a wrong name lists them.")
    ] = None,
    tflops: Annotated[
        float | None, typer.Option(min=0.001, help="Or on one of this peak in the recipe's precision, 10^12 a second,")
    ] = None,
    memory_gib: Annotated[float | None, typer.Option(min=0.001, help="and with this memory.")] = None,
    utilisation: Annotated[
        float, typer.Option(min=0.001, max=1.0, help="Share of the peak that is taken to be reached.")
    ] = 0.35,
    disk_gb_per_s: Annotated[
        float, typer.Option(min=0.001, help="What the disk with a tower cache gives, 10^9 bytes a second.")
    ] = 3.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else.")] = False,
) -> None:
    """Say what a run will take: parameters, memory, arithmetic and time. Nothing starts, and no weights are read."""
    from geosurge_training.planning.gpus import Gpu, find_gpu  # noqa: PLC0415 - torch is slow to import
    from geosurge_training.planning.plan import make_plan  # noqa: PLC0415
    from geosurge_training.planning.report import print_plan, to_dict  # noqa: PLC0415
    from geosurge_training.planning.timing import Machine  # noqa: PLC0415
    from geosurge_training.recipe import load_recipe  # noqa: PLC0415
    from geosurge_training.run_directory import run_of  # noqa: PLC0415

    loaded = load_recipe(recipe)
    chosen = None
    if gpu is not None:
        if tflops is not None or memory_gib is not None:
            raise UsageError("--gpu names published figures; leave out --tflops and --memory-gib, or --gpu")
        if loaded.training.precision != "bfloat16":
            raise UsageError(
                f"the figures of --gpu are for bfloat16, and this recipe computes in {loaded.training.precision}: give "
                "--tflops and --memory-gib"
            )
        chosen = find_gpu(gpu)
    elif tflops is not None and memory_gib is not None:
        chosen = Gpu("the GPU", tflops, memory_gib * 2**30 / 1e9, "as stated")
    elif tflops is not None or memory_gib is not None:
        raise UsageError("--tflops and --memory-gib describe a GPU together; give both")
    machine = None if chosen is None else Machine(chosen, utilisation, disk_gb_per_s)
    result = make_plan(loaded, run or run_of(loaded), images=images, cells=_numbers(cells))
    if as_json:
        sys.stdout.write(json.dumps(to_dict(result, machine)) + "\n")
    else:
        print_plan(result, machine, Console())


def _numbers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise UsageError(f"--cells {text}: give one whole number a level, such as 684,1744,3298")
    return numbers
