"""What a point on a map says about its picture."""

from __future__ import annotations

from typing import Final

from geosurge.archive.rows import Row

COORDINATE_DECIMALS: Final = 7
"""Decimals of a degree on maps: a centimetre."""


def map_properties(row: Row) -> dict[str, str | float | None]:
    """The properties of a row that is done, flat, as programs that draw maps can filter and colour by them."""
    place = row.place
    return {
        "path": row.path,
        "radius_km": row.radius_km,
        "confidence_level": row.confidence_level,
        "probability": row.probability,
        "city": place.city if place else None,
        "region": place.region if place else None,
        "country": place.country if place else None,
        "country_code": place.country_code if place else None,
        "city_distance_km": place.distance_km if place else None,
        "leaf": row.cells[-1].token if row.cells else None,
        "content_hash": row.content_hash or None,
        "index_version": row.index_version or None,
    }
