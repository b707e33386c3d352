"""The data source that a recipe asks for."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from geosurge.encoder import ImageEncoder
from geosurge.errors import ConfigurationError
from geosurge_training.data.bad_samples import BadSamples
from geosurge_training.data.blue_marble import BlueMarble
from geosurge_training.data.image_table import open_table, read_image_table
from geosurge_training.data.shard_index import SHARD_INDEX_FILE
from geosurge_training.data.source import ImageSource
from geosurge_training.data.stored_images import StoredImages, StoredSamples, held_out_by_spot
from geosurge_training.data.webdataset import match_keys, open_webdataset
from geosurge_training.recipe import BlueMarbleData, Recipe, StoredData, TableData, WebDatasetData

_LOGGER = logging.getLogger(__name__)


def open_source(recipe: Recipe, encoder: ImageEncoder, run: Path) -> ImageSource:
    """Opens the data source of a recipe.

    Args:
        recipe: The recipe.
        encoder: The encoder that the images are prepared for.
        run: Directory of the run, where an index of shards is kept.

    Returns:
        The source.

    Raises:
        ConfigurationError: Its files or packages are not at hand, or too many of its rows, or of the names in its table
            of held-out images, are bad.
    """
    data = recipe.data
    if isinstance(data, BlueMarbleData):
        return BlueMarble(encoder.image_size, seed=recipe.seed, partition_samples=data.partition_samples)
    samples = _stored_samples(data, run)
    return StoredImages(
        samples,
        _held_out(samples, data),
        decode=encoder.preprocessing.decode,
        seed=recipe.seed,
        max_bad_share=data.max_bad_share,
    )


def _stored_samples(data: TableData | WebDatasetData, run: Path) -> StoredSamples:
    if isinstance(data, TableData):
        return open_table(data.table, data.images, data.columns, data.max_bad_share)
    return open_webdataset(
        data.shard_patterns,
        run / SHARD_INDEX_FILE,
        coordinates=data.coordinates,
        columns=data.columns,
        json_fields=(data.latitude_field, data.longitude_field),
        max_bad_share=data.max_bad_share,
    )


def _held_out(samples: StoredSamples, data: StoredData) -> npt.NDArray[np.bool_]:
    """(n,) whether each image is held out: by a table of names where there is one, else by a hash of their spots."""
    if data.held_out_table is None:
        return held_out_by_spot(samples.latitude_deg, samples.longitude_deg, data.held_out_share)
    names = samples.names
    named = pc.unique(read_image_table(data.held_out_table, data.columns).names)
    if isinstance(data, WebDatasetData):
        matches = match_keys(names, named)
    else:
        matches = np.asarray(pc.fill_null(pc.index_in(names, value_set=named), -1))
    held_out = matches >= 0
    if not held_out.any():
        raise ConfigurationError(
            f"{data.held_out_table} names no image that there is: it has {named[:3].to_pylist()}, and the images "
            f"are called {names[:3].to_pylist()}"
        )
    missing = np.setdiff1d(np.arange(len(named)), matches)
    _LOGGER.info(
        "%s names %d images, and %d of them are there", data.held_out_table, len(named), len(named) - len(missing)
    )
    bad = BadSamples(f"names in {data.held_out_table}", data.max_bad_share)
    bad.count(len(named), (("no such image", named[row].as_py()) for row in missing.tolist()))
    bad.report("as a whole")
    return held_out
