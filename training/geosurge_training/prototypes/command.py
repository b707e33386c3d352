"""The `geosurge-train prototypes` command."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from geosurge import store as stores
from geosurge.errors import UsageError
from geosurge.location import MAX_BEAM_WIDTH


def prototypes(
    *,
    encoder: Annotated[
        Path, typer.Option(metavar="BUNDLE_OR_STORE", help="Bundle whose encoder is used, or store of it.")
    ],
    out: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Where embeddings, partition and the bundle go; its name is the bundle's."),
    ],
    images: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="TABLE_OR_FOLDER",
            help="CSV or Parquet table with path, latitude_deg and longitude_deg, or folder of pictures that carry "
            "positions; folders can be given repeatedly.",
        ),
    ] = None,
    root: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder that a table's paths start from; default the table's.")
    ] = None,
    views: Annotated[
        int | None, typer.Option(min=1, help="Views of the Blue Marble world, instead of --images.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the views, and of what is held out.")] = 1,
    cells: Annotated[str, typer.Option(help="Kind of the cells: s2, h3 or administrative.")] = "s2",
    tau_max: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,..",
            help="Pictures above which a cell is split, one number a level. Default: seven levels in geometric order "
            "down to the number of pictures / 9400, at least 4; level 1 has fifty times that.",
        ),
    ] = None,
    tau_min: Annotated[
        str | None,
        typer.Option(
            metavar="N[,N..]", help="Cells need more pictures than this. Default: a tenth of the last --tau-max."
        ),
    ] = None,
    plain_means: Annotated[
        bool, typer.Option("--plain-means", help="Cells do not lean on their parents; to compare with.")
    ] = False,
    gallery: Annotated[
        bool, typer.Option("--gallery", help="Keep the pictures' embeddings in the bundle, to place queries in cells.")
    ] = False,
    beam_width: Annotated[
        int | None,
        typer.Option(min=1, max=MAX_BEAM_WIDTH, help="Default beam width of the bundle. Default: 64."),
    ] = None,
    publish: Annotated[
        Path | None, typer.Option(metavar="STORE", help="Also publish the bundle into this store; see --activate.")
    ] = None,
    activate: Annotated[bool, typer.Option("--activate", help="Also make it the store's active bundle.")] = False,
    max_bad_share: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of pictures that cannot be used above which it is an error.")
    ] = 0.05,
    device: Annotated[str, typer.Option(help="Where the encoder lives: cpu, cuda or cuda:N.")] = "cpu",
) -> None:
    """Make an index of your own pictures with known places, without training; a run that was cut off goes on."""
    from geosurge_training.prototypes.about import BEAM_WIDTH, about_pictures, open_encoder  # noqa: PLC0415 - torch is slow to import
    from geosurge_training.prototypes.build import PrototypeOptions, build_prototypes  # noqa: PLC0415
    from geosurge_training.prototypes.pictures import Pictures, ViewPictures, open_pictures  # noqa: PLC0415

    if (views is None) == (not images):
        raise UsageError("say what the index is made of: --images or --views, one of the two")
    if cells not in ("s2", "h3", "administrative"):
        raise UsageError(f"--cells {cells} is no kind of cells: s2, h3 or administrative")
    if activate and publish is None:
        raise UsageError("--activate is about a store: say which with --publish")
    if publish is not None and (publish / out.name).exists():
        raise UsageError(f"{publish} has a bundle {out.name} already, and bundles never change; give another --out")
    options = PrototypeOptions(
        cells=cells,  # type: ignore[arg-type]
        tau_max=_numbers("--tau-max", tau_max),
        tau_min=_numbers("--tau-min", tau_min),
        shrink=not plain_means,
        gallery=gallery,
        seed=seed,
    )
    begun = time.monotonic()
    made_for, manifest = open_encoder(encoder, device)
    pictures: Pictures
    if views is not None:
        pictures = ViewPictures(made_for.image_size, views, seed)
    else:
        pictures = open_pictures(images or [], root, made_for.preprocessing, max_bad_share)
    about, training = about_pictures(pictures, manifest, beam_width or BEAM_WIDTH)
    made = build_prototypes(pictures, made_for, out, about=about, training=training, options=options)
    calibration = made.calibration
    sys.stdout.write(
        f"{made.path}: {made.usable_count} of {made.picture_count} pictures, {made.partition.cell_counts[-1]} leaves, "
        f"expected calibration error {calibration.expected_calibration_error:.4f}, "
        f"{time.monotonic() - begun:.0f} s\n"
    )
    if publish is not None:
        name = stores.publish(publish, made.path, activate=activate)
        sys.stdout.write(f"published {name} in {publish}{' and activated it' if activate else ''}\n")


def _numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"{option} {text!r} is not numbers with commas between them") from error
