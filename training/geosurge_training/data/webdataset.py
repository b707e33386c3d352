"""Images in tar shards as WebDataset writes them, with coordinates from their JSON or from a table.

Images are read where they lie, in an order that depends on the seed alone: exact, and without a buffer to shuffle in,
but every image is a read of its own, which wants a disk that is quick at that.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from geosurge.errors import ConfigurationError
from geosurge_training.data.bad_samples import BadSamples
from geosurge_training.data.image_table import ImageTable, read_image_table
from geosurge_training.data.shard_index import ShardIndex, open_index
from geosurge_training.data.stored_images import StoredSamples

_LOGGER = logging.getLogger(__name__)


def open_webdataset(
    patterns: Sequence[str],
    index_file: Path,
    *,
    coordinates: Path | None = None,
    columns: Sequence[str] | None = None,
    json_fields: tuple[str, str] = ("latitude", "longitude"),
    max_bad_share: float = 0.01,
) -> StoredSamples:
    """Finds the images of shards.

    Args:
        patterns: The shards; see `expand_shards`.
        index_file: Where the index of the shards is kept, which takes a while to make.
        coordinates: Table of keys and coordinates; the samples that it names are the ones that are used. Without one
            they are in each sample's JSON.
        columns: Headings of the key, the latitude and the longitude, where they are none that are known.
        json_fields: Names of latitude and longitude in the JSON.
        max_bad_share: Share of samples without an image, and of samples or rows of the table without coordinates, above
            which it is an error.

    Returns:
        The images with coordinates, in their order in the shards; what they are called is their keys.

    Raises:
        ConfigurationError: A shard or the table cannot be used, they have nothing in common, or too many entries are
            bad.
    """
    index = open_index(index_file, expand_shards(patterns), None if coordinates else json_fields)
    index = index.take(_rows_with_image(index, patterns, max_bad_share))
    if coordinates is None:
        table = ImageTable(Path(patterns[0]), index.keys, index.latitude_deg, index.longitude_deg)
        rows = samples = table.good_rows(max_bad_share)
    else:
        table = read_image_table(coordinates, columns)
        rows = table.good_rows(max_bad_share)
        matches = match_keys(index.keys, table.names.take(pa.array(rows)))
        samples = np.flatnonzero(matches >= 0)
        if len(samples) == 0:
            raise ConfigurationError(
                f"{coordinates} names no sample of the shards: it has {table.names[:3].to_pylist()}, and they have "
                f"{index.keys[:3].to_pylist()}"
            )
        rows = rows[matches[samples]]
        _LOGGER.info("%s names %d of the %d samples of the shards", coordinates, len(samples), len(index.keys))
    index = index.take(samples)
    return StoredSamples(index.keys, table.latitude_deg[rows], table.longitude_deg[rows], index.read)


def _rows_with_image(index: ShardIndex, patterns: Sequence[str], max_bad_share: float) -> npt.NDArray[np.int64]:
    has_image = index.has_image
    bad = BadSamples(f"samples of {', '.join(patterns)}", max_bad_share)
    bad.count(len(has_image), (("no image", index.keys[row].as_py()) for row in np.flatnonzero(~has_image).tolist()))
    bad.report("as a whole")
    return np.flatnonzero(has_image)


def expand_shards(patterns: Iterable[str]) -> tuple[Path, ...]:
    """Files that patterns stand for.

    Args:
        patterns: Paths with `{000..127}` and `{a,b}` as in a shell, which name files that must be there, and with `*`,
            `?` and `[...]`, which stand for those that are.

    Returns:
        The files, in the order of the patterns; those of a `*` by name.

    Raises:
        ConfigurationError: A pattern stands for no file.
    """
    found: list[Path] = []
    for pattern in patterns:
        for name in _expand_braces(pattern):
            root = Path(Path(name).anchor)
            files = sorted(root.glob(str(Path(name).relative_to(root))))
            if not files:
                raise ConfigurationError(f"there is no shard {name}")
            found.extend(files)
    return tuple(found)


def match_keys(keys: pa.LargeStringArray, names: pa.LargeStringArray) -> npt.NDArray[np.int64]:
    """Rows of a table that belong to keys of shards.

    A name belongs to the key that it becomes without what follows the first dot of its last part; `/` counts as `_`,
    and folders before a key as nothing where the whole does not belong: MP-16's `ab/cd/12.jpg` is packed as `ab_cd_12`.

    Args:
        keys: n keys.
        names: Names in a table.

    Returns:
        (n,) row of the first name that belongs to each key; -1 where none does.
    """
    wanted = _flat(pc.replace_substring_regex(names, r"\.[^/]*$", ""))
    last_parts = pc.replace_substring_regex(keys, "^.*/", "")
    rows = pc.coalesce(pc.index_in(_flat(keys), value_set=wanted), pc.index_in(last_parts, value_set=wanted))
    return np.asarray(pc.fill_null(rows, -1), dtype=np.int64)


def _flat(names: pa.LargeStringArray) -> pa.LargeStringArray:
    return pc.replace_substring(names, "/", "_")


def _expand_braces(pattern: str) -> list[str]:
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if span is None:
        parts = match[1].split(",")
    else:
        parts = [f"{number:0{len(span[1])}d}" for number in range(int(span[1]), int(span[2]) + 1)]
    whole = [pattern[: match.start()] + part + pattern[match.end() :] for part in parts]
    return [name for part in whole for name in _expand_braces(part)]
