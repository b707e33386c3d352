"""The option that names an index which a command opens itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

IndexPath = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Index store, whose active bundle is used, or a bundle; GEOSURGE_INDEX or the indexes/ folder by default.",
        show_default=False,
    ),
]
