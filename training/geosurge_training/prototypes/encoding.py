"""Encodes pictures once, into arrays on the disk.

A run that was cut off goes on with the pictures that it lacks. Those that could not be used are tried again by every
run, and those whose file has changed are encoded anew.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from geosurge.durable_files import replace_file
from geosurge.encoder import ImageEncoder
from geosurge.errors import OutputNotWritableError
from geosurge_training.building.embedded import EmbeddedBatch
from geosurge_training.progress import track
from geosurge_training.prototypes.pictures import BATCH_SIZE, PictureBatch, Pictures

_EMBEDDINGS_FILE: Final = "embeddings.npy"
_RECORDS_FILE: Final = "pictures.npy"
_STATE_FILE: Final = "encoding.json"

_RECORD: Final = np.dtype([("coordinates", np.float64, 2), ("file_state", np.int64, 2)])
"""Of 32 bytes, so that no record lies on two pages of the disk: after a power cut it is the old one or the new one."""

_Shapes: TypeAlias = dict[str, tuple[tuple[int, ...], np.dtype[np.generic]]]


@dataclass(frozen=True)
class EncodedPictures:
    """n pictures, in their order; the embeddings are mapped from the disk.

    Attributes:
        embeddings: (n, d) float32, unit rows; NaN where a picture could not be used.
        coordinates: (n, 2) float64 latitudes and longitudes in degrees, as well.
    """

    embeddings: npt.NDArray[np.float32]
    coordinates: npt.NDArray[np.float64]

    @property
    def usable(self) -> npt.NDArray[np.int64]:
        """Rows of the pictures that could be used."""
        return np.flatnonzero(~np.isnan(self.coordinates[:, 0]))

    def batches(self, rows: npt.NDArray[np.int64], batch_size: int = BATCH_SIZE) -> Iterator[EmbeddedBatch]:
        """Pictures of some rows, in their order; memory is that of a batch."""
        for start in range(0, len(rows), batch_size):
            block = rows[start : start + batch_size]
            latitude_deg, longitude_deg = self.coordinates[block].T
            yield EmbeddedBatch(np.array(self.embeddings[block]), latitude_deg, longitude_deg)


def encode_pictures(pictures: Pictures, encoder: ImageEncoder, directory: Path) -> EncodedPictures:
    """Encodes pictures, or what runs before left of them; memory is that of two batches, and the coordinates.

    Args:
        pictures: The pictures.
        encoder: The encoder.
        directory: Where the arrays are kept, made when missing. Those of other pictures, or of another encoder, are
            replaced.

    Returns:
        The pictures' embeddings and places.

    Raises:
        ConfigurationError: Too many pictures cannot be used.
        OutputNotWritableError: The disk is full, or the directory cannot be written.
    """
    with contextlib.closing(_Arrays(directory, pictures, encoder)) as arrays:
        missing = arrays.missing()
        numbers = np.unique(np.flatnonzero(missing) // BATCH_SIZE).tolist()
        asked = [np.flatnonzero(missing[_rows_of_batch(number)]) for number in numbers]
        with track("encode", len(numbers)) as progress, ThreadPoolExecutor(max_workers=1) as ahead:
            loading = (ahead.submit(pictures.batch, *of_batch) for of_batch in zip(numbers, asked, strict=True))
            waiting = next(loading, None)
            for number, positions in zip(numbers, asked, strict=True):
                assert waiting is not None
                batch, waiting = waiting.result(), next(loading, None)
                arrays.write(number, positions, batch, encoder)
                progress.advance()
        pictures.finish()
        return EncodedPictures(arrays.embeddings, np.array(arrays.records["coordinates"]))


class _Arrays:
    """The files of a directory.

    They are written through descriptors and not through their maps: a full disk is an error there, and a signal that
    ends the process here.

    Attributes:
        embeddings: (n, d) float32; what the file holds.
        records: (n,) of `_RECORD`, likewise; the coordinates are NaN as long as the embedding is none.
    """

    def __init__(self, directory: Path, pictures: Pictures, encoder: ImageEncoder) -> None:
        self._directory = directory
        self._file_states = pictures.file_states
        shapes: _Shapes = {
            _EMBEDDINGS_FILE: ((pictures.count, encoder.dimension), np.dtype(np.float32)),
            _RECORDS_FILE: ((pictures.count,), _RECORD),
        }
        state = json.dumps({"pictures": pictures.digest, "encoder": encoder.fingerprint}) + "\n"
        with _writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
            if not _is_kept(directory, state, shapes):
                _create(directory, state, shapes)
            self._descriptors = {name: os.open(directory / name, os.O_RDWR) for name in shapes}
            maps = {name: np.lib.format.open_memmap(directory / name, "r") for name in shapes}
        self._offsets = {name: int(array.offset) for name, array in maps.items()}
        self.embeddings: npt.NDArray[np.float32] = maps[_EMBEDDINGS_FILE]
        self.records: npt.NDArray[np.void] = maps[_RECORDS_FILE]

    def missing(self) -> npt.NDArray[np.bool_]:
        """(n,) whether each picture is to be encoded, for the first time or anew."""
        has_changed = (self.records["file_state"] != self._file_states).any(axis=1)
        return np.asarray(has_changed | np.isnan(self.records["coordinates"][:, 0]))

    def write(self, number: int, positions: npt.NDArray[np.int64], batch: PictureBatch, encoder: ImageEncoder) -> None:
        """Encodes and keeps the pictures at some positions of a batch, or that they cannot be used."""
        rows = _rows_of_batch(number)
        vectors, records = self.embeddings[rows].copy(), self.records[rows].copy()
        vectors[positions] = np.nan
        records["coordinates"][positions] = np.nan
        if len(batch.positions):
            vectors[batch.positions] = encoder.encode(batch.pixels)
            records["coordinates"][batch.positions] = np.stack([batch.latitude_deg, batch.longitude_deg], axis=1)
            records["file_state"][batch.positions] = self._file_states[rows][batch.positions]
        with _writing(self._directory):
            self._write(_EMBEDDINGS_FILE, rows.start, vectors)
            # A record vouches for its embedding, which has to be on the disk before.
            os.fsync(self._descriptors[_EMBEDDINGS_FILE])
            self._write(_RECORDS_FILE, rows.start, records)

    def close(self) -> None:
        """Closes the files; the arrays stay valid."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def _write(self, name: str, start: int, values: npt.NDArray[np.generic]) -> None:
        rest = memoryview(values.tobytes())
        offset = self._offsets[name] + start * values[:1].nbytes
        while rest:
            written = os.pwrite(self._descriptors[name], rest, offset)
            rest, offset = rest[written:], offset + written


