"""Pictures whose coordinates are known: one's own CSV file, and the metadata of the published benchmarks.

| benchmark | images | metadata | columns |
|---|---|---|---|
| Im2GPS | 237 | github.com/TIBHannover/GeoEstimation, meta/im2gps_places365.csv | IMG_ID, LAT, LON |
| Im2GPS3k | 2,997 | the same (branch original_tf), meta/im2gps3k_places365.csv | IMG_ID, LAT, LON |
| YFCC4k | 4,536 | huggingface.co/Jia-py/G3-checkpoint, yfcc4k_places365.csv | IMG_ID, LAT, LON |
| | | or 0aaaa.r.imagedata.txt, which github.com/lugiavn/revisiting-im2gps links | no header: path, lat, lon |
| YFCC26k | 25,600 | GeoEstimation's release "pytorch", yfcc25600_places365.csv | IMG_ID, LAT, LON |
| GWS15k | 14,955 | github.com/dshatwell23/gtloc, metadata/gws15k.csv (no images: Google's licence) | path, lat, lon |
| OpenStreetView-5M, test | 210,122 | huggingface.co/datasets/osv5m/osv5m, test.csv | id, latitude, longitude |

The first published version of Im2GPS3k's file has latitudes under the heading LON and longitudes under LAT; a file
whose LAT leaves [-90, 90] while its LON does not is read the other way round.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from geosurge.errors import ConfigurationError
from geosurge_training.data.image_table import FLAWS, ImageTable, read_image_list, read_image_table

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Benchmark:
    """Published metadata of a benchmark; the module says where.

    Attributes:
        name: What the command line calls it.
        title: What papers call it.
        count: Images that it has.
        columns: Headings of the image, the latitude and the longitude.
        suffix: What an image's file name has that its entry lacks.
        has_headerless_list: It is also published as lines of path, latitude and longitude between blanks.
    """

    name: str
    title: str
    count: int
    columns: tuple[str, str, str] = ("IMG_ID", "LAT", "LON")
    suffix: str = ""
    has_headerless_list: bool = False


BENCHMARKS: Final = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("im2gps", "Im2GPS", 237),
        Benchmark("im2gps3k", "Im2GPS3k", 2_997),
        Benchmark("yfcc4k", "YFCC4k", 4_536, has_headerless_list=True),
        Benchmark("yfcc26k", "YFCC26k", 25_600),
        Benchmark("gws15k", "GWS15k", 14_955, ("path", "lat", "lon")),
        Benchmark("osv5m", "OpenStreetView-5M", 210_122, ("id", "latitude", "longitude"), suffix=".jpg"),
    )
}


@dataclass(frozen=True)
class Dataset:
    """n pictures and where they were taken.

    Attributes:
        title: What to call it.
        images: The n files; one that is missing is an input that fails, not an error.
        latitude_deg: (n,) float64.
        longitude_deg: (n,) float64.
        benchmark: The published benchmark that it is, if any.
    """

    title: str
    images: list[Path]
    latitude_deg: NDArray[np.float64]
    longitude_deg: NDArray[np.float64]
    benchmark: Benchmark | None = None


def open_dataset(csv_path: Path, images: Path | None = None, benchmark: str | None = None) -> Dataset:
    """Reads which pictures there are and where they were taken.

    Args:
        csv_path: CSV or Parquet with known headings (`geosurge_training.data.image_table`), or the metadata of a
            benchmark.
        images: Folder that relative paths start from; default the file's own. A benchmark's images are also found by
            their names in any folder below, as its archives unpack them.
        benchmark: Name in `BENCHMARKS`; with none, any number of rows will do.

    Raises:
        ConfigurationError: The file cannot be used, or is not the benchmark's: it has another number of rows.
    """
    folder = images or csv_path.parent
    if benchmark is None:
        names, latitude_deg, longitude_deg = _whole(read_image_table(csv_path))
        return Dataset(str(csv_path), [folder / name for name in names], latitude_deg, longitude_deg)
    if benchmark not in BENCHMARKS:
        raise ConfigurationError(f"there is no benchmark {benchmark!r}; there are {', '.join(BENCHMARKS)}")
    known = BENCHMARKS[benchmark]
    is_list = known.has_headerless_list and csv_path.suffix == ".txt"
    table = read_image_list(csv_path) if is_list else read_image_table(csv_path, known.columns)
    names, latitude_deg, longitude_deg = _whole(_right_way_round(table))
    if len(names) != known.count:
        raise ConfigurationError(
            f"{csv_path} has {len(names):,} rows, but {known.title} has {known.count:,}: figures on another file are "
            "not comparable with published ones. Get the published file, or leave out --benchmark and give the rows "
            "that you have as path, latitude_deg, longitude_deg"
        )
    return Dataset(
        known.title, find_images(folder, [name + known.suffix for name in names]), latitude_deg, longitude_deg, known
    )


def find_images(folder: Path, names: list[str]) -> list[Path]:
    """Files of a benchmark's images.

    Args:
        folder: Folder of the images.
        names: Relative paths, as the metadata names them.

    Returns:
        For each the file of this path; where there is none, the only file in any folder below with the same name, or
        with the same name before its extension; where there is none or several, the path that is missing.
    """
    files = [folder / name for name in names]
    missing = [row for row, file in enumerate(files) if not file.is_file()]
    if not missing:
        return files
    below: dict[str, Path | None] = {}
    for file in folder.rglob("*"):
        if file.is_file():
            for key in {file.name, file.stem}:
                below[key] = None if key in below else file
    for row in missing:
        files[row] = below.get(files[row].name) or below.get(files[row].stem) or files[row]
    return files


def _right_way_round(table: ImageTable) -> ImageTable:
    latitude_deg, longitude_deg = table.latitude_deg, table.longitude_deg
    if not (np.abs(latitude_deg) > 90.0).any() or (np.abs(longitude_deg) > 90.0).any():
        return table
    _LOGGER.warning("%s has latitudes and longitudes under each other's headings; they are read so", table.path)
    return replace(table, latitude_deg=longitude_deg, longitude_deg=latitude_deg)


def _whole(table: ImageTable) -> tuple[list[str], NDArray[np.float64], NDArray[np.float64]]:
    """What a table says, if it does so in every row: figures on some of the images are not figures on all of them."""
    flaws = table.flaws()
    wrong = np.flatnonzero(flaws)
    if len(wrong):
        raise ConfigurationError(f"{table.path}, {table.describe(wrong[0])}: {FLAWS[flaws[wrong[0]]]}")
    return table.names.to_pylist(), table.latitude_deg, table.longitude_deg
