"""The subregion of each country: the 22 geographic regions of the United Nations' M49 standard.

Where M49 divides a sub-region further (Sub-Saharan Africa, Latin America and the Caribbean), its intermediate regions
are taken. Countries are ISO 3166-1 alpha-2 codes (unstats.un.org/unsd/methodology/m49/overview). Three codes that
occur in gazetteers have no subregion there, and are placed by this project: Antarctica (AQ) stands alone, Kosovo (XK)
is in Southern Europe, Taiwan (TW) in Eastern Asia.
"""

from __future__ import annotations

from typing import Final

COUNTRIES_BY_SUBREGION: Final = {
    "Northern Africa": "DZ EG EH LY MA SD TN",
    "Eastern Africa": "BI DJ ER ET IO KE KM MG MU MW MZ RE RW SC SO SS TF TZ UG YT ZM ZW",
    "Middle Africa": "AO CD CF CG CM GA GQ ST TD",
    "Southern Africa": "BW LS NA SZ ZA",
    "Western Africa": "BF BJ CI CV GH GM GN GW LR ML MR NE NG SH SL SN TG",
    "Caribbean": "AG AI AW BB BL BQ BS CU CW DM DO GD GP HT JM KN KY LC MF MQ MS PR SX TC TT VC VG VI",
    "Central America": "BZ CR GT HN MX NI PA SV",
    "South America": "AR BO BR BV CL CO EC FK GF GS GY PE PY SR UY VE",
    "Northern America": "BM CA GL PM US",
    "Central Asia": "KG KZ TJ TM UZ",
    "Eastern Asia": "CN HK JP KP KR MN MO TW",
    "South-eastern Asia": "BN ID KH LA MM MY PH SG TH TL VN",
    "Southern Asia": "AF BD BT IN IR LK MV NP PK",
    "Western Asia": "AE AM AZ BH CY GE IL IQ JO KW LB OM PS QA SA SY TR YE",
    "Eastern Europe": "BG BY CZ HU MD PL RO RU SK UA",
    "Northern Europe": "AX DK EE FI FO GB GG IE IM IS JE LT LV NO SE SJ",
    "Southern Europe": "AD AL BA ES GI GR HR IT ME MK MT PT RS SI SM VA XK",
    "Western Europe": "AT BE CH DE FR LI LU MC NL",
    "Australia and New Zealand": "AU CC CX HM NF NZ",
    "Melanesia": "FJ NC PG SB VU",
    "Micronesia": "FM GU KI MH MP NR PW UM",
    "Polynesia": "AS CK NU PF PN TK TO TV WF WS",
    "Antarctica": "AQ",
}
"""ISO 3166-1 alpha-2 codes by the name of their subregion."""

_SUBREGIONS: Final = {code: name for name, codes in COUNTRIES_BY_SUBREGION.items() for code in codes.split()}


def country_to_subregion(country_code: str) -> str:
    """Name of the subregion of a country, by its ISO 3166-1 alpha-2 code; empty for a code that is none."""
    return _SUBREGIONS.get(country_code, "")