def _rows_of_batch(number: int) -> slice:
    return slice(number * BATCH_SIZE, (number + 1) * BATCH_SIZE)


def _is_kept(directory: Path, state: str, shapes: _Shapes) -> bool:
    """Whether a directory has arrays of this state, and whole ones."""
    state_path = directory / _STATE_FILE
    if not state_path.exists() or state_path.read_text(encoding="utf-8", errors="replace") != state:
        return False
    for name, (shape, dtype) in shapes.items():
        try:
            array = np.load(directory / name, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return False
        if (array.shape, array.dtype) != (shape, dtype):
            return False
    return True


def _create(directory: Path, state: str, shapes: _Shapes) -> None:
    state_path = directory / _STATE_FILE
    # Without a state nothing in the directory counts, so that it goes first and comes last.
    state_path.unlink(missing_ok=True)
    (count,), _ = shapes[_RECORDS_FILE]
    with (directory / _RECORDS_FILE).open("wb") as file:
        nothing = np.zeros(count, _RECORD)
        nothing["coordinates"] = np.nan
        np.save(file, nothing)
        file.flush()
        os.fsync(file.fileno())
    shape, dtype = shapes[_EMBEDDINGS_FILE]
    np.lib.format.open_memmap(directory / _EMBEDDINGS_FILE, "w+", dtype, shape)
    replace_file(state_path, state.encode())


@contextlib.contextmanager
def _writing(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputNotWritableError(
            f"{directory} cannot be written ({error.strerror or error}): free some space or mend its rights, and run "
            "the same again; what is encoded already is kept"
        ) from error
