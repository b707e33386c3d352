"""Rows of small trees of cells, and what damages their files."""

from __future__ import annotations

from pathlib import Path

import h3
import lmdb
import numpy as np

from geosurge.cells import CellRows

LEVEL_COUNTS = (7, 16, 40, 90)


def entity_rows() -> list[CellRows]:
    def level(tokens: list[str], parents: list[int]) -> CellRows:
        n = len(tokens)
        return CellRows(
            tokens=tokens,
            parents=np.array(parents),
            mean_latitude_deg=np.linspace(-20, 20, n),
            mean_longitude_deg=np.linspace(10, 30, n),
            spread_km=np.full(n, 5.0),
            area_km2=np.full(n, 100.0),
            sample_counts=np.full(n, 60),
            outlines=[np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0]])] * n,
        )

    return [
        level(["CI", "NA"], [-1, -1]),
        level(["CI/Bélier", "NA/Khomas", "NA/Khomas Region"], [0, 1, 1]),
        level(["CI/Bélier/Yamoussoukro", "NA/Khomas/Windhoek", "NA/Khomas Region/Ω"], [0, 1, 2]),
    ]


def hexagon_rows() -> list[CellRows]:
    """A cell of H3 resolution 2 around Paris and its children, of which one is not split and one is split."""
    parent = h3.latlng_to_cell(48.85, 2.35, 2)
    children = sorted(h3.cell_to_children(parent, 3))
    leaves = [*children[:3], *sorted(h3.cell_to_children(children[3], 4))]
    return [
        CellRows(
            tokens=tokens,
            parents=np.array(parents),
            outlines=[np.array(h3.cell_to_boundary(token)) for token in tokens],
            h3_resolutions=np.array([h3.get_resolution(token) for token in tokens]),
            **{
                name: np.ones(len(tokens))
                for name in ("mean_latitude_deg", "mean_longitude_deg", "spread_km", "area_km2", "sample_counts")
            },
        )
        for tokens, parents in (([parent], [-1]), (children[:4], [0] * 4), (leaves, [0, 1, 2, *[3] * 7]))
    ]


def rewrite(path: Path, table: bytes, key: bytes, value: bytes | None) -> None:
    with (
        lmdb.open(str(path), max_dbs=3, lock=False, map_size=1 << 24) as environment,
        environment.begin(write=True) as transaction,
    ):
        database = environment.open_db(table, txn=transaction, create=False)
        if value is None:
            transaction.delete(key, db=database)
        else:
            transaction.put(key, value, db=database)
