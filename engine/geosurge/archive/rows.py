"""One row for each picture: what a run says about it, in whatever form (see the README of `outputs`)."""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import Final, Self

from geosurge.errors import GeoSurgeError
from geosurge.location import Alternative, Location, PathCell, Place, Timings


class Status(enum.StrEnum):
    """What became of a picture."""

    DONE = "done"
    SKIPPED = "skipped"
    WITHHELD = "withheld"
    FAILED = "failed"


class Format(enum.StrEnum):
    """A form that rows are put out in."""

    PARQUET = "parquet"
    CSV = "csv"
    GEOJSON = "geojson"
    KML = "kml"

    @property
    def file_name(self) -> str:
        """Name of the file that holds them."""
        return f"results.{self}"


HAS_POSITION: Final = "HAS_POSITION"
NO_POSITION: Final = "NO_POSITION"
"""Reasons of rows that are skipped; the second one in an audit."""

PROBABILITY_TOO_LOW: Final = "PROBABILITY_TOO_LOW"
RADIUS_TOO_LARGE: Final = "RADIUS_TOO_LARGE"
"""Reasons of rows that are withheld."""


@dataclass(frozen=True)
class Reason:
    """Why a picture is not done.

    Attributes:
        name: A stable string: one of this module's, or of an error of `geosurge.errors`.
        detail: The same in words.
    """

    name: str
    detail: str

    @classmethod
    def of(cls, error: GeoSurgeError) -> Self:
        """What an error says."""
        return cls(error.reason, str(error))


@dataclass(frozen=True)
class Position:
    """Where a picture says that it was taken.

    Attributes:
        latitude_deg: Latitude, WGS-84 degrees.
        longitude_deg: Longitude, WGS-84 degrees, in [-180, 180].
        source: ``"exif"``, ``"xmp"`` (inside the picture) or ``"sidecar"``.
    """

    latitude_deg: float
    longitude_deg: float
    source: str


@dataclass(frozen=True)
class Row:
    r"""One picture.

    Attributes:
        path: Absolute path of the picture, links followed, of one in a shard ``SHARD/MEMBER``; control characters and
            bytes that are not UTF-8 as ``\xNN``, a backslash as ``\\``, so that no two look the same.
        status: What became of it.
        reason: Name of the `Reason` why it is not done; empty when it is.
        detail: The same in words.
        content_hash: SHA-256 of the file's bytes in hexadecimal, without what the run itself wrote into it; empty where
            it was not read to its end, and of skipped rows.
        position: What the picture itself says, where it says anything.
        latitude_deg: Latitude of the estimate; also where only writing it into the picture failed.
        longitude_deg: Longitude of the estimate, likewise.
        radius_km: Radius around the estimate that holds ``confidence_level`` of the posterior; also of withheld rows.
        confidence_level: That part of the posterior.
        probability: Posterior probability of the most likely leaf; also of withheld rows.
        cells: Cells from level 1 to the most likely leaf, with the probability of each.
        place: Place nearest to the estimate.
        alternatives: The most likely leaves, best first.
        index_version: Name of the index bundle that answered.
        encoder_hash: SHA-256 of the encoder that embedded the picture.
        timings: Where the time went.
    """

    path: str
    status: Status
    reason: str = ""
    detail: str = ""
    content_hash: str = ""
    position: Position | None = None
    latitude_deg: float | None = None
    longitude_deg: float | None = None
    radius_km: float | None = None
    confidence_level: float | None = None
    probability: float | None = None
    cells: tuple[PathCell, ...] = ()
    place: Place | None = None
    alternatives: tuple[Alternative, ...] = ()
    index_version: str = ""
    encoder_hash: str = ""
    timings: Timings | None = None

    def with_answer(self, location: Location, encoder_hash: str) -> Row:
        """The row with what was answered; of one that is withheld, without the guess itself."""
        row = replace(
            self,
            radius_km=location.radius_km,
            confidence_level=location.confidence_level,
            probability=location.probability,
            index_version=location.index_version,
            encoder_hash=encoder_hash,
            timings=location.timings,
        )
        if self.status is Status.WITHHELD:
            return row
        return replace(
            row,
            latitude_deg=location.latitude_deg,
            longitude_deg=location.longitude_deg,
            cells=location.path,
            place=location.place,
            alternatives=location.alternatives,
        )
