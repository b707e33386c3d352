"""What is written about a picture that was located, and how it is told from what others wrote."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

MAP_DATUM: Final = "WGS-84"

GPS_VERSION: Final = (2, 3, 0, 0)
"""Version of the EXIF standard's GPS tags: the first that has GPSHPositioningError."""

SAME_PLACE_DEG: Final = 1e-6
"""Two coordinates that differ by no more are the same: programs that copy a position may round it."""

_METHOD: Final = re.compile(r"geosurge (\S+) run (\S+)")


@dataclass(frozen=True)
class Guess:
    """An estimate as it is written into a file.

    Attributes:
        latitude_deg: Latitude, WGS-84 degrees.
        longitude_deg: Longitude, WGS-84 degrees.
        radius_km: Radius around the estimate that holds the confidence level asked for.
        probability: Posterior probability of the most likely leaf.
        index_version: Name of the index bundle that answered.
        encoder_hash: SHA-256 of the encoder that embedded the picture.
        run_id: Name of the run that writes it, without spaces.
    """

    latitude_deg: float
    longitude_deg: float
    radius_km: float
    probability: float
    index_version: str
    encoder_hash: str
    run_id: str

    @property
    def error_m(self) -> int:
        """The radius in whole metres, for GPSHPositioningError."""
        return round(self.radius_km * 1000)

    @property
    def method(self) -> str:
        """Text of GPSProcessingMethod: it marks the position as a guess, and names who made it and when."""
        return f"geosurge {self.index_version} run {self.run_id}"

    def is_at(self, latitude_deg: float, longitude_deg: float) -> bool:
        """Whether a coordinate that was read from a file is the one that was written."""
        return (
            abs(latitude_deg - self.latitude_deg) <= SAME_PLACE_DEG
            and abs(longitude_deg - self.longitude_deg) <= SAME_PLACE_DEG
        )


def method_run_id(method: str) -> str:
    """Run that wrote a GPSProcessingMethod; empty if it is of somebody else."""
    match = _METHOD.fullmatch(method)
    return match[2] if match else ""
