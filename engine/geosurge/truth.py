"""Where images were really taken: CSV files of paths and coordinates, and how far an answer is off."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Final

from geosurge import geodesy
from geosurge.description import Coordinate
from geosurge.errors import CoordinateOutOfRangeError, UsageError
from geosurge.location import Location

TRUTH_COLUMNS: Final = ("path", "latitude_deg", "longitude_deg")

THRESHOLDS_KM: Final = (1, 25, 200, 750, 2500)
"""Street, city, region, country, continent: the distances that accuracies are published for."""


def read_truth(path: Path) -> dict[Path, Coordinate]:
    """Reads a CSV file with the columns of `TRUTH_COLUMNS`; others are ignored.

    Args:
        path: The file.

    Returns:
        The coordinate of each image by its path, in the order of the file; relative paths start from the file's folder.

    Raises:
        UsageError: The file cannot be read, lacks a column, or holds a coordinate that is none; says where.
    """
    truths: dict[Path, Coordinate] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = [column for column in TRUTH_COLUMNS if column not in (reader.fieldnames or ())]
            if missing:
                raise UsageError(f"{path} has no column {', '.join(missing)}; it needs {', '.join(TRUTH_COLUMNS)}")
            for row in reader:
                try:
                    truth = Coordinate(float(row["latitude_deg"]), float(row["longitude_deg"]))
                    geodesy.validate_coordinates(truth.latitude_deg, truth.longitude_deg)
                except (TypeError, ValueError, CoordinateOutOfRangeError) as error:
                    raise UsageError(f"{path}, line {reader.line_num}: {error}") from error
                truths[path.parent / row["path"]] = truth
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"cannot read the truth from {path}: {error}") from error
    return truths


def error_km(location: Location, truth: Coordinate) -> float:
    """Great-circle distance from the truth to an answer."""
    return float(
        geodesy.great_circle_km(location.latitude_deg, location.longitude_deg, truth.latitude_deg, truth.longitude_deg)
    )
