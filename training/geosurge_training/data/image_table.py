"""Tables of images and where they were taken, as CSV or Parquet, sized for many millions of rows.

The headings are told by name, one's own or published ones:

| published with | image | latitude | longitude |
|---|---|---|---|
| this project | path | latitude_deg | longitude_deg |
| MP-16, its test sets, MP16-Pro | IMG_ID | LAT | LON |
| EMP-16 (data.uni-hannover.de/dataset/extended-mp-16-dataset) | image_id | latitude | longitude |
| OpenStreetView-5M | id | latitude | longitude |
| GWS15k | path | lat | lon |

MP-16 is mp16_places365.csv of github.com/TIBHannover/GeoEstimation, release v1.0: 4.7 million rows. Its IMG_ID is a
path of two folders and a file, such as `ab/cd/1234.jpg`.
"""

from __future__ import annotations

import csv
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from geosurge.errors import ConfigurationError
from geosurge_training.data.bad_samples import BadSamples
from geosurge_training.data.stored_images import StoredSamples

KNOWN_COLUMNS: Final = (
    ("path", "latitude_deg", "longitude_deg"),
    ("IMG_ID", "LAT", "LON"),
    ("image_id", "latitude", "longitude"),
    ("id", "latitude", "longitude"),
    ("path", "lat", "lon"),
)
FLAWS: Final = (
    "",
    "no name of an image",
    "a coordinate that is not a number",
    "coordinates off the globe",
    "coordinates 0, 0, which stand for none",
)
"""What can be wrong with a row; `ImageTable.flaws` gives indices into this list."""

_AT_ZERO: Final = 4
_Chunk = tuple[pa.Array, npt.NDArray[np.float64], npt.NDArray[np.float64]]
_CHUNK_ROWS: Final = 1 << 16


@dataclass(frozen=True)
class ImageTable:
    """n images and where they were taken.

    Attributes:
        path: The file.
        names: n texts as they stand there, an Arrow array: a fifth of what Python's own would take.
        latitude_deg: (n,) float64; NaN where the table has no number.
        longitude_deg: (n,) float64; NaN where the table has no number.
    """

    path: Path
    names: pa.LargeStringArray
    latitude_deg: npt.NDArray[np.float64]
    longitude_deg: npt.NDArray[np.float64]

    def flaws(self) -> npt.NDArray[np.int8]:
        """What is wrong with each row, as an index into `FLAWS`; 0 where nothing is."""
        latitude_deg, longitude_deg = self.latitude_deg, self.longitude_deg
        conditions = (
            np.asarray(pc.equal(self.names, "")),
            np.isnan(latitude_deg) | np.isnan(longitude_deg),
            (np.abs(latitude_deg) > 90.0) | (np.abs(longitude_deg) > 180.0),
        )
        return np.select(conditions, [np.int8(1), np.int8(2), np.int8(3)], np.int8(0))

    def good_rows(self, max_bad_share: float) -> npt.NDArray[np.int64]:
        """Rows that name an image and coordinates; 0, 0 is what cameras and services write that know none.

        Args:
            max_bad_share: Share of other rows above which they are an error.

        Raises:
            ConfigurationError: Too many rows do not, or all.
        """
        flaws = self.flaws()
        flaws[(self.latitude_deg == 0.0) & (self.longitude_deg == 0.0)] = _AT_ZERO
        bad = BadSamples(f"rows of {self.path}", max_bad_share)
        bad.count(len(flaws), ((FLAWS[flaws[row]], self.describe(row)) for row in np.flatnonzero(flaws).tolist()))
        bad.report("as a whole")
        rows = np.flatnonzero(flaws == 0)
        if len(flaws) and len(rows) == 0:
            raise ConfigurationError(f"no row of {self.path} can be used ({bad.reasons}). For example {bad.examples}")
        return rows

    def describe(self, row: int) -> str:
        """Where a row is and what it says, for messages."""
        name = self.names[row].as_py()
        return f"row {row + 1} ({name!r} at {self.latitude_deg[row]}, {self.longitude_deg[row]})"


def read_image_table(path: Path, columns: Sequence[str] | None = None) -> ImageTable:
    """Reads a table.

    Args:
        path: Parquet where it ends in `.parquet`, else CSV in UTF-8.
        columns: Headings of the image, the latitude and the longitude; by default the first of `KNOWN_COLUMNS` that
            are all there.

    Returns:
        All its rows, whatever they hold.

    Raises:
        ConfigurationError: The file is missing, is not what its name says, or lacks the headings.
    """
    return _read(path, _parquet_chunks(path, columns) if path.suffix == ".parquet" else _csv_chunks(path, columns))


