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

import csv
import logging
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TextIO

import numpy as np
from numpy.typing import NDArray

from geosurge.errors import ConfigurationError
from geosurge_training.csv_images import read_image_table

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
        csv_path: CSV file with `path`, `latitude_deg`, `longitude_deg`, or the metadata of a benchmark.
        images: Folder that relative paths start from; default the file's own. A benchmark's images are also found by
            their names in any folder below, as its archives unpack them.
        benchmark: Name in `BENCHMARKS`; none reads the columns above.

    Raises:
        ConfigurationError: The file cannot be used, or is not the benchmark's: it has another number of rows.
    """
    folder = images or csv_path.parent
    if benchmark is None:
        paths, latitude_deg, longitude_deg = read_image_table(csv_path)
        return Dataset(str(csv_path), [folder / path for path in paths], latitude_deg, longitude_deg)
    if benchmark not in BENCHMARKS:
        raise ConfigurationError(f"there is no benchmark {benchmark!r}; there are {', '.join(BENCHMARKS)}")
    known = BENCHMARKS[benchmark]
    names, latitude_deg, longitude_deg = _read_metadata(csv_path, known)
    if len(names) != known.count:
        raise ConfigurationError(
            f"{csv_path} has {len(names):,} rows, but {known.title} has {known.count:,}: figures on another file are "
            "not comparable with published ones. Get the published file, or leave out --benchmark and give the rows "
            "that you have as path, latitude_deg, longitude_deg"
        )
    return Dataset(known.title, find_images(folder, names), latitude_deg, longitude_deg, known)


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


def _read_metadata(path: Path, benchmark: Benchmark) -> tuple[list[str], NDArray[np.float64], NDArray[np.float64]]:
    names: list[str] = []
    latitudes, longitudes = array("d"), array("d")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            for line, (name, latitude, longitude) in _entries(path, file, benchmark):
                if not name:
                    raise ConfigurationError(f"{path}, line {line}: the image has no name")
                names.append(name + benchmark.suffix)
                try:
                    latitudes.append(float(latitude or ""))
                    longitudes.append(float(longitude or ""))
                except ValueError as error:
                    raise ConfigurationError(f"{path}, line {line}: a coordinate is not a number: {error}") from error
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigurationError(f"{path} is not a CSV file in UTF-8: {error}") from error
    return names, *_on_the_globe(path, names, np.array(latitudes), np.array(longitudes))


def _entries(
    path: Path, file: TextIO, benchmark: Benchmark
) -> Iterator[tuple[int, tuple[str | None, str | None, str | None]]]:
    """Line number, image, latitude and longitude of each row."""
    if benchmark.has_headerless_list and path.suffix == ".txt":
        for number, line in enumerate(file, start=1):
            fields = line.split()
            if fields:
                name, latitude, longitude, *_ = [*fields, None, None]
                yield number, (name, latitude, longitude)
        return
    reader = csv.DictReader(file)
    missing = [column for column in benchmark.columns if column not in (reader.fieldnames or ())]
    if missing:
        raise ConfigurationError(
            f"{path} has no column {', '.join(missing)}; the metadata of {benchmark.title} has "
            f"{', '.join(benchmark.columns)}, and this file {', '.join(reader.fieldnames or ['nothing'])}"
        )
    image, latitude_column, longitude_column = benchmark.columns
    for row in reader:
        yield reader.line_num, (row[image], row[latitude_column], row[longitude_column])


def _on_the_globe(
    path: Path, names: list[str], latitude_deg: NDArray[np.float64], longitude_deg: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    # Written so that NaN is no latitude.
    if not (np.abs(latitude_deg) <= 90.0).all() and (np.abs(longitude_deg) <= 90.0).all():
        _LOGGER.warning("%s has latitudes and longitudes under each other's headings; they are read so", path)
        latitude_deg, longitude_deg = longitude_deg, latitude_deg
    bad = ~((np.abs(latitude_deg) <= 90.0) & (np.abs(longitude_deg) <= 180.0))
    if bad.any():
        row = int(np.argmax(bad))
        raise ConfigurationError(
            f"{path}: {names[row]} is at latitude {latitude_deg[row]}, longitude {longitude_deg[row]}, which is off "
            "the globe"
        )
    return latitude_deg, longitude_deg
