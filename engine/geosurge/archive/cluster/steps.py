"""What Ray's workers do with pictures: read and decode them, in tasks, and locate them, in actors."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa

from geosurge.archive.backends import Query, open_index
from geosurge.archive.cluster.parts import ID
from geosurge.archive.cluster.session import Cluster
from geosurge.archive.locating import essential
from geosurge.archive.pool import TaskPool
from geosurge.archive.sources import Found
from geosurge.archive.tasks import Decode, Decoded, Failure, Outcome, Unusable
from geosurge.cores import usable_cores
from geosurge.errors import GeoSurgeError
from geosurge.images import ImageLimits
from geosurge.location import LocateOptions
from geosurge.preprocessing import Preprocessing
from geosurge.wire import location_to_bytes

_FAILURE: Final = [("reason", pa.string()), ("detail", pa.string()), ("is_final", pa.bool_())]
_DECODED_SCHEMA: Final = pa.schema(
    [
        (ID, pa.int64()),
        ("key", pa.int64()),
        ("content_hash", pa.binary()),
        ("pixels", pa.large_binary()),
        ("decode_ms", pa.float64()),
        *_FAILURE,
    ]
)
_ANSWER_SCHEMA: Final = pa.schema(
    [(ID, pa.int64()), ("key", pa.int64()), ("content_hash", pa.binary()), ("response", pa.binary()), *_FAILURE]
)


@dataclass(frozen=True)
class DecodeStep:
    """The step that reads and decodes, in tasks."""

    preprocessing: Preprocessing
    limits: ImageLimits

    def __call__(self, pictures: pa.Table) -> pa.Table:
        """Rows of pictures in; the same with their pixels, or why there are none, out."""
        rows = pictures.to_pylist()
        tasks = [
            Decode(
                row["key"],
                Found(row["path"], row["member"], row["size"], row["mtime_ns"], row["offset"]),
                self.preprocessing,
                self.limits,
            )
            for row in rows
        ]
        outcomes = _decode(tasks)
        return pa.Table.from_pylist([_decoded(row, outcomes[row["key"]]) for row in rows], _DECODED_SCHEMA)


def _decode(tasks: list[Decode]) -> dict[int, Outcome]:
    try:
        return dict(_decoder().run(tasks))
    except BaseException:
        # What was under way must not come out for the next task.
        _decoder().stop()
        raise


@functools.cache
def _decoder() -> TaskPool:
    """The process that decodes for this one; it ends when this one does."""
    return TaskPool(1)


def _decoded(row: dict[str, Any], outcome: Outcome) -> dict[str, object]:
    start = {ID: row[ID], "key": row["key"]}
    if isinstance(outcome, Decoded):
        pixels = np.asarray(outcome.query).tobytes()
        return {**start, "content_hash": outcome.content_hash, "pixels": pixels, "decode_ms": outcome.decode_ms}
    if isinstance(outcome, Unusable):
        return {**start, "content_hash": outcome.content_hash, **_reason(outcome.failure)}
    assert isinstance(outcome, Failure)
    return {**start, **_reason(outcome)}


def _reason(failure: Failure) -> dict[str, object]:
    return {"reason": failure.name, "detail": failure.detail, "is_final": failure.is_final}


class LocateStep:
    """The step that locates, in actors."""

    def __init__(self, cluster: Cluster, options: LocateOptions) -> None:
        import torch  # noqa: PLC0415

        # Ray gives each process one thread; how many there are decides how batches are cut and so how they are rounded.
        torch.set_num_threads(usable_cores())
        self._options = options
        self._opened = contextlib.ExitStack()
        self._backend = self._opened.enter_context(open_index(cluster.index, cluster.device, cluster.batch_size))

    def __call__(self, decoded: pa.Table) -> pa.Table:
        """Rows with pixels in; the same with answers, or why there are none, out."""
        assert self._backend.preprocessing is not None
        side = self._backend.preprocessing.image_size
        rows = decoded.to_pylist()
        located = [row for row in rows if row["pixels"] is not None]
        queries: list[Query] = [np.frombuffer(row["pixels"], np.uint8).reshape(3, side, side) for row in located]
        outcomes = self._backend.locate(queries, self._options) if queries else []
        for row, outcome in zip(located, outcomes, strict=True):
            if isinstance(outcome, GeoSurgeError):
                row.update(_reason(Failure.of(outcome)))
            else:
                answer = essential(outcome, row["decode_ms"])
                row["response"] = location_to_bytes(answer)
        return pa.Table.from_pylist(rows, _ANSWER_SCHEMA)
