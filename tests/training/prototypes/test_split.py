from __future__ import annotations

import numpy as np
import pytest

from geosurge.errors import ConfigurationError
from geosurge_training.prototypes.encoding import EncodedPictures
from geosurge_training.prototypes.split import split_pictures


def encoded_at(coordinates: np.ndarray) -> EncodedPictures:
    return EncodedPictures(np.zeros((len(coordinates), 4), np.float32), coordinates)


def test_parts_are_disjoint_and_no_spot_is_in_two() -> None:
    rng = np.random.default_rng(0)
    spots = np.stack([rng.uniform(-60, 60, 800), rng.uniform(-170, 170, 800)], axis=1)
    at = rng.integers(0, 800, 3000)
    coordinates = np.round(spots[at], 2) + rng.uniform(-4e-3, 4e-3, (3000, 2))
    coordinates[::50] = np.nan
    parts = split_pictures(encoded_at(coordinates), seed=1)
    rows = np.concatenate([parts.means, parts.fitting, parts.calibration])
    assert sorted(rows.tolist()) == [row for row in range(3000) if row % 50]
    assert 150 < len(parts.fitting) < 450
    taken = [set(at[part].tolist()) for part in (parts.means, parts.fitting, parts.calibration)]
    assert not taken[0] & taken[1]
    assert not (taken[0] | taken[1]) & taken[2]


def test_parts_and_held_out_images_have_the_same_spots() -> None:
    northward = np.arange(-75.0, 75.0, 0.05)
    sides = [np.stack([northward, np.full_like(northward, side)], axis=1) for side in (-179.999, 179.999)]
    parts = split_pictures(encoded_at(np.concatenate(sides)), seed=1)
    spots = [set((part % len(northward)).tolist()) for part in (parts.means, parts.fitting, parts.calibration)]
    assert sum(map(len, spots)) == len(northward)


def test_calibration_pictures_stand_in_a_random_order_spot_by_spot() -> None:
    # An archive that is sorted by trip: places that follow each other.
    latitude_deg = np.repeat(np.linspace(-60, 60, 1500), 4)
    parts = split_pictures(encoded_at(np.stack([latitude_deg, np.zeros(6000)], axis=1)), seed=1)
    spots = latitude_deg[parts.calibration].reshape(-1, 4)
    assert (spots == spots[:, :1]).all()
    assert abs(np.corrcoef(spots[:, 0], np.arange(len(spots)))[0, 1]) < 0.4
    assert (np.diff(parts.means) > 0).all()
    assert (np.diff(parts.fitting) > 0).all()


def test_held_out_parts_stop_growing_and_too_few_pictures_are_an_error() -> None:
    rng = np.random.default_rng(0)
    many = rng.uniform(-60, 60, (200_000, 2))
    assert 4500 < len(split_pictures(encoded_at(many), seed=1).fitting) < 5500
    with pytest.raises(ConfigurationError, match="200 usable pictures"):
        split_pictures(encoded_at(many[:200]), seed=1)
