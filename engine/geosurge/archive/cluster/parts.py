"""The files between a ledger and Ray: what is to be located goes out in parts, and the answers come back."""

from __future__ import annotations

import hashlib
import itertools
import shutil
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from geosurge.archive.ledger import AnswerKey, Ledger, Noted
from geosurge.archive.locating import Thresholds
from geosurge.archive.tasks import Failure
from geosurge.errors import OutputNotWritableError
from geosurge.wire import bytes_to_location

PICTURES: Final = "pictures"
ANSWERS: Final = "answers"
"""Folders in the directory of what is exchanged with Ray."""

ID: Final = "id"
"""Column that names a picture as it is, in every file and step."""

_MAX_BATCHES_A_PART: Final = 8
_PARTS_A_SLOT: Final = 4
_ROWS_AT_ONCE: Final = 1024

_PICTURE_SCHEMA: Final = pa.schema(
    [
        (ID, pa.int64()),
        ("key", pa.int64()),
        ("path", pa.binary()),
        ("member", pa.binary()),
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("offset", pa.int64()),
    ]
)


def export_pictures(ledger: Ledger, exchange: Path, batch_size: int, slots: int) -> None:
    """Writes what is to be located into parts, enough for every slot to have some and each of whole batches.

    Args:
        ledger: Asks for the pictures.
        exchange: Directory of what is exchanged with Ray.
        batch_size: Pictures encoded together.
        slots: CPUs of the cluster.

    Raises:
        OutputNotWritableError: The disk is full, or the directory cannot be written.
    """
    directory = exchange / PICTURES
    total = ledger.counts().get(None, 0)
    batches = total // (batch_size * slots * _PARTS_A_SLOT)
    rows_a_part = batch_size * min(max(batches, 1), _MAX_BATCHES_A_PART)
    try:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        pictures = ledger.to_locate()
        for number in itertools.count():
            rows = [_picture(noted) for noted in itertools.islice(pictures, rows_a_part)]
            if not rows:
                return
            pq.write_table(pa.Table.from_pylist(rows, _PICTURE_SCHEMA), directory / f"{number:08}.parquet")
    except OSError as error:
        raise OutputNotWritableError(
            f"{directory} cannot be written: {error}; make room, or name another directory"
        ) from error


def _picture(noted: Noted) -> dict[str, object]:
    found = noted.found
    return {
        ID: _identity(noted),
        "key": noted.key,
        "path": found.path,
        "member": found.member,
        "size": found.size,
        "mtime_ns": found.mtime_ns,
        "offset": found.offset,
    }


def _identity(noted: Noted) -> int:
    """Names a picture as it is now: another one once its file has changed."""
    found = noted.found
    fields = (noted.key, found.path, found.member, found.size, found.mtime_ns, found.offset)
    return int.from_bytes(hashlib.blake2b(repr(fields).encode(), digest_size=8).digest(), "big", signed=True)


def count_failures(exchange: Path, part: str) -> int:
    """Counts the pictures without an answer in the files that belong to a part of the checkpoint.

    Args:
        exchange: Directory of what is exchanged with Ray.
        part: What the names of these files begin with.

    Raises:
        OSError: A file cannot be read.
        pyarrow.ArrowException: Likewise.
    """
    reasons = [pq.read_table(path, columns=["reason"])["reason"] for path in (exchange / ANSWERS).glob(f"{part}*")]
    return sum(len(column) - column.null_count for column in reasons)


def note_answers(ledger: Ledger, key: AnswerKey, thresholds: Thresholds, exchange: Path) -> None:
    """Notes in a ledger what came of the pictures; of a picture that has changed since, an answer is passed over.

    Args:
        ledger: Where the answers go.
        key: What they answer.
        thresholds: Which of them are held back.
        exchange: Directory of what is exchanged with Ray.
    """
    wanted = np.sort(pq.read_table(exchange / PICTURES, columns=[ID])[ID].to_numpy())
    for path in sorted((exchange / ANSWERS).glob("*.parquet")):
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_ROWS_AT_ONCE):
                is_wanted = np.isin(batch[ID].to_numpy(), wanted)
                for row in batch.filter(pa.array(is_wanted)).to_pylist():
                    _note_answer(ledger, key, thresholds, row)
        ledger.commit()


def _note_answer(ledger: Ledger, key: AnswerKey, thresholds: Thresholds, row: dict[str, Any]) -> None:
    content_hash = row["content_hash"]
    if row["response"] is None:
        ledger.failed(row["key"], Failure(row["reason"], row["detail"], is_final=row["is_final"]), content_hash)
        return
    content_hash = ledger.journal.hash_before(row["key"], content_hash)
    location = bytes_to_location(row["response"])
    answer, location = ledger.answer(content_hash, key) or (ledger.add_answer(content_hash, key, location), location)
    ledger.located(row["key"], content_hash, answer, thresholds.reason_to_withhold(location))
