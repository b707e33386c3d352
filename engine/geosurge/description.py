"""What a server tells about itself, its index versions and its cells: frozen dataclasses that clients return."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from datetime import datetime

from geosurge.errors import GeoSurgeError
from geosurge.location import Place


@dataclass(frozen=True)
class Coordinate:
    """A point, WGS-84 degrees."""

    latitude_deg: float
    longitude_deg: float


@dataclass(frozen=True)
class Cell:
    """One geocell.

    Attributes:
        token: Its id.
        level: 1 (coarsest) to L.
        ordinal: Its row within the level.
        parent_ordinal: Row of its parent; ``None`` on level 1.
        child_ordinals: Rows of its children; empty on the finest level.
        mean: Mean of its training coordinates: the cell's answer.
        spread_km: Root-mean-square distance of the training coordinates to their mean.
        sample_count: Training coordinates in it.
        area_km2: Its area.
        outline: Corners, counter-clockwise, the first not repeated.
        place: The named place nearest to the mean, where one is known.
        s2_level: Subdivision level of an S2 cell, 0 to 30; ``None`` for other kinds.
        index_version: Version that it was read from.
    """

    token: str
    level: int
    ordinal: int
    parent_ordinal: int | None
    child_ordinals: range
    mean: Coordinate
    spread_km: float
    sample_count: int
    area_km2: float
    outline: tuple[Coordinate, ...]
    place: Place | None
    s2_level: int | None
    index_version: str


@dataclass(frozen=True)
class ServerInfo:
    """What a server is and accepts.

    Attributes:
        engine_version: Version of its software.
        index_version: The active index version.
        index_create_time: When that was built.
        domain: What it can locate and what it cannot.
        dimension: Length of an embedding.
        cell_counts: Cells on each level, coarsest first.
        encoder_sha256: Encoder that embeddings must come from; empty when images are not answered.
        image_formats: Accepted formats.
        max_image_bytes: Largest encoded image.
        max_image_pixels: Most pixels of an image.
        min_image_side_px: Shortest side of an image.
        max_top_k: Most alternatives.
        max_beam_width: Widest beam.
        max_region_tokens: Longest region filter.
        max_batch_size: Requests that are worked on together.
        max_concurrent_requests: Requests held at once.
        max_requests_per_peer: Requests of one client address held at once.
        max_stream_items: Items of one stream.
        default_beam_width: Beam of a request that names none.
    """

    engine_version: str
    index_version: str
    index_create_time: datetime
    domain: str
    dimension: int
    cell_counts: tuple[int, ...]
    encoder_sha256: str
    image_formats: tuple[str, ...]
    max_image_bytes: int
    max_image_pixels: int
    min_image_side_px: int
    max_top_k: int
    max_beam_width: int
    max_region_tokens: int
    max_batch_size: int
    max_concurrent_requests: int
    max_requests_per_peer: int
    max_stream_items: int
    default_beam_width: int


class VersionState(enum.StrEnum):
    """Where an index version of a server is in its life; `geosurge.server.versions` has the table."""

    LOADING = "loading"
    READY = "ready"
    ACTIVE = "active"
    DRAINING = "draining"
    UNLOADED = "unloaded"
    FAILED = "failed"


@dataclass(frozen=True)
class IndexVersion:
    """One index version, as a server sees it.

    Attributes:
        name: Name of the bundle.
        state: Its state.
        failure: Why it could not be loaded, or what is wrong with it in the store.
        load_step: What a load is doing; empty without one.
        load_progress: Fraction of a load that is done, 0 to 1.
        request_count: Requests that are being answered from it.
        memory_bytes: Estimate of the memory that it takes; 0 when it was never read.
        canary_share: Share of the traffic that it gets as a canary, 0 to 1.
        state_time: When it entered its state, UTC; ``None`` when nobody has asked for it.
        create_time: When the bundle was built, UTC; ``None`` when it was never read.
        encoder_sha256: SHA-256 of its encoder; empty when it has none or was never read.
    """

    name: str
    state: VersionState
    failure: GeoSurgeError | None = None
    load_step: str = ""
    load_progress: float = 0.0
    request_count: int = 0
    memory_bytes: int = 0
    canary_share: float = 0.0
    state_time: datetime | None = None
    create_time: datetime | None = None
    encoder_sha256: str = ""
