"""Reads the file of a partition, whatever its kind."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from geosurge.errors import ConfigurationError
from geosurge.grids import GRIDS
from geosurge_training.partitions.entities import EntityPartition
from geosurge_training.partitions.grid import GridPartition
from geosurge_training.partitions.interface import FORMAT_VERSION, Partition


def load_partition(path: Path) -> Partition:
    """Reads a partition that its `save` wrote.

    Args:
        path: File to read.

    Returns:
        The partition.

    Raises:
        ConfigurationError: The file is missing, damaged, of another format, or its levels are not nested.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            version = int(archive["format_version"])
            if version != FORMAT_VERSION:
                raise ConfigurationError(
                    f"{path} is a partition of format {version}; this version reads format {FORMAT_VERSION}: "
                    "compute the partition again"
                )
            kind = str(archive["cell_kind"]) if "cell_kind" in archive else "s2"
            level_count = int(archive["level_count"])
            for grid in GRIDS:
                if grid.cell_kind == kind:
                    return GridPartition.from_arrays(grid, level_count, archive)
            if kind != "entity":
                raise ConfigurationError(
                    f"{path} is a partition into cells of the kind {kind!r}, which this version does not know: "
                    "compute the partition again"
                )
            return EntityPartition.from_arrays(level_count, archive)
    except (OSError, KeyError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise ConfigurationError(f"{path} is not a readable partition ({error}): compute it again") from error
