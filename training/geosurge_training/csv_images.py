"""Images on disk, named by a CSV file of paths and coordinates."""

from __future__ import annotations

import csv
import hashlib
import logging
from array import array
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from geosurge.errors import ConfigurationError, ImageError
from geosurge_training.data import Batch

_LOGGER = logging.getLogger(__name__)
_COLUMNS = ("path", "latitude_deg", "longitude_deg")


class CsvImages:
    """A CSV file with the columns `path`, `latitude_deg` and `longitude_deg` as an image source.

    An image is held out by a hash of its path, so that adding rows never moves one from one part to the other. Training
    goes through the training part in an order that is new each epoch. An image that cannot be decoded is logged and
    left out of its batch; more than one, and more than `max_bad_share` of a batch, is an error.
    """

    def __init__(
        self,
        csv_path: Path,
        images: Path | None = None,
        *,
        decode: Callable[[bytes], npt.NDArray[np.uint8]],
        seed: int = 0,
        held_out_share: float = 0.05,
        max_bad_share: float = 0.01,
    ) -> None:
        """Reads the CSV file.

        Args:
            csv_path: The file.
            images: Folder that relative paths start from; default the file's own.
            decode: From an encoded image to canonical pixels; that of an encoder's `preprocessing`.
            seed: Seed of the epochs' orders.
            held_out_share: Share of the images that is held out.
            max_bad_share: Share of undecodable images in a batch above which it is an error.

        Raises:
            ConfigurationError: The file is missing, lacks a column, holds a row without a path or place, or leaves no
                image to train on.
        """
        self._folder = images or csv_path.parent
        self._decode = decode
        self._seed = seed
        self._max_bad_share = max_bad_share
        self._paths, self._latitude_deg, self._longitude_deg = read_image_table(csv_path)
        draws = np.array([_unit_hash(path) for path in self._paths])
        self._held_out = np.flatnonzero(draws < held_out_share)
        self._train = np.flatnonzero(draws >= held_out_share)
        if len(self._train) == 0:
            raise ConfigurationError(f"{csv_path}: no image is left to train on ({len(self._paths)} rows)")
        self._epoch = -1
        self._order = self._train
        self._pool = ThreadPoolExecutor(max_workers=4, thread_name_prefix="decode")

    def coordinate_chunks(self) -> Iterable[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]:
        """Coordinates of the training part; see `ImageSource`."""
        return [(self._latitude_deg[self._train], self._longitude_deg[self._train])]

    def train_batch(self, step: int, batch_size: int) -> Batch:
        """The training batch of a step; see `ImageSource`.

        Raises:
            ConfigurationError: Too many of its images cannot be decoded.
        """
        positions = np.arange(step * batch_size, (step + 1) * batch_size)
        rows = np.array([self._row(int(position)) for position in positions])
        return self._load(rows)

    def held_out(self, count: int, seed: int, batch_size: int) -> Iterator[Batch]:
        """Batches of the held-out part; see `ImageSource`.

        Raises:
            ConfigurationError: Nothing is held out, or too many images cannot be decoded.
        """
        if len(self._held_out) == 0:
            raise ConfigurationError("no image is held out: raise `held_out_share` or add images")
        rows = np.random.default_rng([seed, 1]).permutation(self._held_out)[:count]
        for start in range(0, len(rows), batch_size):
            yield self._load(rows[start : start + batch_size])

    def _row(self, position: int) -> int:
        epoch, offset = divmod(position, len(self._train))
        if epoch != self._epoch:
            self._order = np.random.default_rng([self._seed, 0, epoch]).permutation(self._train)
            self._epoch = epoch
        return int(self._order[offset])

    def _load(self, rows: npt.NDArray[np.int64]) -> Batch:
        loaded = list(self._pool.map(self._pixels, rows.tolist()))
        good = [index for index, pixels in enumerate(loaded) if pixels is not None]
        bad = len(rows) - len(good)
        # One bad image is never too many: a small batch would turn it into a large share.
        if bad > max(1, self._max_bad_share * len(rows)) or not good:
            raise ConfigurationError(
                f"{bad} of {len(rows)} images of a batch cannot be used, and `max_bad_share` allows "
                f"{self._max_bad_share:.1%}; the log names them. Mend the files, leave them out or raise the share."
            )
        pixels = torch.from_numpy(np.stack([item for item in loaded if item is not None]))
        kept = rows[good]
        return Batch(pixels, self._latitude_deg[kept], self._longitude_deg[kept])

    def _pixels(self, row: int) -> npt.NDArray[np.uint8] | None:
        path = self._folder / self._paths[row]
        try:
            return self._decode(path.read_bytes())
        except (ImageError, OSError) as error:
            _LOGGER.warning("%s is left out: %s", path, error)
            return None


def read_image_table(csv_path: Path) -> tuple[list[str], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Reads paths, latitudes and longitudes of a CSV file with the columns `path`, `latitude_deg`, `longitude_deg`.

    Args:
        csv_path: The file, UTF-8.

    Returns:
        n paths as written, (n,) latitudes and (n,) longitudes in degrees.

    Raises:
        ConfigurationError: The file is missing, lacks a column, or holds a coordinate that is none.
    """
    paths: list[str] = []
    latitudes, longitudes = array("d"), array("d")
    try:
        # Spreadsheets put a byte order mark in front of the first column's name.
        with csv_path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = [column for column in _COLUMNS if column not in (reader.fieldnames or ())]
            if missing:
                raise ConfigurationError(
                    f"{csv_path} has no column {', '.join(missing)}; it needs {', '.join(_COLUMNS)} and has "
                    f"{', '.join(reader.fieldnames or ['nothing'])}"
                )
            for row in reader:
                path, latitude_deg, longitude_deg = _fields(row, f"{csv_path}, line {reader.line_num}")
                paths.append(path)
                latitudes.append(latitude_deg)
                longitudes.append(longitude_deg)
    except OSError as error:
        raise ConfigurationError(f"{csv_path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigurationError(f"{csv_path} is not a CSV file in UTF-8: {error}") from error
    return paths, np.array(latitudes), np.array(longitudes)


def _fields(row: dict[str, str | None], place: str) -> tuple[str, float, float]:
    path, latitude, longitude = (row[column] for column in _COLUMNS)
    if not path:
        raise ConfigurationError(f"{place}: the path is empty")
    try:
        latitude_deg, longitude_deg = float(latitude or ""), float(longitude or "")
    except ValueError as error:
        raise ConfigurationError(f"{place}: a coordinate is not a number: {error}") from error
    # Written so that NaN fails it too.
    if not (abs(latitude_deg) <= 90.0 and abs(longitude_deg) <= 180.0):
        raise ConfigurationError(
            f"{place}: latitude_deg {latitude}, longitude_deg {longitude} is off the globe: latitudes must be in "
            "[-90, 90] and longitudes in [-180, 180]"
        )
    return path, latitude_deg, longitude_deg


def _unit_hash(path: str) -> float:
    """A number in [0, 1) that depends on the path alone."""
    return int.from_bytes(hashlib.blake2b(path.encode(), digest_size=8).digest(), "big") / 2.0**64