def open_table(
    path: Path, images: Path | None = None, columns: Sequence[str] | None = None, max_bad_share: float = 0.01
) -> StoredSamples:
    """Reads which images there are; none of them is opened.

    Args:
        path: The table; see `read_image_table`.
        images: Folder that relative paths start from; default the table's own.
        columns: Headings of the path, the latitude and the longitude, where they are none that are known.
        max_bad_share: Share of rows without a name or coordinates, above which it is an error.

    Returns:
        The images of the good rows, in their order.

    Raises:
        ConfigurationError: The table cannot be used, or too many rows are bad.
    """
    table = read_image_table(path, columns)
    rows = table.good_rows(max_bad_share)
    folder, names = images or path.parent, table.names.take(pa.array(rows))
    return StoredSamples(
        names,
        table.latitude_deg[rows],
        table.longitude_deg[rows],
        lambda row: (folder / names[row].as_py()).read_bytes(),
    )


def read_image_list(path: Path) -> ImageTable:
    """Reads lines of an image, a latitude and a longitude between blanks, without headings.

    Args:
        path: The file, UTF-8.

    Raises:
        ConfigurationError: The file is missing or is no text.
    """
    return _read(path, _list_chunks(path))


def _read(path: Path, chunks: Iterable[_Chunk]) -> ImageTable:
    try:
        parts = list(chunks)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror or error}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigurationError(f"{path} is not a CSV file in UTF-8: {error}") from error
    except pa.ArrowException as error:
        raise ConfigurationError(f"{path} is not a Parquet file of texts and numbers: {error}") from error
    names = pa.chunked_array([part[0] for part in parts], pa.large_string()).combine_chunks()
    latitude_deg, longitude_deg = (
        np.concatenate([np.empty(0), *(part[column] for part in parts)]) for column in (1, 2)
    )
    return ImageTable(path, names, latitude_deg, longitude_deg)


def _csv_chunks(path: Path, columns: Sequence[str] | None) -> Iterator[_Chunk]:
    # Spreadsheets put a byte order mark in front of the first column's name.
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.reader(file)
        headings = next(rows, [])
        column_numbers = [headings.index(column) for column in _columns(path, headings, columns)]
        yield from _text_chunks(rows, column_numbers)


def _list_chunks(path: Path) -> Iterator[_Chunk]:
    with path.open(encoding="utf-8-sig") as file:
        yield from _text_chunks((line.split() for line in file), (0, 1, 2))


def _text_chunks(rows: Iterable[Sequence[str]], column_numbers: Sequence[int]) -> Iterator[_Chunk]:
    name_column, latitude_column, longitude_column = column_numbers
    names: list[str] = []
    latitudes, longitudes = array("d"), array("d")
    for row in rows:
        if not row:
            continue
        names.append(_field(row, name_column))
        latitudes.append(_number(_field(row, latitude_column)))
        longitudes.append(_number(_field(row, longitude_column)))
        if len(names) == _CHUNK_ROWS:
            yield pa.array(names, pa.large_string()), np.array(latitudes), np.array(longitudes)
            names, latitudes, longitudes = [], array("d"), array("d")
    yield pa.array(names, pa.large_string()), np.array(latitudes), np.array(longitudes)


def _field(row: Sequence[str], column: int) -> str:
    return row[column] if column < len(row) else ""


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return np.nan


def _parquet_chunks(path: Path, columns: Sequence[str] | None) -> Iterator[_Chunk]:
    with pq.ParquetFile(path) as file:
        chosen = list(_columns(path, file.schema_arrow.names, columns))
        for batch in file.iter_batches(_CHUNK_ROWS, columns=chosen):
            names, latitudes, longitudes = (batch.column(column) for column in chosen)
            yield (
                pc.fill_null(names.cast(pa.large_string()), ""),
                _floats(latitudes),
                _floats(longitudes),
            )


def _floats(column: pa.Array) -> npt.NDArray[np.float64]:
    return np.asarray(column.cast(pa.float64()).to_numpy(zero_copy_only=False), dtype=np.float64)


def _columns(path: Path, headings: Sequence[str], columns: Sequence[str] | None) -> Sequence[str]:
    if columns is None:
        known = next((known for known in KNOWN_COLUMNS if set(known) <= set(headings)), None)
        columns = KNOWN_COLUMNS[0] if known is None else known
    if missing := [column for column in columns if column not in headings]:
        raise ConfigurationError(
            f"{path} has no column {', '.join(missing)}; it needs {', '.join(columns)} and has "
            f"{', '.join(headings) or 'nothing'}"
        )
    return columns
