"""exiftool as the independent reader and writer of metadata: one call for many files."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest


def read_tags(paths: Iterable[Path], *arguments: str) -> dict[Path, dict[str, Any]]:
    """The tags of files, with numbers as numbers and each tag under the group that it is from (``XMP:GPSLatitude``)."""
    wanted = list(paths)
    answer = _run(["-json", "-n", "-G0", *arguments, *map(str, wanted)])
    return {Path(tags["SourceFile"]): tags for tags in json.loads(answer)}


def position(tags: Mapping[str, Any]) -> tuple[float, float]:
    """Latitude and longitude of what `read_tags` gives for one file, with their signs."""
    source = "Composite" if "Composite:GPSLatitude" in tags else "XMP"
    return float(tags[f"{source}:GPSLatitude"]), float(tags[f"{source}:GPSLongitude"])


def write_tags(values: Mapping[Path, Mapping[str, object]], work: Path) -> None:
    """Writes tags into files; each file gets its own."""
    names = sorted({name for tags in values.values() for name in tags})
    table = work / "tags.csv"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["SourceFile", *names])
        writer.writeheader()
        writer.writerows({"SourceFile": str(path), **tags} for path, tags in values.items())
    _run(["-overwrite_original", "-n", f"-csv={table}", *map(str, values)])
    table.unlink()


def change_tags(paths: Iterable[Path], *arguments: str) -> None:
    """Makes the same changes to files."""
    _run(["-overwrite_original", *arguments, *map(str, paths)])


def _run(arguments: list[str]) -> str:
    if shutil.which("exiftool") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("exiftool is missing: install Debian's libimage-exiftool-perl")
        pytest.skip("needs exiftool (Debian's libimage-exiftool-perl)")
    run = subprocess.run(
        ["exiftool", "-@", "-"], input="\n".join(arguments), capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout
