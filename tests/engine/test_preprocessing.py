from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from geosurge.preprocessing import Preprocessing

SIDE = 32
CANONICAL = Preprocessing(SIDE)


def random_image(width: int, height: int, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def test_an_image_of_the_canonical_size_is_not_touched() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8))
    pixels = CANONICAL.apply(image)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert np.array_equal(pixels, np.asarray(image).transpose(2, 0, 1))


def bicubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' cubic convolution kernel with a = -1/2."""
    x = np.abs(x)
    inner = (1.5 * x - 2.5) * x * x + 1.0
    outer = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return np.where(x < 1.0, inner, np.where(x < 2.0, outer, 0.0))


def resampling_matrix(length: int, start: float, extent: float, size: int) -> NDArray[np.float64]:
    """(size, length) weights of an antialiased bicubic resize of a stretch of a line of pixels."""
    scale = extent / size
    centres = start + (np.arange(size) + 0.5) * scale
    distances = (np.arange(length) + 0.5)[None, :] - centres[:, None]
    weights = bicubic(distances / max(scale, 1.0))
    return weights / weights.sum(axis=1, keepdims=True)


def centre_square(image: Image.Image) -> NDArray[np.float64]:
    """(3, SIDE, SIDE) centre square of an image, in float64."""
    width, height = image.size
    shortest = min(width, height)
    across = resampling_matrix(width, (width - shortest) / 2, shortest, SIDE)
    down = resampling_matrix(height, (height - shortest) / 2, shortest, SIDE)
    channels = np.asarray(image, dtype=np.float64).transpose(2, 0, 1)
    return (down @ channels @ across.T).clip(0.0, 255.0)


@pytest.mark.parametrize("size", [(90, 60), (60, 90), (61, 40), (40, 61), (33, 32), (20, 24), (64, 64), (8, 500)])
def test_preprocessing_is_a_centre_crop_and_a_bicubic_resize(size: tuple[int, int]) -> None:
    image = random_image(*size)
    # Pillow rounds to whole levels after each of the two directions.
    np.testing.assert_allclose(CANONICAL.apply(image), centre_square(image), atol=2.0)


def test_a_large_image_is_shrunk_all_but_exactly() -> None:
    image = random_image(1200, 800)
    np.testing.assert_allclose(CANONICAL.apply(image), centre_square(image), atol=3.0)


def test_what_is_cut_off_does_not_matter_beyond_the_filters_reach() -> None:
    canvas = np.zeros((50, 150, 3), np.uint8)
    reach = 4
    canvas[:, 50 - reach : 100 + reach] = 200
    assert (CANONICAL.apply(Image.fromarray(canvas)) == 200).all()


def test_the_upper_left_corner_stays_there() -> None:
    canvas = np.zeros((80, 120, 3), np.uint8)
    canvas[:40, 20:60, 0] = 255
    pixels = CANONICAL.apply(Image.fromarray(canvas))
    means = pixels[0].reshape(2, SIDE // 2, 2, SIDE // 2).mean(axis=(1, 3))
    assert means[0, 0] > 240
    assert max(means[0, 1], means[1, 0], means[1, 1]) < 10
    assert not pixels[1:].any()


def test_preprocessing_in_threads_gives_what_it_gives_in_turn() -> None:
    images = [random_image(40 + 7 * number, 90 - 3 * number, number) for number in range(16)]
    in_turn = [CANONICAL.apply(image) for image in images]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for one, other in zip(in_turn, pool.map(CANONICAL.apply, images), strict=True):
                assert np.array_equal(one, other)


def jpeg(image: Image.Image, file_format: str = "JPEG") -> bytes:
    content = io.BytesIO()
    image.save(content, file_format, quality=92)
    return content.getvalue()


def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size_and_looks_nearly_the_same() -> None:
    image = random_image(1200, 800)
    fully = Preprocessing(SIDE, jpeg_draft=False)
    draft, full = (way.decode(jpeg(image)).astype(int) for way in (CANONICAL, fully))
    assert 0 < np.abs(draft - full).mean() < 1
    assert np.array_equal(full, fully.apply(Image.open(io.BytesIO(jpeg(image)))))
    assert fully.id != CANONICAL.id


@pytest.mark.parametrize(("size", "file_format"), [((1200, 800), "PNG"), ((4 * SIDE - 1, 400), "JPEG")])
def test_other_formats_and_small_pictures_are_decoded_in_full(size: tuple[int, int], file_format: str) -> None:
    data = jpeg(random_image(*size), file_format)
    assert np.array_equal(CANONICAL.decode(data), Preprocessing(SIDE, jpeg_draft=False).decode(data))


def test_another_size_or_way_has_another_name() -> None:
    ways = [Preprocessing(32), Preprocessing(48), Preprocessing(32, jpeg_draft=False)]
    assert len({way.id for way in ways}) == len(ways)


def test_one_crop_is_the_canonical_square() -> None:
    for size in ((90, 60), (SIDE, SIDE)):
        assert np.array_equal(CANONICAL.crops(random_image(*size), 1), CANONICAL.apply(random_image(*size))[None])


@pytest.mark.parametrize("size", [(96, 64), (64, 96), (64, 64), (SIDE, SIDE)])
def test_five_crops_are_the_corners_and_the_centre(size: tuple[int, int]) -> None:
    image, (width, height) = random_image(*size), size
    side = min(size) * 7 // 8
    crops = CANONICAL.crops(image, 5)
    starts = [(0, 0), (width - side, 0), (0, height - side), (width - side, height - side)]
    for crop, (left, top) in zip(crops, [*starts, ((width - side) // 2, (height - side) // 2)], strict=True):
        cut = image.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        # What lies around a crop takes part in it at its edges.
        inner = np.s_[:, 4:-4, 4:-4]
        assert np.abs(crop[inner].astype(int) - np.asarray(cut).transpose(2, 0, 1)[inner]).max() <= 2


def test_ten_crops_are_five_and_their_mirror_images() -> None:
    image = random_image(90, 60)
    ten = CANONICAL.crops(image, 10)
    assert np.array_equal(ten[:5], CANONICAL.crops(image, 5))
    for crop, mirrored in zip(ten[:5], ten[5:], strict=True):
        assert np.array_equal(mirrored, np.flip(crop, axis=2))


def test_crops_are_decoded_as_one_is() -> None:
    data = io.BytesIO()
    random_image(300, 260).save(data, "JPEG")
    assert np.array_equal(CANONICAL.decode_crops(data.getvalue(), 1), CANONICAL.decode(data.getvalue())[None])
    assert CANONICAL.decode_crops(data.getvalue(), 10).shape == (10, 3, SIDE, SIDE)


def test_crops_are_drafted_at_twice_their_own_size_and_not_that_of_the_whole() -> None:
    # At half of its size the whole is twice as long as the square, and a crop of seven eighths is not.
    data = jpeg(Image.fromarray(np.random.default_rng(0).integers(0, 256, (4 * SIDE, 4 * SIDE, 3), np.uint8)))
    fully = Preprocessing(SIDE, jpeg_draft=False)
    assert not np.array_equal(CANONICAL.decode(data), fully.decode(data))
    assert np.array_equal(CANONICAL.decode_crops(data, 5), fully.decode_crops(data, 5))
