"""The published schema of the rows, and the way from a row to Arrow and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, TypeVar

import pyarrow as pa

from geosurge.archive.rows import Position, Row, Status
from geosurge.location import Alternative, PathCell, Place, Timings

_Part = TypeVar("_Part", Position, Place, Timings)


def _field(name: str, kind: pa.DataType, description: str, *, nullable: bool = True) -> pa.Field:
    return pa.field(name, kind, nullable=nullable, metadata={"description": description})


_PLACE: Final = pa.struct(
    [
        _field("city", pa.string(), "nearest city; may be empty"),
        _field("region", pa.string(), "first-order administrative region; may be empty"),
        _field("country", pa.string(), "country, in English"),
        _field("country_code", pa.string(), "ISO 3166-1 alpha-2"),
        _field("distance_km", pa.float64(), "great-circle distance to the city"),
    ]
)
_POSITION: Final = pa.struct(
    [
        _field("latitude_deg", pa.float64(), "WGS-84 degrees"),
        _field("longitude_deg", pa.float64(), "WGS-84 degrees, in [-180, 180]"),
        _field("source", pa.string(), "`exif`, `xmp` (inside the picture) or `sidecar`"),
    ]
)
_CELL: Final = pa.struct(
    [
        _field("level", pa.int32(), "1 is the coarsest"),
        _field("token", pa.string(), "the cell: an S2 token, or what the index's cells are called"),
        _field("probability", pa.float64(), "mass of all leaves under it"),
    ]
)
_ALTERNATIVE: Final = pa.struct(
    [
        _field("token", pa.string(), "the leaf"),
        _field("probability", pa.float64(), "posterior probability of the leaf"),
        _field("latitude_deg", pa.float64(), "latitude of the leaf's mean, WGS-84 degrees"),
        _field("longitude_deg", pa.float64(), "longitude of the leaf's mean, WGS-84 degrees"),
        _field("place", _PLACE, "place nearest to the leaf's mean, as above"),
    ]
)
_TIMINGS: Final = pa.struct(
    [
        _field("decode_ms", pa.float64(), "decoding the picture"),
        _field("queue_ms", pa.float64(), "waiting for its batch"),
        _field("encode_ms", pa.float64(), "embedding the batch"),
        _field("search_ms", pa.float64(), "searching for the batch"),
        _field("posterior_ms", pa.float64(), "turning the batch's scores into probabilities"),
    ]
)

SCHEMA: Final = pa.schema(
    [
        _field(
            "path",
            pa.string(),
            "absolute path of the picture, links followed; bytes that are not UTF-8 as `\\xNN`; of one in a shard "
            "`SHARD/MEMBER`",
            nullable=False,
        ),
        _field("status", pa.string(), "`done`, `skipped`, `withheld` or `failed`", nullable=False),
        _field("reason", pa.string(), "why it is not done: a stable string, such as `IMAGE_TRUNCATED`"),
        _field("detail", pa.string(), "the same in words"),
        _field(
            "content_hash",
            pa.string(),
            "SHA-256 of the file's bytes, hexadecimal; without what the run itself wrote into it; null of skipped rows,"
            " and of failed ones that were not read to their end",
        ),
        _field("position", _POSITION, "where the picture itself says that it was taken"),
        _field(
            "latitude_deg",
            pa.float64(),
            "latitude of the estimate, WGS-84 degrees; null of skipped and withheld rows, and of failed ones unless"
            " only writing it failed",
        ),
        _field(
            "longitude_deg",
            pa.float64(),
            "longitude of the estimate, WGS-84 degrees; null of skipped and withheld rows, and of failed ones unless"
            " only writing it failed",
        ),
        _field(
            "radius_km",
            pa.float64(),
            "radius around the estimate that holds `confidence_level` of the posterior; also of withheld rows",
        ),
        _field("confidence_level", pa.float64(), "that part of the posterior"),
        _field("probability", pa.float64(), "posterior probability of the most likely leaf; also of withheld rows"),
        _field("cells", pa.list_(_CELL), "cells from level 1 to the most likely leaf"),
        _field("place", _PLACE, "place nearest to the mean of the most likely leaf"),
        _field("alternatives", pa.list_(_ALTERNATIVE), "the most likely leaves, best first"),
        _field("index_version", pa.string(), "name of the index bundle that answered"),
        _field("encoder_hash", pa.string(), "SHA-256 of the encoder that embedded the picture"),
        _field("timings", _TIMINGS, "milliseconds spent on it"),
    ],
    metadata={"geosurge.rows": "1"},
)
"""Columns of every table of rows. A text that a row leaves empty is null, a list that it leaves empty is empty."""


def row_to_record(row: Row) -> dict[str, Any]:
    """One row as plain values, by the columns of `SCHEMA`."""
    return {
        "path": row.path,
        "status": row.status.value,
        "reason": row.reason or None,
        "detail": row.detail or None,
        "content_hash": row.content_hash or None,
        "position": _values(row.position),
        "latitude_deg": row.latitude_deg,
        "longitude_deg": row.longitude_deg,
        "radius_km": row.radius_km,
        "confidence_level": row.confidence_level,
        "probability": row.probability,
        "cells": [vars(cell) for cell in row.cells],
        "place": _values(row.place),
        "alternatives": [{**vars(leaf), "place": _values(leaf.place)} for leaf in row.alternatives],
        "index_version": row.index_version or None,
        "encoder_hash": row.encoder_hash or None,
        "timings": _values(row.timings),
    }


def rows_to_batch(rows: Sequence[Row]) -> pa.RecordBatch:
    """Rows as an Arrow batch of `SCHEMA`."""
    return pa.RecordBatch.from_pylist([row_to_record(row) for row in rows], schema=SCHEMA)


def batch_to_rows(batch: pa.RecordBatch) -> Iterator[Row]:
    """The rows of an Arrow batch of `SCHEMA`: those that `rows_to_batch` was given."""
    for record in batch.to_pylist():
        yield Row(
            path=record["path"],
            status=Status(record["status"]),
            reason=record["reason"] or "",
            detail=record["detail"] or "",
            content_hash=record["content_hash"] or "",
            position=_filled(Position, record["position"]),
            latitude_deg=record["latitude_deg"],
            longitude_deg=record["longitude_deg"],
            radius_km=record["radius_km"],
            confidence_level=record["confidence_level"],
            probability=record["probability"],
            cells=tuple(PathCell(**cell) for cell in record["cells"]),
            place=_filled(Place, record["place"]),
            alternatives=tuple(
                Alternative(**{**leaf, "place": _filled(Place, leaf["place"])}) for leaf in record["alternatives"]
            ),
            index_version=record["index_version"] or "",
            encoder_hash=record["encoder_hash"] or "",
            timings=_filled(Timings, record["timings"]),
        )


def columns_table() -> str:
    """`SCHEMA` as a Markdown table."""
    lines = ["| column | type | meaning |", "|---|---|---|"]
    for field in SCHEMA:
        lines.append(_line(field.name, field))
        inner = field.type.value_type if pa.types.is_list(field.type) else field.type
        if pa.types.is_struct(inner):
            lines.extend(_line(f"{field.name}.{part.name}", part) for part in inner)
    return "\n".join(lines) + "\n"


def _line(name: str, field: pa.Field) -> str:
    kind = field.type
    shown = "list" if pa.types.is_list(kind) else "struct" if pa.types.is_struct(kind) else str(kind)
    needed = "" if field.nullable else ", never null"
    return f"| `{name}` | {shown}{needed} | {field.metadata[b'description'].decode()} |"


def _values(part: Position | Place | Timings | None) -> dict[str, Any] | None:
    return None if part is None else vars(part)


def _filled(kind: type[_Part], values: Mapping[str, Any] | None) -> _Part | None:
    return None if values is None else kind(**values)
