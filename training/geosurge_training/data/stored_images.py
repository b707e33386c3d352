"""Images that are stored in files, as a source of training batches.

An epoch shows every image of the training part once, in an order of its own; batches walk through the epochs without a
gap. An image that cannot be used is skipped: in a training batch another one, drawn at random from the training part,
stands in for it, so that batches keep their size, and nothing else in any batch depends on it; in the held-out part the
next one follows. Batches are therefore the same as long as the files are. The papers do not say what they do with
such images: this is this project's decision.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from geosurge.cores import usable_cores
from geosurge.errors import ConfigurationError, InputError
from geosurge_training.data.bad_samples import BadSamples, reason_of
from geosurge_training.data.source import Batch, rebatch
from geosurge_training.data.spots import order_by_spot, spots_of

_ORDER, _HELD_OUT, _REPLACEMENT = range(3)
_ROWS_AT_ONCE: Final = 1 << 16
_MAX_REPLACEMENTS: Final = 100


@dataclass(frozen=True)
class StoredSamples:
    """n images that can be read, and where they were taken.

    Attributes:
        names: n texts, an Arrow array; what messages call an image, and what a table of held-out images calls it.
        latitude_deg: (n,) float64, on the globe.
        longitude_deg: (n,) float64, on the globe.
        read: Gives the encoded image of a row; called from several threads. Raises OSError or InputError.
    """

    names: pa.LargeStringArray
    latitude_deg: npt.NDArray[np.float64]
    longitude_deg: npt.NDArray[np.float64]
    read: Callable[[int], bytes]

    def pixels(self, row: int, decode: Callable[[bytes], npt.NDArray[np.uint8]]) -> npt.NDArray[np.uint8] | str:
        """Pixels of an image, or the reason why there are none."""
        try:
            return decode(self.read(row))
        except (OSError, InputError) as error:
            return reason_of(error)


def held_out_by_spot(
    latitude_deg: npt.NDArray[np.float64], longitude_deg: npt.NDArray[np.float64], share: float
) -> npt.NDArray[np.bool_]:
    """Which images a hash of the spot that they were taken at holds out.

    More images never move one from one part to the other. See `spots` for what a spot is.

    Args:
        latitude_deg: (n,) latitudes.
        longitude_deg: (n,) longitudes.
        share: Share of the spots that is held out.

    Returns:
        (n,) bool.
    """
    spots, spot_of_image = np.unique(spots_of(latitude_deg, longitude_deg), return_inverse=True)
    held_out = np.fromiter((_unit_hash(spot) < share for spot in spots.tolist()), np.bool_, len(spots))
    return held_out[spot_of_image]


class StoredImages:
    """Stored samples as an `ImageSource`."""

    def __init__(
        self,
        samples: StoredSamples,
        held_out: npt.NDArray[np.bool_],
        *,
        decode: Callable[[bytes], npt.NDArray[np.uint8]],
        seed: int = 0,
        max_bad_share: float = 0.01,
    ) -> None:
        """Splits the samples.

        Args:
            samples: The images.
            held_out: (n,) whether each is held out.
            decode: From an encoded image to canonical pixels; that of an encoder's `preprocessing`.
            seed: Seed of the epochs' orders.
            max_bad_share: Share of images that cannot be used, above which it is an error; see `BadSamples`.

        Raises:
            ConfigurationError: No image is left to train on.
        """
        self._samples = samples
        self._decode = decode
        self._seed = seed
        self._held_out = np.flatnonzero(held_out)
        self._train = np.flatnonzero(~held_out)
        if len(self._train) == 0:
            raise ConfigurationError(f"no image is left to train on ({len(held_out)} images, all of them held out)")
        self._max_bad_share = max_bad_share
        self._bad = BadSamples("training images", max_bad_share)
        self._unusable: set[int] = set()
        self._skipped: set[int] = set()
        self._unusable_of_epoch: Counter[int] = Counter()
        self._order = lru_cache(maxsize=2)(self._order_of_epoch)
        self._pool = ThreadPoolExecutor(max_workers=max(4, usable_cores()), thread_name_prefix="decode")

    @property
    def train_count(self) -> int:
        """Images of the training part; see `ImageSource`."""
        return len(self._train)

    @property
    def held_out_count(self) -> int:
        """Images of the held-out part; see `ImageSource`."""
        return len(self._held_out)

    def coordinate_chunks(self) -> Iterable[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]:
        """Coordinates of the training part; see `ImageSource`."""
        return [(self._samples.latitude_deg[self._train], self._samples.longitude_deg[self._train])]

    def train_batch(self, step: int, batch_size: int, rows: slice | None = None) -> Batch:
        """The training batch of a step; see `ImageSource`.

        What was skipped in an epoch is logged when its last batch has been read.

        Raises:
            ConfigurationError: Far too many of the images read so far cannot be used; `check_unusable_count` is exact.
        """
        positions = np.arange(step * batch_size, (step + 1) * batch_size)[rows or slice(None)]
        chosen = self._rows(positions)
        pixels = self._load_training(chosen)
        unusable = np.array([image is None for image in pixels], np.bool_)
        self._unusable_of_epoch.update((positions[unusable] // self.train_count).tolist())
        attempt = 0
        while empty := [row for row, image in enumerate(pixels) if image is None]:
            if attempt == _MAX_REPLACEMENTS:
                raise ConfigurationError(
                    f"training images: one cannot be used, and {attempt} others that were to stand in for it cannot be "
                    f"used either ({self._bad.reasons}). For example {self._bad.examples}"
                )
            chosen[empty] = [self._replacement(int(positions[row]), attempt) for row in empty]
            for row, image in zip(empty, self._load_training(chosen[empty]), strict=True):
                pixels[row] = image
            attempt += 1
        ended, rest = divmod((step + 1) * batch_size, self.train_count)
        if rest < batch_size:
            self._bad.report(f"epoch {ended} of the training images", whole=False)
        return self._batch(chosen, pixels)

    def train_numbers(self, step: int, batch_size: int, rows: slice | None = None) -> npt.NDArray[np.int64]:
        """Numbers of the images that `train_batch` gives for the same arguments; see `NumberedSource`."""
        positions = np.arange(step * batch_size, (step + 1) * batch_size)[rows or slice(None)]
        chosen = self._rows(positions)
        for attempt in range(_MAX_REPLACEMENTS):
            unusable = [place for place, row in enumerate(chosen.tolist()) if row in self._unusable]
            if not unusable:
                break
            chosen[unusable] = [self._replacement(int(positions[place]), attempt) for place in unusable]
        return np.searchsorted(self._train, chosen)

    def unusable_numbers(self) -> npt.NDArray[np.int64]:
        """Numbers of the images found unusable so far; see `NumberedSource`."""
        return np.searchsorted(self._train, np.array(sorted(self._unusable), np.int64))

    def skip(self, numbers: npt.NDArray[np.int64]) -> None:
        """Takes images for unusable; see `NumberedSource`."""
        self._skipped.update(self._train[numbers].tolist())
        self._unusable |= self._skipped

    def unusable_count(self, epoch: int) -> int:
        """Images of an epoch that this process has found unusable; see `NumberedSource`."""
        return self._unusable_of_epoch[epoch]

    def check_unusable_count(self, count: int) -> None:
        """Checks how many images of an epoch are unusable; see `NumberedSource`."""
        self._bad.check_all(count, self.train_count)

    def train_digest(self) -> str:
        """SHA-256 over names and coordinates, and no pixels, of the training part; see `NumberedSource`."""
        digest = hashlib.sha256()
        for start in range(0, self.train_count, _ROWS_AT_ONCE):
            rows = self._train[start : start + _ROWS_AT_ONCE]
            digest.update(json.dumps(self._samples.names.take(pa.array(rows)).to_pylist()).encode())
            for values in (self._samples.latitude_deg, self._samples.longitude_deg):
                digest.update(np.ascontiguousarray(values[rows], np.float64).tobytes())
        return digest.hexdigest()

    def held_out(self, count: int, seed: int, batch_size: int) -> Iterator[Batch]:
        """Batches of the held-out part, spot by spot in a random order; see `ImageSource`.

        Raises:
            ConfigurationError: Nothing is held out, or too many images cannot be used.
        """
        if len(self._held_out) == 0:
            raise ConfigurationError("no image is held out: raise `held_out_share` or add images")
        coordinates = self._samples.latitude_deg[self._held_out], self._samples.longitude_deg[self._held_out]
        order = self._held_out[order_by_spot(*coordinates, np.random.default_rng([seed, _HELD_OUT]))]
        bad = BadSamples("held-out images", self._max_bad_share)
        given = 0
        for batch in rebatch(self._good(order, batch_size, bad), count, batch_size):
            given += len(batch.pixels)
            yield batch
        if given == 0 < count:
            raise ConfigurationError(
                f"none of the {len(order)} held-out images can be used ({bad.reasons}). For example {bad.examples}"
            )
        bad.report("held-out part", whole=bad.seen >= len(order))

    def _order_of_epoch(self, epoch: int) -> npt.NDArray[np.int64]:
        return np.random.default_rng([self._seed, _ORDER, epoch]).permutation(self._train)

    def _rows(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        epochs, offsets = np.divmod(positions, self.train_count)
        rows = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = self._order(int(epoch))[offsets[here]]
        return rows

    def _replacement(self, position: int, attempt: int) -> int:
        rng = np.random.default_rng([self._seed, _REPLACEMENT, position, attempt])
        return int(self._train[rng.integers(self.train_count)])

    def _good(self, order: npt.NDArray[np.int64], batch_size: int, bad: BadSamples) -> Iterator[Batch]:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            pixels = self._load(rows, bad)
            if any(image is not None for image in pixels):
                yield self._batch(rows[[image is not None for image in pixels]], pixels)

    def _batch(self, rows: npt.NDArray[np.int64], pixels: list[npt.NDArray[np.uint8] | None]) -> Batch:
        stacked = torch.from_numpy(np.stack([image for image in pixels if image is not None]))
        return Batch(stacked, self._samples.latitude_deg[rows], self._samples.longitude_deg[rows])

    def _load_training(self, rows: npt.NDArray[np.int64]) -> list[npt.NDArray[np.uint8] | None]:
        """Loads training images, keeps in mind which could not be used, and leaves out those that are skipped."""
        wanted = np.array([row not in self._skipped for row in rows.tolist()], np.bool_)
        loaded = iter(self._load(rows[wanted], self._bad))
        pixels = [next(loaded) if is_wanted else None for is_wanted in wanted]
        for row, image in zip(rows.tolist(), pixels, strict=True):
            if image is None:
                self._unusable.add(row)
            else:
                self._unusable.discard(row)
        return pixels

    def _load(self, rows: npt.NDArray[np.int64], bad: BadSamples) -> list[npt.NDArray[np.uint8] | None]:
        loaded = list(self._pool.map(partial(self._samples.pixels, decode=self._decode), rows.tolist()))
        failed = ((row, reason) for row, reason in zip(rows.tolist(), loaded, strict=True) if isinstance(reason, str))
        bad.count(len(rows), ((reason, self._samples.names[row].as_py()) for row, reason in failed))
        return [None if isinstance(image, str) else image for image in loaded]


def _unit_hash(spot: int) -> float:
    """A number in [0, 1) that depends on the spot alone."""
    return (
        int.from_bytes(hashlib.blake2b(spot.to_bytes(8, "big", signed=True), digest_size=8).digest(), "big") / 2.0**64
    )
