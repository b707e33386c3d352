"""What the pictures of an index are for: most make the cells, some fit what is fitted, some calibrate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from geosurge.errors import ConfigurationError
from geosurge_training.data.spots import order_by_spot, spots_of
from geosurge_training.prototypes.encoding import EncodedPictures
from geosurge_training.prototypes.shrinkage import MIN_FITTING_PICTURES

_HELD_OUT_SHARE: Final = 0.1
_MAX_HELD_OUT: Final = 5000


@dataclass(frozen=True)
class PictureSplit:
    """Rows of pictures; no spot has pictures in two parts.

    Attributes:
        means: Make the cells and their prototypes; ascending.
        fitting: Fit the strength and the temperatures; ascending.
        calibration: Calibrate; spot by spot in a random order, so that the first of them are no other places than the
            last.
    """

    means: npt.NDArray[np.int64]
    fitting: npt.NDArray[np.int64]
    calibration: npt.NDArray[np.int64]


def split_pictures(encoded: EncodedPictures, seed: int) -> PictureSplit:
    """Splits the usable pictures at random; about a tenth, or about 5,000 if that is less, for each smaller part.

    Pictures of one spot (`spots_of`) stay together: a burst of the same view in two parts would have the fit trust the
    prototypes too much.

    Args:
        encoded: The pictures.
        seed: Seed of the split.

    Raises:
        ConfigurationError: There are too few pictures.
    """
    rows = encoded.usable
    share = min(_HELD_OUT_SHARE, _MAX_HELD_OUT / max(1, len(rows)))
    latitude_deg, longitude_deg = encoded.coordinates[rows].T
    _, spot = np.unique(spots_of(latitude_deg, longitude_deg), return_inverse=True)
    rng = np.random.default_rng(seed)
    draws = rng.random(spot.max(initial=-1) + 1)[spot]
    calibrates = (draws >= share) & (draws < 2 * share)
    order = order_by_spot(latitude_deg[calibrates], longitude_deg[calibrates], rng)
    parts = PictureSplit(rows[draws >= 2 * share], rows[draws < share], rows[calibrates][order])
    if min(len(parts.fitting), len(parts.calibration)) < MIN_FITTING_PICTURES:
        raise ConfigurationError(
            f"{len(rows)} usable pictures leave {len(parts.fitting)} to fit and {len(parts.calibration)} to calibrate "
            f"on, and {MIN_FITTING_PICTURES} of each are the least: give some {12 * MIN_FITTING_PICTURES} pictures of "
            "different spots or more"
        )
    return parts
