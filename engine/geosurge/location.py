"""The question and the answer: plain frozen dataclasses, shared by the locator, the server and the client.

They mirror ``proto/geosurge/v1/geolocation.proto`` field by field and need neither torch nor FAISS to import.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

MAX_TOP_K: Final = 100
MAX_BEAM_WIDTH: Final = 2048


@dataclass(frozen=True)
class LocateOptions:
    """How one image or embedding is located.

    Attributes:
        top_k: Alternatives to return, at least 1.
        beam_width: Cells kept a level, at least 1; ``None`` is the index version's default. A narrower one than that is
            widened to it, because the probabilities were calibrated with it and a narrow beam, which misses leaves,
            overstates them. Without effect where every leaf is scored: with `exact` or `region_tokens`.
        exact: Score every leaf instead of searching with a beam.
        confidence_level: Posterior mass inside the radius and the credible region, in (0, 1).
        h3_resolution: Resolution, 0 to 15, of the H3 cell to return; ``None`` returns none.
        region_tokens: Cells, of any level, that the answer must lie in; empty is the whole index. The leaves inside are
            searched exactly. Of S2 and H3 cells, one that is smaller than the leaf around it stands for this leaf.
    """

    top_k: int = 5
    beam_width: int | None = None
    exact: bool = False
    confidence_level: float = 0.9
    h3_resolution: int | None = None
    region_tokens: tuple[str, ...] = ()


@dataclass(frozen=True)
class Place:
    """The named place nearest to a coordinate.

    Attributes:
        city: Name of the nearest city; empty when none is known.
        region: First-order administrative region; may be empty.
        country: Country name in English.
        country_code: ISO 3166-1 alpha-2 code.
        distance_km: Great-circle distance to the city.
    """

    city: str
    region: str
    country: str
    country_code: str
    distance_km: float


@dataclass(frozen=True)
class PathCell:
    """One cell on the way from level 1 to the most likely leaf; ``probability`` is the mass of all leaves under it."""

    level: int
    token: str
    probability: float


@dataclass(frozen=True)
class Alternative:
    """One leaf that the image may have been taken in."""

    token: str
    probability: float
    latitude_deg: float
    longitude_deg: float
    place: Place | None = None


@dataclass(frozen=True)
class CredibleRegion:
    """Leaves in order of probability density until the confidence level is reached.

    Attributes:
        tokens: The leaves; they need not touch.
        area_km2: Their area.
        probability: Their posterior mass, at least the confidence level.
    """

    tokens: tuple[str, ...]
    area_km2: float
    probability: float


@dataclass(frozen=True)
class Timings:
    """Milliseconds spent in each stage.

    Decoding and waiting are the query's own; the others are those of the part of its batch that the query was in: the
    images encoded together, the call of the index, the posteriors computed together.
    """

    decode_ms: float = 0.0
    queue_ms: float = 0.0
    encode_ms: float = 0.0
    search_ms: float = 0.0
    posterior_ms: float = 0.0


@dataclass(frozen=True)
class Location:
    """Where an image was most likely taken.

    Attributes:
        latitude_deg: Latitude of the estimate, WGS-84 degrees.
        longitude_deg: Longitude of the estimate, WGS-84 degrees.
        radius_km: Radius of the circle around the estimate that holds ``confidence_level`` of the calibrated posterior.
        confidence_level: Posterior mass asked for.
        probability: Posterior probability of the most likely leaf.
        path: Cells from level 1 to the most likely leaf.
        alternatives: The most likely leaves, best first.
        credible_region: The smallest set of leaves that holds the confidence level.
        index_version: Name of the index bundle that answered.
        place: Place nearest to the mean of the most likely leaf, where the index knows one; the estimate may lie
            elsewhere.
        h3_cell: H3 cell of the estimate, when a resolution was asked for.
        timings: Where the time went.
    """

    latitude_deg: float
    longitude_deg: float
    radius_km: float
    confidence_level: float
    probability: float
    path: tuple[PathCell, ...]
    alternatives: tuple[Alternative, ...]
    credible_region: CredibleRegion
    index_version: str
    place: Place | None = None
    h3_cell: str | None = None
    timings: Timings = field(default_factory=Timings)
