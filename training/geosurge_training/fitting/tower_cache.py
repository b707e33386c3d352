"""Outputs of frozen towers, kept on disk: they see each image once, however many epochs follow.

Training with a cache is training on what is stored, from the first epoch on: in `float32` the same as without to the
rounding of another batch's arithmetic (1e-5), in `float16` to that of half precision (1e-3). The towers see an image as
it is; a source that shows an image differently each time cannot be cached.

A directory holds `manifest.json` (whose outputs these are), `tokens.bin`, `fractions.bin` and `coordinates.bin` (a
record for each image of the training part, in its order), and `done.bin` (a byte for each: 1 when its records are
whole, 2 when the image was found unusable and has none).
An image is told by its name and its coordinates: whoever exchanges or mends pictures under their names removes the
cache.
Records reach the disk before their byte does, so that a cut at any moment leaves a cache that can be gone on with, and
several processes fill one cache together.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray

from geosurge.encoder import ImageEncoder
from geosurge.encoder.model import TowerOutputs
from geosurge.encoder.segmentation import Segmenter
from geosurge.encoder.vision import VisionTower
from geosurge.errors import ConfigurationError
from geosurge_training.aside import written_aside
from geosurge_training.data.source import Batch, ImageSource, NumberedSource

CacheDtype = Literal["float16", "float32"]
MANIFEST_FILE: Final = "manifest.json"
_DONE_FILE: Final = "done.bin"
_DONE: Final = 1
_UNUSABLE: Final = 2


@dataclass(frozen=True)
class _Manifest:
    """Whose outputs a cache holds; caches with equal manifests are one."""

    towers_sha256: str
    images_sha256: str
    count: int
    dtype: CacheDtype
    precision: str
    tokens: tuple[int, int]
    fractions: tuple[int, int]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


class TowerCache:
    """Outputs of an encoder's towers for the training part of a source."""

    @classmethod
    def open(
        cls, directory: Path, encoder: ImageEncoder, source: ImageSource, dtype: CacheDtype, precision: str
    ) -> Self:
        """Opens a cache, or makes one.

        Args:
            directory: The cache's own directory.
            encoder: The towers' owner.
            source: The images.
            dtype: What outputs are stored as.
            precision: In which the towers run; other precisions have other outputs.

        Returns:
            The cache.

        Raises:
            ConfigurationError: The towers are trained, the source's images have no numbers, the directory holds
                something else, or the disk has not enough room or cannot be written.
        """
        if not encoder.vision.config.frozen:
            raise ConfigurationError(
                "training.tower_cache: the vision tower is trained, so that its outputs change; leave the cache out or "
                "set encoder.vision.frozen"
            )
        if not isinstance(source, NumberedSource) or source.train_count is None:
            raise ConfigurationError(
                "training.tower_cache: the images of this data source never repeat; leave the cache out"
            )
        rows, columns = encoder.vision.grid
        fused = encoder.config.fusion.blocks > 0
        manifest = _Manifest(
            _towers_digest(encoder),
            source.train_digest(),
            source.train_count,
            dtype,
            precision,
            (encoder.vision.token_count, encoder.vision.width),
            (rows * columns, encoder.config.segmentation.class_count) if fused else (0, 0),
        )
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with _locked(directory):
                return cls(directory, manifest)
        except OSError as error:
            raise _unusable(directory, error) from error

    def __init__(self, directory: Path, manifest: _Manifest) -> None:
        self._directory = directory
        self._manifest = manifest
        _claim(directory, manifest)
        count, dtype = manifest.count, np.dtype(manifest.dtype)
        shapes = {
            "tokens.bin": (manifest.tokens, dtype),
            "fractions.bin": (manifest.fractions, dtype),
            "coordinates.bin": ((2,), np.dtype(np.float64)),
            _DONE_FILE: ((), np.dtype(np.uint8)),
        }
        self._files: dict[str, int] = {}
        self._values: dict[str, NDArray[np.generic]] = {}
        # The last file to be made: as long as it has no size, nothing is in the others.
        started = (directory / _DONE_FILE).exists() and (directory / _DONE_FILE).stat().st_size > 0
        for name, (shape, kind) in shapes.items():
            size = count * int(np.prod(shape, dtype=np.int64)) * kind.itemsize
            path = directory / name
            if started and (not path.exists() or path.stat().st_size != size):
                raise ConfigurationError(f"{path} is missing or damaged; remove {directory}, and it is filled again")
            self._files[name] = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            os.ftruncate(self._files[name], size)
            # Written through the file and not the map: a full disk is an error there and a signal here.
            self._values[name] = (
                np.memmap(path, kind, "r", shape=(count, *shape)) if size else np.empty((count, *shape), kind)
            )
        self._record_bytes = sum(values[:1].nbytes for values in self._values.values())
        needed = int((self._values[_DONE_FILE] == 0).sum()) * self._record_bytes
        free = shutil.disk_usage(directory).free
        if needed > free:
            raise ConfigurationError(
                f"training.tower_cache: {directory} needs {needed / 2**30:.1f} GiB more for {count} images, and the "
                f"disk has {free / 2**30:.1f}; free some, store float16, or leave the cache out"
            )

    def close(self) -> None:
        """Closes the files; what was read before stays valid."""
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    def has(self, numbers: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which images are there, (n,) bool."""
        return np.asarray(self._values[_DONE_FILE][numbers] == _DONE)

    def unusable(self) -> NDArray[np.int64]:
        """Numbers of the images that are known to be unusable, ascending."""
        return np.flatnonzero(self._values[_DONE_FILE] == _UNUSABLE)

    def mark_unusable(self, numbers: NDArray[np.int64]) -> None:
        """Notes that images cannot be used, so that nobody looks at them again.

        Raises:
            ConfigurationError: The disk is full or cannot be written.
        """
        try:
            for number in numbers[self._values[_DONE_FILE][numbers] == 0]:
                self._write(_DONE_FILE, int(number), np.array(_UNUSABLE, np.uint8))
        except OSError as error:
            raise _unusable(self._directory, error) from error

    def coordinates(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Latitudes and longitudes in degrees of images that are there, (n,) each."""
        latitude_deg, longitude_deg = np.asarray(self._values["coordinates.bin"][numbers], np.float64).T
        return latitude_deg, longitude_deg

    def outputs(self, numbers: NDArray[np.int64], device: torch.device) -> TowerOutputs:
        """What the towers saw in images that are there, as float32 on a device."""

        def read(name: str) -> torch.Tensor:
            return torch.from_numpy(np.asarray(self._values[name][numbers])).to(device).float()

        return TowerOutputs(read("tokens.bin"), read("fractions.bin") if self._manifest.fractions[0] else None)

    def add(self, numbers: NDArray[np.int64], batch: Batch, seen: TowerOutputs) -> None:
        """Adds those of some images that are not there.

        Args:
            numbers: (n,) their numbers.
            batch: The images.
            seen: What the towers saw in them.

        Raises:
            ConfigurationError: The disk is full or cannot be written, or outputs are too large for the stored type.
        """
        missing = np.flatnonzero(~self.has(numbers))
        records = {
            "tokens.bin": self._stored(seen.tokens),
            "coordinates.bin": np.stack([batch.latitude_deg, batch.longitude_deg], axis=1),
        }
        if seen.fractions is not None:
            records["fractions.bin"] = self._stored(seen.fractions)
        try:
            for name, values in records.items():
                for row in missing:
                    self._write(name, int(numbers[row]), values[row])
                os.fsync(self._files[name])
            for row in missing:
                self._write(_DONE_FILE, int(numbers[row]), np.array(_DONE, np.uint8))
        except OSError as error:
            raise _unusable(self._directory, error) from error

    def _stored(self, values: torch.Tensor) -> NDArray[np.generic]:
        stored = values.to(getattr(torch, self._manifest.dtype))
        if not stored.isfinite().all():
            raise ConfigurationError(
                f"training.tower_cache: outputs of the towers are too large for {self._manifest.dtype}, or not finite; "
                'set training.tower_cache_dtype = "float32"'
            )
        return np.asarray(stored.cpu().numpy())

    def _write(self, name: str, number: int, values: NDArray[np.generic]) -> None:
        rest = memoryview(values.tobytes())
        offset = number * len(rest)
        while rest:
            written = os.pwrite(self._files[name], rest, offset)
            rest, offset = rest[written:], offset + written


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Lets one process in at a time: those that train together open a cache at once, and one of them makes it."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _claim(directory: Path, manifest: _Manifest) -> None:
    """Makes a directory this cache's, or refuses one that is another's."""
    path = directory / MANIFEST_FILE
    if path.exists():
        if path.read_text(encoding="utf-8") != manifest.to_json():
            raise ConfigurationError(
                f"training.tower_cache: {directory} holds outputs of other towers, images, precision or type; give "
                "another directory or remove it"
            )
        return
    if any(not entry.name.startswith(".") for entry in directory.iterdir()):
        raise ConfigurationError(f"training.tower_cache: {directory} is no cache and not empty; give another directory")
    with written_aside(path) as aside:
        aside.write_text(manifest.to_json(), encoding="utf-8")


def _towers_digest(encoder: ImageEncoder) -> str:
    """SHA-256 over configuration and weights of the towers that run; the fusion module has no part in their outputs."""
    towers: dict[str, VisionTower | Segmenter] = {"vision": encoder.vision}
    if encoder.config.fusion.blocks:
        towers["segmentation"] = encoder.segmenter
    configurations = {name: asdict(tower.config) for name, tower in towers.items()}
    digest = hashlib.sha256(json.dumps(configurations, sort_keys=True).encode())
    digest.update(f"{encoder.preprocessing.id}".encode())
    for name, tower in towers.items():
        for weight, tensor in sorted(tower.state_dict().items()):
            values = tensor.detach().cpu().contiguous()
            digest.update(f"{name}.{weight} {values.dtype} {tuple(values.shape)}".encode())
            digest.update(values.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _unusable(directory: Path, error: OSError) -> ConfigurationError:
    return ConfigurationError(
        f"training.tower_cache: {directory} cannot be written: {error.strerror or error}; make room, or leave the "
        "cache out. What is in it stays good."
    )
