from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.clients import MAX_IMAGE_BYTES, without_timings
from support.servers import encoded_image

from geosurge.client import Client
from geosurge.errors import (
    GeoSurgeError,
    ImageEmptyError,
    ImageFormatUnsupportedError,
    ImageNotDecodableError,
    ImageTooLargeError,
    InputNotReadableError,
    MessageTooLargeError,
)
from geosurge.locator import Locator


def test_a_path_bytes_an_array_and_a_picture_get_one_answer(client: Client, bundle: Path, tmp_path: Path) -> None:
    data = encoded_image(1)
    path = tmp_path / "view.png"
    path.write_bytes(data)
    picture = Image.open(path)
    with Locator.open(bundle) as locator:
        expected = without_timings(locator.locate([data])[0])
    for image in (path, str(path), data, np.asarray(picture), picture):
        assert without_timings(client.locate(image)) == expected


def test_a_rotated_picture_is_sent_upright(client: Client, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "rotated.jpg"
    Image.fromarray(np.arange(40 * 48 * 3, dtype=np.uint8).reshape(40, 48, 3)).save(path, exif=exif, quality=100)
    with Image.open(path) as picture:
        sent = client.locate(picture)
    assert without_timings(sent).path[-1].token == client.locate(path).path[-1].token
    assert sent.probability == pytest.approx(client.locate(path).probability, rel=1e-6)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (b"", ImageEmptyError),
        (b"no image", ImageNotDecodableError),
        (encoded_image(1) + bytes(MAX_IMAGE_BYTES), ImageTooLargeError),
        (bytes(3_000_000), MessageTooLargeError),
        ("missing.jpg", InputNotReadableError),
        (Path(__file__).parent, InputNotReadableError),
        ("nul\x00byte.jpg", InputNotReadableError),
        (np.zeros((4, 4), np.uint8), ImageFormatUnsupportedError),
        (np.zeros((4, 4, 3)), ImageFormatUnsupportedError),
        (np.zeros((0, 4, 3), np.uint8), ImageFormatUnsupportedError),
        (3, ImageFormatUnsupportedError),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else type(value).__name__,
)
def test_an_image_that_cannot_be_used_raises_the_class_that_says_why(
    client: Client, image: Any, expected: type[GeoSurgeError]
) -> None:
    with pytest.raises(expected) as caught:
        client.locate(image)
    assert type(caught.value) is expected
