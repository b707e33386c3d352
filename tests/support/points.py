"""Points all over the Earth."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from geosurge.geodesy import Float64Array

latitudes = st.floats(-90.0, 90.0)
longitudes = st.floats(-180.0, 180.0)


def random_points(count: int, seed: int = 0) -> tuple[Float64Array, Float64Array]:
    rng = np.random.default_rng(seed)
    return np.degrees(np.arcsin(rng.uniform(-1.0, 1.0, count))), rng.uniform(-180.0, 180.0, count)
